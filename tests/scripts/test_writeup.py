"""scripts/writeup.py renders what it is asked for, and what it cannot do it says in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from checkouts import changeable_checkout, content_of
from source_files import load_script, status_of
from step_records import record_of
from writeup_records import laptop_case, published_cpu, record_here

from cs336_systems.bench.records import Store

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("writeup")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return changeable_checkout(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--year", "2027"], "unknown year '2027': did you mean '2026'? Known: 2025, 2026"),
        (["--format", "docx"], "unknown format 'docx'"),
        (["--profile", "smok"], "unknown profile 'smok': did you mean 'smoke'"),
        (["--check"], "give --committed as well"),
        (["--font", "No Such Font", "--format", "pdf"], "no such font"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    output = tmp_path / "output"
    assert status_of(script, *arguments, "--output", output) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert told in shown.err
    assert shown.err.count("\n") == 1
    assert not output.exists()


def test_the_documents_that_were_written_are_named(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--format", "md", "html", "--output", tmp_path / "output") == 0
    assert capfd.readouterr().out.splitlines() == [
        str(tmp_path / "output" / f"writeup.{end}") for end in ("md", "html")
    ]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ([], "writeup/build"),
        (["--year", "2026"], "writeup/build/2026"),
        (["--profile", "smoke"], "writeup/build/smoke"),
    ],
)
def test_a_handouts_edition_and_the_smoke_profiles_lie_apart_from_the_whole(
    script: ModuleType, checkout: Path, arguments: list[str], place: str
) -> None:
    assert status_of(script, "--format", "md", *arguments) == 0
    assert [path.parent for path in checkout.rglob("build/**/writeup.md")] == [checkout / place]


def test_the_committed_edition_is_checked_written_and_then_up_to_date(
    script: ModuleType, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    orphans = [checkout / "writeup" / "figures" / "orphan.svg", checkout / "writeup" / "tables" / "orphan.md"]
    assert status_of(script, "--committed") == 0
    for path in orphans:
        path.write_text("shown no more")
    with (checkout / "writeup" / "writeup.md").open("a") as file:
        file.write("by hand\n")
    before = content_of(checkout / "writeup")
    capfd.readouterr()

    assert status_of(script, "--committed", "--check") == 1
    assert capfd.readouterr().out.splitlines() == [
        "writeup/figures/orphan.svg: out of date",
        "writeup/tables/orphan.md: out of date",
        "writeup/writeup.md: out of date",
    ]
    assert content_of(checkout / "writeup") == before

    assert status_of(script, "--committed") == 0
    assert not any(path.exists() for path in orphans)
    assert status_of(script, "--committed", "--check") == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--year", "2026"], "--year"),
        (["--format", "md"], "--format"),
        (["--font", "No Such Font"], "--font"),
        (["--profile", "laptop"], "--profile"),
        (["--output", "elsewhere"], "--output"),
        (["--data-dir", "elsewhere"], "--data-dir"),
        (["--published"], "--published"),
        (["--published", "--year", "2026", "--data-dir", "elsewhere"], "--year, --published, --data-dir"),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check"]])
def test_the_committed_edition_takes_no_other_option(
    script: ModuleType,
    checkout: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
    check: list[str],
) -> None:
    before = content_of(checkout / "writeup")
    assert status_of(script, "--committed", *arguments, *check) == 2
    shown = capfd.readouterr()
    assert shown.err == f"error: the committed edition is always the same: leave out {told}\n"
    assert shown.out == ""
    assert content_of(checkout / "writeup") == before


def test_this_checkouts_records_are_left_out_on_request(
    script: ModuleType, tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    record_here(store, [record_of(laptop_case())])
    for options, is_shown in (([], True), (["--published"], False)):
        output = tmp_path / "output" / str(is_shown)
        assert status_of(script, "--format", "md", "--output", output, "--data-dir", store.local, *options) == 0
        assert ("this checkout\n" in (output / "writeup.md").read_text()) == is_shown
    assert capfd.readouterr().err == ""


def test_records_without_their_machine_are_one_line_of_warning_and_the_rest_is_written(
    script: ModuleType, tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = record_here(store, [record_of(laptop_case())])
    (store.local / machine / "machine.json").unlink()
    output = tmp_path / "output"
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as outside of tests
        assert status_of(script, "--format", "md", "--output", output, "--data-dir", store.local) == 0
    shown = capfd.readouterr().err
    assert shown.startswith(f"warning: the records of {machine} are left out: cannot read ")
    assert shown.count("\n") == 1
    assert f"#### {published_cpu()}, published" in (output / "writeup.md").read_text()


def test_published_records_of_a_newer_workbook_are_one_line_that_names_file_and_line(
    script: ModuleType, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "data" / published_cpu() / "warmup.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "schema": 99})
    path.write_text("\n".join(lines) + "\n")
    before = content_of(checkout / "writeup")
    assert status_of(script, "--committed") == 2
    shown = capfd.readouterr().err
    assert f"data/{published_cpu()}/warmup.jsonl:2 has schema 99" in shown
    assert shown.count("\n") == 1
    assert content_of(checkout / "writeup") == before

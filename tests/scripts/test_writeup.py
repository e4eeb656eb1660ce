"""scripts/writeup.py renders what it is asked for, and what it cannot do it says in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from source_files import load_script, status_of

from cs336_systems.repository import repository_root

LINKED = ("cs336_systems", "scripts", "tests", "notebooks", "configs")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("writeup")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose documents and data can be changed; its code is this one's."""
    real, made = repository_root(), (tmp_path / "checkout").resolve()
    made.mkdir()
    for name in LINKED:
        (made / name).symlink_to(real / name)
    for name in ("problems.toml", "README.md"):
        shutil.copy(real / name, made)
    shutil.copytree(real / "writeup", made / "writeup", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(real / "data", made / "data", ignore=shutil.ignore_patterns("local"))
    monkeypatch.setenv("CS336_ROOT", str(made))
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--year", "2027"], "unknown year '2027'"),
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


def test_published_records_of_a_newer_workbook_are_one_line_that_names_file_and_line(
    script: ModuleType, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "data" / "epyc-turin-2c" / "warmup.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "schema": 99})
    path.write_text("\n".join(lines) + "\n")
    before = content_of(checkout / "writeup")
    assert status_of(script, "--committed") == 2
    shown = capfd.readouterr().err
    assert "data/epyc-turin-2c/warmup.jsonl:2 has schema 99" in shown
    assert shown.count("\n") == 1
    assert content_of(checkout / "writeup") == before

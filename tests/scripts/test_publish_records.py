"""scripts/publish_records.py merges chosen runs into the published files, the same bytes each time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from source_files import load_script, status_of

from cs336_systems.bench.machine import Machine
from cs336_systems.bench.records import Measurement, Record, Store, read_lines
from cs336_systems.repository import repository_root

SCRIPT = repository_root() / "scripts" / "publish_records.py"
TOY = Machine("toy-1c", "cpu", {"device_name": "Toy", "cores": 1})
OTHER = Machine("other-2c", "cpu", {"device_name": "Other", "cores": 2})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("publish_records")


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout, so that the published records of the real one are never written."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "problems.toml").write_text("[notebooks]\n[problems]\n")
    monkeypatch.setenv("CS336_ROOT", str(root))
    monkeypatch.delenv("CS336_DATA")
    return root


def measured(
    number: int, *, machine: Machine = TOY, experiment: str = "toy", value: float = 1.0, **context: Any
) -> str:
    """A local run with a record of case `number`; returns the run's name."""
    with Store.default().begin_run(machine, experiment, {"commit": "c0ffee", "dirty": False, **context}) as writer:
        writer.append(
            Record(
                experiment=experiment,
                machine=machine.name,
                run=writer.run,
                case={"number": number},
                status="ok",
                reason=None,
                measurement=Measurement({"toy_ms": [value]}),
                noise={"flags": []},
                fingerprint={"source": {}},
                finished_utc=f"2026-01-01T00:00:{value:09.6f}Z",
                seconds=0.5,
            )
        )
        return writer.run


def published(checkout: Path, machine: Machine = TOY, experiment: str = "toy") -> dict[int, float]:
    """Value by case number in a published file."""
    _, records = read_lines(checkout / "data" / machine.name / f"{experiment}.jsonl")
    return {record.case["number"]: record.measurement.samples["toy_ms"][0] for record in records}


# Publishing ----------------------------------------------------------------------------------------------------


def test_everything_is_published_where_nothing_is_named(script: ModuleType, checkout: Path) -> None:
    measured(1)
    measured(2)
    measured(3, experiment="other")
    measured(4, machine=OTHER)
    assert status_of(script) == 0
    assert published(checkout) == {1: 1.0, 2: 1.0}
    assert published(checkout, experiment="other") == {3: 1.0}
    assert published(checkout, machine=OTHER) == {4: 1.0}


def test_only_the_machine_experiment_and_run_that_are_named_are_published(script: ModuleType, checkout: Path) -> None:
    measured(1)
    chosen = measured(2)
    measured(3, experiment="other")
    measured(4, machine=OTHER)
    assert status_of(script, "--machine", TOY.name, "--experiment", "toy", "--run", chosen) == 0
    assert published(checkout) == {2: 1.0}
    files = {
        path.relative_to(checkout / "data") for path in (checkout / "data").glob("*/*") if "local" not in str(path)
    }
    assert files == {Path("toy-1c/toy.jsonl"), Path("toy-1c/machine.json")}


def test_publishing_twice_gives_the_same_bytes(script: ModuleType, checkout: Path) -> None:
    measured(2)
    measured(1)
    assert status_of(script) == 0
    files = {path: path.read_bytes() for path in (checkout / "data" / TOY.name).iterdir()}
    assert len(files) == 2
    assert status_of(script) == 0
    assert {path: path.read_bytes() for path in (checkout / "data" / TOY.name).iterdir()} == files


def test_publishing_run_by_run_gives_the_same_bytes_as_all_at_once(script: ModuleType, checkout: Path) -> None:
    runs = [measured(number, value=number) for number in (1, 2, 3)]
    assert status_of(script) == 0
    path = checkout / "data" / TOY.name / "toy.jsonl"
    at_once = path.read_bytes()
    path.unlink()
    for run in reversed(runs):
        assert status_of(script, "--machine", TOY.name, "--experiment", "toy", "--run", run) == 0
    assert path.read_bytes() == at_once


def test_of_a_case_the_newest_record_is_published_whether_local_or_published_before(
    script: ModuleType, checkout: Path
) -> None:
    old, new = measured(1, value=1.0), measured(1, value=2.0)
    for run in (new, old):
        assert status_of(script, "--machine", TOY.name, "--experiment", "toy", "--run", run) == 0
        assert published(checkout) == {1: 2.0}


def test_what_was_published_stays_when_the_local_records_are_gone(script: ModuleType, checkout: Path) -> None:
    first = measured(1)
    assert status_of(script) == 0
    (checkout / "data" / "local" / TOY.name / "toy" / f"{first}.jsonl").unlink()
    measured(2)
    assert status_of(script) == 0
    assert published(checkout) == {1: 1.0, 2: 1.0}


def test_records_kept_elsewhere_are_published_from_there(
    script: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "elsewhere"))
    measured(1)
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "nothing"))
    assert status_of(script, "--data-dir", str(tmp_path / "elsewhere")) == 0
    assert published(checkout) == {1: 1.0}


def test_the_published_files_and_their_counts_are_told(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    measured(1)
    measured(2)
    assert status_of(script) == 0
    assert capsys.readouterr().out == f"{Path('data', 'toy-1c', 'toy.jsonl')}: 2 cases\n"


@pytest.mark.parametrize(
    ("dirty", "told"), [(True, "changes that were not committed"), (None, "no commit that could be read")]
)
def test_a_run_from_changed_sources_is_published_and_told(
    script: ModuleType, capsys: pytest.CaptureFixture[str], dirty: bool | None, told: str
) -> None:
    run = measured(1, dirty=dirty)
    assert status_of(script) == 0
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert run in note
    assert told in note


# Looking -------------------------------------------------------------------------------------------------------


def test_the_list_names_machines_experiments_and_runs_and_publishes_nothing(
    script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sorted([measured(1), measured(2)])
    other = measured(3, machine=OTHER)
    assert status_of(script, "--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"other-2c toy: 1 cases, runs {other}",
        f"toy-1c toy: 2 cases, runs {', '.join(runs)}",
    ]
    assert [path.name for path in (checkout / "data").iterdir()] == ["local"]


def test_every_run_that_the_list_names_can_be_published_even_where_a_newer_one_has_the_same_case(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [measured(1, value=1.0), measured(1, value=2.0)]
    assert status_of(script, "--list") == 0
    text = capsys.readouterr().out
    assert [run for run in runs if run not in text] == []


# Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--machine", "toy"], "unknown machine 'toy': did you mean 'toy-1c'? Known: other-2c, toy-1c"),
        (["--experiment", "toyy"], "unknown experiment 'toyy' of other-2c, toy-1c: did you mean 'toy'? Known: toy"),
        (["--machine", "toy-1c", "--experiment", "toyy"], "unknown experiment 'toyy' of toy-1c"),
        (["--run", "2026"], "--run names runs of one --machine and one --experiment: give both"),
        (["--run", "2026", "--machine", "toy-1c"], "--run names runs of one --machine and one --experiment: give both"),
        (["--run", "2026", "--machine", "toy-1c", "--experiment", "toy"], "unknown run '2026' of toy on toy-1c"),
    ],
)
def test_a_mistake_is_one_line_that_lists_what_is_known_and_nothing_is_published(
    script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    measured(1)
    measured(1, machine=OTHER)
    assert status_of(script, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}")
    assert len(captured.err.splitlines()) == 1
    assert [path.name for path in (checkout / "data").iterdir()] == ["local"]


def test_an_experiment_that_only_one_machine_has_is_published_for_that_machine(
    script: ModuleType, checkout: Path
) -> None:
    measured(1, machine=OTHER)
    measured(2, experiment="rare")
    assert status_of(script, "--experiment", "rare") == 0
    assert published(checkout, experiment="rare") == {2: 1.0}


def test_without_records_the_error_says_what_makes_them(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script) == 2
    assert "measure first" in capsys.readouterr().err


def test_records_of_another_machine_under_a_published_name_are_refused(
    script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(1)
    path = checkout / "data" / TOY.name / "machine.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"name": TOY.name, "device_name": "Toy", "cores": 8}))
    before = path.read_bytes()
    assert status_of(script) == 2
    assert "describes another machine: cores is 8 there and 1 here" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not path.with_name("toy.jsonl").exists()


def test_a_place_that_cannot_be_written_is_one_line(
    script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(1)
    (checkout / "data" / TOY.name).write_text("in the folder's place")
    assert status_of(script) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot ")
    assert len(error.splitlines()) == 1


def test_the_checkouts_own_records_are_out_of_reach_of_these_tests() -> None:
    assert "CS336_DATA" not in os.environ
    assert not Store.default().published.is_relative_to(SCRIPT.parents[1])

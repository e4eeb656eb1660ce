"""scripts/problems.py shows every problem with its points and records, and keeps the README's index up to date."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from source_files import status_of

from cs336_systems.bench.machine import Machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.repository import repository_root
from cs336_systems.workbook.index import README_BEGIN, README_END, load_index, readme_index

SCRIPT = repository_root() / "scripts" / "problems.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_problems", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The rows of the one table in a text, by problem."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def table(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, dict[str, str]], str]:
    assert status_of(script) == 0
    text = capsys.readouterr().out
    return rows_of(text), text


def write_records(store: Store, experiment: str, count: int) -> None:
    machine = Machine("toy-1c", "cpu", {"device_name": "Toy"})
    with store.begin_run(machine, experiment, {}) as writer:
        blank = Record(
            experiment, machine.name, writer.run, {}, "ok", None, Measurement(), {}, {}, "2026-01-01T00:00:00Z", 0.1
        )
        for number in range(count):
            writer.append(dataclasses.replace(blank, case={"number": number}))


def test_the_table_has_every_problem_with_its_points_notebook_and_state(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = table(script, capsys)
    problems = load_index().problems
    assert list(rows) == list(problems)
    for name, problem in problems.items():
        points = [rows[name][year] for year in ("2025", "2026")]
        assert points == [str(problem.points.get(year, "–")) for year in ("2025", "2026")], name
        assert (rows[name]["notebook"], rows[name]["state"]) == (problem.notebook, problem.state)


def test_the_points_that_are_built_are_summed_by_year(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = table(script, capsys)
    # What the handouts ask altogether, by hand.
    for year, asked in (("2025", 107), ("2026", 137)):
        built = sum(
            problem.points.get(year, 0) for problem in load_index().problems.values() if problem.state == "built"
        )
        assert f"{year}: {built} of {asked} points built" in text.splitlines()


def test_the_records_of_a_problem_are_those_of_its_notebooks_experiments(script: ModuleType) -> None:
    write_records(Store.default(), "transformer_step", 3)
    write_records(Store.default(), "warmup", 2)
    write_records(Store.default(), "machine_peaks", 1)  # which no problem asks for
    rows = rows_of(str(script.problems_table(load_index(), Store.default())))
    assert rows["benchmarking_script"]["records here"] == "5"
    # Both problems of notebook 03 read the steps too.
    of_steps = {"mixed_precision_accumulation", "benchmarking_mixed_precision"}
    assert {rows[name]["records here"] for name in of_steps} == {"3"}
    others = rows.keys() - of_steps - {"benchmarking_script"}
    assert {rows[name]["records here"] for name in others} == {"–", "0"}


def test_a_built_problem_without_records_has_none_and_not_a_hole(script: ModuleType, store: Store) -> None:
    rows = rows_of(str(script.problems_table(load_index(), store)))
    assert rows["benchmarking_script"]["records here"] == "0"


# The README ----------------------------------------------------------------------------------------------------


@pytest.fixture
def readme(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README elsewhere, with an index that is out of date."""
    monkeypatch.setattr(script, "repository_root", lambda: tmp_path)
    path = tmp_path / "README.md"
    path.write_text(f"# Title – été\n\n{README_BEGIN}\nold\n{README_END}\nThe end\n", encoding="utf-8")
    return path


def test_the_index_is_written_into_the_readme_and_the_rest_of_it_stays(script: ModuleType, readme: Path) -> None:
    assert status_of(script, "--write-readme") == 0
    expected = f"# Title – été\n\n{README_BEGIN}\n\n{readme_index(load_index())}\n\n{README_END}\nThe end\n"
    assert readme.read_text(encoding="utf-8") == expected
    assert status_of(script, "--write-readme") == 0
    assert readme.read_text(encoding="utf-8") == expected


def test_a_readme_without_the_markers_is_an_error_and_stays_as_it_is(
    script: ModuleType, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.write_text("# Title\n", encoding="utf-8")
    assert status_of(script, "--write-readme") == 2
    assert capsys.readouterr().err.startswith("error: the README lacks the lines")
    assert readme.read_text(encoding="utf-8") == "# Title\n"


def test_a_readme_that_is_not_there_is_an_error(
    script: ModuleType, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.unlink()
    assert status_of(script, "--write-readme") == 2
    assert "README.md" in capsys.readouterr().err

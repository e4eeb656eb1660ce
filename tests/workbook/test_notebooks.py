"""Notebooks are thin: they define nothing, carry no outputs, and say which problems they answer."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest

from cs336_systems.experiments import experiment_names, grid_parameters, load_experiment
from cs336_systems.repository import repository_root
from cs336_systems.workbook.index import Notebook, load_index
from cs336_systems.workbook.profiles import experiment_arguments, notebook_parameters

LONGEST_CELL = 8
NOTEBOOKS = sorted((repository_root() / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def program_of(cell: dict[str, Any]) -> ast.Module:
    """A code cell without IPython's magic lines."""
    return ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))


def notebook_of(path: Path) -> Notebook:
    return load_index().notebooks[path.stem]


def test_there_are_notebooks_to_check() -> None:
    assert NOTEBOOKS


@every_notebook
def test_a_notebook_is_valid_nbformat(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4


@every_notebook
def test_a_notebook_runs_in_the_kernel_that_everyone_has(path: Path) -> None:
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}


@every_notebook
def test_a_notebook_defines_neither_functions_nor_classes(path: Path) -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in cells_of(path, "code"):
        found = [node for node in ast.walk(program_of(cell)) if isinstance(node, definitions)]
        assert not found, source_of(cell)


@every_notebook
def test_no_cell_is_longer_than_eight_lines(path: Path) -> None:
    too_long = [cell["id"] for cell in cells_of(path, "code") if len(source_of(cell).splitlines()) > LONGEST_CELL]
    assert too_long == []


@every_notebook
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    left = [cell["id"] for cell in cells_of(path, "code") if cell["outputs"] or cell["execution_count"] is not None]
    assert left == []


@every_notebook
def test_exactly_one_cell_is_tagged_parameters_and_it_is_the_first_of_code(path: Path) -> None:
    cells = cells_of(path, "code")
    assert ["parameters" in cell["metadata"].get("tags", []) for cell in cells] == [True, *[False] * (len(cells) - 1)]


@every_notebook
def test_a_notebook_begins_with_a_heading_that_names_its_problems(path: Path) -> None:
    index = load_index()
    own = {problem.id for problem in index.problems.values() if problem.notebook == path.stem}
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    text = source_of(first)
    assert first["cell_type"] == "markdown"
    assert text.startswith("# ")
    assert notebook_of(path).title.lower() in text.splitlines()[0].lower()
    named = {problem for problem in index.problems if f"`{problem}`" in text}
    assert named == own


@every_notebook
def test_the_experiments_of_a_notebook_exist(path: Path) -> None:
    assert set(notebook_of(path).experiments) <= set(experiment_names())


@every_notebook
def test_every_parameter_is_an_argument_of_the_grid_of_one_of_its_experiments(path: Path) -> None:
    """Or a run without notebooks (scripts/measure.py) would lack what the notebook's run has."""
    notebook = notebook_of(path)
    known = {name for experiment in notebook.experiments for name in grid_parameters(load_experiment(experiment))}
    assert set(notebook_parameters(notebook)) <= known


def plain(value: Any) -> Any:
    """A value as YAML would have it; an axis of one value is the same as the value."""
    if isinstance(value, tuple | list):
        values = [plain(each) for each in value]
        return values[0] if len(values) == 1 else values
    return {name: plain(each) for name, each in value.items()} if hasattr(value, "items") else value


@every_notebook
def test_the_values_in_the_parameters_cell_are_the_defaults_of_the_grids(path: Path) -> None:
    """Of an experiment that several notebooks read, those of the first: what the others ask of it is their own."""
    notebook = notebook_of(path)
    parameters = notebook_parameters(notebook)
    earlier = {
        name for each in load_index().notebooks_there() if each.name < notebook.name for name in each.experiments
    }
    for experiment in set(notebook.experiments) - earlier:
        for name, default in grid_parameters(load_experiment(experiment)).items():
            if name in parameters:
                assert plain(parameters[name]) == plain(default), f"{name} of {experiment}"


@every_notebook
def test_a_notebook_gives_its_grids_the_arguments_that_measuring_without_it_gives(path: Path) -> None:
    """`transformer_step.grid(contexts=contexts, …)`, each parameter under its own name and none left out."""
    notebook = notebook_of(path)
    parameters = notebook_parameters(notebook)
    trees = [program_of(cell) for cell in cells_of(path, "code")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {
        alias.asname or alias.name: alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "cs336_systems.experiments"
        for alias in node.names
    }
    given: dict[str, dict[str, str]] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".grid"):
            assert not node.args
            experiment = names[ast.unparse(node.func).removesuffix(".grid")]
            given[experiment] = {str(keyword.arg): ast.unparse(keyword.value) for keyword in node.keywords}
    expected = {
        name: {argument: argument for argument in experiment_arguments(name, parameters)}
        for name in notebook.experiments
    }
    assert given == expected


@every_notebook
def test_a_notebook_imports_nothing_but_the_package(path: Path) -> None:
    imported = []
    for cell in cells_of(path, "code"):
        for node in ast.walk(program_of(cell)):
            if isinstance(node, ast.Import):
                imported += [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                imported.append(str(node.module))
    assert imported
    assert {name.partition(".")[0] for name in imported} == {"cs336_systems"}

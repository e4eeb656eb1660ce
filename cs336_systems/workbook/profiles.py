"""Profiles: a folder of papermill parameter files per kind of machine.

    configs/profiles/<profile>/<notebook>.yaml   values for a notebook's parameters
    configs/profiles/<profile>/profile.yaml      what the profile is for, and the GPU it expects

The parameters of a notebook are those of its `parameters` cell, each of which is also an argument of the grid of one of
its experiments; what a file leaves out keeps the value in the cell, a laptop's. "laptop" is the profile without files.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cs336_systems.analysis.hardware import GPUS
from cs336_systems.bench.records import DATA_VARIABLE
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.experiments import grid_parameters, load_experiment
from cs336_systems.repository import repository_root
from cs336_systems.workbook.index import Index, Notebook

LAPTOP = "laptop"
SMOKE = "smoke"
_ABOUT = "profile"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A named set of parameters."""

    name: str
    description: str
    gpu: str | None = None
    """A key of `analysis.hardware.GPUS`: what the times are predicted for."""


def profiles_folder() -> Path:
    return repository_root() / "configs" / "profiles"


def profile_names() -> list[str]:
    return [LAPTOP, *sorted(path.name for path in profiles_folder().iterdir() if path.is_dir())]


def load_profile(name: str) -> Profile:
    """What a profile is for; an unknown one is an error that lists the known."""
    if name not in profile_names():
        raise unknown_name("profile", name, profile_names())
    if name == LAPTOP:
        return Profile(LAPTOP, "the notebooks' own values: a two-core CPU, under a minute of measuring each")
    path = profiles_folder() / name / f"{_ABOUT}.yaml"
    about = read_yaml(path)
    for key in about:
        if key not in ("description", "gpu"):
            raise unknown_name("key", key, ("description", "gpu"), where=f"in {path}")
    gpu = about.get("gpu")
    if gpu is not None and gpu not in GPUS:
        raise unknown_name("gpu", gpu, GPUS, where=f"in {path}")
    return Profile(name, str(about.get("description", "")), gpu)


@contextlib.contextmanager
def local_data(profile: str, folder: Path | None) -> Iterator[bool]:
    """Say by CS336_DATA where a run's records go; gives whether that is a folder which ends with the run.

    The smoke profile's figures mean nothing, so they go to a temporary folder unless another is asked for.
    """
    with contextlib.ExitStack() as stack:
        is_temporary = profile == SMOKE and folder is None
        if is_temporary:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cs336-smoke-")))
        if folder is not None:
            before = os.environ.get(DATA_VARIABLE)
            os.environ[DATA_VARIABLE] = str(folder.absolute())
            stack.callback(_set_or_remove, DATA_VARIABLE, before)
        yield is_temporary


def _set_or_remove(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, read without building objects.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise UserError(f"{path} is not YAML{line}: {str(error).splitlines()[0]}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must map parameter names to values, found {type(content).__name__}")
    return content


def notebook_parameters(notebook: Notebook) -> dict[str, Any]:
    """The names and laptop values in a notebook's `parameters` cell.

    Read without Jupyter: a notebook is JSON, and the cell holds nothing but assignments of literals.

    Raises:
        UserError: the notebook cannot be read, or its cell holds something else.
    """
    try:
        cells = json.loads(notebook.path.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        statements = ast.parse("".join(tagged[0]["source"])).body if tagged else []
        return {_name(statement): ast.literal_eval(statement.value) for statement in statements}  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"cannot read {notebook.path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"the parameters cell of {notebook.path} must hold assignments of plain values only: {error}"
        ) from error


def _name(statement: ast.stmt) -> str:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        raise ValueError(f"line {statement.lineno} is no assignment to one name")
    return statement.targets[0].id


def profile_parameters(profile: str, notebook: Notebook, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a profile sets for a notebook, with `overrides` (as from `-p name value`) on top.

    Raises:
        UserError: an unknown profile, a file that is not YAML, or a name the notebook has no parameter for.
    """
    load_profile(profile)
    path = profiles_folder() / profile / f"{notebook.name}.yaml"
    from_file = read_yaml(path) if profile != LAPTOP and path.is_file() else {}
    known = notebook_parameters(notebook)
    for source, names in ((f"in {path}", from_file), ("given with -p", overrides or {})):
        for name in names:
            if name not in known:
                raise unknown_name("parameter", name, known, where=f"of {notebook.name} {source}")
    return {**from_file, **(overrides or {})}


def names_notebook(profile: str, notebook: Notebook) -> bool:
    """Whether a profile has anything to say about a notebook; "laptop" covers all."""
    return profile == LAPTOP or (profiles_folder() / profile / f"{notebook.name}.yaml").is_file()


def experiment_arguments(experiment: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a notebook's parameters that belong to one of its experiments' grids."""
    known = grid_parameters(load_experiment(experiment))
    return {name: value for name, value in parameters.items() if name in known}


def experiments_of(profile: str, index: Index) -> dict[str, list[dict[str, Any]]]:
    """Every experiment a profile names, with the arguments of its grids, one for each notebook that reads it.

    `machine_peaks` comes first, since all bounds need it.
    """
    found: dict[str, list[dict[str, Any]]] = {"machine_peaks": []}
    for notebook in index.notebooks_there():
        if not names_notebook(profile, notebook):
            continue
        parameters = notebook_parameters(notebook) | profile_parameters(profile, notebook)
        for experiment in ("machine_peaks", *notebook.experiments):
            arguments, grids = experiment_arguments(experiment, parameters), found.setdefault(experiment, [])
            if arguments not in grids:
                grids.append(arguments)
    found["machine_peaks"] = found["machine_peaks"] or [{}]
    return found


def parse_overrides(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`-p name value` pairs, each value as YAML has it: 3, true, [128, 256], {small: [128]}.

    Raises:
        UserError: a value is not YAML.
    """
    overrides = {}
    for name, text in pairs:
        try:
            overrides[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"the value of -p {name} is not YAML: {str(error).splitlines()[0]}") from error
    return overrides

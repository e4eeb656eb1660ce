"""The package imports with its core alone, knows no machine's paths, and keeps its rooms apart."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cs336_systems
from cs336_systems.repository import repository_root

ROOT = repository_root()
PACKAGE = ROOT / "cs336_systems"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

# What only some machines have: GPU tools, Jupyter, plotting, a cluster.
OPTIONAL = (
    "triton",
    "nvtx",
    "IPython",
    "ipykernel",
    "ipywidgets",
    "papermill",
    "nbformat",
    "nbclient",
    "nbconvert",
    "traitlets",
    "jupyterlab",
    "matplotlib",
    "seaborn",
    "submitit",
    "jinja2",
    "pypandoc",
    "typst",
    "playwright",
    "beartype",
    "pytest",
)

# What is nothing without Triton, and imported by name when it is chosen.
OF_TRITON = tuple(f"cs336_systems.attention.flash_{name}" for name in ("kernels", "launch", "triton", "tuning"))

# The rooms that the rooms of the first column may not know of.
MEASURING = ("bench", "experiments", "workbook", "presentation", "analysis")
SYSTEMS = (
    "model",
    "loss",
    "optimizer",
    "checkpointing",
    "compilation",
    "step",
    "attention",
    "distributed",
    "profiling",
)
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SYSTEMS, MEASURING),
    "bench": (*(set(SYSTEMS) - {"profiling"}), "experiments", "workbook", "presentation"),
    "analysis": ("bench", "experiments", "workbook", "presentation"),
    "experiments": ("workbook", "presentation"),
    "presentation": ("workbook",),
    "errors": (*SYSTEMS, *MEASURING),
    "files": (*SYSTEMS, *MEASURING),
    "repository": (*SYSTEMS, *MEASURING),
    "object_reference": (*SYSTEMS, *MEASURING),
}


def module_names() -> list[str]:
    walked = pkgutil.walk_packages(cs336_systems.__path__, "cs336_systems.")
    return ["cs336_systems", *(module.name for module in walked)]


def rooms_imported(path: Path) -> set[str]:
    """The rooms (first level of the package) that a file imports, anywhere in it."""
    return {name.split(".")[1] for name in modules_imported(path)}


def modules_imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("cs336_systems.")}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "cs336_systems":
                found |= {f"cs336_systems.{alias.name}" for alias in node.names}
            elif str(node.module).startswith("cs336_systems."):
                found.add(str(node.module))
    return found


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a program with its line, docstrings and parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_every_module_imports_without_what_only_some_machines_have() -> None:
    """In one fresh process: this one has imported much of it already."""
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
for name in {sorted({*module_names()} - {*OF_TRITON})!r}:
    importlib.import_module(name)
# Something that torch tried and did without leaves no module behind.
print([name for name in {OPTIONAL!r} if sys.modules.get(name) is not None])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[]\n"


def test_every_source_file_is_a_module_that_was_imported() -> None:
    """A folder without __init__.py would be passed over in silence, here and in an installation."""
    paths = {path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    assert names == set(module_names())


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_of_the_rooms_that_it_must_not_know(room: str) -> None:
    assert files_of(room), f"there is no {room}"
    for path in files_of(room):
        assert rooms_imported(path) & set(FORBIDDEN[room]) == set(), path


@pytest.mark.parametrize("room", ["model", "step", "attention", "distributed", "bench"])
def test_what_is_measured_and_what_times_it_know_of_profiling_the_ranges_alone(room: str) -> None:
    used = {name for path in files_of(room) for name in modules_imported(path) if ".profiling" in name}
    assert used == {"cs336_systems.profiling.ranges"}


def test_no_room_imports_scripts_or_tests() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] not in ("scripts", "tests"), path


# Paths ---------------------------------------------------------------------------------------------------------

A_MACHINES_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|Users|mnt|scratch)(?![\w-])")


@pytest.mark.parametrize("text", ["cd /home/somebody", '"/root"', "'/scratch/run'", "/Users/me"])
def test_the_search_for_paths_finds_those_of_a_machine(text: str) -> None:
    assert A_MACHINES_PATH.search(text)


@pytest.mark.parametrize("text", ["workbook/run.py", "https://example.org/home", "a/home", "/homework", "~/home"])
def test_the_search_for_paths_leaves_other_words_alone(text: str) -> None:
    assert not A_MACHINES_PATH.search(text)


def test_no_file_mentions_a_path_of_a_machine() -> None:
    names = ("pyproject.toml", "constraints.txt", "environment.yml", "problems.toml", "Makefile", "README.md")
    others = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "configs").rglob("*.yaml"), *(ROOT / n for n in names)]
    assert SOURCES
    for path in (*SOURCES, *(other for other in others if other.is_file())):
        found = A_MACHINES_PATH.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


def test_only_the_records_know_where_the_data_lies() -> None:
    """Whoever else joined a path to `data` would write where a store that was moved elsewhere does not look."""
    joined = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                parts = str(node.right.value).split("/")
                if parts[0] == "data":
                    joined.append(path.relative_to(ROOT).as_posix())
    assert set(joined) == {"cs336_systems/bench/records.py"}


def test_only_the_records_read_the_variable_that_moves_the_data() -> None:
    for path in PACKAGE.rglob("*.py"):
        mentions = [line for line, text in strings_of(path) if text == "CS336_DATA"]
        assert not mentions or path.name == "records.py", path

"""What a record measured: a hash of the measured source, and the versions of torch, triton and device.

A record can be used again only while its fingerprint is today's. Comments, docstrings and blank lines are no part of
the hash, so that writing about the code does not make its measurements stale; nor is what does not change a measured
thing (analysis, records, presentation).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from cs336_systems.bench.machine import Machine
from cs336_systems.errors import UserError, first_line
from cs336_systems.object_reference import source_file_of

PACKAGE = "cs336_systems"
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
# Rooms that measure, predict or present, and change no measured thing; timing and memory are measured with, so count.
_NOT_MEASURED = (
    "",
    "analysis",
    "bench",
    "presentation",
    "workbook",
    "errors",
    "files",
    "object_reference",
    "repository",
)
_MEASURED_WITH = (f"{PACKAGE}.bench.timing", f"{PACKAGE}.bench.allocator")


# What is a function of a source's text alone is kept: a document of many experiments asks for it dozens of times.
@functools.lru_cache(maxsize=2048)
def bare_source(source: str) -> str:
    """`source` without comments, docstrings and blank lines: the same for the same program."""
    lines = source.split("\n")  # as Python counts them; splitlines() also splits at other characters
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
            alone = not lines[first][: statement.col_offset].strip() and not lines[last - 1][statement.end_col_offset :]
            if _is_docstring(statement) and alone:
                lines[first:last] = [""] * (last - first)
    return "\n".join(stripped for line in lines if (stripped := line.rstrip()))


def _is_docstring(statement: ast.stmt) -> bool:
    """A string that stands alone: a docstring, or the words under an attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def function_with_callees(function: Callable[..., Any]) -> str:
    """The bare source of `function` and of all it names in its own module, constants too, sorted by name."""
    definitions = _top_level_definitions(Path(inspect.getfile(function)).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    waiting = [function.__name__]
    while waiting:
        name = waiting.pop()
        if name in found or name not in definitions:
            continue
        found[name] = bare_source(definitions[name])
        waiting += names_in(found[name])
    return "\n".join(found[name] for name in sorted(found))


@functools.lru_cache(maxsize=2048)
def names_in(source: str) -> frozenset[str]:
    """Every name that a piece of source uses."""
    return frozenset(node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))


@functools.lru_cache(maxsize=512)
def _top_level_definitions(source: str) -> Mapping[str, str]:
    """The source of every function, class and constant of a module, by name."""
    lines = source.split("\n")  # as in `bare_source`
    definitions: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first, names = min([node.lineno, *(each.lineno for each in node.decorator_list)]), [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            first = node.lineno
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        else:
            continue
        segment = "\n".join(lines[first - 1 : node.end_lineno])
        definitions |= dict.fromkeys(names, segment)
    return MappingProxyType(definitions)


def module_file(name: str) -> Path | None:
    """The source of a module of this package by its name; None if there is no such module."""
    path = _PACKAGE_FOLDER.joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of this package that a source file imports, anywhere in it."""
    for module, name in _imports_in(path.read_text(encoding="utf-8")):
        submodule = f"{module}.{name}"
        yield submodule if name and module_file(submodule) else module


@functools.lru_cache(maxsize=512)
def _imports_in(source: str) -> tuple[tuple[str, str], ...]:
    """What a source imports of this package: modules, each with what is taken of it, or with nothing."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            found += [(str(node.module), alias.name) for alias in node.names]
    return tuple(found)


def measured_modules(experiment: ModuleType) -> list[str]:
    """What an experiment measures: the systems it imports, what those import, and other experiments it measures with.

    The measuring side is left out, except what times and what watches memory; so is an experiment that `measure` does
    not name, whose results are only shown beside. What an experiment names as MEASURED_TOO counts as well.
    """
    measured_too = getattr(experiment, "MEASURED_TOO", ())
    return sorted({*_closure(_measured_imports(experiment)), *_MEASURED_WITH, *measured_too})


def _closure(waiting: list[str]) -> set[str]:
    """These modules of the package and what they import, less what changes no measured thing."""
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        room = name.removeprefix(PACKAGE).strip(".").partition(".")[0]
        file = module_file(name)
        if name in found or room in _NOT_MEASURED or file is None:
            continue
        found.add(name)
        waiting += _measured_imports(importlib.import_module(name)) if _is_experiment(name) else imported_modules(file)
    return found


def _is_experiment(name: str) -> bool:
    """Whether a module is one, and not a part of one."""
    return name.startswith(f"{PACKAGE}.experiments.") and hasattr(importlib.import_module(name), "measure")


def _measured_imports(experiment: ModuleType) -> list[str]:
    """The imports of an experiment, its parts too, less other experiments that its `measure` does not name."""
    named = names_in(function_with_callees(experiment.measure))
    return [
        name
        for name in imported_modules(Path(str(experiment.__file__)))
        if not name.startswith(f"{PACKAGE}.experiments")
        or name.rpartition(".")[2] in named
        or name.startswith(f"{experiment.__name__}_")
    ]


def source_hashes(experiment: ModuleType) -> dict[str, str]:
    """A short hash per measured module, and one of `measure` itself.

    Of an experiment only `measure` and what it calls counts: how its records are summarised changes no measurement.
    """
    hashes = {"measure": _digest(function_with_callees(experiment.measure))}
    for name in measured_modules(experiment):
        file, short = module_file(name), name.removeprefix(f"{PACKAGE}.")
        if _is_experiment(name):
            hashes[short] = _digest(function_with_callees(importlib.import_module(name).measure))
        elif file is not None:
            hashes[short] = file_hash(file)
    return hashes


def file_hash(path: Path) -> str:
    """The hash of a Python file's bare source."""
    return _digest(bare_source(path.read_text(encoding="utf-8-sig")))


def _reference_hash(reference: str) -> str | None:
    """The hash of an implementation: its file, and what else of its package or folder it has imported.

    One of this package is not imported for it, so that a machine without Triton can tell of its records.
    """
    module_name = reference.partition(":")[0]
    if module_name.partition(".")[0] == PACKAGE:
        modules = sorted(_closure([module_name]))
        return _digest("\n".join(file_hash(file) for file in map(module_file, modules) if file is not None))
    path = source_file_of(reference)
    if path is None:
        return None
    package = module_name.partition(".")[0]
    folder = path.parent
    files = {path} | {
        Path(file)
        for name, module in sys.modules.items()
        if (file := getattr(module, "__file__", None)) and str(file).endswith(".py")
        if name.partition(".")[0] == package or Path(file).parent == folder
    }
    try:
        return _digest("\n".join(file_hash(file) for file in sorted(files)))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the source of {reference!r}: {first_line(error)}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(experiment: ModuleType, machine: Machine, references: Iterable[str] = ()) -> dict[str, Any]:
    """What must be the same for a record to be used again.

    `references`: object references of somebody else's implementations that a case measures.
    """
    return {
        "source": source_hashes(experiment) | {name: _reference_hash(name) for name in references},
        "torch": torch.__version__.partition("+")[0],
        "triton": version_of("triton") if machine.device == "cuda" else None,
        "device": machine.device_name,
        "threads": torch.get_num_threads() if machine.device == "cpu" else None,
    }


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

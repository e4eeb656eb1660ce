"""The circumstances of a run: what was measured, with what, and how disturbed the machine was.

A record can be used again only while what it measured is still there. The fingerprint says what that is: a hash of the
measured source and the versions of torch, triton and device. Comments, docstrings and blank lines are no part of the
hash, so that writing about the code does not make its measurements stale.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from cs336_systems.bench.machine import Machine
from cs336_systems.errors import UserError, first_line
from cs336_systems.object_reference import source_file_of
from cs336_systems.repository import repository_root

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
    "object_reference",
    "repository",
)
_MEASURED_WITH = (f"{PACKAGE}.bench.timing", f"{PACKAGE}.bench.allocator")


# What was measured -------------------------------------------------------------------------------------------


def bare_source(source: str) -> str:
    """`source` without comments, docstrings and blank lines: the same for the same program."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if _is_docstring(statement):
                first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
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
    """The bare source of `function` and of all it names in its own module, in the order of their names."""
    module = inspect.getmodule(function)
    found: dict[str, str] = {}
    waiting = [function.__name__]
    while waiting:
        name = waiting.pop()
        member: Any = getattr(module, name, None)
        own = inspect.isfunction(member) or inspect.isclass(member)
        if name in found or not own or getattr(member, "__module__", None) != function.__module__:
            continue
        found[name] = bare_source(textwrap.dedent(inspect.getsource(member)))
        waiting += [node.id for node in ast.walk(ast.parse(found[name])) if isinstance(node, ast.Name)]
    return "\n".join(found[name] for name in sorted(found))


def module_file(name: str) -> Path | None:
    """The source of a module of this package by its name; None if there is no such module."""
    path = _PACKAGE_FOLDER.joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of this package that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if module_file(submodule) else str(node.module)


def measured_modules(experiment: ModuleType) -> list[str]:
    """What an experiment measures: the systems it imports, what those import, and other experiments it measures with.

    The measuring side is left out, except what times and what watches memory.
    """
    found: set[str] = set()
    waiting = list(imported_modules(Path(str(experiment.__file__))))
    while waiting:
        name = waiting.pop()
        room = name.removeprefix(PACKAGE).strip(".").partition(".")[0]
        file = module_file(name)
        if name in found or room in _NOT_MEASURED or file is None:
            continue
        found.add(name)
        waiting += imported_modules(file)
    return sorted({*found, *_MEASURED_WITH} - {f"{PACKAGE}.experiments"})


def source_hashes(experiment: ModuleType) -> dict[str, str]:
    """A short hash per measured module, and one of `measure` itself.

    Of an experiment only `measure` and what it calls counts: how its records are summarised changes no measurement.
    """
    hashes = {"measure": _digest(function_with_callees(experiment.measure))}
    for name in measured_modules(experiment):
        file, short = module_file(name), name.removeprefix(f"{PACKAGE}.")
        if short.startswith("experiments."):
            hashes[short] = _digest(function_with_callees(importlib.import_module(name).measure))
        elif file is not None:
            hashes[short] = file_hash(file)
    return hashes


def file_hash(path: Path) -> str:
    """The hash of a Python file's bare source."""
    return _digest(bare_source(path.read_text(encoding="utf-8")))


def _reference_hash(reference: str) -> str | None:
    path = source_file_of(reference)
    try:
        return file_hash(path) if path is not None else None
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}, the source of {reference!r}: {first_line(error)}") from error


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
    }


# With what ---------------------------------------------------------------------------------------------------


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def utc_now() -> str:
    """The time in UTC to the microsecond, in a form whose text order is its time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def run_context(experiment: ModuleType, machine: Machine, parameters: dict[str, Any]) -> dict[str, Any]:
    """The first line of a run's file."""
    commit = _output("git", "-C", str(repository_root()), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(repository_root()), "status", "--porcelain")
    return {
        "commit": commit,
        "dirty": bool(changes) if commit is not None else None,
        "started_utc": utc_now(),
        "command": Path(sys.argv[0]).name,
        "parameters": parameters,
        "fingerprint": fingerprint(experiment, machine),
        "device": machine.description,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "ptxas": _ptxas_version(),
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version") if machine.device == "cuda" else None,
            "compiler": (_output("cc", "--version") or "").partition("\n")[0] or None,
            "system": platform.system(),
        },
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "clocks": clocks(machine.device),
    }


def clocks(device: str) -> dict[str, Any]:
    """Clock rates and power as far as the system tells."""
    if device == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
        return {name: _nvidia_smi(name) for name in names}
    try:
        frequency = psutil.cpu_freq()
    except (NotImplementedError, OSError, RuntimeError):
        frequency = None
    return {
        "current_mhz": frequency.current if frequency else None,
        "max_mhz": frequency.max if frequency else None,
    }


def _ptxas_version() -> str | None:
    """That of the assembler in Triton's wheel, which is the one that compiles its kernels."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    ptxas = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    text = _output(str(ptxas), "--version") if ptxas.is_file() else None
    return text.strip().splitlines()[-1] if text else None


def _nvidia_smi(query: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0")


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or takes longer than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


# How disturbed -----------------------------------------------------------------------------------------------


class NoiseMonitor:
    """Watches for disturbance while a case is measured.

    `with NoiseMonitor(device) as noise: …`, then `noise.report(samples)`.
    """

    SWITCHES_PER_S = 50.0
    """Involuntary context switches per second and core beyond which a CPU measurement shared its cores."""
    STEAL = 0.02
    """Share of processor time taken by other virtual machines."""
    SPREAD = 0.10
    """Interquartile range over median."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> NoiseMonitor:
        self._started = self._counters()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = self._counters()

    def report(self, samples: dict[str, list[float]]) -> dict[str, Any]:
        """What was seen, and under "flags" why the case counts as noisy (empty: quiet)."""
        seconds = self._ended["time"] - self._started["time"]
        switches = self._ended["switches"] - self._started["switches"]
        steal = (self._ended["steal"] - self._started["steal"]) / max(seconds * (os.cpu_count() or 1), 1e-9)
        spread = max((relative_spread(values) for values in samples.values()), default=0.0)
        throttled = _throttle_reasons() if self.device == "cuda" else None
        flags = []
        if switches / max(seconds, 1.0) > self.SWITCHES_PER_S * (os.cpu_count() or 1):
            flags.append(f"{switches / seconds:.0f} involuntary context switches per second")
        if steal > self.STEAL:
            flags.append(f"{steal:.0%} of the processors' time was stolen")
        if spread > self.SPREAD:
            flags.append(f"spread of {spread:.0%} of the median")
        if throttled:
            flags.append(f"GPU clocks throttled: {throttled}")
        return {"flags": flags, "involuntary_switches": switches, "steal": steal, "spread": spread}

    @staticmethod
    def _counters() -> dict[str, Any]:
        process, times = psutil.Process(), psutil.cpu_times()
        return {
            "time": datetime.now(UTC).timestamp(),
            "switches": process.num_ctx_switches().involuntary,
            "steal": getattr(times, "steal", 0.0),
        }


def relative_spread(samples: list[float]) -> float:
    """Interquartile range over median; 0 for fewer than three samples, which show no spread."""
    if len(samples) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def _throttle_reasons() -> str | None:
    """The clock event reasons that slow a busy GPU, by name; None where the driver does not tell."""
    active = _nvidia_smi("clocks_event_reasons.active")
    if active is None or not active.startswith("0x"):
        return None
    bits = int(active, 16)
    names = {
        0x4: "power cap",
        0x8: "hardware slowdown",
        0x20: "thermal (software)",
        0x40: "thermal (hardware)",
    }
    return ", ".join(name for bit, name in names.items() if bits & bit) or None

"""Runs a program under Nsight Systems, and keeps the profile only when it is whole.

    capture(find_nsys(), ["python", "train.py"], folder / "step")   # step.nsys-rep for the GUI, step.sqlite for nsys.py

Recording begins when the program opens the range "measured" (`bench/timing.py`) and ends with it, so that warm-ups are
left out; CUDA and NVTX are recorded and nothing else, which is what disturbs the program least.

What nsys says of itself is not enough. Of the versions 2022.4, 2023.4 and 2024.2 was seen: `nsys profile` ends with the
program's own status, which is 0 too where the range never opened, where the report could not be written, and where the
disk was full; `nsys export` ends with 0 on a full disk. So what they wrote is looked at. Killed, nsys leaves the
program running, and an agent that is a daemon; they are known by a variable in their environment, and ended.

Source: Nsight Systems, "User Guide", sections "CLI Profile Command Switch Options" and "Example Interactive CLI Command
Sequences" (capture ranges), of those versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from cs336_systems.errors import UserError, WorkbookWarning
from cs336_systems.profiling.nsys import Contents, contents_of

RANGE = "measured"
"""What is recorded: `bench/timing.py` opens it after the warm-ups."""
VARIABLE = "CS336_NSYS"
"""The environment variable that names an nsys that is not found, or not the one wanted."""
INSTALLED = ("/opt/nvidia/nsight-systems*/*/bin/nsys", "/usr/local/cuda*/bin/nsys")
"""Where installers put it, besides a folder of PATH."""
REPORT, EXPORT = ".nsys-rep", ".sqlite"

_MARK = "CS336_CAPTURE"  # in the environment of whatever a capture started
_POLL_S, _GRACE_S, _ABANDONED_S = 0.2, 10.0, 24 * 3600.0
_LEAST_FREE_BYTES = 64 * 2**20

_MISSING = (
    "Nsight Systems is needed, and its program nsys was not found: not on PATH, and not as {places}. It comes with the "
    f"CUDA toolkit, or alone from https://developer.nvidia.com/nsight-systems; an nsys elsewhere is named by {VARIABLE}"
    "=/path/to/nsys. Without it, PyTorch's profiler sees kernels and ranges as well: notebook 02 records with it, and "
    "scripts/kernel_summary.py reads its traces"
)


# Which nsys ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Nsys:
    """An nsys that runs."""

    path: Path
    version: str


def find_nsys() -> Nsys:
    """The nsys that CS336_NSYS names, else the first on PATH, else the newest that is installed.

    Raises:
        UserError: there is none, or it cannot be run.
    """
    told = os.environ.get(VARIABLE)
    found = shutil.which(told or "nsys") or (None if told else _newest_installed())
    if found is None and told:
        raise UserError(f"{VARIABLE} is {told!r}, which is no program: set it to the path of an nsys, or unset it")
    if found is None:
        raise UserError(_MISSING.format(places=" or ".join(INSTALLED)))
    return Nsys(Path(found), _version(found))


def _newest_installed() -> str | None:
    paths = [path for pattern in INSTALLED for path in Path("/").glob(pattern.lstrip("/")) if shutil.which(path)]
    newest = max(paths, key=lambda path: [int(digits) for digits in re.findall(r"\d+", str(path))], default=None)
    return None if newest is None else str(newest)


def _version(path: str) -> str:
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{path} cannot be run: {error}; name another nsys by {VARIABLE}") from error
    version = re.search(r"\d{4}(\.\d+)+", answer.stdout)
    if answer.returncode or version is None:
        said = _gist(answer.stderr or answer.stdout) or "it says nothing"
        raise UserError(f"{path} --version tells no version of Nsight Systems ({said}): name an nsys by {VARIABLE}")
    return version[0]


# Capturing -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is recorded beside kernels and ranges when it is asked for; each takes time."""

    cuda_memory_usage: bool = False
    """How much of the GPU's memory is taken, at every allocation."""
    python_backtrace: bool = False
    """The Python lines that launched a kernel; from 2023 on."""

    @property
    def arguments(self) -> list[str]:
        # Backtraces of CUDA are taken by the sampler: without it there are none, and a warning.
        sample, backtraces = "none", []
        if self.python_backtrace:
            sample, backtraces = "process-tree", ["--cudabacktrace=kernel", "--python-backtrace=cuda"]
        memory = ["--cuda-memory-usage=true"] if self.cuda_memory_usage else []
        return [f"--sample={sample}", "--cpuctxsw=none", *memory, *backtraces]


@dataclasses.dataclass(frozen=True)
class Captured:
    """A whole profile."""

    report: Path
    export: Path
    contents: Contents
    arguments: tuple[str, ...]
    """What nsys was told, less where to write."""


class ProgramFailed(UserError):
    """What ran under nsys, or nsys itself, ended with another status than 0."""


def capture(
    nsys: Nsys,
    command: Sequence[str],
    target: Path,
    *,
    extras: Extras | None = None,
    needs_kernels: bool = True,
    environment: Mapping[str, str] | None = None,
    while_running: Callable[[], object] = lambda: None,
) -> Captured:
    """Record what `command` does within the range "measured", as `target`.nsys-rep and `target`.sqlite.

    Args:
        target: folder and name. What is there already is replaced when the new profile is whole, and not before.
        needs_kernels: a profile without kernels is an error.
        environment: variables for the program, beside this process's own.
        while_running: called a few times a second.

    Raises:
        ProgramFailed: the program failed, and says why; or nsys did.
        UserError: the range was never opened, or something could not be written.
    """
    arguments = (
        "--trace=cuda,nvtx",
        *(extras or Extras()).arguments,
        "--capture-range=nvtx",
        f"--nvtx-capture={RANGE}",
        "--capture-range-end=stop",  # and the program goes on, to write its records
        "--wait=primary",
        "--force-overwrite=true",
    )
    with (
        _ended_with_this_process(),
        _folder_beside(target) as folder,
        # nsys writes several times a report's size here before it writes the report.
        tempfile.TemporaryDirectory(prefix="cs336-nsys-", ignore_cleanup_errors=True) as temporary,
    ):
        _require_room(folder, Path(temporary))
        report, export = folder / f"{target.name}{REPORT}", folder / f"{target.name}{EXPORT}"
        # PyTorch's NVTX has its names as plain strings, of which nsys compares none unless told to.
        for_nsys = {"NSYS_NVTX_PROFILER_REGISTER_ONLY": "0", "TMPDIR": temporary, _MARK: secrets.token_hex(8)}
        variables = {**os.environ, **(environment or {}), **for_nsys}
        output = f"--output={str(report).replace('%', '%%')}"
        ran = _run([str(nsys.path), "profile", *arguments, output, *command], variables, while_running)
        if ran.status:
            program = Path(command[0]).name
            raise ProgramFailed(f"`{program}` under nsys {nsys.version} {_how(ran.status)}: {ran.gist}")
        if not report.is_file():
            raise _no_report(nsys, ran, target, (folder, Path(temporary)))
        for line in ran.stderr.splitlines():
            if line.startswith("WARNING:"):
                warnings.warn(f"nsys: {line.removeprefix('WARNING:').strip()}", WorkbookWarning, stacklevel=2)
        options = ["--type=sqlite", "--force-overwrite=true", "--quiet=true", f"--output={export}"]
        exported = _run([str(nsys.path), "export", *options, str(report)], variables, while_running)
        if exported.status or not export.is_file():
            raise UserError(f"`nsys export` of {target.name}{REPORT} {_how(exported.status)}: {exported.gist}")
        contents = _checked(export, exported, nsys, needs_kernels)
        try:
            return Captured(
                report.replace(target.with_name(report.name)),
                export.replace(target.with_name(export.name)),
                contents,
                arguments,
            )
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from error


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk for what is not whole yet; those that killed captures left are removed."""
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {target.parent}: {error.strerror}; name a folder that can be written") from error
    for other in target.parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_room(*folders: Path) -> None:
    """Raise a UserError if a disk is full already: nsys 2022.4 then waits for its own recording for ever."""
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE_BYTES:
            raise UserError(
                f"{free / 2**20:.0f} MiB are free in {folder.parent}, and a profile may take more than "
                f"{_LEAST_FREE_BYTES >> 20}: make room there, or name another folder (for temporary files: TMPDIR)"
            )


def _no_report(nsys: Nsys, ran: _Ended, target: Path, folders: Sequence[Path]) -> UserError:
    """Why there is none: something was recorded, and lies elsewhere or half imported, or nothing was."""
    if any(path.suffix in (".qdstrm", REPORT) for folder in folders for path in folder.rglob("*")):
        return UserError(
            f"Nsight Systems {nsys.version} recorded the program, and could not write the report into {target.parent}: "
            f"{ran.gist}. Make room there and in {tempfile.gettempdir()}, and see that all of Nsight Systems is "
            "installed, its importer too"
        )
    return UserError(
        f"the program ended well, and Nsight Systems {nsys.version} recorded nothing: it never saw the range {RANGE!r} "
        "open. A PyTorch with CUDA opens ranges by itself, one without by the package nvtx, if that is installed; from "
        "0.2.12 on the package makes none under Nsight Systems 2024.2 and before, so take a newer one, or nvtx==0.2.11"
    )


def _checked(export: Path, exported: _Ended, nsys: Nsys, needs_kernels: bool) -> Contents:
    """What the export has, if that is what was to be recorded."""
    try:
        contents = contents_of(export)
    except UserError as error:
        raise UserError(f"`nsys export` wrote no whole file ({exported.gist}); is the disk full? {error}") from error
    if RANGE not in contents.ranges:
        raise UserError(f"the profile lacks the range {RANGE!r}, which it was to record: found {len(contents.ranges)}")
    if needs_kernels and not contents.kernels:
        raise UserError(
            f"the profile has ranges and not one kernel: Nsight Systems {nsys.version} could not trace CUDA here, as "
            "when it is older than the driver. `nsys status --environment` tells more; a newer one is named by "
            f"{VARIABLE}"
        )
    return contents


# Processes -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ended:
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str

    @property
    def gist(self) -> str:
        return _gist(self.stderr) or "it does not say why"


def _run(command: Sequence[str], environment: Mapping[str, str], while_running: Callable[[], object]) -> _Ended:
    """Run a command to its end; whatever it started is ended with it, also when this is interrupted."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            while process.poll() is None:
                while_running()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            _end(process, environment[_MARK])
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode("utf-8", "replace"))
    return _Ended(process.returncode, *said)


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a command that may have ended, in order if it can be, and all that it started."""
    if process.poll() is None:
        process.terminate()
        # A second Ctrl-C ends it at once.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(_GRACE_S)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(_started_with(mark), timeout=2.0)
    for _ in range(3):  # one that is killed may just have started another
        for each in alive:
            with contextlib.suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(alive, timeout=_GRACE_S)
        alive = _started_with(mark)


def _started_with(mark: str) -> list[psutil.Process]:
    """The processes with this mark in their environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


@contextlib.contextmanager
def _ended_with_this_process() -> Iterator[None]:
    """Meanwhile a signal to end is as Ctrl-C, or what was started would go on alone."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")

    changed = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _how(status: int) -> str:
    """A signal shows as a negative status, or as 128 and its number where nsys passes it on."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with {status}"


def _gist(text: str) -> str:
    """What matters of what a program said: its own error, a traceback's last line, or what it began with."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    if any(line.startswith("Traceback ") for line in lines):
        return lines[-1]
    # nsys tells first in which of its own functions it found that out.
    of_files = [line for line in lines if re.search("No space|disk is full|denied|Read-only|Not a directory", line)]
    if of_files:
        return of_files[-1][:300]
    return "; ".join(line[:300] for line in lines[:3])

"""Run a function on several ranks that can communicate, and bring back what each found.

    losses = launch(train, 10, world_size=2)                 # train(rank, 10) in two processes, over Gloo on the CPU
    losses = launch(train, 10, world_size=4, backend="nccl") # a GPU for each

The same call works in a notebook, a script, a test, and under `torchrun` or `srun`, whose ranks it then takes instead
of starting its own (`cluster.py`). The function must live in a module that can be imported: what is defined in a
notebook's cell cannot be found by another process, and a plain fork hangs once its parent has used PyTorch's threads.
On Linux the ranks are forked from a server that has imported PyTorch and computed nothing; elsewhere each imports it
anew.

On one machine nothing listens beyond the loopback interface: the ranks meet at a file of their own, so that no two
launches can meet each other, whatever else runs. A rank has one thread on a CPU unless told otherwise, since several
ranks with all threads each would only wait for one another.

Whatever happens to a rank, the launch ends: one that raises or dies ends it at once; one that says nothing for
`timeout_s` (60 s by default) counts as hung, and writes where it is before it is ended. `RankFailed` names the rank
that began it, and its log has that rank's own traceback first. No process is left, and every report that a rank had
sent has reached `on_report`.

Source: CS336 assignment 2 (2025), section 2.1, which starts its ranks with `mp.spawn` on a constant port.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cs336_systems.distributed import cluster
from cs336_systems.distributed.rank import STACKS_SIGNAL, Job, Kind, require_devices, run_rank
from cs336_systems.errors import UserError, first_line

TIMEOUT_S = 60.0
SETTLING_S = 0.5
"""How long the other ranks have to tell of their own end once one has failed: some fail for the same reason."""
SETTLING_SHARE = 0.25
"""Of the timeout: the same where the first that failed had waited for another, and who that was has yet to be seen."""
STACKS_S = 0.5
"""How long a hung rank has to write where it is."""
MOST_OUTPUT = 20_000
"""Characters of a rank's output that are told, from its end."""
_PRELOADED = ("torch._dynamo",)
"""What PyTorch imports at the first use of an optimizer or a profiler, for seconds: once for all ranks of all jobs."""
OnReport = Callable[[int, Any], object]


class RankFailed(RuntimeError):
    """A rank raised, died or hung; the message says which and how, `log` has its traceback and all ranks' output."""

    def __init__(self, sentence: str, *, rank: int, signal_name: str | None = None, log: str = "") -> None:
        super().__init__(sentence)
        self.rank, self.signal_name, self.log = rank, signal_name, log
        if log:
            self.add_note(log)  # printed below the sentence wherever this error is


def launch(
    worker: Callable[..., Any],
    *arguments: Any,
    world_size: int,
    backend: str = "gloo",
    timeout_s: float = TIMEOUT_S,
    threads: int = 1,
    on_report: OnReport | None = None,
) -> list[Any]:
    """What `worker(rank, *arguments)` returns on each of `world_size` ranks, in their order.

    Args:
        worker: of a module that can be imported; its first argument is its `Rank`.
        backend: gloo between CPUs, nccl between GPUs.
        timeout_s: for how long a rank may say nothing (`Rank.alive`, `Rank.report`) before it counts as hung.
        threads: of each rank, on a CPU.
        on_report: called with rank and value as soon as a rank reports something.

    Raises:
        UserError: what all ranks raised as one, or a job that cannot be: a worker that no other process can find,
            arguments that cannot be sent, more NCCL ranks than GPUs.
        RankFailed: a rank raised anything else, died or hung; no rank is left.
    """
    job = Job(*_found_elsewhere(worker), arguments, world_size, backend, timeout_s, threads)
    given = cluster.world()
    if given is not None:
        return cluster.lead(given, job, on_report)
    require_devices(backend, world_size)
    with _Ranks(job, on_report or (lambda _rank, _value: None)) as ranks:
        return ranks.results()


def _found_elsewhere(worker: Callable[..., Any]) -> tuple[str, str]:
    """Module and name by which another process finds a function."""
    module, name = getattr(worker, "__module__", None), getattr(worker, "__qualname__", "<no name>")
    if not inspect.isfunction(worker) or module in (None, "__main__") or "<" in name:
        raise UserError(
            f"the ranks are processes of their own, which cannot import {name!r} from {module}: "
            "expected a function at the top of a module that can be imported"
        )
    return str(module), name


class _Process:
    """One rank as its parent sees it."""

    def __init__(self, process: BaseProcess, pipe: Connection, output: Path) -> None:
        self.process, self.pipe, self.output = process, pipe, output
        self.last_sign = time.monotonic()
        self.result: Any = None
        self.error: BaseException | None = None
        self.traceback = ""
        self.waited_for_another = False
        self.has_finished = False
        self.pipe_is_open = True

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to come from it."""
        return self.has_finished or self.error is not None or not self.process.is_alive()

    @property
    def is_at_fault(self) -> bool:
        """Whether it failed by itself, rather than because another did."""
        return self.has_ended and not self.has_finished and not self.waited_for_another

    def read(self) -> tuple[Kind, Any] | None:
        """The next message that is there as a whole; None if there is none."""
        try:
            if not self.pipe_is_open or not self.pipe.poll():
                return None
            content = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.pipe_is_open = False
            return None
        self.last_sign = time.monotonic()
        message: tuple[Kind, Any] = pickle.loads(content)
        return message

    def write_stacks(self) -> None:
        """Have it write where it is, if it still can."""
        if STACKS_SIGNAL is not None and self.process.pid is not None and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, STACKS_SIGNAL)

    def told(self) -> str:
        """What it wrote, or the end of it."""
        try:
            text = self.output.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        return text if len(text) <= MOST_OUTPUT else f"…{text[-MOST_OUTPUT:]}"

    def end(self) -> None:
        """Kill it and what it has started."""
        with contextlib.suppress(psutil.Error):
            for each in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.kill()


class _Ranks:
    """The processes of a job, from their start to the end of the last."""

    def __init__(self, job: Job, on_report: OnReport) -> None:
        self._job, self._on_report = job, on_report
        self._folder = tempfile.TemporaryDirectory(prefix="cs336-ranks-", ignore_cleanup_errors=True)
        self._ranks: list[_Process] = []

    def __enter__(self) -> _Ranks:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for each in self._ranks:
            each.end()
        for each in self._ranks:
            each.process.join()
            each.pipe.close()
        self._folder.cleanup()

    def _start(self) -> None:
        try:
            pickled = pickle.dumps(self._job)
        except Exception as error:
            raise UserError(f"the arguments of {self._job.function} cannot be sent: {first_line(error)}") from error
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([run_rank.__module__, *_PRELOADED])
        folder = Path(self._folder.name)
        environ = {**os.environ, **_only_loopback()}
        for rank in range(self._job.world_size):
            reader, writer = context.Pipe(duplex=False)
            output = folder / f"rank-{rank}.log"
            given = (writer, pickled, rank, str(folder / "rendezvous"), str(output), environ)
            process = context.Process(target=run_rank, args=given, daemon=False, name=f"rank {rank}")  # type: ignore[attr-defined]
            try:
                process.start()
            finally:
                writer.close()
            self._ranks.append(_Process(process, reader, output))

    def results(self) -> list[Any]:
        """Wait for all ranks.

        Raises:
            UserError, RankFailed: see `launch`.
        """
        while not all(each.has_finished for each in self._ranks):
            self._wait(min(each.last_sign for each in self._running) + self._job.timeout_s)
            if any(each.has_ended and not each.has_finished for each in self._ranks):
                self._settle()
                self._fail()
            silent = [each for each in self._running if each.last_sign + self._job.timeout_s <= time.monotonic()]
            if silent:
                self._fail(silent)
        return [each.result for each in self._ranks]

    @property
    def _running(self) -> list[_Process]:
        return [each for each in self._ranks if not each.has_ended]

    def _wait(self, until: float) -> None:
        """Read what comes next, or nothing until then."""
        ends = [each.process.sentinel for each in self._running]
        pipes = [each.pipe for each in self._running if each.pipe_is_open]
        wait([*ends, *pipes], timeout=max(0.0, until - time.monotonic()))
        self._read_all()

    def _read_all(self) -> None:
        for rank, each in enumerate(self._ranks):
            while (message := each.read()) is not None:
                kind, value = message
                if kind == "report":
                    self._on_report(rank, value)
                elif kind == "result":
                    each.result, each.has_finished = value, True
                elif kind == "error":
                    each.error, each.traceback = value["error"], value["traceback"]
                    each.waited_for_another = value["is_of_communication"]

    def _settle(self) -> None:
        """Let the others end as well: until who is at fault is known, and whether others are for the same reason."""
        began = time.monotonic()
        while self._running:
            is_known = any(each.is_at_fault for each in self._ranks)
            until = began + (SETTLING_S if is_known else self._job.timeout_s * SETTLING_SHARE)
            if time.monotonic() >= until:
                break
            self._wait(until)

    def _fail(self, silent: list[_Process] | None = None) -> None:
        """Raise what the user is to know, once nothing runs any more."""
        at_fault = [each for each in self._ranks if each.is_at_fault]
        hung = silent or ([] if at_fault else self._running)
        for each in hung:
            each.write_stacks()
        if hung:
            time.sleep(STACKS_S)
        for each in self._ranks:
            if not each.has_ended:
                each.end()
        for each in self._ranks:
            each.process.join()
        first = (hung or at_fault or [each for each in self._ranks if each.error is not None])[0]
        sentence, signal_name = self._sentence(first, hung)
        self._read_all()
        if isinstance(first.error, UserError):
            raise first.error
        rank = self._ranks.index(first)
        raise RankFailed(sentence, rank=rank, signal_name=signal_name, log=self._log(first)) from first.error

    def _sentence(self, first: _Process, hung: list[_Process]) -> tuple[str, str | None]:
        """What happened to the rank that began it, and the signal it died of."""
        rank, signal_name = f"rank {self._ranks.index(first)} of {self._job.world_size}", None
        code = first.process.exitcode or 0
        if hung:
            names = " and ".join(str(self._ranks.index(each)) for each in hung)
            rank = f"rank {names} of {self._job.world_size}" if len(hung) == 1 else f"ranks {names}"
            since = max(time.monotonic() - each.last_sign for each in hung)
            what = f"hung: nothing was heard for {since:.0f} s (timeout {self._job.timeout_s:g} s)"
        elif first.error is not None:
            what = f"failed with {first_line(first.error)}"
        elif code < 0:
            signal_name = signal.Signals(-code).name
            often = ", as a system does that runs out of memory" if signal_name == "SIGKILL" else ""
            what = f"was killed by {signal_name}{often}"
        else:
            what = f"ended with exit status {code} and without a result"
        others = "; the others were ended" if self._job.world_size > 1 else ""
        return f"{rank} {what}{others}", signal_name

    def _log(self, first: _Process) -> str:
        """What the ranks wrote, that of the first to fail before the others'."""
        parts = []
        for each in sorted(self._ranks, key=lambda each: each is not first):
            text = each.told() or each.traceback.strip()
            parts.append(f"--- rank {self._ranks.index(each)}\n{text or '(wrote nothing)'}")
        return "\n".join(parts)


def _only_loopback() -> dict[str, str]:
    """Variables by which Gloo and NCCL communicate over the loopback interface, under its name on this system."""
    if sys.platform == "win32":
        return {}
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(each.address == "127.0.0.1" for each in addresses)
    ]
    return {f"{backend}_SOCKET_IFNAME": names[0] for backend in ("GLOO", "NCCL")} if names else {}

"""Run a function on several ranks that can communicate, and bring back what each found.

    losses = launch(train, 10, world_size=2)                 # train(rank, 10) in two processes, over Gloo on the CPU
    losses = launch(train, 10, world_size=4, backend="nccl") # a GPU for each

The same call works in a notebook, a script, a test, and under `torchrun` or `srun`, whose ranks it then takes instead
of starting its own (`cluster.py`). The function must live in a module that can be imported: what is defined in a
notebook's cell cannot be found by another process, and a plain fork hangs once its parent has used PyTorch's threads.
On Linux the ranks are forked from a server that has imported PyTorch and computed nothing; elsewhere each imports it
anew.

On one machine the ranks meet at a file of their own, so that no two launches can meet each other, whatever else runs,
and they communicate over the loopback interface, where the system lets it be named (not on Windows). A rank has one
thread on a CPU unless told otherwise, since several ranks with all threads each would only wait for one another.

Whatever happens to a rank, the launch ends. One that raises or dies ends it at once. Where no rank says anything for
`timeout_s` (60 s by default), all are asked where they are, and those that do not wait for others count as hung.
`RankFailed` names the rank that began it, and its log has that rank's own traceback first. No process is left, nothing
that a rank had started either, and every report that a rank had sent has reached `on_report`. (Ranks that torchrun or
srun started are theirs to end; see `cluster.py` for what holds there.)

Source: CS336 assignment 2 (2025), section 2.1, which starts its ranks with `mp.spawn` on a constant port.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import multiprocessing
import os
import pickle
import queue
import re
import signal
import sys
import tempfile
import threading
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
"""How long the other ranks have to tell of their own end once one has failed: some fail for the same reason, and the
one that began it may be heard of after those that it left waiting."""
SILENCE_SHARE = 0.95
"""Of the timeout: how long nothing may be heard, so that the launch has ended when the timeout is over."""
STACKS_S = 0.5
"""How long a hung rank has to write where it is."""
JOINING_S = 10.0
"""How long the system has to take away what was killed; what is stuck in it cannot be waited for."""
_MAIN_THREAD = "Current thread"
_PLACE = re.compile(r'^  File "(.*)", line (\d+) in ', re.MULTILINE)
_LIBRARY = "/torch/distributed/"
"""In stacks as faulthandler writes them: the main thread last, its innermost call first."""
LONGEST_TEMPORARY = 70
"""Bytes of the path of the folder for temporary files below which the server can have its socket: else ranks are not
forked, and each imports PyTorch anew."""
MOST_OUTPUT = 20_000
"""Characters of a rank's output that are told, from its end."""
_PRELOADED = ("torch._dynamo",)
"""What PyTorch imports at the first use of an optimizer or a profiler, for seconds: once for all ranks of all jobs."""
_GUARD = 'put what it does under `if __name__ == "__main__":`'
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
        timeout_s: for how long all ranks may say nothing (`Rank.alive`, `Rank.report`) before some count as hung.
        threads: of each rank, on a CPU.
        on_report: called with rank and value as soon as a rank reports something.

    Raises:
        UserError: what all ranks raised as one, or a job that cannot be: a worker that no other process can find,
            arguments that cannot be sent, more NCCL ranks than GPUs.
        RankFailed: a rank raised anything else, died or hung; no rank is left.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(f"a rank imports the script that started it, which must not start ranks again: {_GUARD}")
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

    def __init__(self, rank: int, process: BaseProcess, pipe: Connection, output: Path) -> None:
        self.rank, self.process, self.output = rank, process, output
        self.last_sign = time.monotonic()
        self.has_begun = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.traceback = ""
        self.waited_for_another = False
        self.has_finished = False
        self.has_ended = False
        """There is nothing more to come from it: only said after all that it had sent was taken in."""
        self._pipe = pipe

    @property
    def has_failed(self) -> bool:
        return self.error is not None or (self.has_ended and not self.has_finished)

    @property
    def is_at_fault(self) -> bool:
        """Whether it failed by itself, rather than because another did."""
        return self.has_failed and not self.waited_for_another

    def pass_on(self, messages: queue.SimpleQueue[tuple[_Process, bytes | None]]) -> None:
        """Put every message into the queue, and None after the last: on a thread, since a message may come slowly."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                if self._pipe not in wait([self._pipe, self.process.sentinel]):
                    break  # it has ended, and nothing is left in the pipe
                messages.put((self, self._pipe.recv_bytes()))
        wait([self.process.sentinel])
        messages.put((self, None))

    def take_in(self, content: bytes | None, on_report: OnReport) -> None:
        """Remember what a message says."""
        if content is None:
            self.has_ended = True
            return
        kind: Kind
        kind, value = pickle.loads(content)
        self.last_sign, self.has_begun = time.monotonic(), True
        if kind == "report":
            on_report(self.rank, value)
        elif kind == "result":
            self.result, self.has_finished = value, True
        elif kind == "error":
            self.error, self.traceback = value["error"], value["traceback"]
            self.waited_for_another = value["is_of_communication"]

    def write_stacks(self) -> None:
        """Have it write where it is, if it still can."""
        if STACKS_SIGNAL is not None and self.process.pid is not None and not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, STACKS_SIGNAL)

    def told(self) -> str:
        """What it wrote, or the end of it."""
        try:
            text = self.output.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        return text if len(text) <= MOST_OUTPUT else f"…{text[-MOST_OUTPUT:]}"

    def waits_for_others(self) -> bool:
        """Whether, by the stacks that it wrote, it waits for other ranks or for its GPU."""
        places = _PLACE.findall(self.told().rpartition(_MAIN_THREAD)[2])
        if not places:
            return False
        file, line = places[0]
        calls = linecache.getline(file, int(line))
        return _LIBRARY in Path(file).as_posix() or any(each in calls for each in (".wait(", "synchronize("))

    def end(self) -> None:
        """Kill it and all that it has started."""
        pid = self.process.pid
        if pid is None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # a rank leads a group of its own, which may outlive it
        elif self.process.is_alive():
            for each in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.kill()  # before it leads a group, or on a system without

    def close(self) -> None:
        self.process.join(JOINING_S)
        self._pipe.close()


class _Ranks:
    """The processes of a job, from their start to the end of the last."""

    def __init__(self, job: Job, on_report: OnReport) -> None:
        self._job, self._on_report = job, on_report
        self._folder = tempfile.TemporaryDirectory(prefix="cs336-ranks-", ignore_cleanup_errors=True)
        self._ranks: list[_Process] = []
        self._readers: list[threading.Thread] = []
        self._messages: queue.SimpleQueue[tuple[_Process, bytes | None]] = queue.SimpleQueue()

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
        for reader in self._readers:
            reader.join(JOINING_S)
        for each in self._ranks:
            each.close()
        self._folder.cleanup()

    def _start(self) -> None:
        try:
            pickled = pickle.dumps(self._job)
        except Exception as error:
            raise UserError(f"the arguments of {self._job.function} cannot be sent: {first_line(error)}") from error
        is_forked = sys.platform == "linux" and len(os.fsencode(tempfile.gettempdir())) <= LONGEST_TEMPORARY
        context = multiprocessing.get_context("forkserver" if is_forked else "spawn")
        if is_forked:
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
            self._ranks.append(_Process(rank, process, reader, output))
            self._readers.append(threading.Thread(target=self._ranks[-1].pass_on, args=[self._messages], daemon=True))
            self._readers[-1].start()

    def results(self) -> list[Any]:
        """Wait for all ranks.

        Raises:
            UserError, RankFailed: see `launch`.
        """
        while not all(each.has_finished for each in self._ranks):
            silent_at = max(each.last_sign for each in self._ranks) + SILENCE_SHARE * self._job.timeout_s
            is_silent = not self._read(silent_at)
            if any(each.has_failed for each in self._ranks):
                self._settle()
                self._fail()
            if is_silent:
                self._fail()
        return [each.result for each in self._ranks]

    def _read(self, until: float) -> bool:
        """Take in what comes next; False if nothing has come until then."""
        try:
            sender, content = self._messages.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return False
        sender.take_in(content, self._on_report)
        return True

    def _settle(self) -> None:
        """Let the others tell of their own end."""
        until = time.monotonic() + SETTLING_S
        while not all(each.has_ended for each in self._ranks) and self._read(until):
            pass

    def _fail(self) -> None:
        """Raise what the user is to know, once nothing runs any more."""
        # In the order in which they were heard of: dictionaries and lists keep it, ranks do not.
        failed = sorted((each for each in self._ranks if each.has_failed), key=lambda each: each.last_sign)
        at_fault = [each for each in failed if each.is_at_fault] or failed
        hung = [] if at_fault else self._hung()
        since_s = time.monotonic() - max(each.last_sign for each in self._ranks)
        for each in self._ranks:
            each.end()
        while not all(each.has_ended for each in self._ranks) and self._read(time.monotonic() + JOINING_S):
            pass
        first = (hung or at_fault)[0]
        if isinstance(first.error, UserError):
            raise first.error
        sentence, signal_name = self._hanging(hung, since_s) if hung else self._failing(first)
        raise RankFailed(sentence, rank=first.rank, signal_name=signal_name, log=self._log(first)) from first.error

    def _hung(self) -> list[_Process]:
        """Of the ranks at work, those that do not wait for others, by what they write; all where none is such."""
        running = [each for each in self._ranks if not each.has_ended and not each.has_finished]
        for each in running:
            each.write_stacks()
        time.sleep(STACKS_S)
        return [each for each in running if not each.waits_for_others()] or running

    def _hanging(self, hung: list[_Process], since_s: float) -> tuple[str, None]:
        names = " and ".join(str(each.rank) for each in hung)
        who = f"rank {names} of {self._job.world_size}" if len(hung) == 1 else f"ranks {names}"
        heard = f"no rank was heard of for {since_s:.0f} s (timeout {self._job.timeout_s:g} s)"
        return f"{who} hung: {heard}{self._others()}", None

    def _failing(self, first: _Process) -> tuple[str, str | None]:
        """What happened to the rank that began it, and the signal it died of."""
        code, signal_name = first.process.exitcode or 0, None
        if first.error is not None:
            what = f"failed with {first_line(first.error)}"
        elif code < 0:
            signal_name = signal.Signals(-code).name
            often = ", as a system does that runs out of memory" if signal_name == "SIGKILL" else ""
            what = f"was killed by {signal_name}{often}"
        elif not first.has_begun:
            what = f"ended with exit status {code} before it began: if it was a script that started it, {_GUARD}"
        else:
            what = f"ended with exit status {code} and without a result"
        return f"rank {first.rank} of {self._job.world_size} {what}{self._others()}", signal_name

    def _others(self) -> str:
        return "; the others were ended" if self._job.world_size > 1 else ""

    def _log(self, first: _Process) -> str:
        """What the ranks wrote, that of the first to fail before the others'."""
        parts = []
        for each in sorted(self._ranks, key=lambda each: each is not first):
            text = each.told() or each.traceback.strip()
            parts.append(f"--- rank {each.rank}\n{text or '(wrote nothing)'}")
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

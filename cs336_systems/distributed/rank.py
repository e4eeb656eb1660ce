"""One rank of a job: what its worker function is given, and the process around it.

    def train(rank: Rank, steps: int) -> float:              # in an importable module
        parameters = …; dist.all_reduce(parameters)          # the process group is there
        rank.report({"step": 1})                             # reaches the parent at once
        return 0.5                                           # `launch` returns a list of these

The process sends every report through a pipe before it goes on, so that whatever ends the rank later, what it had
finished is with the parent. It ends when its parent does, unless it is stopped itself. Its output goes to a file, and
on a signal of the parent it writes there what it is doing, which is how a rank that hangs tells where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from cs336_systems.errors import UserError, unknown_name

BACKENDS = {"gloo": "cpu", "nccl": "cuda"}
"""The kind of device each backend communicates between."""
PATIENCE_S = 86_400.0
"""How long a rank waits in a collective where its parent watches over all of them: longer than the parent does."""
_GLOOS = re.compile(r"gloo/transport/|Gloo connect")
STACKS_SIGNAL = getattr(signal, "SIGUSR1", None)
"""Has a rank write the stacks of its threads; there is none on Windows."""
Kind = Literal["sign", "report", "result", "error"]


@dataclasses.dataclass(frozen=True)
class Rank:
    """One of the processes that work together, as its worker function sees it."""

    rank: int
    world_size: int
    local_rank: int
    """Its number among the ranks of its machine."""
    backend: str
    device: torch.device
    """Where its tensors are: the CPU under Gloo, a GPU of its own under NCCL."""
    send: Callable[[Kind, Any], None] = lambda _kind, _value: None

    def report(self, value: Any) -> None:
        """Give the parent something that is finished and must not be lost; a sign of life, too."""
        self.send("report", value)

    def alive(self) -> None:
        """Say that work goes on: where no rank says so for the launch's timeout, some count as hung."""
        self.send("sign", None)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all ranks are to run."""

    module: str
    function: str
    arguments: tuple[Any, ...]
    world_size: int
    backend: str
    timeout_s: float
    threads: int

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown_name("backend", self.backend, BACKENDS)
        if not self.world_size >= 1:
            raise UserError(f"a job has at least 1 rank, found {self.world_size!r}")
        if not self.timeout_s > 0 or not self.threads >= 1:
            raise UserError(
                f"a job needs a positive timeout and a thread per rank, found {self.timeout_s!r} s, {self.threads!r}"
            )

    @property
    def worker(self) -> Callable[..., Any]:
        """The worker function."""
        found: Any = importlib.import_module(self.module)
        for name in self.function.split("."):
            found = getattr(found, name)
        return found


def require_devices(backend: str, ranks_here: int) -> None:
    """Raise unless this machine has a device for each of its ranks.

    Raises:
        UserError: NCCL without a GPU per rank, or without NCCL; a backend that this PyTorch was built without.
    """
    if backend == "nccl":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if ranks_here > gpus:
            raise UserError(
                f"NCCL needs a GPU for each rank: {ranks_here} ranks on this machine, {gpus} GPUs; "
                f"ask for {gpus} ranks or fewer, or for the backend gloo, which runs on CPUs"
                if gpus
                else f"NCCL needs a GPU for each of {ranks_here} ranks, found none; the backend gloo runs on CPUs"
            )
    if not getattr(dist, f"is_{backend}_available")():
        raise UserError(f"this PyTorch was built without {backend}")


def run_job(job: Job, rank: Rank, store: Store, patience_s: float) -> Any:
    """Run the worker function inside a process group of its own; returns what it returns.

    After an exception the group stays as it is: taking it down would wait for the reductions that are under way.

    Args:
        patience_s: how long a collective may wait for the other ranks.
    """
    with contextlib.ExitStack() as stack:
        if rank.device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(job.threads)
        else:
            torch.cuda.set_device(rank.device)
        dist.init_process_group(
            job.backend,
            store=store,
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=datetime.timedelta(seconds=patience_s),
            device_id=rank.device if rank.device.type == "cuda" else None,
        )
        rank.alive()
        result = job.worker(rank, *job.arguments)
    dist.destroy_process_group()
    return result


def is_of_communication(error: BaseException) -> bool:
    """Whether an error is of the kind that is raised where another rank went away: the fault may be elsewhere."""
    of_library = (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)
    # Gloo raises a plain RuntimeError, with the place in its source.
    return isinstance(error, of_library) or (type(error) is RuntimeError and _GLOOS.search(str(error)) is not None)


# The process ------------------------------------------------------------------------------------------------------


def run_rank(
    pipe: Connection, pickled: bytes, rank: int, rendezvous: str, output: str, environ: Mapping[str, str]
) -> None:
    """The whole life of one process: see the module."""
    _detach(output)
    os.environ.update(environ)
    lock = threading.Lock()

    def send(kind: Kind, value: Any) -> None:
        content = pickle.dumps((kind, value))
        with lock:
            pipe.send_bytes(content)

    try:
        job: Job = pickle.loads(pickled)
        kind = BACKENDS[job.backend]
        device = torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)
        this = Rank(rank, job.world_size, rank, job.backend, device, send)
        this.alive()
        store = FileStore(rendezvous, job.world_size)
        send("result", run_job(job, this, store, PATIENCE_S))
    except BaseException as error:
        traceback.print_exc()
        _send_error(send, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a process group is no more taken down


def _send_error(send: Callable[[Kind, Any], None], error: BaseException) -> None:
    """Tell the parent of an error, as far as it can be sent."""
    told = {"is_of_communication": is_of_communication(error), "traceback": traceback.format_exc()}
    try:
        pickle.loads(pickle.dumps(error))
        send("error", told | {"error": error})
    except Exception:
        send("error", told | {"error": RuntimeError(f"{type(error).__name__}: {error}")})


def _detach(output: str) -> None:
    """A session of its own, so that Ctrl-C is the parent's alone; an end when the parent ends; output in a file."""
    if hasattr(os, "setsid"):
        os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))
    if STACKS_SIGNAL is not None:
        faulthandler.register(STACKS_SIGNAL, file=sys.stderr, all_threads=True)
    faulthandler.enable(file=sys.stderr)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is started by `launch`"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process and all that it started as soon as the parent has ended: nobody would read its answer."""
    wait([sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)

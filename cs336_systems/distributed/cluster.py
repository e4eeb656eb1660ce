"""Ranks that somebody else started: `torchrun` or `srun`, on one machine or several.

    torchrun --nnodes 2 --nproc-per-node 4 … scripts/measure.py collectives --profile h100

Every rank runs the same command. Rank 0 leads: it alone lays out grids, keeps records and prints; wherever it launches
a job, it puts the job where all ranks meet and takes its own part in it. The others follow: they wait for jobs, do
their part, and end when the leader says so. A job of fewer ranks than there are leaves the last ones waiting for the
next.

Who starts the ranks also ends them: where one fails, `torchrun` and `srun --kill-on-bad-exit` end the others. Nobody
sees a rank's signs of life, so that a collective waits no longer than the job's timeout. What the leader reports
arrives at once, what the others report when the job ends, or has failed for the leader.

Source: the environment variables of PyTorch's torchrun (docs: "Torch Distributed Elastic", environment variables) and
of Slurm's srun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from cs336_systems.distributed.rank import BACKENDS, Job, Rank, require_devices, run_job
from cs336_systems.errors import UserError

_TORCHRUN = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "ranks_here": "LOCAL_WORLD_SIZE"}
_SLURM = {
    "rank": "SLURM_PROCID",
    "world_size": "SLURM_NTASKS",
    "local_rank": "SLURM_LOCALID",
    "ranks_here": "SLURM_STEP_TASKS_PER_NODE",
}
_LONGEST_WAIT = datetime.timedelta(days=1)
"""For which a follower waits for the next job: the leader may be measuring something that needs one rank."""
_STOP = b"stop"
_STOPPING_S = 10.0
"""For which the leader waits for followers to hear of it: one that has failed never does."""
_SERVED = "CS336_STORE_IS_SERVED"
"""Told to the leader's own children, as a notebook's kernel is: the store where all ranks meet is there already."""


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks that there are, from one of them."""

    rank: int
    world_size: int
    local_rank: int
    ranks_here: int
    address: str
    port: int


def world(environ: Mapping[str, str] = os.environ) -> World | None:
    """The ranks that this process is one of; None if nobody started it as one.

    Raises:
        UserError: some variables are there and others are not, or are no numbers.
    """
    names = _TORCHRUN if "RANK" in environ else _SLURM
    if "RANK" not in environ and not {"SLURM_PROCID", "MASTER_ADDR"} <= environ.keys():
        return None  # a Slurm job without a place to meet is a batch script's single task
    needed = {field: environ.get(name, "") for field, name in names.items()}
    if names is _SLURM:
        needed["ranks_here"] = _tasks_here(needed["ranks_here"], environ.get("SLURM_NODEID", "0"))
    # One machine, unless told otherwise.
    needed |= {"ranks_here": needed["ranks_here"] or needed["world_size"], "local_rank": needed["local_rank"] or "0"}
    needed["port"] = environ.get("MASTER_PORT", "")
    for field, value in needed.items():
        if not value.isdigit():
            name = {**names, "port": "MASTER_PORT"}[field]
            raise UserError(f"this process was started as one of several ranks, but {name} is {value or 'not set'!r}")
    address = environ.get("MASTER_ADDR")
    if not address:
        raise UserError("this process was started as one of several ranks, but MASTER_ADDR is not set")
    return World(**{field: int(value) for field, value in needed.items()}, address=address)


def _tasks_here(tasks_per_node: str, node: str) -> str:
    """Of Slurm's `4(x2),3`, four tasks on each of two nodes and three on the next, those on this node."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
    counts = [count for count, times in groups for _ in range(int(times or 1))]
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else ""


@functools.cache
def _meeting_place(given: World) -> Store:
    """The store that all ranks know: torchrun's agent keeps it, under srun the leader's command."""
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or _SERVED in os.environ
    store = TCPStore(
        given.address,
        given.port,
        is_master=given.rank == 0 and not is_served,
        timeout=_LONGEST_WAIT,
        wait_for_workers=False,
    )
    return PrefixStore(f"cs336-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def lead(given: World, job: Job, on_report: Callable[[int, Any], object] | None) -> list[Any]:
    """Run a job on the first ranks there are, this one among them; returns what each returned.

    Raises:
        UserError: the job needs more ranks than were started.
    """
    if job.world_size > given.world_size:
        raise UserError(
            f"the job needs {job.world_size} ranks, but {given.world_size} were started: start more, or ask for fewer"
        )
    store = _meeting_place(given)
    number = store.add("jobs", 1)
    store.set(f"job {number}", pickle.dumps(job))  # type: ignore[arg-type]
    take_in = on_report or (lambda _rank, _value: None)
    followers = range(1, job.world_size)
    try:
        results = [_take_part(given, job, number, store, lambda value: take_in(0, value))]
        for rank in followers:
            key = _key(number, "result", rank)
            store.wait([key], datetime.timedelta(seconds=job.timeout_s))
            results.append(pickle.loads(store.get(key)))
    finally:
        for rank in followers:
            for report in range(store.add(_key(number, "reports", rank), 0)):
                take_in(rank, pickle.loads(store.get(_key(number, f"report {report}", rank))))
    return results


def _key(number: int, what: str, rank: int) -> str:
    return f"job {number}, {what} of {rank}"


def follow(given: World) -> None:
    """Do this rank's part of every job, until the leader has no more."""
    store, number = _meeting_place(given), 0
    while True:
        number += 1
        content = store.get(f"job {number}")
        if content == _STOP:
            store.add("stopped", 1)
            return
        job: Job = pickle.loads(content)
        if given.rank >= job.world_size:
            continue

        def report(value: Any, number: int = number) -> None:
            # First the report, then that there is one more.
            count = store.add(_key(number, "reports", given.rank), 0)
            store.set(_key(number, f"report {count}", given.rank), pickle.dumps(value))  # type: ignore[arg-type]
            store.add(_key(number, "reports", given.rank), 1)

        result = _take_part(given, job, number, store, report)
        store.set(_key(number, "result", given.rank), pickle.dumps(result))  # type: ignore[arg-type]


def _take_part(given: World, job: Job, number: int, store: Store, report: Callable[[Any], object]) -> Any:
    def send(what: str, value: Any) -> None:
        if what == "report":
            report(value)

    device = _device(given, job)
    rank = Rank(given.rank, job.world_size, given.local_rank, job.backend, device, send)
    return run_job(job, rank, PrefixStore(f"job {number}", store), job.timeout_s)


def _device(given: World, job: Job) -> torch.device:
    """A rank's own; of a rank that is shown a single GPU, as `srun --gpus-per-task=1` does, that one."""
    kind = BACKENDS[job.backend]
    if kind == "cpu":
        return torch.device(kind)
    if "CUDA_VISIBLE_DEVICES" in os.environ and torch.cuda.device_count() == 1:
        return torch.device(kind, 0)
    require_devices(job.backend, min(given.ranks_here, job.world_size))
    return torch.device(kind, given.local_rank)


@contextlib.contextmanager
def leading_or_following() -> Iterator[bool]:
    """For a command that may run under torchrun or srun: gives whether this process is to do the command's own work.

    A rank that follows does its part of the jobs before the body, which it should then leave; the others are told to
    stop when the leader's body ends, however it ends.
    """
    given = world()
    if given is None:
        yield True
    elif given.rank > 0:
        follow(given)
        yield False
    else:
        store = _meeting_place(given)
        os.environ[_SERVED] = "1"
        try:
            yield True
        except BaseException:
            _stop(store)
            raise
        _stop(store)
        _wait_for_followers(given, store)


def _stop(store: Store) -> None:
    os.environ.pop(_SERVED, None)
    store.set(f"job {store.add('jobs', 1)}", _STOP)  # type: ignore[arg-type]


def _wait_for_followers(given: World, store: Store) -> None:
    """Let all have heard that there is no more, since the store may end with this process."""
    until = time.monotonic() + _STOPPING_S
    while store.add("stopped", 0) < given.world_size - 1 and time.monotonic() < until:
        time.sleep(0.02)

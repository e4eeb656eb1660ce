"""What one rank does where collectives are timed: check every operation once, then time all of them round by round.

Every call stands between two barriers, and every rank times its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from cs336_systems.bench.timing import no_garbage_collection, synchronize
from cs336_systems.distributed.collectives import COLLECTIVES, Buffers, exchange
from cs336_systems.distributed.rank import Rank
from cs336_systems.errors import UserError

if TYPE_CHECKING:
    from cs336_systems.experiments.collectives import Case

ONE_WAY, BOTH_WAYS, ALL_AT_ONCE, ALL_WHOLE = "one way", "both ways", "all at once", "all at once, whole"
"""The messages of a round: of s/N bytes from rank 0 to 1; between them; from each rank to its right; so of s bytes."""
SIGN_S = 1.0
"""A rank that was longer than this in a call says that it is at work."""


def take_part(rank: Rank, case: Case) -> None:
    """What each rank does: check every operation once, then time all of them round by round."""
    buffers = Buffers.of(case.length, case.world_size, rank.device, scratch=case.scratch_length)
    calls: dict[str, Callable[[], object]] = {}
    for name in case.messages:
        calls[name] = partial(_message, name, buffers)
    for name in case.operations:
        try:
            require_right(name, buffers, rank)
            calls[name] = partial(COLLECTIVES[name], buffers)
        except UserError as error:
            rank.report({"skipped": name, "reason": str(error)})
    with no_garbage_collection():
        for number in range(case.warmup + case.rounds):
            times = {name: timed_ms(call, buffers, rank) for name, call in calls.items()}
            if rank.rank > 1:
                times = {name: ms for name, ms in times.items() if name not in (ONE_WAY, BOTH_WAYS)}
            rank.report({"round": number, "ms": times})


def _message(name: str, buffers: Buffers) -> None:
    """One message of every rank that takes part: to its right, and at the same time from its left."""
    rank, chunk = dist.get_rank(), buffers.part.numel()
    if name == ALL_WHOLE:
        exchange(buffers.whole, buffers.scratch[: buffers.whole.numel()])
    elif name == ALL_AT_ONCE:
        exchange(buffers.part, buffers.whole[:chunk])
    elif rank < 2:
        sends = name == BOTH_WAYS or rank == 0
        receives = name == BOTH_WAYS or rank == 1
        messages = [dist.P2POp(dist.isend, buffers.part, 1 - rank)] if sends else []
        messages += [dist.P2POp(dist.irecv, buffers.whole[:chunk], 1 - rank)] if receives else []
        for work in dist.batch_isend_irecv(messages):
            work.wait()


def timed_ms(call: Callable[[], object], buffers: Buffers, rank: Rank) -> float:
    """One call between two barriers, as this rank sees it; sums do not grow from one to the next."""
    fill(buffers, rank)
    synchronize(rank.device.type)
    dist.barrier()
    start = time.perf_counter_ns()
    call()
    synchronize(rank.device.type)
    elapsed_ns = time.perf_counter_ns() - start
    dist.barrier()  # those that are done first would take the others' cores, or memory
    if elapsed_ns > SIGN_S * 1e9:
        rank.alive()
    return elapsed_ns / 1e6


def fill(buffers: Buffers, rank: Rank) -> None:
    """Every number is the rank's own, counted from 1."""
    buffers.whole.fill_(rank.rank + 1)
    buffers.part.fill_(rank.rank + 1)


def require_right(name: str, buffers: Buffers, rank: Rank) -> None:
    """Run an operation once, and see that it did what it is called.

    Raises:
        UserError: the backend does not have it.
        RuntimeError: its result is another.
    """
    fill(buffers, rank)
    COLLECTIVES[name](buffers)
    summed = rank.world_size * (rank.world_size + 1) // 2
    result = buffers.part if name == "reduce_scatter" else buffers.whole
    rows, expected = [result], [1 if name == "broadcast" else summed]
    if name == "all_gather":
        rows, expected = list(result.chunk(rank.world_size)), list(range(1, rank.world_size + 1))
    for row, value in zip(rows, expected, strict=True):
        least, most = (float(each) for each in row.aminmax())
        if not least == most == value:
            raise RuntimeError(f"{name} gave {least:g} to {most:g} on rank {rank.rank} where {value} is right")

"""What ranks do in the tests of collectives; a module of its own, since a rank is another process."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from cs336_systems.distributed.collectives import (
    COLLECTIVES,
    Buffers,
    alternate_ring_all_reduce,
    ring_all_reduce,
    scratch_elements,
)
from cs336_systems.distributed.rank import Rank
from cs336_systems.errors import UserError
from cs336_systems.experiments import collectives_ranks
from cs336_systems.experiments.collectives import Case

REDUCES = {"ring": ring_all_reduce, "alternate ring": alternate_ring_all_reduce}


def drawn(rank: int, length: int, *, whole: bool) -> torch.Tensor:
    """What a rank begins with; whole numbers are summed without rounding, whatever the order."""
    generator = torch.Generator().manual_seed(rank)
    if whole:
        return torch.randint(-1000, 1000, (length,), generator=generator).float()
    return torch.randn(length, generator=generator)


def reduce_lengths(rank: Rank, operation: str, lengths: list[int], whole: bool) -> list[tuple[Any, Any, int]]:
    """Of each length the result, the library's, and the bytes that this rank sent."""
    sent = 0
    original = dist.batch_isend_irecv

    def counted(messages: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        sent += sum(message.tensor.nbytes for message in messages if message.op is dist.isend)
        return original(messages)

    found = []
    for length in lengths:
        ours = drawn(rank.rank, length, whole=whole)
        library = ours.clone()
        before, sent = ours.data_ptr(), 0
        with patch.object(dist, "batch_isend_irecv", counted):
            REDUCES[operation](ours)
        assert ours.data_ptr() == before
        dist.all_reduce(library)
        found.append((ours.tolist(), library.tolist(), sent))
    return found


def reduce_transposed(rank: Rank, operation: str) -> tuple[Any, Any]:
    """Of a tensor that does not lie in a row, with a gradient: the result, and what it is a view of."""
    matrix = (torch.arange(12.0) * (rank.rank + 1)).view(3, 4)
    parameter = torch.nn.Parameter(matrix).t()
    REDUCES[operation](parameter)
    return parameter.tolist(), matrix.tolist()


def run_named(rank: Rank, names: list[str], length: int) -> dict[str, tuple[Any, Any]]:
    """Whole and part after each collective by its name, each rank's numbers begin at a hundred times its own."""
    found = {}
    for name in names:
        scratch = scratch_elements(name, length, rank.world_size)
        buffers = Buffers.of(length, rank.world_size, rank.device, scratch=scratch)
        buffers.whole.copy_(torch.arange(length) + 100 * rank.rank)
        buffers.part.fill_(rank.rank + 1)
        COLLECTIVES[name](buffers)
        found[name] = (buffers.whole.tolist(), buffers.part.tolist())
    return found


def refuse(*_: object) -> None:
    raise RuntimeError("ProcessGroupGloo does not support reduce_scatter")


def run_without_reduce_scatter(rank: Rank) -> str:
    """What is told where the library says that it does not have it."""

    buffers = Buffers.of(4, rank.world_size, rank.device, scratch=0)
    try:
        with patch.object(dist, "reduce_scatter_tensor", refuse):
            COLLECTIVES["reduce_scatter"](buffers)
    except UserError as error:
        return str(error)
    return ""


def reduce_with_short_scratch(rank: Rank, operation: str) -> None:
    """Of eight elements."""
    REDUCES[operation](torch.zeros(8, device=rank.device), torch.zeros(1, device=rank.device))


# In the place of the experiment's own worker ---------------------------------------------------------------------


def find_a_wrong_result(rank: Rank, case: Case) -> None:
    """An all-reduce that does nothing."""
    with patch.object(dist, "all_reduce", lambda _: None):
        collectives_ranks.take_part(rank, case)


def fail_after_rounds(rank: Rank, case: Case) -> None:
    """A warm-up and a measured round, then one rank fails once all have come so far."""
    for number in range(case.warmup + 1):
        rank.report({"round": number, "ms": {"all_reduce": 1.5}})
    dist.barrier()
    if rank.rank == 0:
        raise RuntimeError("broken on purpose")


def be_killed(rank: Rank, case: Case) -> None:
    """As by a system that runs out of memory."""
    if rank.rank == case.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def take_part_without_reduce_scatter(rank: Rank, case: Case) -> None:
    """As with an old library."""
    with patch.object(dist, "reduce_scatter_tensor", refuse):
        collectives_ranks.take_part(rank, case)


def bytes_of_buffers(rank: Rank, length: int, scratch: int) -> int:
    """Of the arrays that a rank allocates."""
    buffers = Buffers.of(length, rank.world_size, rank.device, scratch=scratch)
    return sum(each.nbytes for each in (buffers.whole, buffers.part, buffers.scratch))

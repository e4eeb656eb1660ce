"""What ranks do in the test of a recorded step: communicate after computing, and while they compute."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from cs336_systems.distributed.rank import Rank
from cs336_systems.profiling.overlap import Overlap, read_overlap
from cs336_systems.profiling.ranges import named_range
from cs336_systems.profiling.recorder import record_trace

WAYS = ("after", "during")


def recorded(rank: Rank, folder: str) -> dict[str, Overlap]:
    """Of a reduction after the products and of one begun before them, what a trace tells."""
    found = {}
    for way in WAYS:
        path = Path(folder) / f"{way}-{rank.rank}.json"
        gradients, x = torch.ones(4_000_000), torch.ones(400, 400)
        with record_trace(path, "cpu"):
            dist.barrier()
            with named_range("step"):
                work = dist.all_reduce(gradients, async_op=True) if way == "during" else None
                for _ in range(40):
                    torch.mm(x, x)
                if work is None:
                    dist.all_reduce(gradients)
                else:
                    work.wait()
        rank.alive()
        found[way] = read_overlap(path, "step")
    return found

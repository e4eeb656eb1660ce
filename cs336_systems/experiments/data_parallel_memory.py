"""Which wrappers have room beside one another, from a plan made before anything is built.

Of one set of gradients, g bytes of float32, a rank holds at its peak at least:

    every wrapper                 weights, gradients and two moments of AdamW: 4 g
    flat, overlapped, bucketed    g more while their gradients are on their way, one wrapper after the other
    torch                         g more from its construction on, while the others take their turns too

The check before the first step holds the expected gradients, g, and no moments yet: weights, gradients and those are
3 g, so that the steps need more. Activations come on top of it all, and what somebody else's wrapper takes.

Where not all fit, PyTorch's wrapper is left out first, then those that need a buffer: the others are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cs336_systems.analysis import flops
from cs336_systems.bench.report import bytes_in_words, plural
from cs336_systems.bench.sweep import OutOfMemory

if TYPE_CHECKING:
    from cs336_systems.experiments.data_parallel import Case

KEEPS_BUCKETS = ("torch",)
WITH_BUFFERS = ("flat", "overlapped", "bucketed")


def gradient_bytes(case: Case) -> int:
    """Of the gradients of all parameters."""
    return torch.float32.itemsize * sum(flops.parameters(case.config).values())


def planned_bytes(case: Case, wrappers: Sequence[str]) -> int:
    """What these wrappers need at least where they take turns: on a CPU of all ranks, else of one."""
    gradients = gradient_bytes(case)
    checking = flops.resident_bytes(case.config, "forward-backward") + gradients
    stepping = flops.resident_bytes(case.config, "step")
    buffers = sum(any(name in group for name in wrappers) for group in (KEEPS_BUCKETS, WITH_BUFFERS))
    return _sharing(case) * (max(checking, stepping) + buffers * gradients)


def without_room(case: Case, available_bytes: int) -> Mapping[str, str]:
    """The wrappers of a case that do not fit, with the reason.

    Raises:
        OutOfMemory: none fits; with what is needed at least, and what there is.
    """
    kept = list(dict.fromkeys(case.wrappers))
    reasons: dict[str, str] = {}
    for group in (KEEPS_BUCKETS, WITH_BUFFERS, kept.copy()):
        needed = planned_bytes(case, kept)
        if needed <= available_bytes:
            break
        told = (
            f"weights, gradients, optimizer state and the gradients on their way of {plural(_sharing(case), 'rank')} "
            f"need at least {bytes_in_words(needed)}, and {bytes_in_words(available_bytes)} are available"
        )
        reasons |= dict.fromkeys((name for name in kept if name in group), told)
        kept = [name for name in kept if name not in group]
    if not kept:
        least = bytes_in_words(min(planned_bytes(case, [name]) for name in case.wrappers))
        raise OutOfMemory(
            f"weights, gradients, optimizer state and the gradients on their way of {plural(_sharing(case), 'rank')} "
            f"need at least {least}, and {bytes_in_words(available_bytes)} are available: take a smaller size"
        )
    return reasons


def _sharing(case: Case) -> int:
    """How many ranks share what is available."""
    return case.world_size if case.device == "cpu" else 1

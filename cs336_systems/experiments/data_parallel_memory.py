"""Which wrappers have room beside one another, from a plan made before anything is built.

Of one set of gradients, g bytes of float32, a rank holds at its peak at least the largest of:

    the check, expected       forward and backward of the whole batch in one process, before there are any moments
    the check, each wrapper   the same of the rank's own part of the batch, and the expected gradients: g more
    a step                    of the rank's own part, with two moments of AdamW
    a step's end              weights, gradients and moments, 4 g, and of flat, overlapped and bucketed the gradients on
                              their way, g more; by then the activations are gone

and throughout g more of torch, from its construction on, while the others take their turns too. Steps are planned
(`analysis/footprint.py`); where one cannot be, its weights, gradients and moments are counted. What somebody else's
wrapper takes is in none of this.

Where not all fit, PyTorch's wrapper is left out first, then those that need a buffer: the others are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cs336_systems.analysis import flops
from cs336_systems.bench.report import bytes_in_words, plural
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.experiments.transformer_step import checked_phase, plan_of
from cs336_systems.step import StepConfig

if TYPE_CHECKING:
    from cs336_systems.experiments.data_parallel import Case

KEEPS_BUCKETS = ("torch",)
WITH_BUFFERS = ("flat", "overlapped", "bucketed")


def gradient_bytes(case: Case) -> int:
    """Of the gradients of all parameters."""
    return torch.float32.itemsize * sum(flops.parameters(case.config).values())


def planned_bytes(case: Case, wrappers: Sequence[str], gpu: str | None = None) -> int:
    """What one rank holds at least where these wrappers take turns.

    `gpu`: whose plan, for ranks on GPUs, by its key; by default this machine's.
    """
    gradients, own = gradient_bytes(case), case.step_of_rank
    kept, passing = (gradients * any(name in group for name in wrappers) for group in (KEEPS_BUCKETS, WITH_BUFFERS))
    moments = (
        _step_bytes(own.as_step(phase="forward-backward", batch_size=case.batch_size), gpu),
        _step_bytes(own.as_step(phase="forward-backward"), gpu) + gradients,
        _step_bytes(own.as_step(phase="step"), gpu),
        flops.resident_bytes(case.config, "step") + passing,
    )
    return max(moments) + kept


def _step_bytes(chosen: StepConfig, gpu: str | None) -> int:
    plan = plan_of(chosen, gpu)
    held = flops.resident_bytes(chosen.config, checked_phase(chosen))
    return held if plan is None else plan.peak_allocated_bytes


def without_room(case: Case, available_bytes: int) -> Mapping[str, str]:
    """The wrappers of a case that do not fit, with the reason.

    Raises:
        OutOfMemory: none fits; with what is needed at least, and what there is.
    """
    sharing = case.world_size if case.device == "cpu" else 1  # ranks that share what is available

    def told(needed: int) -> str:
        return (
            f"{plural(sharing, 'rank')} would hold at least {bytes_in_words(needed)} at once ({needed:,} bytes of "
            "weights, activations, gradients also on their way, and optimizer state), and "
            f"{bytes_in_words(available_bytes)} are available"
        )

    kept = list(dict.fromkeys(case.wrappers))
    reasons: dict[str, str] = {}
    for group in (KEEPS_BUCKETS, WITH_BUFFERS, kept.copy()):
        needed = sharing * planned_bytes(case, kept)
        if needed <= available_bytes:
            break
        reasons |= dict.fromkeys((name for name in kept if name in group), told(needed))
        kept = [name for name in kept if name not in group]
    if not kept:
        least = sharing * min(planned_bytes(case, [name]) for name in case.wrappers)
        raise OutOfMemory(f"{told(least)}: take a smaller size, a shorter context or a smaller batch")
    return reasons

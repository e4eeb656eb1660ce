"""The operators of one of the workbook's steps, by stage: forward, loss, backward, optimizer.

    stages = stages_of(StepConfig(…, device="cuda", compile="model"))
    sum(operator.flops * times for stage in stages for operator, times in stage.operators.items())

Counted on fake tensors of the CPU (`analysis/operators.py`) by the very `build_step` that is timed elsewhere; for a
CUDA device under CUDA's rules of autocast (`analysis/cuda_autocast.py`). Blocks are equal, so that one depth more adds
one block, wherever it stands: a deep model is counted from its first two depths, exactly.

With `compile`, what lies between two products of the model is one kernel. The loss and the optimizer are called as
they are written, since only the model is compiled; of backward, what comes before its first product is the loss's.
Blocks compiled one by one are counted as the whole: their borders lie in the residual stream, which is in memory
between any two products anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from cs336_systems.analysis.allocations import told_plainly
from cs336_systems.analysis.cuda_autocast import cuda_rules
from cs336_systems.analysis.operators import Call, Operator, Trace, fake_tensors, fused, trace
from cs336_systems.errors import UserError
from cs336_systems.kept import kept
from cs336_systems.step import StepConfig, build_step

COUNTED_ATTENTION = ("reference",)
"""Whose operators are the same on every device."""
_STAGES = MappingProxyType(
    {
        "inference": ("forward",),
        "forward": ("forward",),
        "forward-backward": ("forward", "loss", "backward"),
        "step": ("forward", "loss", "backward", "optimizer"),
    }
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a step, and how often it calls each kind of operator."""

    name: str
    operators: Mapping[Operator, int]

    @property
    def launches(self) -> int:
        return sum(operator.launches * times for operator, times in self.operators.items())

    @property
    def host_steps(self) -> int:
        return sum(operator.host_steps * times for operator, times in self.operators.items())

    @property
    def flops(self) -> int:
        return sum(operator.flops * times for operator, times in self.operators.items())

    @property
    def bytes(self) -> int:
        return sum(operator.bytes * times for operator, times in self.operators.items())


def stages_of(chosen: StepConfig) -> tuple[Stage, ...]:
    """What a step calls, stage by stage in its order. Counted once per checkout, and kept (`kept.py`).

    Raises:
        UserError: an attention whose kernels are not those of a CPU's fake tensors; checkpoints whose work is no
            multiple of the number of blocks; somebody else's model that cannot be run on such tensors.
    """
    if chosen.checkpointing not in ("none", "every-1", "selective") and chosen.model is None and chosen.num_layers > 2:
        raise UserError(
            f"how often blocks run under checkpointing {chosen.checkpointing} is no multiple of their number, from "
            "which operators are counted: expected none, every-1 or selective"
        )
    if chosen.attention not in COUNTED_ATTENTION:
        raise UserError(
            f"the operators of attention {chosen.attention!r} depend on the device and cannot be counted without it: "
            f"expected {' or '.join(COUNTED_ATTENTION)}"
        )
    # A case of an experiment has further fields, which are no part of the step; and neither how products round nor
    # what is compiled changes the trace.
    phase = "inference" if chosen.phase == "inference" else "step"
    whole = chosen.as_step(phase=phase, float32_matmul="highest", compile="none")
    counted = _counted(whole)
    stages = counted.eager if chosen.compile == "none" else counted.compiled
    by_name = {stage.name: stage for stage in stages}
    return tuple(by_name[name] for name in _STAGES[chosen.phase])


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The stages of one trace, as it is and with its model compiled."""

    eager: tuple[Stage, ...]
    compiled: tuple[Stage, ...]


@functools.lru_cache(maxsize=256)
def _counted(chosen: StepConfig) -> _Counted:
    """Of any depth, from those of one block and of two, where the blocks are known to be equal."""
    if chosen.model is not None:  # its source is not ours to watch
        return _count(chosen)
    if chosen.num_layers <= 2:
        described = dataclasses.asdict(chosen)
        return _from_plain(kept("step_operators", described, lambda: _to_plain(_count(chosen))))
    one, two = (_counted(dataclasses.replace(chosen, num_layers=depth)) for depth in (1, 2))
    deeper = functools.partial(_deeper, depth=chosen.num_layers)
    return _Counted(tuple(map(deeper, one.eager, two.eager)), tuple(map(deeper, one.compiled, two.compiled)))


def _count(chosen: StepConfig) -> _Counted:
    traced, names = _trace(chosen), _STAGES[chosen.phase]
    return _Counted(_stages(names, traced), _stages(names, _compiled(traced)))


def _to_plain(counted: _Counted) -> dict[str, Any]:
    """As JSON can hold it."""
    return {
        way: [
            {"name": stage.name, "operators": [[dataclasses.asdict(kind), n] for kind, n in stage.operators.items()]}
            for stage in getattr(counted, way)
        ]
        for way in ("eager", "compiled")
    }


def _from_plain(plain: dict[str, Any]) -> _Counted:
    ways = {
        way: tuple(
            Stage(stage["name"], MappingProxyType({Operator(**kind): n for kind, n in stage["operators"]}))
            for stage in stages
        )
        for way, stages in plain.items()
    }
    return _Counted(**ways)


def _deeper(one: Stage, two: Stage, depth: int) -> Stage:
    """The stage at `depth` blocks: with every block come the operators in which two blocks differ from one.

    An operator over all parameters at once, as a fused optimizer is, is called as often at any depth and moves more.
    """
    further = depth - 1
    kinds = dict.fromkeys((*two.operators, *one.operators))
    times = {
        kind: one.operators.get(kind, 0) + further * (two.operators.get(kind, 0) - one.operators.get(kind, 0))
        for kind in kinds
    }
    for kind in one.operators.keys() - two.operators.keys():
        grown = next(each for each in two.operators if each.name == kind.name and each not in one.operators)
        read, written = (getattr(grown, name) - getattr(kind, name) for name in ("read_bytes", "written_bytes"))
        deeper = dataclasses.replace(
            kind, read_bytes=kind.read_bytes + further * read, written_bytes=kind.written_bytes + further * written
        )
        times[deeper] = one.operators[kind]
        times[kind] = times[grown] = 0
    return Stage(one.name, MappingProxyType({kind: count for kind, count in times.items() if count}))


def _stages(names: Sequence[str], traced: Trace) -> tuple[Stage, ...]:
    counted: dict[str, Counter[Operator]] = {name: Counter() for name in names}
    for call in traced.calls:
        if call.ranges and call.ranges[0] in counted:  # clearing gradients launches nothing
            counted[call.ranges[0]][call.operator] += 1
    return tuple(Stage(name, MappingProxyType(dict(operators))) for name, operators in counted.items())


def _compiled(traced: Trace) -> Trace:
    """The trace with the model's part of it fused."""
    of_model = {id(call) for call in _calls_of_model(traced.calls)}
    return fused(traced, lambda call: id(call) in of_model)


def _calls_of_model(calls: Sequence[Call]) -> list[Call]:
    """All of forward; of backward, all from its first product on."""
    forward = [call for call in calls if call.ranges[:1] == ("forward",)]
    backward = [call for call in calls if call.ranges[:1] == ("backward",)]
    first = next((place for place, call in enumerate(backward) if call.is_product), len(backward))
    return forward + backward[first:]


def _trace(chosen: StepConfig) -> Trace:
    """One step on fake tensors of a CPU, under the rules of its device."""
    rules = cuda_rules() if chosen.device == "cuda" else contextlib.nullcontext()
    on_cpu = dataclasses.replace(chosen, device="cpu")
    with rules, told_plainly(chosen), fake_tensors():
        step = build_step(on_cpu)
        if chosen.phase == "step":  # the state, which the first step alone makes
            for parameter in step.model.parameters():
                parameter.grad = torch.empty_like(parameter)
            step.optimizer.step()
        return trace(step)

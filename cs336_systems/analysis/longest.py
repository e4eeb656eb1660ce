"""The longest context, or the largest batch, whose step fits on a device.

    found = longest_context(StepConfig(...), "h200")
    found.value, found.plan.peak_allocated_bytes, found.next_fails_at

Which operators run does not depend on how long a sequence is, and every tensor's size is a polynomial in it: of second
degree at most, since scores have two lengths. So a step is followed at three lengths, every allocation's size at any
other length is what the parabola through its three says, in whole numbers, and a search replays the allocator alone.
The same holds of the batch, which no tensor has twice.

That this holds is checked at the three, and once more at the length that is found. A module that decides by the length
has to be planned length by length (`footprint.plan_step`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch

from cs336_systems.analysis.allocations import Allocation, Event, record_step
from cs336_systems.analysis.flops import resident_bytes
from cs336_systems.analysis.footprint import Footprint, first_failure, replay
from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.step import PHASES, StepConfig

Axis = Literal["context", "batch"]
FIELDS = {"context": "context_length", "batch": "batch_size"}
# Unlike any dimension of the known sizes, so that no two of a tensor's dimensions agree by chance.
_NODES = {"context": (48, 80, 112), "batch": (2, 3, 5)}
MOST = 2**24
"""No search goes further: a context beyond sixteen million tokens is a mistake."""


class NothingFits(UserError):
    """Not even a length of one."""


@dataclasses.dataclass(frozen=True)
class Longest:
    """What fits, and where the next does not."""

    axis: Axis
    value: int
    plan: Footprint
    next_fails_at: str

    def step_of(self, chosen: StepConfig) -> StepConfig:
        """`chosen` with what was found."""
        return _with_length(chosen, self.axis, self.value)


class Growth:
    """The allocations of a step at any length of one axis."""

    def __init__(self, chosen: StepConfig, axis: Axis) -> None:
        """Follow the step at three lengths.

        Raises:
            UserError: the operators differ between lengths; as `record_step`.
        """
        self.nodes = _NODES[axis]
        recorded = [tuple(record_step(_with_length(chosen, axis, node)).events) for node in self.nodes]
        if len({_structure(events) for events in recorded}) > 1:
            raise _depends(axis)
        self.events = recorded[0]
        sizes = zip(*(_sizes(events) for events in recorded), strict=True)
        self._parabolas = dict(zip(_births(self.events), (_parabola(self.nodes, each) for each in sizes), strict=True))

    def at(self, length: int) -> tuple[Event, ...]:
        """The events of a step at `length`."""
        # Constructors by position: a search makes millions of these.
        made: dict[int, Allocation] = {}
        events = []
        for event in self.events:
            old = event.allocation
            if old is None:
                events.append(event)
                continue
            if event.is_birth:
                size = self._parabolas[id(old)].at(length)
                made[id(old)] = Allocation(size, old.operator, old.ranges, old.kind)
            events.append(Event(made[id(old)], event.is_birth))
        return tuple(events)


def longest_context(chosen: StepConfig, gpu: str) -> Longest:
    """The longest context of a step that fits on a GPU, to the token; the context of `chosen` is not looked at.

    Raises:
        NothingFits: not even one token does.
        UserError: an unknown GPU; a choice that cannot be followed.
    """
    return _largest(chosen, "context", gpu)


def largest_batch(chosen: StepConfig, gpu: str) -> Longest:
    """The largest batch of a step that fits on a GPU; the batch of `chosen` is not looked at.

    Raises:
        UserError: as `longest_context`.
    """
    return _largest(chosen, "batch", gpu)


@functools.lru_cache(maxsize=8)
def _growth(chosen: StepConfig, axis: Axis) -> Growth:
    return Growth(chosen, axis)


def _largest(chosen: StepConfig, axis: Axis, gpu: str) -> Longest:
    peaks = gpu_peaks(gpu)
    if axis not in FIELDS:
        raise unknown_name("axis", axis, FIELDS)
    if chosen.model is None and _held(chosen) > peaks.usable_bytes:
        raise _nothing_fits(axis, gpu, "the parameters and what comes with each")
    # Whatever was not to be looked at is made the same, so that it is not followed again.
    growth = _growth(_with_length(dataclasses.replace(chosen, device="cpu"), axis, 1), axis)

    def failure(length: int) -> str | None:
        return first_failure(growth.at(length), peaks.usable_bytes, peaks.cublas_workspace_bytes)

    if (fails_at := failure(1)) is not None:
        raise _nothing_fits(axis, gpu, fails_at or "the parameters")
    fits, too_long = 1, 2
    while (fails_at := failure(too_long)) is None:
        fits, too_long = too_long, 2 * too_long
        if fits >= MOST:
            raise UserError(f"a {axis} of {fits} still fits on {gpu}: there is no longest to be found")
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        found = failure(middle)
        if found is None:
            fits = middle
        else:
            too_long, fails_at = middle, found
    _require_as_grown(chosen, axis, fits, growth)
    return Longest(axis, fits, replay(growth.at(fits), gpu), fails_at)


def _require_as_grown(chosen: StepConfig, axis: Axis, length: int, growth: Growth) -> None:
    """Follow the step once at the length that was found: a module may decide by lengths that were not tried.

    Raises:
        UserError: it allocates something else than the parabolas say.
    """
    direct = tuple(record_step(_with_length(chosen, axis, length)).events)
    grown = growth.at(length)
    if (_structure(direct), _sizes(direct)) != (_structure(grown), _sizes(grown)):
        raise _depends(axis)


def _depends(axis: Axis) -> UserError:
    return UserError(
        f"what is allocated is no polynomial of the {axis} here, so that the longest cannot be searched for: plan "
        "single ones, as with --context and --batch"
    )


def _held(chosen: StepConfig) -> int:
    """What our model holds whatever the length, without following it."""
    phase = next(phase for phase in PHASES if phase == chosen.phase)
    return resident_bytes(chosen.config, phase, itemsize=getattr(torch, chosen.dtype).itemsize)


def _nothing_fits(axis: Axis, gpu: str, ends_in: str) -> NothingFits:
    return NothingFits(
        f"not even a {axis} of 1 fits on {gpu}, which can give {gpu_peaks(gpu).usable_bytes / 2**30:.1f} GiB: memory "
        f"ends in {ends_in}. Take a smaller size, a larger GPU or another phase"
    )


def _with_length(chosen: StepConfig, axis: Axis, length: int) -> StepConfig:
    """The step of `chosen`, and nothing else that a case may say, at another length."""
    return chosen.as_step(**{FIELDS[axis]: length})


def _births(events: tuple[Event, ...]) -> list[int]:
    return [id(event.allocation) for event in events if event.is_birth]


def _sizes(events: tuple[Event, ...]) -> list[int]:
    return [event.allocation.requested_bytes for event in events if event.is_birth and event.allocation is not None]


def _structure(events: tuple[Event, ...]) -> tuple[tuple[int, bool, str, str], ...]:
    """Births and deaths by the order of births, without sizes."""
    order: dict[int, int] = {}
    return tuple(
        (
            order.setdefault(id(event.allocation), len(order)),
            event.is_birth,
            event.mark,
            event.allocation.operator if event.allocation is not None else "",
        )
        for event in events
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Parabola:
    """(c₀ + c₁·x + c₂·x²) / divisor, in whole numbers."""

    constant: int
    linear: int
    square: int
    divisor: int

    def at(self, x: int) -> int:
        return (self.constant + x * (self.linear + x * self.square)) // self.divisor


def _parabola(nodes: tuple[int, int, int], values: tuple[int, ...]) -> _Parabola:
    """The parabola through three points, by Newton's divided differences."""
    (x0, x1, x2), (y0, y1, y2) = nodes, values
    divisor = (x1 - x0) * (x2 - x1) * (x2 - x0)
    first = (y1 - y0) * (x2 - x1) * (x2 - x0)  # the slopes, times the divisor
    second = (y2 - y1) * (x1 - x0) - (y1 - y0) * (x2 - x1)
    return _Parabola(
        constant=y0 * divisor - first * x0 + second * x0 * x1,
        linear=first - second * (x0 + x1),
        square=second,
        divisor=divisor,
    )

"""One device's allocations over time and where each was made, whoever recorded them.

A CUDA memory snapshot and a trace of PyTorch's profiler are both read into this: `live_memory.summarise` answers from
it, and the tables and the figure are drawn of it. What a source does not have is None.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cs336_systems.errors import UserError, unknown_name
from cs336_systems.profiling.stacks import Stack
from cs336_systems.profiling.timeline import Timeline

Device = int | Literal["cpu"]
"""A GPU by its number, or the CPU."""

Unit = Literal["line", "function", "operator"]
"""What an allocation is put down to: the line that ran, the function with its first line, or range and operator."""


class Stacks(Protocol):
    """Stacks by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Stack: ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MemoryHistory:
    """What was allocated on one device."""

    path: Path
    device: Device
    other_devices: tuple[Device, ...]
    """Devices that the file tells of too."""
    timeline: Timeline
    """Its labels are the places that allocations are put down to."""
    stacks: NDArray[np.int32]
    """Of every allocation of the timeline: its stack, as a number for `stack`."""
    known_stacks: Stacks
    events: int
    unit: Unit
    knows_before: bool = True
    """Whether what was live before the first event is known. If not, the timeline begins with what frees tell of it."""
    rounds_up: bool = False
    """Whether sizes are what the allocator gave, and not what it was asked for."""
    peak_reserved_bytes: int | None = None
    missing_from_segments: int | None = None
    """Bytes that are left allocated and that the allocator's segments do not have."""
    out_of_memory: int = 0
    """How many allocations failed for want of memory."""
    damaged: int = 0
    """Events that were left out because they make no sense."""

    def stack(self, allocation: int) -> Stack:
        """Where an allocation was made, from the innermost frame out; empty where that was not recorded."""
        number = int(self.stacks[allocation])
        return self.known_stacks[number] if number >= 0 else ()

    def calls(self, allocation: int) -> tuple[int, ...] | None:  # noqa: ARG002 (of those that know them)
        """For each frame of the stack a number that only this call of it has; None where calls are not known."""
        return None

    def place(self, allocation: int) -> str:
        """The line, function or operator that an allocation is put down to."""
        return self.timeline.labels[int(self.timeline.label[allocation])]

    def within(self, name: str) -> Self:
        """What happened while the range called `name` was open, the first time, as if that alone had been recorded.

        Raises:
            UserError: there is no such range.
        """
        timeline = self.timeline
        phase = next((phase for phase in timeline.phases if phase.name == name), None)
        if phase is None:
            raise unknown_name("range", name, dict.fromkeys(phase.name for phase in timeline.phases))
        part = timeline.within(phase)
        return dataclasses.replace(
            self, timeline=part, events=len(part.change), **self._columns_of(timeline.allocated_in(phase))
        )

    def _columns_of(self, allocations: NDArray[np.int64]) -> dict[str, Any]:
        """Of some allocations the fields that have an entry for each."""
        return {"stacks": self.stacks[allocations]}

    @cached_property
    def freed_from_before(self) -> int:
        """Bytes that are freed and were not allocated here."""
        return -int(self.timeline.change[self.timeline.unmatched].sum())


def device_named(text: str) -> Device:
    """A device as users write it.

    Raises:
        UserError: it is neither the CPU nor a GPU's number.

    >>> device_named("cpu"), device_named("1"), device_named("cuda:1")
    ('cpu', 1, 1)
    """
    if text == "cpu":
        return "cpu"
    if found := re.fullmatch(r"(?:cuda:)?(\d{1,9})", text):
        return int(found[1])
    raise UserError(f"unknown device {text!r}: expected cpu, or the number of a GPU such as 0 or cuda:0")

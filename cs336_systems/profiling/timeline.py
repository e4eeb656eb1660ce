"""What is live at each moment, from a list of bytes that came and went.

    timeline = timeline_of_changes([Change(0, 512, "linear"), Change(5, -512, "linear")])
    timeline.peak_bytes, timeline.live_at_peak()

Where the changes come from does not matter: the events of a CUDA memory snapshot, or the memory events of PyTorch's
profiler on a CPU. `outline.py` has what is drawn of it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Change:
    """Bytes that came (positive) or went (negative) at a time, of whatever is called `name`."""

    time_us: float
    bytes: int
    name: str
    address: int | None = None
    """Tells which allocation is freed; without it, the youngest of that name and size is."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A named stretch of time; its end is None where it was still open. Phases within it are deeper."""

    name: str
    start_us: float
    end_us: float | None
    depth: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """Every change in order, and every allocation by the changes that it begins and ends with."""

    time_us: NDArray[np.float64]
    """Of every change."""
    change: Integers
    """Bytes, positive or negative."""
    start_bytes: int
    """What was live before the first change."""
    birth: Integers
    """Of every allocation: the change that made it."""
    death: Integers
    """The change that freed it; the number of changes where none did."""
    label: NDArray[np.integer]
    """Its name, as an index into `labels`."""
    labels: tuple[str, ...]
    unmatched: Integers
    """Changes that free what no change has made: it was there before."""
    phases: tuple[Phase, ...] = ()

    @cached_property
    def total(self) -> Integers:
        """Bytes live after each change."""
        return self.start_bytes + np.cumsum(self.change)

    @cached_property
    def before(self) -> Integers:
        """Of these, what was there before the first change."""
        freed = np.zeros(len(self.change), dtype=np.int64)
        freed[self.unmatched] = self.change[self.unmatched]
        return self.start_bytes + np.cumsum(freed)

    @cached_property
    def size(self) -> Integers:
        """Bytes of every allocation."""
        return self.change[self.birth]

    @cached_property
    def peak_index(self) -> int:
        """The change after which most is live for the first time; -1 where that is before the first."""
        if not len(self.change) or self.total.max() <= self.start_bytes:
            return -1
        return int(np.argmax(self.total))

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever live."""
        return self.start_bytes if self.peak_index < 0 else int(self.total[self.peak_index])

    @property
    def peak_ms(self) -> float:
        """When the peak was reached, from the first change on."""
        return 0.0 if self.peak_index < 0 else self.milliseconds(self.time_us[self.peak_index])

    @property
    def before_at_peak(self) -> int:
        """What of the peak was there before the first change."""
        return self.start_bytes if self.peak_index < 0 else int(self.before[self.peak_index])

    def milliseconds(self, time_us: float) -> float:
        """A moment as drawn, counted from the first change."""
        return (float(time_us) - float(self.time_us[0])) / 1000

    def live_at_peak(self) -> Integers:
        """The allocations that are live at the peak, in the order of their birth."""
        peak = self.peak_index
        return np.flatnonzero((self.birth <= peak) & (self.death > peak))

    def changes_in(self, phase: Phase) -> slice:
        """The changes while a phase was open."""
        end_us = float("inf") if phase.end_us is None else phase.end_us
        first, last = np.searchsorted(self.time_us, (phase.start_us, end_us))
        return slice(int(first), int(last))

    def left_by(self, phase: Phase, *, until: Phase) -> int:
        """Bytes that were allocated during `phase` and were still there when `until` ended."""
        made, end = self.changes_in(phase), self.changes_in(until).stop
        is_left = (self.birth >= made.start) & (self.birth < made.stop) & (self.death >= end)
        return int(self.size[is_left].sum())

    def allocated_in(self, phase: Phase) -> Integers:
        """The allocations that were made while a phase was open, in the order of their birth."""
        made = self.changes_in(phase)
        return np.flatnonzero((self.birth >= made.start) & (self.birth < made.stop))

    def within(self, phase: Phase) -> Timeline:
        """What happened while a phase was open, as if recording had begun and ended with it."""
        part, kept = self.changes_in(phase), self.allocated_in(phase)
        count = part.stop - part.start
        earlier = self.birth < part.start
        of_earlier = self.death[earlier & (self.death >= part.start) & (self.death < part.stop)]
        of_before = self.unmatched[(self.unmatched >= part.start) & (self.unmatched < part.stop)]
        return Timeline(
            time_us=self.time_us[part],
            change=self.change[part],
            start_bytes=int(self.total[part.start - 1]) if part.start else self.start_bytes,
            birth=self.birth[kept] - part.start,
            death=np.minimum(self.death[kept] - part.start, count),
            label=self.label[kept],
            labels=self.labels,
            unmatched=np.sort(np.concatenate((of_earlier, of_before))) - part.start,
            phases=tuple(
                dataclasses.replace(inner, depth=inner.depth - phase.depth - 1)
                for inner in self.phases
                if inner.depth > phase.depth and phase.start_us <= inner.start_us <= (phase.end_us or float("inf"))
            ),
        )

    def phases_at(self, time_us: float) -> list[Phase]:
        """The phases that are open at a moment, from the outermost in."""
        found = [phase for phase in self.phases if phase.start_us <= time_us <= (phase.end_us or float("inf"))]
        return sorted(found, key=lambda phase: phase.depth)


def timeline_of_changes(
    changes: Iterable[Change], *, start_bytes: int | None = None, phases: Sequence[Phase] = ()
) -> Timeline:
    """The timeline of changes in order of time; without `start_bytes` with as much before as is freed of it."""
    ordered = sorted(changes, key=lambda change: change.time_us)
    numbers: defaultdict[object, list[int]] = defaultdict(list)
    keys = np.zeros(len(ordered), dtype=np.uint64)
    for index, change in enumerate(ordered):
        key = change.address if change.address is not None else (change.name, abs(change.bytes))
        if change.bytes > 0:
            numbers[key].append(index)
        # What nothing has made gets a number that nothing else has.
        keys[index] = index if change.bytes > 0 or not numbers[key] else numbers[key].pop()
    labels = tuple(dict.fromkeys(change.name for change in ordered))
    places = {name: index for index, name in enumerate(labels)}
    return paired_timeline(
        time_us=np.array([change.time_us for change in ordered], dtype=np.float64),
        change=np.array([change.bytes for change in ordered], dtype=np.int64),
        keys=keys,
        label=np.array([places[change.name] for change in ordered], dtype=np.int64),
        labels=labels,
        start_bytes=start_bytes,
        phases=phases,
    )


def paired_timeline(
    *,
    time_us: NDArray[np.float64],
    change: Integers,
    keys: NDArray[np.uint64],
    label: NDArray[np.integer],
    labels: Sequence[str],
    start_bytes: int | None,
    phases: Sequence[Phase] = (),
) -> Timeline:
    """The timeline of columns with one entry per change; a change is undone by the next one with the same key.

    Without `start_bytes` it begins with as much as is freed that no change has made, which is the least there was.
    Columns, because a trace may have tens of millions of changes.
    """
    births = change > 0
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    ends = np.full(len(change), len(change), dtype=np.int64)
    ends[order[:-1][same]] = order[1:][same]
    # A change frees what the one before it made, if there is one of the same key and it made something.
    frees = np.zeros(len(change), dtype=bool)
    frees[order[1:][same]] = births[order[:-1][same]]
    unmatched = np.flatnonzero(~births & ~frees)
    if start_bytes is None:
        start_bytes = -min(int(change[unmatched].sum()), int(np.cumsum(change).min(initial=0)))
    birth = np.flatnonzero(births)
    return Timeline(
        time_us=time_us,
        change=change,
        start_bytes=start_bytes,
        birth=birth,
        death=ends[birth],
        label=label[birth],
        labels=tuple(labels),
        unmatched=unmatched,
        phases=tuple(phases),
    )

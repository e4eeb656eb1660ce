"""What is drawn of a timeline, in so few numbers that a record can hold it: the same picture comes from it again.

    drawn = outline(timeline, most=300, points=500)
    Outline.from_json(drawn.to_json()) == drawn, bands(drawn)

An allocation is a band from its birth to its end, which lies upon those that were there before it and sinks when one of
them is freed, as in PyTorch's memory_viz. A million allocations make a picture as readable as its largest few hundred:
the others are to be drawn above them all, as the rest up to the total. Small allocations come and go by the thousand,
and from below would shake everything.

Source: torch/utils/viz/MemoryViz.js (process_alloc_data), which lays out the page at pytorch.org/memory_viz.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cs336_systems.errors import UserError
from cs336_systems.profiling.timeline import Phase, Timeline

DIGITS = 3
"""Of a millisecond, beyond which no picture shows anything; a CUDA snapshot has no more."""

MOST_STRETCHES = 2**20
"""Of a curve, far finer than what is drawn."""

OTHER = -1
"""The label of a band whose line has little at the peak."""


class Stretch(NamedTuple):
    """A phase as it is drawn, within the first and the last change."""

    name: str
    start_ms: float
    end_ms: float
    depth: int


@dataclasses.dataclass(frozen=True)
class Outline:
    """The drawn part of a timeline; milliseconds count from its first change."""

    allocations: int
    """In all, drawn or not."""
    start_bytes: int
    """What was live before the first change."""
    peak_ms: float
    peak_bytes: int
    label: tuple[int, ...]
    """Of every band, in the order of their birth: its name as an index into `labels`, or OTHER."""
    bytes: tuple[int, ...]
    birth_ms: tuple[float, ...]
    death_ms: tuple[float | None, ...]
    """None of one that was never freed."""
    times_ms: tuple[float, ...]
    """Of the curve's steps."""
    totals: tuple[int, ...]
    """Live bytes from each of these times on."""
    before: tuple[int, ...]
    """Of these, what was there before the first change."""
    labels: tuple[str, ...]
    """The names that have most at the peak, the most first."""
    at_peak: tuple[int, ...]
    """Bytes that each of them has there."""
    others_at_peak: int
    """Bytes that all other names have there."""
    phases: tuple[Stretch, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers. What was there before is told by its changes, which are few."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        changed = [index for index, size in enumerate(self.before) if not index or size != self.before[index - 1]]
        return plain | {
            "before": [[index, self.before[index]] for index in changed],
            "phases": [list(phase) for phase in self.phases],
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Outline:
        """The outline that `to_json` made plain.

        Raises:
            UserError: it is something else.
        """
        try:
            read: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
            }
            starts = [int(index) for index, _ in read["before"]]
            lengths = np.diff([*starts, len(read["times_ms"])])
            read["before"] = tuple(np.repeat([int(size) for _, size in read["before"]], lengths).tolist())
            read["phases"] = tuple(Stretch(*phase) for phase in read["phases"])
            made = cls(**read)
            if not made._fits():
                raise ValueError("its columns do not fit one another")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"this is no outline of a timeline of memory ({error})") from error
        return made

    def _fits(self) -> bool:
        """Whether what was read can be drawn."""
        lives = list(zip(self.birth_ms, self.death_ms, strict=True))
        ends = [birth if death is None else death for birth, death in lives]
        times = (*self.times_ms, *self.birth_ms, *ends, self.peak_ms)
        return (
            len({*map(len, (self.label, self.bytes, self.birth_ms, self.death_ms))}) == 1
            and len({*map(len, (self.times_ms, self.totals, self.before))}) == 1
            and len(self.labels) == len(self.at_peak)
            and len(self.times_ms) > 0
            and all(OTHER <= label < len(self.labels) for label in self.label)
            and all(birth <= end for birth, end in zip(self.birth_ms, ends, strict=True))
            and all(math.isfinite(number) for number in (*times, *self.totals, *self.bytes))
        )


def outline(timeline: Timeline, *, most: int = 300, points: int = 500, labels: int = 12, phases: int = 12) -> Outline:
    """The `most` allocations of the largest areas (bytes by time), and the curve in about `points` steps.

    Of names those `labels` are told apart that have most at the peak; of phases those that take longest are kept.
    """
    at_peak: defaultdict[int, int] = defaultdict(int)
    for index in timeline.live_at_peak():
        at_peak[int(timeline.label[index])] += int(timeline.size[index])
    leading = sorted(at_peak, key=lambda number: -at_peak[number])[:labels]
    numbers = {number: place for place, number in enumerate(leading)}
    chosen = _largest(timeline, most)
    lasting = timeline.death[chosen] >= len(timeline.change)
    times, totals, before = thinned(timeline, points)
    return Outline(
        allocations=len(timeline.birth),
        start_bytes=timeline.start_bytes,
        peak_ms=round(timeline.peak_ms, DIGITS),
        peak_bytes=timeline.peak_bytes,
        label=tuple(numbers.get(int(number), OTHER) for number in timeline.label[chosen]),
        bytes=tuple(timeline.size[chosen].tolist()),
        birth_ms=tuple(_moment(timeline, at) for at in timeline.birth[chosen]),
        death_ms=tuple(
            None if lasts else _moment(timeline, at) for at, lasts in zip(timeline.death[chosen], lasting, strict=True)
        ),
        times_ms=tuple(round(time, DIGITS) for time in times),
        totals=tuple(totals),
        before=tuple(before),
        labels=tuple(timeline.labels[number] for number in leading),
        at_peak=tuple(at_peak[number] for number in leading),
        others_at_peak=sum(at_peak.values()) - sum(at_peak[number] for number in leading),
        phases=_longest(timeline, phases),
    )


def _moment(timeline: Timeline, change: int) -> float:
    return round(timeline.milliseconds(timeline.time_us[change]), DIGITS)


def _largest(timeline: Timeline, most: int) -> NDArray[np.int64]:
    """The allocations of the largest areas, in the order of their birth."""
    if not len(timeline.change):
        return np.array([], dtype=np.int64)
    times = np.append(timeline.time_us, timeline.time_us[-1])
    area = timeline.size * (times[timeline.death] - times[timeline.birth])
    return np.sort(np.argsort(-area, kind="stable")[:most])


def _longest(timeline: Timeline, most: int) -> tuple[Stretch, ...]:
    """The phases that take longest, in the order of their beginning."""
    if not timeline.phases or not len(timeline.change):
        return ()
    first, last = float(timeline.time_us[0]), float(timeline.time_us[-1])

    def end_us(phase: Phase) -> float:
        return last if phase.end_us is None else phase.end_us

    within = [phase for phase in timeline.phases if phase.start_us < last and first < end_us(phase)]
    longest = sorted(within, key=lambda phase: end_us(phase) - phase.start_us, reverse=True)[:most]
    return tuple(
        Stretch(
            phase.name,
            round(timeline.milliseconds(max(phase.start_us, first)), DIGITS),
            round(timeline.milliseconds(min(end_us(phase), last)), DIGITS),
            phase.depth,
        )
        for phase in sorted(longest, key=lambda phase: phase.start_us)
    )


def thinned(timeline: Timeline, most: int) -> tuple[list[float], list[int], list[int]]:
    """Milliseconds, total and what was there before, as steps; of many changes about `most`.

    Then the highest of each stretch of time is kept, and the last, which holds on into the next. As changes crowd into
    few stretches, these are made so short that the changes kept are as many as may be.
    """
    if not len(timeline.change):
        return [0.0], [timeline.start_bytes], [timeline.start_bytes]
    kept = np.arange(len(timeline.change))
    if len(kept) > most:
        stretches = max(1, most // 2)
        kept = _of_stretches(timeline, stretches)
        while stretches < MOST_STRETCHES and len(finer := _of_stretches(timeline, 2 * stretches)) <= most:
            kept, stretches = finer, 2 * stretches
    times = [timeline.milliseconds(time) for time in timeline.time_us[kept]]
    return (
        [times[0], *times],
        [timeline.start_bytes, *(int(total) for total in timeline.total[kept])],
        [timeline.start_bytes, *(int(before) for before in timeline.before[kept])],
    )


def _of_stretches(timeline: Timeline, stretches: int) -> NDArray[np.int64]:
    """Of each of so many stretches of time the highest change and the last; and the first of all."""
    times = timeline.time_us - timeline.time_us[0]
    stretch = (times / (float(times[-1]) or 1.0) * (stretches - 1)).astype(np.int64)
    ends = np.append(stretch[1:] != stretch[:-1], True)
    highest = np.lexsort((timeline.total, stretch))[ends]
    return np.unique(np.concatenate([[0], highest, np.flatnonzero(ends)]))


# Bands ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Band:
    """One allocation as it is drawn: from each moment on, how many bytes lie below it."""

    bytes: int
    label: int
    """As in the outline."""
    start_ms: tuple[float, ...]
    below: tuple[int, ...]
    end_ms: float

    def corners(self) -> list[tuple[float, float]]:
        """The corners of its polygon: along the lower edge, back along the upper."""
        edge = []
        for start, end, below in zip(self.start_ms, (*self.start_ms[1:], self.end_ms), self.below, strict=True):
            edge += [(start, float(below)), (end, float(below))]
        return edge + [(time, height + self.bytes) for time, height in reversed(edge)]


def bands(outline: Outline) -> list[Band]:
    """The bands, stacked in the order of their birth."""
    # Of what happens at one time, frees come first, but of what was made at that very time.
    born = [(time, 1, index) for index, time in enumerate(outline.birth_ms)]
    freed = [
        (time, 0 if time > outline.birth_ms[index] else 2, index)
        for index, time in enumerate(outline.death_ms)
        if time is not None
    ]
    lost_of_before = {
        index: earlier - later
        for index, (earlier, later) in enumerate(itertools.pairwise(outline.before), 1)
        if later < earlier
    }
    sunk = [(outline.times_ms[index], 0, -index) for index in lost_of_before]
    stack: list[int] = []
    height = outline.start_bytes
    starts: list[list[float]] = [[] for _ in outline.label]
    below: list[list[int]] = [[] for _ in outline.label]
    for now, kind, index in sorted(born + freed + sunk):
        if kind == 1:
            stack.append(index)
            starts[index].append(now)
            below[index].append(height)
            height += outline.bytes[index]
            continue
        if index < 0:
            lost, place = lost_of_before[-index], 0
        else:
            lost, place = outline.bytes[index], stack.index(index)
            del stack[place]
        height -= lost
        for above in stack[place:]:
            starts[above].append(now)
            below[above].append(below[above][-1] - lost)
    last = outline.times_ms[-1]
    return [
        Band(
            bytes=outline.bytes[index],
            label=outline.label[index],
            start_ms=tuple(starts[index]),
            below=tuple(below[index]),
            end_ms=last if (end := outline.death_ms[index]) is None else end,
        )
        for index in range(len(outline.label))
    ]

"""What a memory snapshot answers: the peak, what was live then by size and by line, and what one block keeps.

summary = summarise(read_snapshot(path), under="attention")
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from cs336_systems.errors import UserError, unknown_name
from cs336_systems.profiling.snapshot import Snapshot
from cs336_systems.profiling.stacks import Stack, matches, place_of, saved_by_one_block, user_frames


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Live allocations that are alike."""

    count: int
    total_bytes: int
    bytes: int | None
    """Of each; None where they differ."""
    place: str
    """The line that they come from, or most of their bytes."""
    other_places: int = 0
    trace: Stack = ()
    """Where they share it: the frames of the user's code from the innermost out."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What one call of a block keeps allocated at the peak."""

    function: str
    called_from: str
    calls: int
    alike: int
    total_bytes: int
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Under:
    """What is live at the peak and was allocated below a frame that somebody asked for."""

    text: str
    count: int
    total_bytes: int
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The answers, in bytes. The groups are complete, with the most bytes first."""

    device: int
    other_devices: tuple[int, ...]
    events: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_ms: float
    """From the first event of the trace on."""
    peak_phases: tuple[str, ...]
    """The named ranges that were open then, from the outermost in."""
    peak_place: str
    """The line whose allocation made the peak."""
    before_trace_bytes: int
    """Live when the trace began."""
    before_trace_at_peak_bytes: int
    live_count: int
    """Allocations of the trace that are live at the peak."""
    freed_from_before_count: int
    """How many times the trace frees what it did not allocate."""
    freed_from_before_bytes: int
    missing_from_segments_bytes: int
    """How much less the segments hold at the end than the trace says; 0 in a sound snapshot."""
    out_of_memory: int
    """How many allocations failed for want of memory."""
    by_size: tuple[Group, ...]
    by_place: tuple[Group, ...]
    largest: tuple[Group, ...]
    block: Block | None
    under: Under | None


class _Live(NamedTuple):
    """One allocation that is live at the peak."""

    bytes: int
    place: str
    user_stack: Stack
    is_under: bool


def summarise(snapshot: Snapshot, *, under: str | None = None) -> Summary:
    """Everything but the picture.

    Raises:
        UserError: no live allocation was made below a frame with `under` in its path, line or function.
    """
    timeline = snapshot.timeline
    live = _live(snapshot, under)
    peak = timeline.peak_index
    return Summary(
        device=snapshot.device,
        other_devices=snapshot.other_devices,
        events=sum(snapshot.actions.values()),
        peak_allocated_bytes=timeline.peak_bytes,
        peak_reserved_bytes=snapshot.peak_reserved_bytes,
        peak_ms=timeline.peak_ms,
        peak_phases=tuple(phase.name for phase in timeline.phases_at(timeline.time_us[peak])) if peak >= 0 else (),
        peak_place=live[-1].place if live else "(before the trace)",
        before_trace_bytes=timeline.start_bytes,
        before_trace_at_peak_bytes=timeline.before_at_peak,
        live_count=len(live),
        freed_from_before_count=len(timeline.unmatched),
        freed_from_before_bytes=snapshot.freed_from_before,
        missing_from_segments_bytes=snapshot.missing_from_segments,
        out_of_memory=snapshot.actions["oom"],
        by_size=_groups(live, lambda one: one.bytes),
        by_place=_groups(live, lambda one: one.place),
        largest=tuple(sorted(_alike(live), key=lambda group: group.bytes or 0, reverse=True)),
        block=_block(live),
        under=_under(live, under) if under else None,
    )


def _live(snapshot: Snapshot, under: str | None) -> list[_Live]:
    """What is live at the peak in the order of its birth; each stack is looked at once."""
    sizes = snapshot.timeline.size
    known: dict[int, tuple[str, Stack, bool]] = {}
    live = []
    for index in map(int, snapshot.timeline.live_at_peak()):
        number = int(snapshot.stacks[index])
        if number not in known:
            stack = snapshot.stack(index)
            known[number] = (place_of(stack), user_frames(stack), bool(under) and matches(stack, str(under)))
        live.append(_Live(int(sizes[index]), *known[number]))
    return live


def _groups(live: Iterable[_Live], key: Callable[[_Live], Hashable]) -> tuple[Group, ...]:
    """The allocations by what `key` says of them, the most bytes first."""
    found: defaultdict[Hashable, list[_Live]] = defaultdict(list)
    for one in live:
        found[key(one)].append(one)
    groups = [_group(members) for members in found.values()]
    return tuple(sorted(groups, key=lambda group: -group.total_bytes))


def _group(members: list[_Live]) -> Group:
    places: Counter[str] = Counter()
    for one in members:
        places[one.place] += one.bytes
    traces = {one.user_stack for one in members}
    sizes = {one.bytes for one in members}
    return Group(
        count=len(members),
        total_bytes=sum(one.bytes for one in members),
        bytes=sizes.pop() if len(sizes) == 1 else None,
        place=places.most_common(1)[0][0],
        other_places=len(places) - 1,
        trace=traces.pop() if len(traces) == 1 else (),
    )


def _alike(live: Iterable[_Live]) -> tuple[Group, ...]:
    """Allocations of one size and one way through the user's code together, the most bytes first."""
    return _groups(live, lambda one: (one.bytes, one.user_stack, one.place))


def _block(live: list[_Live]) -> Block | None:
    saved = saved_by_one_block([one.user_stack for one in live], [one.bytes for one in live])
    if saved is None:
        return None
    groups = _alike(live[index] for index in saved.allocations)
    return Block(
        function=saved.function,
        called_from=saved.called_from,
        calls=saved.calls,
        alike=saved.alike,
        total_bytes=sum(group.total_bytes for group in groups),
        groups=tuple(sorted(groups, key=lambda group: group.bytes or 0, reverse=True)),
    )


def _under(live: list[_Live], text: str) -> Under:
    chosen = [one for one in live if one.is_under]
    if not chosen:
        functions: Counter[str] = Counter()
        for one in live:
            functions.update({str(frame) for frame in one.user_stack})
        known = [name for name, _ in functions.most_common(12)]
        if known:
            raise unknown_name("frame", text, known)
        raise UserError(
            f"nothing that is live at the peak has a stack trace, so nothing is known to be under {text!r}: record the "
            "history with context='all' and stacks='all'"
        )
    groups = _alike(chosen)
    return Under(text, len(chosen), sum(group.total_bytes for group in groups), groups)

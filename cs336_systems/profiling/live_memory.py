"""What a memory snapshot or a trace answers: the peak, what was live then by size and by line, what one block keeps.

summary = summarise(read_memory(path), under="attention")
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from cs336_systems.errors import UserError, unknown_name
from cs336_systems.profiling.memory_history import Device, MemoryHistory, Unit
from cs336_systems.profiling.stacks import (
    OPERATOR,
    Frame,
    Stack,
    is_users,
    matches,
    operator_of,
    saved_by_one_block,
    user_frames,
)


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
    """Where they share it: the operator, if that is known, and the user's frames from the innermost out."""


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

    device: Device
    other_devices: tuple[Device, ...]
    unit: Unit
    """What places are."""
    events: int
    damaged: int
    """Events that were left out because they make no sense."""
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    """None where nothing is reserved: on a CPU."""
    peak_ms: float
    """From the first event of the trace on."""
    peak_phases: tuple[str, ...]
    """The named ranges that were open then, from the outermost in."""
    peak_place: str
    """The line whose allocation made the peak."""
    before_trace_bytes: int | None
    """Live when the trace began; None where that is not known."""
    before_trace_at_peak_bytes: int
    """Of it, as far as it is known."""
    rounds_up: bool
    """Whether sizes are what the allocator gave, and not what it was asked for."""
    live_count: int
    """Allocations of the trace that are live at the peak."""
    freed_from_before_count: int
    """How many times the trace frees what it did not allocate."""
    freed_from_before_bytes: int
    missing_from_segments_bytes: int | None
    """How much less the segments hold at the end than the trace says; 0 in a sound snapshot, None without segments."""
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
    trace: Stack
    """The operator and the user's frames."""
    stack: Stack
    calls: tuple[int, ...] | None
    """Of each frame of the stack which call it is."""
    is_under: bool


def summarise(history: MemoryHistory, *, under: str | None = None) -> Summary:
    """Everything but the picture.

    Raises:
        UserError: no live allocation was made below a frame with `under` in its path, line or function.
    """
    timeline = history.timeline
    live = _live(history, under)
    peak = timeline.peak_index
    return Summary(
        device=history.device,
        other_devices=history.other_devices,
        unit=history.unit,
        events=history.events,
        damaged=history.damaged,
        peak_allocated_bytes=timeline.peak_bytes,
        peak_reserved_bytes=history.peak_reserved_bytes,
        peak_ms=timeline.peak_ms,
        peak_phases=tuple(phase.name for phase in timeline.phases_at(timeline.time_us[peak])) if peak >= 0 else (),
        peak_place=live[-1].place if live else "(before the trace)",
        before_trace_bytes=timeline.start_bytes if history.knows_before else None,
        before_trace_at_peak_bytes=timeline.before_at_peak,
        rounds_up=history.rounds_up,
        live_count=len(live),
        freed_from_before_count=len(timeline.unmatched),
        freed_from_before_bytes=history.freed_from_before,
        missing_from_segments_bytes=history.missing_from_segments,
        out_of_memory=history.out_of_memory,
        by_size=_groups(live, lambda one: one.bytes),
        by_place=_groups(live, lambda one: one.place),
        largest=tuple(sorted(_alike(live), key=lambda group: group.bytes or 0, reverse=True)),
        block=_block(live),
        under=_under(live, under) if under else None,
    )


def _live(history: MemoryHistory, under: str | None) -> list[_Live]:
    """What is live at the peak in the order of its birth; each stack is looked at once."""
    sizes = history.timeline.size
    known: dict[int, tuple[Stack, Stack, bool]] = {}
    live = []
    for index in map(int, history.timeline.live_at_peak()):
        number = int(history.stacks[index])
        if number not in known:
            stack = history.stack(index)
            known[number] = (_shown(stack), stack, bool(under) and matches(stack, str(under)))
        trace, stack, is_under = known[number]
        live.append(_Live(int(sizes[index]), history.place(index), trace, stack, history.calls(index), is_under))
    return live


def _shown(stack: Stack) -> Stack:
    """The user's frames, and before them the operator that the innermost called."""
    mine = user_frames(stack)
    operator = operator_of(stack) if mine else None
    return (Frame(operator, OPERATOR, 0), *mine) if operator else mine


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
    traces = {one.trace for one in members}
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
    return _groups(live, lambda one: (one.bytes, one.trace, one.place))


def _block(live: list[_Live]) -> Block | None:
    stacks = [user_frames(one.stack) for one in live]
    calls = [
        [call for call, frame in zip(one.calls, one.stack, strict=True) if is_users(frame)]
        for one in live
        if one.calls is not None
    ]
    saved = saved_by_one_block(stacks, [one.bytes for one in live], calls or None)
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
            functions.update({str(frame) for frame in one.stack if is_users(frame) or frame.has_no_file})
        known = [name for name, _ in functions.most_common(12)]
        if known:
            raise unknown_name("frame", text, known)
        raise UserError(
            f"nothing that is live at the peak has a stack trace, so nothing is known to be under {text!r}: record the "
            "history with context='all' and stacks='all', a trace with with_stack=True"
        )
    groups = _alike(chosen)
    return Under(text, len(chosen), sum(group.total_bytes for group in groups), groups)

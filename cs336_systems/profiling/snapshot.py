"""A CUDA memory snapshot as PyTorch writes it: what was allocated and freed, when, and from where.

    snapshot = read_snapshot(Path("snapshot.pickle"))
    snapshot.timeline.peak_bytes, snapshot.peak_reserved_bytes

`torch.cuda.memory._dump_snapshot` pickles the allocator's state (segments and their blocks) and the trace that it kept
since `_record_memory_history`. What was live before the trace began follows from the two: allocated at the end, less
what the trace allocated, plus what it freed. The trace has the sizes that were asked for, the segments those that
were given, rounded up.

Source: torch.cuda.memory._snapshot, whose documentation has the fields.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs336_systems.errors import UserError
from cs336_systems.profiling.memory_history import MemoryHistory
from cs336_systems.profiling.plain_pickle import References, load_plain
from cs336_systems.profiling.stacks import Frame, Stack, place_of
from cs336_systems.profiling.timeline import Phase, paired_timeline

HOW_TO_RECORD = (
    "record one by calling torch.cuda.memory._record_memory_history(max_entries=1_000_000) before the work and "
    "torch.cuda.memory._dump_snapshot(path) after it"
)

# Bytes come at an `alloc` and go at a `free_requested`: its `free_completed` only says that they may be given again.
ALLOC, FREE, GROW, SHRINK = range(4)
_KEPT = {
    "alloc": ALLOC,
    "free_requested": FREE,
    "segment_alloc": GROW,
    "segment_map": GROW,
    "segment_free": SHRINK,
    "segment_unmap": SHRINK,
}
_SIGN = np.array([1, -1, 1, -1], dtype=np.int64)


class Block(NamedTuple):
    """A piece of a segment; only what a tensor uses is `active_allocated`."""

    size: int
    state: str


class _Event(NamedTuple):
    """Stands in the trace's list for an event that went into the columns, or into none."""

    kept: bool
    action: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot(MemoryHistory):
    """One device's part of a snapshot."""

    actions: Counter[str]
    allocated_at_end: int
    reserved_at_end: int
    peak_reserved_bytes: int
    missing_from_segments: int
    blocks_at_end: tuple[int, ...]
    """Sizes of the blocks that tensors use at the end, rounded up as the allocator does."""


def read_snapshot(path: Path, device: int | None = None) -> Snapshot:
    """The snapshot in a file, of `device` or of the one with most events.

    Raises:
        UserError: the file is no memory snapshot, is damaged or refused, or has no trace (of that device).
    """
    columns = _Columns()
    try:
        whole, memo = load_plain(path, columns.convert)
        known_stacks = columns.known_stacks(memo)
    except _Malformed as error:
        raise UserError(f"{path} is no memory snapshot of PyTorch's: {error}") from error
    del memo
    segments, traces = _parts(path, whole)
    lengths = [sum(event.kept for event in trace) for trace in traces]
    if sum(lengths) != len(columns.action):
        raise UserError(f"{path} is damaged: its traces have {sum(lengths):,} events, of {len(columns.action):,} in it")
    traced = [index for index, length in enumerate(lengths) if length]
    if not traced:
        raise UserError(f"{path} has no trace: the history was not recorded, so the peak is unknown; {HOW_TO_RECORD}")
    if device is None:
        device = max(traced, key=lambda index: lengths[index])
    elif device not in traced:
        raise UserError(f"{path} has no trace of device {device}; there is one of {', '.join(map(str, traced))}")
    start = sum(lengths[:device])
    actions = Counter(event.action for event in traces[device])
    annotations = [note for note in whole.get("external_annotations") or [] if note.get("device", device) == device]
    del traces, whole
    mine = [segment for segment in segments if segment.get("device", 0) == device]
    chosen = slice(start, start + lengths[device])
    try:
        allocated = sum(segment["allocated_size"] for segment in mine)
        reserved = sum(segment["total_size"] for segment in mine)
        blocks = tuple(
            block.size for segment in mine for block in segment["blocks"] if block.state == "active_allocated"
        )
        phases = _phases(annotations)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no memory snapshot of PyTorch's: a segment or annotation lacks {error}") from error
    return _assembled(
        path=path,
        device=device,
        other_devices=tuple(index for index in traced if index != device),
        columns=columns.taken(chosen),
        known_stacks=known_stacks,
        actions=actions,
        events=sum(actions.values()),
        out_of_memory=actions["oom"],
        allocated_at_end=allocated,
        reserved_at_end=reserved,
        blocks_at_end=blocks,
        phases=phases,
    )


class _Malformed(Exception):
    """What an event or a block lacks."""


class KnownStacks:
    """Stacks by their number, decoded when they are asked for: each may have a hundred frames."""

    def __init__(self, found: list[References | Stack], frames: dict[int, Frame]) -> None:
        self._found = found
        self._frames = frames

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Stack:
        found = self._found[number]
        return tuple(self._frames[index] for index in found.indices()) if isinstance(found, References) else found


class _Columns:
    """The events of all devices in the order of the file, a few bytes each."""

    def __init__(self) -> None:
        self.action = array("b")
        self.address = array("Q")
        self.size = array("q")
        self.time_us = array("q")
        self.stack = array("i")
        # Stacks by what they are in the pickle: equal ones have equal references.
        self.numbers: dict[References | Stack, int] = {}
        # Lists that were read entry by entry, which are kept so that no other gets their identity.
        self.lists: dict[int, tuple[list[Any], int]] = {}
        self.frames: dict[Frame, Frame] = {}
        self.events: dict[str, _Event] = {}

    def convert(self, made: dict[Any, Any]) -> _Event | Block | Frame | None:
        """What takes the place of an event, a block or a frame."""
        if "action" in made:
            return self.event(made["action"], made)
        if "filename" in made:
            try:
                frame = Frame(str(made["name"]), str(made["filename"]), int(made["line"]))
            except (KeyError, TypeError, ValueError) as error:
                raise _Malformed(f"a frame of a stack trace lacks {error}") from error
            return self.frames.setdefault(frame, frame)
        if "state" in made and "size" in made:
            return Block(made["size"], made["state"])
        return None

    def event(self, action: str, made: dict[Any, Any]) -> _Event:
        event = self.events.get(action)
        if event is None:
            event = self.events[action] = _Event(action in _KEPT, action)
        if event.kept:
            try:
                self.address.append(made["addr"])
                self.size.append(made["size"])
                self.time_us.append(made.get("time_us", len(self.time_us)))
            except (KeyError, TypeError, OverflowError) as error:
                told = f"event {len(self.action):,} of the trace ({action!r}) is malformed: {error}"
                raise _Malformed(told) from error
            self.action.append(_KEPT[action])
            self.stack.append(self.number(made.get("frames")))
        return event

    def number(self, frames: Any) -> int:
        """The number of a stack; -1 where none was recorded."""
        if not frames:
            return -1
        if isinstance(frames, References):
            return self.numbers.setdefault(frames, len(self.numbers))
        if id(frames) in self.lists:
            return self.lists[id(frames)][1]
        if not isinstance(frames, list) or not all(isinstance(frame, Frame) for frame in frames):
            raise _Malformed("a stack trace is no list of frames")
        number = self.numbers.setdefault(tuple(frames), len(self.numbers))
        self.lists[id(frames)] = (frames, number)
        return number

    def known_stacks(self, memo: list[Any]) -> KnownStacks:
        """The stacks, once the memo is complete that they refer to."""
        frames = {index: made for index, made in enumerate(memo) if type(made) is Frame}
        found = list(self.numbers)
        for known in found:
            if isinstance(known, References) and not all(index in frames for index in known.indices()):
                raise _Malformed("a stack trace is no list of frames")
        return KnownStacks(found, frames)

    def taken(self, chosen: slice) -> dict[str, np.ndarray]:
        """One device's events."""
        return {
            name: np.frombuffer(column, dtype=column.typecode)[chosen]
            for name, column in vars(self).items()
            if isinstance(column, array)
        }


def _parts(path: Path, whole: Any) -> tuple[list[dict[str, Any]], list[list[_Event]]]:
    """Segments and traces, looked at as far as the rest relies on them."""
    if not isinstance(whole, dict) or not {"segments", "device_traces"} <= whole.keys():
        found = f"a dictionary of {list(whole)[:5]}" if isinstance(whole, dict) else f"one {type(whole).__name__}"
        raise UserError(
            f"{path} is a pickle, but no memory snapshot: one with segments and device_traces was expected, as "
            f"torch.cuda.memory._dump_snapshot writes it, and it holds {found}"
        )
    segments, traces = whole["segments"], whole["device_traces"]
    fits = (
        isinstance(segments, list)
        and all(isinstance(segment, dict) for segment in segments)
        and isinstance(traces, list)
        and all(isinstance(trace, list) and all(isinstance(event, _Event) for event in trace) for trace in traces)
    )
    if not fits:
        raise UserError(f"{path} is no memory snapshot of PyTorch's: its segments or traces are no lists of entries")
    return segments, traces


def _phases(annotations: list[dict[str, Any]]) -> list[Phase]:
    """Named ranges from their starts and ends, which carry the same name."""
    found: list[Phase] = []
    opened: list[tuple[str, float, int]] = []
    for note in sorted(annotations, key=lambda note: note["time_us"]):
        if note["stage"] == "START":
            opened.append((str(note["name"]), float(note["time_us"]), len(opened)))
            continue
        index = next((index for index in reversed(range(len(opened))) if opened[index][0] == note["name"]), None)
        if index is not None:
            name, start, depth = opened.pop(index)
            found.append(Phase(name, start, float(note["time_us"]), depth))
    found += [Phase(name, start, None, depth) for name, start, depth in opened]
    return sorted(found, key=lambda phase: (phase.start_us, phase.depth))


def _assembled(
    *,
    columns: dict[str, np.ndarray],
    known_stacks: KnownStacks,
    allocated_at_end: int,
    reserved_at_end: int,
    phases: list[Phase],
    **rest: Any,
) -> Snapshot:
    """The timeline of bytes in use, and the running sum of segments."""
    signed = columns["size"] * _SIGN[columns["action"]]
    of_segments = columns["action"] >= GROW
    in_segments = signed[of_segments]
    reserved_before = reserved_at_end - int(in_segments.sum())
    peak_reserved = reserved_before + max(0, int(np.cumsum(in_segments).max(initial=0)))
    used = ~of_segments
    change = signed[used]
    del signed
    stacks = columns["stack"][used]
    # One label per line of code, whatever the stacks that lead to it; the last is for what has no stack.
    numbers: dict[str, int] = {}
    label_of_stack = np.zeros(len(known_stacks) + 1, dtype=np.int32)
    for number in range(len(known_stacks) + 1):
        place = place_of(known_stacks[number] if number < len(known_stacks) else ())
        label_of_stack[number] = numbers.setdefault(place, len(numbers))
    before = allocated_at_end - int(change.sum())
    timeline = paired_timeline(
        time_us=columns["time_us"][used].astype(np.float64),
        change=change,
        keys=columns["address"][used],
        label=label_of_stack[stacks],
        labels=tuple(numbers),
        start_bytes=max(0, before),
        phases=phases,
    )
    return Snapshot(
        timeline=timeline,
        stacks=stacks[timeline.birth],
        known_stacks=known_stacks,
        unit="line",
        missing_from_segments=max(0, -before),
        allocated_at_end=allocated_at_end,
        reserved_at_end=reserved_at_end,
        peak_reserved_bytes=peak_reserved,
        **rest,
    )

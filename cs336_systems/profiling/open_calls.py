"""What was open at moments of a trace: the calls on one thread, each within the one that made it.

A trace lists spans of time with a thread each, in no order that matters. Sorted by their beginning they are gone
through once, with those that are open on a stack. Most spans enclose nothing that is asked for (a trace has a hundred
functions for each allocation); only those that do become calls.

On one thread a span lies within another as a call within its caller. A range that begins in one call and ends in a
later one lies across both; it too is taken away when it ends, wherever on the stack it is by then.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Sequence

import numpy as np

from cs336_systems.profiling.stacks import Frame, Stack

MOMENT = -1
"""Stands for the frame of what is no span: something happened then, and it is asked within what."""


class Rows:
    """Spans and moments, in columns: a trace has millions."""

    def __init__(self) -> None:
        self.thread, self.start, self.end, self.frame = array("i"), array("q"), array("q"), array("i")

    def add(self, thread: int, start: int, end: int, frame: int) -> int:
        """A span of a frame, by its number, or a MOMENT; returns its own number."""
        self.thread.append(thread)
        self.start.append(start)
        self.end.append(end)
        self.frame.append(frame)
        return len(self.frame) - 1


class Calls:
    """Calls by number, in which something was found, and their stacks by number."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.caller, self.stack, self.outermost = array("i"), array("i"), array("i")
        """Of each call: the call that made it, or -1; its stack; the row of the span that its stack begins with."""
        self._frames = frames
        # Of each stack: the one that it lies on, or -1, and its innermost frame.
        self._stacks: dict[tuple[int, int], int] = {}

    def add(self, row: int, frame: int, caller: int) -> int:
        """The call that a row is, made in `caller` or, where that is -1, in none."""
        lies_on = self.stack[caller] if caller >= 0 else -1
        self.caller.append(caller)
        self.stack.append(self._stacks.setdefault((lies_on, frame), len(self._stacks)))
        self.outermost.append(self.outermost[caller] if caller >= 0 else row)
        return len(self.caller) - 1

    def outwards(self, call: int) -> tuple[int, ...]:
        """A call and those that it was made in, one for each frame of its stack."""
        found = []
        while call >= 0:
            found.append(call)
            call = self.caller[call]
        return tuple(found)

    def known_stacks(self) -> CallStacks:
        """All stacks, by their number."""
        return CallStacks(list(self._stacks), self._frames)


class CallStacks:
    """Stacks by their number, put together when they are asked for."""

    def __init__(self, parts: Sequence[tuple[int, int]], frames: Sequence[Frame]) -> None:
        self._parts = parts
        self._frames = frames

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Stack:
        found = []
        while number >= 0:
            number, frame = self._parts[number]
            found.append(self._frames[frame])
        return tuple(found)


def open_calls(
    rows: Rows, asked: Collection[int], frames: Sequence[Frame], roots: Collection[int]
) -> tuple[Calls, dict[int, int]]:
    """The innermost call that was open at each row that is asked for, which a span itself is; -1 where none was.

    `roots` are frames, by number, that stacks begin with: what lies outside of them is cut off.
    """
    thread, start, end, frame = map(np.asarray, (rows.thread, rows.start, rows.end, rows.frame))
    is_asked = np.zeros(len(frame), dtype=bool)
    is_asked[list(asked)] = True
    # Of spans that begin together the longer one is the caller; a moment lies within all of them.
    order = np.lexsort((-end, frame == MOMENT, start, thread))
    calls = Calls(frames)
    found: dict[int, int] = {}
    opened: list[tuple[int, int, int]] = []
    """End, row and frame of what is open, from the outermost in."""
    known: list[int] = []
    """The calls that the outermost of them are."""
    across = False
    thread_before = None
    columns = (column[order].tolist() for column in (thread, start, end, frame, is_asked))
    for row, of_thread, now, until, number, wanted in zip(order.tolist(), *columns, strict=True):
        if of_thread != thread_before:
            opened, known, across, thread_before = [], [], False, of_thread
        # A moment still lies within what ends at it; what begins then does not.
        least = now if number == MOMENT else now + 1
        while opened and opened[-1][0] < least:
            opened.pop()
        if across:
            ended = next((depth for depth, one in enumerate(opened) if one[0] < least), len(opened))
            del known[ended:]
            opened = [one for one in opened if one[0] >= least]
            across = any(outer[0] < inner[0] for outer, inner in itertools.pairwise(opened))
        del known[len(opened) :]
        if number != MOMENT:
            across = across or (bool(opened) and opened[-1][0] < until)
            opened.append((until, row, number))
        if wanted:
            for _, of_row, of_frame in opened[len(known) :]:
                caller = -1 if of_frame in roots or not known else known[-1]
                known.append(calls.add(of_row, of_frame, caller))
            found[row] = known[-1] if known else -1
    return calls, found

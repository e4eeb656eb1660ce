"""Reads a Chrome trace that `torch.profiler` exported (.json, .json.gz) into a `Recording`.

Work is what ran on the GPU (`kernel`, `gpu_memcpy`, `gpu_memset`), joined with the call of CUDA that launched it by
`correlation`, or with the operator that called for it by `External id`. Ranges are `record_function`'s
(`user_annotation`); what the profiler projects of them onto the GPU (`gpu_user_annotation`) would count twice.

A trace of a CPU has no kernels. There the operators stand in their place (`cpu_op`), each with the time that it spent
itself: its duration less that of the operators that it called on the same thread. One that calls another of its name
and nothing else (`aten::sum` with the dimensions filled in) is one with it, as in the profiler's own table.

Source: PyTorch, torch/profiler; Kineto, libkineto/src/output_json.cpp; "Trace Event Format".
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cs336_systems.errors import UserError
from cs336_systems.profiling.kernels import RANGE_COLUMNS, WORK_COLUMNS, Recording

GZIP_MAGIC = b"\x1f\x8b"

# By their names today, and before PyTorch 1.13.
ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"})
OPERATORS = frozenset({"cpu_op", "operator"})
LAUNCHES = ("runtime", "driver")
"""What the categories of calls end with: cuda_runtime, cuda_driver, and those of other makers."""
RANGES = frozenset({"user_annotation"})
EXTERNAL = ("External id", "external id")

_Kind = Literal["work", "operator", "range", "launch"]

MOST_MICROSECONDS = 4e15
"""The year 2096; a start and a duration up to this make a 64-bit number of nanoseconds."""


def read_trace(path: Path) -> Recording:
    """The kernels, or on a CPU the operators, and the named ranges of a trace.

    Raises:
        UserError: the file is cut off, no trace, or has neither kernels nor operators, or no ranges.
    """
    with without_collecting():
        events = _Events(trace_events(path))
    if not events.of_gpu and not events.operators:
        raise UserError(
            f"{path} has neither kernels nor operators: expected events of the categories kernel or cpu_op, found "
            f"{', '.join(sorted(events.categories)) or 'none'}; record one with torch.profiler.profile"
        )
    if not events.ranges:
        raise UserError(
            f"{path} has no named ranges: expected events of the category user_annotation, found none; run what is "
            "profiled inside torch.profiler.record_function"
        )
    notes = []
    if events.damaged:
        notes.append(f"Left out for want of a name or a time: {events.damaged} of the events")
    if events.of_gpu:
        work = events.kernels()
        lost = int((~work["is_linked"]).sum())
        if lost:
            notes.append(f"Without a launch in the trace, and so in no range: {lost} of {len(work)}")
    else:
        work = events.own_times()
        notes.append("The trace has no kernels: operators of the CPU stand in their place, with their own time")
    work["name"] = pd.Categorical(work["name"])
    ranges = pd.DataFrame(events.ranges, columns=["name", "start", "end", "process", "thread"])
    ranges["is_process_wide"] = False
    return Recording(
        work=work[list(WORK_COLUMNS)],
        ranges=ranges[list(RANGE_COLUMNS)],
        unit="kernel" if events.of_gpu else "operator",
        notes=tuple(notes),
    )


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Python's collector off: it would look through millions of new dictionaries, again and again, for cycles.

    It is two thirds of the time of reading a large trace.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def trace_events(path: Path) -> list[Any]:
    """What a trace lists, whatever it is."""
    try:
        with path.open("rb") as opened:
            is_compressed = opened.read(2) == GZIP_MAGIC
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            content = json.load(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): export the trace anew") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no trace: expected JSON as torch.profiler's export_chrome_trace writes it, and reading stopped "
            f"({str(error).splitlines()[0]}); if it was cut off, export it anew"
        ) from error
    # The profiler writes an object; the format allows the bare list of events too.
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise UserError(
            f"{path} is JSON, but no trace: expected a list of events under `traceEvents`; export one with "
            "torch.profiler's export_chrome_trace"
        )
    return events


class _Events:
    """The events of a trace that matter, by what they are."""

    def __init__(self, events: list[Any]) -> None:
        self.categories: dict[str, _Kind | None] = {}
        self.damaged = 0
        # Of each: name, start, end, process, thread; and of what runs on a GPU, what it is joined by.
        self.ranges: list[tuple[str, int, int, int, int]] = []
        self.operators: list[tuple[str, int, int, int, int]] = []
        self.of_gpu: list[tuple[str, int, int, int | None, int | None]] = []
        # Of each number: process, thread, moment.
        self.launches: dict[int, tuple[int, int, int]] = {}
        self.callers: dict[int, tuple[int, int, int]] = {}
        self._identifiers: dict[object, int] = {}
        for event in events:
            if isinstance(event, dict) and event.get("ph") == "X":
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        category = str(event.get("cat", ""))
        kind = self.categories[category] if category in self.categories else self._kind(category)
        if kind is None:
            return
        name, start, duration = event.get("name"), nanoseconds(event.get("ts")), nanoseconds(event.get("dur", 0))
        if not isinstance(name, str) or start is None or duration is None or duration < 0:
            self.damaged += 1
            return
        found = event.get("args")
        told = found if isinstance(found, dict) else {}
        if kind == "work":
            self.of_gpu.append((name, start, start + duration, _number(told.get("correlation")), _external(told)))
            return
        process, thread = self._identifier(event.get("pid")), self._identifier(event.get("tid"))
        if kind == "launch":
            correlation = _number(told.get("correlation"))
            known = self.launches.get(correlation) if correlation is not None else None
            if correlation is not None and (known is None or start < known[2]):
                self.launches[correlation] = (process, thread, start)
            return
        if kind == "range":
            self.ranges.append((name, start, start + duration, process, thread))
            return
        self.operators.append((name, start, start + duration, process, thread))
        external = _external(told)
        if external is not None:
            self.callers[external] = (process, thread, start)

    def _kind(self, category: str) -> _Kind | None:
        """What the events of a category are; None for one that does not matter."""
        lowered = category.lower()
        kind: _Kind | None = None
        if lowered in ON_GPU:
            kind = "work"
        elif lowered in OPERATORS:
            kind = "operator"
        elif lowered in RANGES:
            kind = "range"
        elif lowered.endswith(LAUNCHES):
            kind = "launch"
        self.categories[category] = kind
        return kind

    def _identifier(self, found: object) -> int:
        """A process or a thread as a number; some are texts."""
        if isinstance(found, int) and abs(found) < 2**62:
            return found
        return self._identifiers.setdefault(str(found), -1 - len(self._identifiers))

    def kernels(self) -> pd.DataFrame:
        """What ran on the GPU, with its launch."""
        rows = []
        for name, start, end, correlation, external in self.of_gpu:
            launch = self.launches.get(correlation) if correlation is not None else None
            if launch is None and external is not None:
                launch = self.callers.get(external)
            process, thread, launched = launch or (-1, -1, start)
            rows.append((name, start, end, end - start, process, thread, launched, launch is not None))
        return pd.DataFrame(rows, columns=list(WORK_COLUMNS))

    def own_times(self) -> pd.DataFrame:
        """The operators, each with its duration less that of the operators that it called on its thread."""
        rows = pd.DataFrame(self.operators, columns=["name", "start", "end", "process", "thread"])
        # Of two that begin together the longer is the caller.
        rows = rows.assign(length=rows["end"] - rows["start"])
        rows = rows.sort_values(["process", "thread", "start", "length"], ascending=[True, True, True, False])
        starts, ends = rows["start"].tolist(), rows["end"].tolist()
        threads = list(zip(rows["process"].tolist(), rows["thread"].tolist(), strict=True))
        own, names = rows["length"].tolist(), rows["name"].tolist()
        caller_of = [-1] * len(rows)
        called = [0] * len(rows)
        callers: list[int] = []
        for at, start in enumerate(starts):
            while callers and (threads[callers[-1]] != threads[at] or ends[callers[-1]] <= start):
                callers.pop()
            if callers:
                caller_of[at] = callers[-1]
                called[callers[-1]] += 1
                # The clock's last digit may let a called operator end after its caller.
                own[callers[-1]] -= min(ends[at], ends[callers[-1]]) - start
            callers.append(at)
        is_kept = np.ones(len(rows), bool)
        for at in reversed(range(len(rows))):
            caller = caller_of[at]
            if caller >= 0 and called[caller] == 1 and names[caller] == names[at]:
                own[caller] += own[at]
                is_kept[at] = False
        rows = rows.assign(time=np.maximum(own, 0), launched=rows["start"], is_linked=True)
        return rows[is_kept].reset_index(drop=True)


def nanoseconds(microseconds: object) -> int | None:
    """A time of the trace, which is in microseconds and their decimals."""
    if isinstance(microseconds, bool) or not isinstance(microseconds, int | float):
        return None
    if not abs(microseconds) <= MOST_MICROSECONDS:  # which NaN is not either
        return None
    return round(microseconds * 1000)


def _external(told: dict[str, Any]) -> int | None:
    return _number(told.get(EXTERNAL[0], told.get(EXTERNAL[1])))


def _number(found: object) -> int | None:
    return found if isinstance(found, int) else None

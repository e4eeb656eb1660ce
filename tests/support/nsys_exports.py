"""Builds SQLite exports as Nsight Systems writes them, with known answers, in the schemas of several versions.

export = Export()
export.range("forward", 0, 100)
export.kernel("gemm", launched=10, start=50, end=80)
path = export.write(tmp_path / "step.sqlite", "2024.6")
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Schema = Literal["2020.1", "2022.4", "2024.6"]
SCHEMAS: tuple[Schema, ...] = ("2020.1", "2022.4", "2024.6")

PROCESS = 1234
"""The one whose ranges and kernels these are where none is named; its main thread has the same number."""
AUTOGRAD = 1300
"""A thread that is not the main one."""

PUSH_POP, START_END, MARK = 59, 60, 34

# What the versions differ in: the table of metadata, columns that came later, where a range's text is.
METADATA = {"2020.1": "EXPORT_META_DATA", "2022.4": "META_DATA_EXPORT", "2024.6": "META_DATA_EXPORT"}
NAMES_INLINE = {"2020.1": True, "2022.4": True, "2024.6": False}
LATER_COLUMNS: dict[str, str] = {
    "2020.1": "",
    "2022.4": ", graphNodeId INTEGER",
    "2024.6": ", graphNodeId INTEGER, greenContextId INTEGER",
}


def global_tid(process: int, thread: int) -> int:
    """Hardware and virtual machine in the high bits, as in a real export, then process and thread."""
    return (0x0100 << 48) | (process << 24) | thread


@dataclasses.dataclass
class Export:
    """What a profiled program did, to be written in any schema."""

    ranges: list[tuple[str, int, int | None, int, int, int]] = dataclasses.field(default_factory=list)
    kernels: list[tuple[str, int, int, int, int]] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int, int, int, int]] = dataclasses.field(default_factory=list)
    sets: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    graphs: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    calls: list[tuple[int, int, int, int, int]] = dataclasses.field(default_factory=list)

    def range(
        self,
        name: str,
        start: int,
        end: int | None,
        *,
        process: int = PROCESS,
        thread: int | None = None,
        kind: int = PUSH_POP,
    ) -> None:
        self.ranges.append((name, start, end, process, process if thread is None else thread, kind))

    def kernel(self, name: str, *, start: int, end: int, process: int = PROCESS, **launch: Any) -> None:
        self.kernels.append((name, start, end, process, self._call(process=process, **launch)))

    def copy(self, kind: int, *, start: int, end: int, process: int = PROCESS, **launch: Any) -> None:
        self.copies.append((kind, start, end, process, self._call(process=process, **launch)))

    def set(self, *, start: int, end: int, process: int = PROCESS, **launch: Any) -> None:
        self.sets.append((start, end, process, self._call(process=process, **launch)))

    def graph(self, *, start: int, end: int, process: int = PROCESS, **launch: Any) -> None:
        self.graphs.append((start, end, process, self._call(process=process, **launch)))

    def _call(self, *, process: int, launched: int | None, thread: int | None = None) -> int:
        """The correlation number of a call, which each process counts on its own; None is a call not recorded."""
        number = 1 + sum(1 for work in (*self.kernels, *self.copies, *self.sets, *self.graphs) if work[-2] == process)
        if launched is not None:
            self.calls.append((launched, launched + 1, process, process if thread is None else thread, number))
        return number

    def write(
        self, path: Path, schema: Schema = "2024.6", *, without: tuple[str, ...] = (), is_lazy: bool = True
    ) -> Path:
        """The export as a file; `without` names tables, or columns as `table.column`, that it shall not have."""
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            _write(connection, self, schema, is_lazy=is_lazy)
            for name in without:
                table, _, column = name.partition(".")
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}" if column else f"DROP TABLE {table}")
            connection.commit()
        return path


def _write(connection: sqlite3.Connection, export: Export, schema: Schema, *, is_lazy: bool) -> None:
    strings: dict[str, int] = {}

    def number(text: str) -> int:
        return strings.setdefault(text, 100 + len(strings))

    later = LATER_COLUMNS[schema]
    inline = NAMES_INLINE[schema]
    activity = "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER, streamId INTEGER, correlationId INTEGER"
    activity += ", globalPid INTEGER"
    rows: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
        "NVTX_EVENTS": (
            "start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, text TEXT, "
            "globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER",
            [
                (start, end, kind, None, *_text(name, inline, global_tid(process, thread), number), 0)
                for name, start, end, process, thread, kind in export.ranges
            ],
        ),
        "CUPTI_ACTIVITY_KIND_KERNEL": (
            f"{activity}, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL{later}",
            [
                (start, end, 0, 7, correlation, global_tid(process, 0), number(name), number(f"short {name}"))
                + (None,) * later.count(",")
                for name, start, end, process, correlation in export.kernels
            ],
        ),
        "CUPTI_ACTIVITY_KIND_MEMCPY": (
            f"{activity}, bytes INTEGER, copyKind INTEGER",
            [
                (start, end, 0, 7, correlation, global_tid(process, 0), 4096, kind)
                for kind, start, end, process, correlation in export.copies
            ],
        ),
        "CUPTI_ACTIVITY_KIND_MEMSET": (f"{activity}, bytes INTEGER", _plain(export.sets, 4096)),
        "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": (f"{activity}, graphId INTEGER", _plain(export.graphs, 1)),
        "CUPTI_ACTIVITY_KIND_RUNTIME": (
            "start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER, globalTid INTEGER, "
            "correlationId INTEGER, nameId INTEGER, returnValue INTEGER",
            [
                (start, end, 0, global_tid(process, thread), correlation, number("cudaLaunchKernel_v7000"), 0)
                for start, end, process, thread, correlation in export.calls
            ],
        ),
    }
    # Calls that launch nothing are most of what a program does.
    rows["CUPTI_ACTIVITY_KIND_RUNTIME"][1].append((0, 1, 0, global_tid(PROCESS, PROCESS), 0, number("cudaMalloc"), 0))
    for table, (columns, values) in rows.items():
        if values or not is_lazy:
            connection.execute(f"CREATE TABLE {table} ({columns})")
            if values:
                connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values[0]))})", values)
    connection.execute("CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL)")
    connection.executemany("INSERT INTO StringIds VALUES (?, ?)", [(key, text) for text, key in strings.items()])
    connection.execute(f"CREATE TABLE {METADATA[schema]} (name TEXT NOT NULL, value TEXT)")
    told = [("EXPORT_SCHEMA_VERSION", "3.16.1"), ("EXPORT_PRODUCT_VERSION", f"{schema}.1")]
    connection.executemany(f"INSERT INTO {METADATA[schema]} VALUES (?, ?)", told)


def _plain(found: list[tuple[int, int, int, int]], last: int) -> list[tuple[Any, ...]]:
    return [(start, end, 0, 7, number, global_tid(process, 0), last) for start, end, process, number in found]


def _text(name: str, inline: bool, thread: int, number: Callable[[str], int]) -> tuple[Any, ...]:
    """The columns text, globalTid, endGlobalTid and textId of a range."""
    return (name, thread, None, None) if inline else (None, thread, None, number(name))

"""Reads what `nsys export --type sqlite` wrote into a `Recording`.

Nsight Systems creates a table only when it has rows for it, and has moved columns between versions; so what is there
is looked up first, and what is missing is named: as an error where no figure can be given without it, else as a note.
The file may come from anywhere. It is opened to be read only, and only plain tables are read: a view, a virtual table
or a trigger would run SQL of the file's own.

Source: Nsight Systems, "SQLite Export Schema Reference" and "Common SQLite examples" (identifiers of processes and
threads, kernels and their launches) of versions 2020.1, 2021.5, 2022.4 and 2024.6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from cs336_systems.errors import UserError
from cs336_systems.profiling.kernels import RANGE_COLUMNS, WORK_COLUMNS, Integers, Recording

MAGIC = b"SQLite format 3\x00"
NULL = np.iinfo(np.int64).min

# A global identifier holds hardware, virtual machine, process (24 bits) and thread (24 bits), from the high bits down.
PROCESS_SHIFT, MASK = 24, 0xFFFFFF

KERNELS, COPIES, SETS = (f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET"))
GRAPHS = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
"""Whole CUDA graphs, which nsys records in the place of their kernels unless told `--cuda-graph-trace=node`."""
CALLS = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_DRIVER")
"""Calls of CUDA's two interfaces; versions of today keep both in the first."""
RANGES, STRINGS = "NVTX_EVENTS", "StringIds"
METADATA = ("META_DATA_EXPORT", "EXPORT_META_DATA")
"""The table that says which version wrote the file, by its name since 2022 and before."""

# NVTX_EVENTS.eventType, of the program's own calls and of imported text files.
PUSH_POP, START_END = (59, 70), (60, 71)

# The tables CUPTI_ACTIVITY_KIND_MEMCPY and ENUM_CUDA_MEMCPY_OPER number them alike.
COPY_KINDS = {
    1: "Host-to-Device",
    2: "Device-to-Host",
    3: "Host-to-Array",
    4: "Array-to-Host",
    5: "Array-to-Array",
    6: "Array-to-Device",
    7: "Device-to-Array",
    8: "Device-to-Device",
    9: "Host-to-Host",
    10: "Peer-to-Peer",
    11: "Unified Host-to-Device",
    12: "Unified Device-to-Host",
    13: "Unified Device-to-Device",
}


def read_export(path: Path) -> Recording:
    """The kernels, copies and named ranges of an SQLite export.

    Raises:
        UserError: the file is cut off, no export, or lacks what the figures need.
    """
    with _reading(path) as export:
        return export.recording()


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an export has, whether figures can be made of it or not."""

    ranges: frozenset[str]
    """The names of its ranges."""
    kernels: int
    """How many kernels ran, and CUDA graphs in the place of theirs."""


def contents_of(path: Path) -> Contents:
    """What an export has, when every page of the file is as it should be.

    Raises:
        UserError: the file is damaged, cut off, no SQLite file, or has no ranges.
    """
    with _reading(path) as export:
        return export.contents()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[_Export]:
    """An open export; that it is damaged is told as a UserError."""
    with contextlib.closing(_open(path)) as connection:
        try:
            # Functions in the file's own schema are not to be run, nor anything to be written.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA query_only = ON")
            yield _Export(path, connection, _columns(connection))
        except (sqlite3.Error, OverflowError) as error:
            raise UserError(
                f"{path} cannot be read as an SQLite file ({error}): it is damaged or cut off; "
                "write it anew with `nsys export --type sqlite`"
            ) from error


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise UserError(f"cannot open {path}: {error}") from error
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return connection


def _columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """The columns of every plain table, by its name."""
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
    plain = [name for name, sql in found if str(sql).upper().startswith("CREATE TABLE")]
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in plain}
    return {name: {row[1] for row in connection.execute(f"PRAGMA table_info({quoted[name]})")} for name in plain}


@dataclasses.dataclass(frozen=True)
class _Export:
    """An open export, and the columns of its tables."""

    path: Path
    connection: sqlite3.Connection
    columns: dict[str, set[str]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def recording(self) -> Recording:
        self._check()
        ranges = self._ranges()
        calls = self._calls()
        work = pd.concat([self._work(table, calls) for table in (KERNELS, COPIES, SETS, GRAPHS) if self._rows(table)])
        names = pd.Categorical(work["name"])
        work = work.assign(name=names).reset_index(drop=True)
        self._note(work)
        # A range that was still open when the recording ended is open until the last thing that is known of.
        still_open = ranges["end"] == NULL
        if still_open.any():
            last = max(int(frame[["start", "end"]].to_numpy().max()) for frame in (work, ranges, calls)) + 1
            ranges["end"] = ranges["end"].mask(still_open, last)
            self.notes.append(
                f"Still open when the recording ended, and taken to end there: {int(still_open.sum())} of the ranges"
            )
        return Recording(work=work, ranges=ranges, unit="kernel", notes=tuple(self.notes))

    def contents(self) -> Contents:
        (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if not self._rows(RANGES):
            raise self._no_ranges(f"its table {RANGES} is missing or empty")
        counted = [f"SELECT COUNT(*) FROM {table}" for table in (KERNELS, GRAPHS) if table in self.columns]
        kernels = sum(int(self.connection.execute(query).fetchone()[0]) for query in counted)
        return Contents(frozenset(self._ranges()["name"]), kernels)

    # What is there -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise a UserError that names what is missing, unless the export has what the figures need."""
        known = {KERNELS, COPIES, SETS, GRAPHS, *CALLS, RANGES, STRINGS, *METADATA}
        if not known & self.columns.keys():
            tables = ", ".join(sorted(self.columns)[:5]) or "none"
            raise UserError(
                f"{self.path} is an SQLite file, but no export of Nsight Systems: expected tables such as {KERNELS} "
                f"and {RANGES}, found {tables}; write one with `nsys export --type sqlite`"
            )
        if not any(self._rows(table) for table in (KERNELS, COPIES, SETS, GRAPHS)):
            raise UserError(
                f"{self.path} has no GPU work: its table {KERNELS} is missing or empty; profile a program that uses "
                "CUDA, with `nsys profile --trace=cuda,nvtx`"
            )
        if not self._rows(RANGES):
            raise self._no_ranges(f"its table {RANGES} is missing or empty")
        if not any(self._rows(table) for table in CALLS):
            raise UserError(
                f"{self.path} does not say which call launched which kernel: its table {CALLS[0]} is missing or "
                "empty; profile with `nsys profile --trace=cuda,nvtx`"
            )

    def _no_ranges(self, why: str) -> UserError:
        return UserError(
            f"{self.path} has no NVTX ranges: {why}; profile a program that names them, with --trace=cuda,nvtx and "
            "NSYS_NVTX_PROFILER_REGISTER_ONLY=0 where only a range is captured"
        )

    def _rows(self, table: str) -> bool:
        return (
            table in self.columns and self.connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None
        )

    def _need(self, table: str, *names: str) -> None:
        """Raise a UserError that names the columns of a table that are missing."""
        missing = [name for name in names if name not in self.columns[table]]
        if missing:
            raise UserError(
                f"{self.path} is of a schema that is not known ({self._version()}): its table {table} has no column "
                f"{', '.join(missing)}; export the report with an Nsight Systems from 2020 on"
            )

    def _version(self) -> str:
        """What the file says of the version that wrote it."""
        for table in METADATA:
            if {"name", "value"} <= self.columns.get(table, set()):
                told = dict(self.connection.execute(f"SELECT name, value FROM {table}").fetchall())
                schema = told.get("EXPORT_SCHEMA_VERSION", "not told")
                product = next(
                    (told[name] for name in told if "VERSION" in str(name) and "SCHEMA" not in str(name)), ""
                )
                return f"schema {schema}, {table}" + (f", written by {product}" if product else "")
        return f"schema not told: neither {METADATA[0]} nor {METADATA[1]}"

    def _note(self, work: pd.DataFrame) -> None:
        """Keep what the file lacks, where it changes what the figures mean."""
        if not self._rows(KERNELS):
            self.notes.append(f"{KERNELS} is missing or empty: these are copies and whole CUDA graphs only")
        lost = int((~work["is_linked"]).sum())
        if lost:
            self.notes.append(f"Without a launch in the export, and so in no range: {lost} of {len(work)}")
        graphs = int((work["name"] == "[CUDA graph]").sum())
        if graphs:
            self.notes.append(
                f"CUDA graphs in the place of their kernels: {graphs}; --cuda-graph-trace=node shows those instead"
            )

    # Rows ----------------------------------------------------------------------------------------------------

    def _read(self, table: str, *names: str) -> pd.DataFrame:
        """Whole numbers of a table, `NULL` where there is none."""
        # Whatever a cell holds comes as a whole number, so that no text of a foreign file is taken for a time.
        cells = ", ".join(f'COALESCE(CAST("{name}" AS INTEGER), {NULL})' for name in names)
        rows = self.connection.execute(f"SELECT {cells} FROM {table}")
        return pd.DataFrame(np.fromiter(rows, np.dtype([(name, np.int64) for name in names])))

    def _strings(self, numbers: Integers) -> pd.Series:
        """The texts with these numbers, those that are there."""
        wanted = set(np.unique(numbers).tolist())
        if STRINGS not in self.columns:
            return pd.Series([], index=[], dtype=object)
        self._need(STRINGS, "id", "value")
        rows = self.connection.execute(f"SELECT id, value FROM {STRINGS}")
        found = {number: value for number, value in rows if number in wanted}
        return pd.Series(list(found.values()), index=list(found), dtype=object)

    def _ranges(self) -> pd.DataFrame:
        """What was pushed and popped, or started and ended, by its name."""
        self._need(RANGES, "start", "end", "eventType", "globalTid")
        texts = [name for name in ("text", "textId") if name in self.columns[RANGES]]
        if not texts:
            self._need(RANGES, *("text", "textId"))
        number = "textId" if "textId" in texts else "NULL"
        text = "text" if "text" in texts else "NULL"
        rows = self.connection.execute(
            f"""SELECT CAST(start AS INTEGER), COALESCE(CAST("end" AS INTEGER), {NULL}), CAST(eventType AS INTEGER),
                CAST(globalTid AS INTEGER), {text}, COALESCE(CAST({number} AS INTEGER), {NULL})
                FROM {RANGES} WHERE eventType IN {(*PUSH_POP, *START_END)} AND start IS NOT NULL
                AND globalTid IS NOT NULL"""
        ).fetchall()
        if not rows:
            raise self._no_ranges(f"its table {RANGES} has no event of the types {PUSH_POP[0]} and {START_END[0]}")
        found = pd.DataFrame(rows, columns=["start", "end", "kind", "globalTid", "text", "textId"])
        registered = found["textId"].map(self._strings(found["textId"].to_numpy(np.int64)))
        name = found["text"].astype(object).where(found["text"].notna(), registered)
        return pd.DataFrame(
            {
                "name": name.where(name.notna(), "(without a name)").map(str),
                "start": found["start"],
                "end": found["end"],
                "process": _process(found["globalTid"]),
                "thread": found["globalTid"] & MASK,
                "is_process_wide": found["kind"].isin(START_END),
            }
        )[list(RANGE_COLUMNS)]

    def _calls(self) -> pd.DataFrame:
        """Of each correlation number the first call that has it, by process."""
        found = []
        for table in CALLS:
            if self._rows(table):
                self._need(table, "start", "end", "globalTid", "correlationId")
                found.append(self._read(table, "start", "end", "globalTid", "correlationId"))
        calls = pd.concat(found, ignore_index=True)
        calls = calls[(calls["globalTid"] != NULL) & (calls["correlationId"] != NULL)]
        calls = calls.assign(process=_process(calls["globalTid"]), thread=calls["globalTid"] & MASK)
        calls["key"] = _link(calls["process"].to_numpy(), calls["correlationId"])
        # Of two calls of one number the outer one began first.
        calls = calls.iloc[np.lexsort((calls["start"], calls["key"]))]
        return calls[~calls["key"].duplicated()]

    def _work(self, table: str, calls: pd.DataFrame) -> pd.DataFrame:
        """The rows of an activity table with their launches."""
        self._need(table, "start", "end", "correlationId")
        of_name = self._name_column(table)
        has_process = "globalPid" in self.columns[table]
        names = (
            "start",
            "end",
            "correlationId",
            *(["globalPid"] if has_process else []),
            *([of_name] if of_name else []),
        )
        rows = self._read(table, *names)
        rows = rows[rows["start"] != NULL].reset_index(drop=True)
        processes = calls["process"].unique()
        if has_process:
            process = _process(rows["globalPid"])
        elif len(processes) > 1:
            raise UserError(
                f"{self.path} holds {len(processes)} processes, and its table {table} has no column globalPid that "
                "would tell whose work is whose: export the report with an Nsight Systems from 2020 on"
            )
        else:
            process = np.full(len(rows), processes[0] if len(processes) else 0, np.int64)
        at = pd.Index(calls["key"]).get_indexer(pd.Index(_link(process, rows["correlationId"])))
        is_linked = (at >= 0) & (rows["correlationId"] != NULL).to_numpy()
        return pd.DataFrame(
            {
                "name": self._names(table, rows, of_name),
                "start": rows["start"],
                # What had not ended when the recording did has no duration to count.
                "end": np.maximum(rows["start"], rows["end"]),
                "time": np.maximum(rows["end"], rows["start"]) - rows["start"],
                "process": process,
                "thread": calls["thread"].to_numpy()[at] if len(calls) else -1,
                "launched": calls["start"].to_numpy()[at] if len(calls) else NULL,
                "is_linked": is_linked,
            }
        )[list(WORK_COLUMNS)]

    def _name_column(self, table: str) -> str | None:
        """The column that says what ran; a kernel's full name where there is one."""
        if table == KERNELS:
            known = ("demangledName", "shortName", "mangledName", "nameId")
            name = next((name for name in known if name in self.columns[table]), None)
            if name is None or STRINGS not in self.columns:
                what = f"its table {table} has no {known[0]}" if name is None else f"its table {STRINGS} is missing"
                raise UserError(f"{self.path} does not tell the kernels' names: {what}; export the report anew")
            return name
        return "copyKind" if table == COPIES and "copyKind" in self.columns[table] else None

    def _names(self, table: str, rows: pd.DataFrame, of_name: str | None) -> pd.Series:
        if table == KERNELS and of_name is not None:
            texts = rows[of_name].map(self._strings(rows[of_name].to_numpy()))
            return texts.astype(object).where(texts.notna(), "(without a name)")
        if of_name is not None:
            return "[CUDA memcpy " + rows[of_name].map(COPY_KINDS).fillna("of an unknown kind").astype(object) + "]"
        told = {COPIES: "[CUDA memcpy]", SETS: "[CUDA memset]", GRAPHS: "[CUDA graph]"}[table]
        return pd.Series(told, index=rows.index, dtype=object)


def _process(identifier: pd.Series) -> Integers:
    """The process of a global identifier of a process or a thread."""
    return (identifier.to_numpy(np.int64) >> PROCESS_SHIFT) & MASK


def _link(process: Integers, correlation: pd.Series) -> Integers:
    """One number for a process's call: correlation numbers have 32 bits, and each process counts its own."""
    return (process << 32) | (correlation.to_numpy(np.int64) & 0xFFFFFFFF)

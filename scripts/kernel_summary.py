#!/usr/bin/env python3
"""Say which kernels ran for which named range of a profile, and how long.

    python scripts/kernel_summary.py step.sqlite                                   every range, its ten longest kernels
    python scripts/kernel_summary.py step.sqlite --range forward --group category  products, reductions, copies, …
    python scripts/kernel_summary.py step.sqlite --range step --occurrence 2       the second time that it was open
    python scripts/kernel_summary.py trace.json.gz --format csv                    every row, as the published table

FILE is what `nsys export --type sqlite` wrote, or a Chrome trace of torch.profiler. A kernel belongs to the ranges that
were open when it was launched, on the launching thread or, for the autograd thread, on the main one; when it ran does
not matter. Times of kernels are summed; the busy time is that in which at least one ran. A trace of a CPU has no
kernels: there operators stand in their place, each with the time that it spent itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cs336_systems.bench.report import Column, Table, number, plural, shortened, verbatim
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.profiling.kernels import GROUPS, Recording, occurrences, outside, overview, summarise
from cs336_systems.profiling.recordings import read_recording

FORMATS = ("markdown", "csv", "json")
NAME_WIDTH = 120
"""Characters of a kernel's name that a table in Markdown shows; template arguments may take thousands."""

# The columns of the published table, by those of `summarise`.
MILLISECONDS = {
    "total": "total_ms",
    "average": "avg_ms",
    "median": "median_ms",
    "minimum": "min_ms",
    "maximum": "max_ms",
    "deviation": "std_ms",
    "busy": "busy_ms",
    "open": "open_ms",
    "start": "start_ms",
}


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    if arguments.occurrence is not None and arguments.range is None:
        raise UserError("--occurrence counts how often one range was open: name it with --range")
    recording = read_recording(arguments.file)
    rows = summarise(recording, range_name=arguments.range, occurrence=arguments.occurrence, group=arguments.group)
    if arguments.format == "csv":
        published(rows, recording, arguments.group).to_csv(sys.stdout, index=False, lineterminator="\n")
    elif arguments.format == "json":
        print(json.dumps(as_json(recording, rows, arguments), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n\n".join(map(str, tables(recording, rows, arguments))))
    return 0


# Tables for programs -------------------------------------------------------------------------------------------


def in_milliseconds(rows: pd.DataFrame) -> pd.DataFrame:
    """Nanoseconds to the milliseconds of the published tables."""
    present = [name for name in MILLISECONDS if name in rows]
    return rows.assign(**{name: rows[name] / 1e6 for name in present}).rename(columns=MILLISECONDS)


def published(rows: pd.DataFrame, recording: Recording, group: str) -> pd.DataFrame:
    """The columns of the published table in their order, then what it does not have."""
    named = recording.unit if group == "kernel" else "category"
    found = in_milliseconds(rows).assign(time_percent=100 * rows["share"])
    if named != "category":
        found = found.rename(columns={"name": named})
    columns = ["range", "time_percent", "total_ms", "instances", "avg_ms", "median_ms", "min_ms", "max_ms", "std_ms"]
    more = ["busy_ms", "process"] if named == "category" else ["category", "busy_ms", "process"]
    return found[[*columns, named, *more]]


def as_json(recording: Recording, rows: pd.DataFrame, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known, each range with its rows; one that is asked for by name also each time it was open."""
    found = []
    for told in records(in_milliseconds(chosen_ranges(recording, arguments))):
        of_range = (rows["range"] == told["range"]) & (rows["process"] == told["process"])
        lines = published(rows[of_range], recording, arguments.group).drop(columns=["range", "process"])
        found.append({**told, "rows": records(lines)})
        if arguments.range is not None:
            each = in_milliseconds(occurrences(recording, arguments.range))
            each = each[each["process"] == told["process"]].drop(columns=["range", "process"])
            found[-1]["each"] = records(each)
    alone, nanoseconds = outside(recording)
    return {
        "file": arguments.file.name,
        "unit": recording.unit,
        "group": arguments.group,
        "occurrence": arguments.occurrence,
        "notes": list(recording.notes),
        "outside": {"instances": alone, "total_ms": nanoseconds / 1e6},
        "ranges": found,
    }


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A dictionary per row, with null where there is no value."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


# Tables for readers --------------------------------------------------------------------------------------------


def tables(recording: Recording, rows: pd.DataFrame, arguments: argparse.Namespace) -> list[Table]:
    """The ranges, each time that one was open if it was asked for, and what ran in each."""
    ranges = chosen_ranges(recording, arguments)
    several = recording.ranges["process"].nunique() > 1
    found = [range_table(ranges, recording, several)]
    if arguments.range is not None and arguments.occurrence is None:
        found.append(occurrence_table(recording, several, arguments))
    for told in ranges.itertuples():
        of_range = rows[(rows["range"] == told.range) & (rows["process"] == told.process)]
        if len(of_range):
            which = f" (process {told.process})" if several else ""
            time = f", occurrence {arguments.occurrence}" if arguments.occurrence is not None else ""
            found.append(work_table(of_range, f"{told.range}{which}{time}", recording, arguments))
    return found


def chosen_ranges(recording: Recording, arguments: argparse.Namespace) -> pd.DataFrame:
    """Of the ranges those asked for."""
    rows = overview(recording)
    return rows if arguments.range is None else rows[rows["range"] == arguments.range]


def range_table(ranges: pd.DataFrame, recording: Recording, several: bool) -> Table:
    columns = [
        Column("range", lambda row: verbatim(row.range), "left"),
        *([Column("process", lambda row: str(row.process))] if several else []),
        Column("times open", lambda row: f"{row.occurrences:,}"),
        Column("open (ms)", lambda row: number(row.open / 1e6, 4)),
        *_of_work(recording),
    ]
    alone, nanoseconds = outside(recording)
    notes = [f"{note}." for note in recording.notes]
    if alone:
        work = f"{alone:,} of {plural(len(recording.work), recording.unit)} ({number(nanoseconds / 1e6, 4)} ms)"
        notes.append(f"In no range: {work}.")
    return Table.of(ranges, columns, caption=f"Ranges, and the {recording.unit}s launched in them", notes=notes)


def occurrence_table(recording: Recording, several: bool, arguments: argparse.Namespace) -> Table:
    rows = occurrences(recording, arguments.range)
    shown = rows.head(arguments.top) if arguments.top else rows
    columns = [
        Column("number", lambda row: f"{row.number:,}"),
        *([Column("process", lambda row: str(row.process))] if several else []),
        Column("open (ms)", lambda row: number(row.open / 1e6, 4)),
        *_of_work(recording),
    ]
    left = len(rows) - len(shown)
    notes = [f"{left:,} more are not shown: see `--top 0`, or `--format json`."] if left else []
    return Table.of(shown, columns, caption=f"{arguments.range}: each time that it was open", notes=notes)


def _of_work(recording: Recording) -> Sequence[Column]:
    return (
        Column(f"{recording.unit}s", lambda row: f"{row.instances:,}"),
        Column("summed (ms)", lambda row: number(row.total / 1e6, 4)),
        Column("busy (ms)", lambda row: number(row.busy / 1e6, 4)),
    )


def work_table(rows: pd.DataFrame, name: str, recording: Recording, arguments: argparse.Namespace) -> Table:
    shown = rows.head(arguments.top) if arguments.top else rows
    rest = rows.iloc[len(shown) :]
    by = recording.unit if arguments.group == "kernel" else "category"
    columns = [
        Column("time %", lambda row: f"{100 * row.share:.1f}"),
        _milliseconds("total", "total"),
        Column("instances", lambda row: f"{row.instances:,}"),
        _milliseconds("average", "average"),
        _milliseconds("median", "median"),
        _milliseconds("min", "minimum"),
        _milliseconds("max", "maximum"),
        _milliseconds("std", "deviation"),
        _milliseconds("busy", "busy"),
        Column(by, lambda row: row.name if by == "category" else verbatim(shortened(row.name, NAME_WIDTH)), "left"),
    ]
    notes = []
    if len(rest):
        left = f"{number(rest['total'].sum() / 1e6, 4)} ms, {100 * rest['share'].sum():.1f} %"
        notes.append(f"{len(rest):,} more ({left}) are not shown: see `--top 0`, or `--format csv`.")
    time = "" if recording.unit == "kernel" else ", own time on the CPU"
    return Table.of(shown, columns, caption=f"{name}: by {by}{time}", notes=notes)


def _milliseconds(heading: str, of: str) -> Column:
    return Column(f"{heading} (ms)", lambda row: number(getattr(row, of) / 1e6, 4))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path, help="an .sqlite export, or a trace: .json, .json.gz")
    parser.add_argument("--range", metavar="NAME", help="only this range; else every one")
    parser.add_argument("--occurrence", metavar="N", type=int, help="of --range only the N-th time that it was open")
    parser.add_argument("--group", choices=GROUPS, default="kernel", help="a row per kernel, or per kind of kernel")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--top", metavar="N", type=int, default=10, help="rows per table in Markdown; 0 for all (10)")
    arguments = parser.parse_args(argv)
    if arguments.top < 0:
        parser.error(f"--top: expected 0 or more, found {arguments.top}")
    return arguments


if __name__ == "__main__":
    run_command(main)

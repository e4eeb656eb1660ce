"""What every table and figure says of its rows beside their numbers: where they come from, and what is the matter.

The summaries of all experiments have the columns that are needed for it: machine, threads and torch, status and reason,
noise and stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from cs336_systems.bench.report import Column, Finding, Table, number_of_cases, plural, verbatim


def circumstances(summary: pd.DataFrame) -> str:
    """The machine and what ran on it, as the records tell: `epyc-turin-2c, 2 threads, PyTorch 2.13.0`."""
    machines, threads, versions = (summary[name].dropna().unique() for name in ("machine", "threads", "torch"))
    texts = [" and ".join(machines)]
    if len(threads):
        texts.append(" or ".join(plural(int(count), "thread") for count in threads))
    if len(versions):
        texts.append(f"PyTorch {' and '.join(versions)}")
    return ", ".join(texts)


def marks(row: Any) -> str:
    """~ behind a number whose machine was disturbed, † behind one of another source than today's."""
    return (" ~" if row.noise else "") + (" †" if row.stale else "")


def notes_below(
    summary: pd.DataFrame,
    name: Callable[[pd.Series], str],
    case_name: Callable[[pd.Series], str] | None = None,
) -> list[str]:
    """What the marks mean, and why a row has no time.

    `name` says which row is meant; `case_name` which case, where several rows are of one record and share its noise.
    """
    notes = []
    noisy, stale = summary[summary["noise"] != ""], summary[summary["stale"] != ""]
    if len(noisy):
        of, count = (case_name, number_of_cases) if case_name else (name, len)
        texts = list(dict.fromkeys(f"{of(row)} ({row['noise']})" for _, row in noisy.iterrows()))
        notes.append(f"~ noisy, {count(noisy)} of {count(summary)} cases: {enumerated(texts)}")
    if len(stale):
        notes.append("† stale: " + "; ".join(sorted(set(stale["stale"]))))
    untimed = summary[summary["status"] != "ok"]
    for (status, reason), rows in untimed.groupby(["status", "reason"], sort=False, dropna=False):
        # An exception's message is no Markdown.
        told = reason if isinstance(reason, str) and reason else "no reason was recorded"
        why = told if status == "missing" else verbatim(told)
        names = dict.fromkeys(name(row) for _, row in rows.iterrows())
        notes.append(f"{status}: {enumerated(list(names))}: {why}")
    return notes


def staleness(rows: pd.DataFrame) -> list[Finding]:
    """That the sentences above speak of an earlier source, if they do."""
    stale = number_of_cases(rows[rows["stale"] != ""])
    cases = plural(number_of_cases(rows), "case")
    return [Finding(f"Stale (†) are {stale} of {cases}: they say nothing of today's source.")] if stale else []


def by_machine(summary: pd.DataFrame, table: Callable[[pd.DataFrame], Table]) -> Table | Finding:
    """`table` of the published records of all machines, with the machine in front, or that there are none."""
    if not len(summary):
        return Finding("No machine has published records of this experiment yet: scripts/publish_records.py publishes.")
    made = table(summary)
    machines = tuple((str(machine), *row) for machine, row in zip(summary["machine"], made.rows, strict=True))
    return dataclasses.replace(
        made, headings=("machine", *made.headings), alignments=("left", *made.alignments), rows=machines
    )


def without_record(row: pd.Series, caption: str, notes: Callable[[pd.DataFrame], list[str]]) -> Table:
    """What stands in the place of a table whose every row is of one record, as long as that is missing."""
    status = Column("record", lambda found: str(found.status), "left")
    rows = pd.DataFrame([row])
    return Table.of(rows, [status], caption=caption, notes=notes(rows))


def enumerated(texts: Sequence[str], most: int = 12) -> str:
    """All of a few; of many the first, and how many more."""
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")

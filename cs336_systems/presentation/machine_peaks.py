"""The ceilings of a machine as a table."""

from __future__ import annotations

import math

import pandas as pd

from cs336_systems.bench.report import MISSING, Column, Table, number


def table(summary: pd.DataFrame) -> Table:
    """What was measured, and the datasheet's figure where there is one."""
    name = summary["machine"].iloc[0] if len(summary) else "this machine"
    columns = [
        Column("ceiling", lambda row: row.what, "left"),
        Column("by", lambda row: row.how, "left"),
        Column("measured", lambda row: _rate(row.rate, row.unit)),
        Column("datasheet", lambda row: _rate(row.published, row.unit)),
    ]
    lacking = summary[summary["lacks"] != ""]
    notes = [f"not known: {', '.join(rows['what'])}; {reason}" for reason, rows in lacking.groupby("lacks", sort=False)]
    return Table.of(summary, columns, caption=f"What {name} reaches at best", notes=notes)


def _rate(rate: float, unit: str) -> str:
    if math.isnan(rate):
        return MISSING
    scale, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{number(rate / scale)} {prefix}{unit}"

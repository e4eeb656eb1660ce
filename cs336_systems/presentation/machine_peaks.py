"""The ceilings of a machine as a table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.report import MISSING, Column, Table, bytes_in_words, number

_PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "float8")


def table(summary: pd.DataFrame) -> Table:
    """What was measured, and the datasheet's figure where there is one."""
    columns = [
        Column("ceiling", lambda row: row.what, "left"),
        Column("by", lambda row: row.how, "left"),
        Column("measured", _measured),
        Column("datasheet", lambda row: _rate(row.published, row.unit)),
    ]
    name = summary["machine"].iloc[0] if len(summary) else "this machine"
    return Table.of(summary, columns, caption=f"What {name} reaches at best", notes=_notes(summary))


def ceilings(summary: pd.DataFrame, peaks: Peaks, machine: str) -> Table:
    """What a machine's times are bounded with, beside the best it was seen to reach."""
    # Of several ways to reach a ceiling the best counts, and none while one of them is not known.
    best = summary.sort_values("rate", na_position="last").drop_duplicates("what", keep="last").set_index("what")
    bounds = {f"{name} products": rate for name, rate in peaks.matmul_flops_per_s.items()}
    bounds["memory"] = peaks.bandwidth_bytes_per_s
    known = [f"{precision} products" for precision in _PRECISIONS] + ["memory"]
    names = [name for name in known if name in bounds or name in best.index]
    rows = [
        {
            "what": what,
            "bound": bounds.get(what, math.nan),
            "unit": "B/s" if what == "memory" else "FLOP/s",
            "rate": best["rate"].get(what, math.nan),
            "stale": best["stale"].get(what, ""),
        }
        for what in names
    ]
    columns = [
        Column("ceiling", lambda row: row.what, "left"),
        Column("bounds with", lambda row: _rate(row.bound, row.unit)),
        Column("reached here", _measured),
    ]
    notes = [f"Last-level cache: {bytes_in_words(peaks.cache_bytes)}. Bounds: {peaks.source}.", *_notes(summary)]
    return Table.of(pd.DataFrame(rows), columns, caption=f"The ceilings of {machine}", notes=notes)


def _measured(row: Any) -> str:
    return _rate(row.rate, row.unit) + (" †" if row.stale else "")


def _notes(summary: pd.DataFrame) -> list[str]:
    lacking, stale = summary[summary["lacks"] != ""], summary[summary["stale"] != ""]
    unknown = lacking.groupby("lacks", sort=False)
    notes = [f"Not known: {', '.join(rows['what'].unique())}; {reason}." for reason, rows in unknown]
    return notes + [f"† stale: {reason}" for reason in stale["stale"].unique()]


def _rate(rate: float, unit: str) -> str:
    if math.isnan(rate):
        return MISSING
    scale, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{number(rate / scale)} {prefix}{unit}"

"""Problem `benchmarking_script`, part (c), as a table, a figure and sentences."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pandas as pd

from cs336_systems.analysis.published import A100
from cs336_systems.bench.report import (
    COLOURS,
    MARKERS,
    Column,
    Finding,
    Findings,
    Table,
    figure_style,
    logarithmic,
    number,
    percent,
    with_deviation,
)
from cs336_systems.presentation.transformer_step import measured_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(summary: pd.DataFrame) -> Table:
    """Mean and deviation by number of warm-ups, beside the published."""
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        Column("warm-ups", lambda row: str(row.warmup)),
        Column("measured (ms)", measured_text),
        Column("std / mean", lambda row: percent(row.std_ms / row.mean_ms)),
        Column("median (ms)", lambda row: number(row.median_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column(f"{A100} (ms)", lambda row: with_deviation(row.a100_ms, row.a100_std_ms)),
        Column(f"{A100} std / mean", lambda row: percent(row.a100_std_ms / row.a100_ms)),
    ]
    notes = [f"{row.warmup} warm-ups: {row.status}, {row.reason}" for row in _not_measured(summary).itertuples()]
    return Table.of(summary, columns, caption=caption(summary), notes=notes)


def _not_measured(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary["status"] != "ok"] if len(summary) else pd.DataFrame()


def caption(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    shared = f"{first['machine']}, batch {first['batch_size']}, {first['steps']} measured steps"
    return f"Warm-ups: {shared}, each row a fresh process"


def figure(summary: pd.DataFrame) -> Figure:
    """Every step's time by its place in the process, one line per number of warm-ups; hollow steps are warm-ups."""
    from matplotlib.figure import Figure

    measured = summary[summary["status"] == "ok"]
    groups = list(measured.groupby(["size", "context_length", "phase"], sort=False))
    with figure_style():
        drawing = Figure(figsize=(3.6 * max(1, len(groups)), 3.0))
        panels = drawing.subplots(1, max(1, len(groups)), squeeze=False)[0]
        for panel, ((size, context, phase), rows) in zip(panels, groups, strict=False):
            for index, row in enumerate(rows.itertuples()):
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                times, warmups = list(row.steps_ms), int(row.warmup)
                places = range(1, len(times) + 1)
                panel.plot(places, times, "-", color=colour, linewidth=0.8, marker="none")
                panel.plot(places[:warmups], times[:warmups], marker, color=colour, markerfacecolor="white")
                panel.plot(places[warmups:], times[warmups:], marker, color=colour, label=f"{warmups} warm-ups")
            panel.set_title(f"{phase}, {size}, context {context}")
            panel.set_xlabel("step of the process")
            panel.xaxis.get_major_locator().set_params(integer=True)
            logarithmic(panel.yaxis)
            panel.legend()
        panels[0].set_ylabel("time of the step (ms)")
        drawing.suptitle(caption(measured), fontsize=8)
    return drawing


def findings(summary: pd.DataFrame) -> Findings:
    """What the first step costs, and how the deviation falls with warm-ups."""
    measured = summary[summary["status"] == "ok"].reset_index(drop=True)
    if not len(measured):
        return Findings([Finding("No case was measured: run `python scripts/measure.py warmup`.")])
    firsts = [times[0] / statistics.median(times[1:]) for times in measured["steps_ms"] if len(times) > 1]
    sentences = []
    if firsts:
        sentences.append(
            Finding(
                f"The first step of a process takes {number(statistics.median(firsts), 2)} times the median of its "
                f"later steps (median of {len(firsts)} processes): it pays once for loading kernels, creating handles "
                "and touching memory for the first time.",
                holds=statistics.median(firsts) > 1.2,
            )
        )
    spread = (measured["std_ms"] / measured["mean_ms"]).groupby(measured["warmup"]).median()
    if 0 in spread.index and len(spread) > 1:
        least = spread.drop(0)
        sentences.append(
            Finding(
                f"Without warm-up the standard deviation is {percent(spread[0])} of the mean; with "
                + ", ".join(f"{count} it is {percent(share)}" for count, share in least.items())
                + ".",
                holds=bool(spread[0] > least.max()),
            )
        )
    published = measured[measured["a100_ms"].notna()]
    if len(published):
        shares = (published["a100_std_ms"] / published["a100_ms"]).groupby(published["warmup"]).max()
        listed = ", ".join(f"{percent(share)} with {count}" for count, share in shares.items())
        sentences.append(Finding(f"Published on an {A100}, at most: {listed} warm-ups."))
    return Findings(sentences)

"""Problem `benchmarking_script`, part (c), as a table, a figure and sentences."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import A100, PUBLISHED_WARMUPS
from cs336_systems.bench.report import (
    BOUND,
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
    plural,
    with_deviation,
)
from cs336_systems.presentation.transformer_step import measured_text, notes_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(summary: pd.DataFrame) -> Table:
    """Mean and deviation by number of warm-ups, beside the published."""
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        Column("warm-ups", lambda row: str(row.warmup)),
        Column("mean ± std (ms)", measured_text),
        Column("std / mean", lambda row: percent(row.std_ms / row.mean_ms)),
        Column("median (ms)", lambda row: number(row.median_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column(f"{A100} (ms)", lambda row: with_deviation(row.a100_ms, row.a100_std_ms)),
        Column(f"{A100} std / mean", lambda row: percent(row.a100_std_ms / row.a100_ms)),
    ]
    return Table.of(summary, columns, caption=caption(summary), notes=notes_below(summary) if len(summary) else [])


def published(deviations: pd.DataFrame) -> Table:
    """What others published: the deviation of the forward pass after 0, 1 and 5 warm-ups."""
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        *(
            Column(f"{plural(count, 'warm-up')} (ms)", partial(_published_time, count=count))
            for count in PUBLISHED_WARMUPS
        ),
        *(Column(f"std / mean, {count}", partial(_published_share, count=count)) for count in PUBLISHED_WARMUPS),
    ]
    return Table.of(deviations, columns, caption=f"Published: forward on an {A100}, float32, batch 4, 10 steps")


def _published_time(row: Any, count: int) -> str:
    return with_deviation(getattr(row, f"mean_ms_{count}"), getattr(row, f"std_ms_{count}"))


def _published_share(row: Any, count: int) -> str:
    return percent(getattr(row, f"std_ms_{count}") / getattr(row, f"mean_ms_{count}"))


def caption(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    shared = f"{first['machine']}, batch {first['batch_size']}, {first['steps']} measured steps"
    return f"Warm-ups: {shared}, each in a fresh process"


def figure(summary: pd.DataFrame) -> Figure:
    """Every step's time by its place in the process, one line per number of warm-ups; hollow steps are warm-ups."""
    from matplotlib.figure import Figure

    measured = summary[summary["status"] == "ok"]
    groups = list(measured.groupby(["size", "context_length", "phase"], sort=False))
    with figure_style():
        drawing = Figure(figsize=(3.4 * max(1, len(groups)) + 1.8, 3.0))
        panels = drawing.subplots(1, max(1, len(groups)), squeeze=False)[0]
        for panel, ((size, context, phase), rows) in zip(panels, groups, strict=False):
            for index, row in enumerate(rows.itertuples()):
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                times, warmups = list(row.steps_ms), int(row.warmup)
                places = range(1, len(times) + 1)
                panel.plot(places, times, "-", color=colour, linewidth=0.8, marker="none")
                panel.plot(places[:warmups], times[:warmups], marker, color=colour, markerfacecolor="white")
                panel.plot(places[warmups:], times[warmups:], marker, color=colour, label=plural(warmups, "warm-up"))
            panel.set_title(f"{phase}, {size}, context {context}")
            panel.set_xlabel("step of the process")
            panel.xaxis.get_major_locator().set_params(integer=True)
            logarithmic(panel.yaxis)
            panel.plot([], [], "o", color=BOUND, markerfacecolor="white", label="hollow: a warm-up step")
            panel.axhline(rows["bound_ms"].iloc[0], color=BOUND, linewidth=1.5, marker="none", label="floor")
        panels[0].set_ylabel("time of the step (ms)")
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            drawing.legend(handles, labels, loc="outside right center")
        drawing.suptitle(caption(measured), fontsize=8)
    return drawing


def findings(summary: pd.DataFrame) -> Findings:
    """What the first step costs, and how the deviation falls with warm-ups."""
    measured = summary[summary["status"] == "ok"].reset_index(drop=True)
    if not len(measured):
        return Findings([Finding("No case was measured: run `python scripts/measure.py warmup`.")])
    sentences = []
    firsts = [times[0] / statistics.median(times[1:]) for times in measured["steps_ms"] if len(times) > 1]
    if firsts:
        first = statistics.median(firsts)
        sentences.append(
            Finding.checked(
                f"The first step of a process takes {number(first, 2)} times the median of its later steps (median of "
                f"{len(firsts)} {'process' if len(firsts) == 1 else 'processes'})",
                first > 1.2,
                so=": it pays once for loading kernels, creating handles and touching memory for the first time.",
                but=": of what it pays once, nothing is to be seen here.",
            )
        )
    spread = (measured["std_ms"] / measured["mean_ms"]).groupby(measured["warmup"]).median()
    if 0 in spread.index and len(spread) > 1:
        warm = spread.drop(0)
        sentences.append(
            Finding.checked(
                f"Without warm-up the standard deviation is {percent(spread[0])} of the mean; "
                + ", ".join(f"after {plural(int(count), 'warm-up')} {percent(share)}" for count, share in warm.items()),
                bool(spread[0] > warm.max()),
                so=": warm-up steps keep the start out of the numbers.",
                but=": here something else disturbed the steps more than the start does.",
            )
        )
    return Findings(sentences)

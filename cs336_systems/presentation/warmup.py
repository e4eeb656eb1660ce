"""Problem `benchmarking_script`, part (c), as a table, a figure and sentences."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import A100, PUBLISHED_DECIMALS_MS, PUBLISHED_STEPS, PUBLISHED_WARMUPS
from cs336_systems.bench.remarks import circumstances, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MARKERS,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    figure_style,
    logarithmic,
    number,
    percent,
    plural,
    within,
)
from cs336_systems.presentation.transformer_step import measured_text, notes_below, published_text

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
        Column("std / mean (%)", lambda row: number(100 * row.std_ms / row.mean_ms, 2)),
        Column("median (ms)", lambda row: within(row.median_ms, row.std_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column(f"{A100} (ms)", lambda row: published_text(row.a100_ms, row.a100_std_ms)),
        Column(f"{A100} std / mean (%)", lambda row: _published_percent(row.a100_std_ms, row.a100_ms)),
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
        *(Column(f"std / mean, {count} (%)", partial(_published_share, count=count)) for count in PUBLISHED_WARMUPS),
    ]
    return Table.of(
        deviations, columns, caption=f"Published: forward on an {A100}, float32, batch 4, {PUBLISHED_STEPS} steps"
    )


def published_findings(deviations: pd.DataFrame) -> Findings:
    """How warm-up changed the deviation that others published."""
    without, one, five = ((deviations[f"std_ms_{count}"] / deviations[f"mean_ms_{count}"]) for count in (0, 1, 5))
    extra = PUBLISHED_STEPS * (deviations["mean_ms_0"] - deviations["mean_ms_5"])
    return Findings(
        [
            Finding.checked(
                f"On an {A100} others found a standard deviation of {percent(without.median())} of the mean without "
                f"warm-up, {_rounded(one.median())} after one step and {_rounded(five.median())} "
                f"after five (medians of {plural(len(deviations), 'case')}, published to a tenth of a millisecond)",
                bool(without.median() > 10 * one.median() and one.median() >= five.median()),
                so=": one step takes out most of the start.",
                but=": there, too, warm-up is not all that disturbs the times.",
            ),
            Finding.checked(
                f"By their means without and with warm-up, the first of {PUBLISHED_STEPS} steps took "
                f"{number(extra.median(), 2)} ms longer than the others (from {number(extra.min(), 2)} to "
                f"{number(extra.max(), 2)})",
                bool(extra.max() < 2 * extra.min()),
                so=", about the same for every model: it is the cost of starting, not of computing.",
                but=", which differs by model: not all of it is the cost of starting.",
            ),
        ]
    )


def _published_time(row: Any, count: int) -> str:
    return published_text(getattr(row, f"mean_ms_{count}"), getattr(row, f"std_ms_{count}"))


def _published_share(row: Any, count: int) -> str:
    return _published_percent(getattr(row, f"std_ms_{count}"), getattr(row, f"mean_ms_{count}"))


def _rounded(share: float) -> str:
    return f"{number(100 * share, 1)} %" if share else "too little to be seen"


def _published_percent(std_ms: float, mean_ms: float) -> str:
    """One digit of a deviation that was published with one, and at most what rounding hides of one that is 0."""
    step = 10.0**-PUBLISHED_DECIMALS_MS
    if std_ms < step / 2:
        return f"< {number(100 * step / 2 / mean_ms, 1)}"
    return number(100 * std_ms / mean_ms, 1 if std_ms < 10 * step else 2)


def caption(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    shared = f"{circumstances(summary)}, batch {first['batch_size']}, {first['steps']} measured steps"
    return f"Warm-ups: {shared}, each in a fresh process"


def figure(summary: pd.DataFrame) -> Picture:
    """Every step's time by its place in the process, one line per number of warm-ups; hollow steps are warm-ups."""
    return Picture(caption(summary), partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
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
            if rows["bound_ms"].notna().any():
                panel.axhline(rows["bound_ms"].iloc[0], color=BOUND, linewidth=1.5, marker="none", label="floor")
        panels[0].set_ylabel("time of the step (ms)")
        shown = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels]
        entries = {label: handle for pairs in shown for handle, label in pairs}
        if entries:
            drawing.legend(entries.values(), entries.keys(), loc="outside right center")
    return drawing


def findings(summary: pd.DataFrame) -> Findings:
    """What the first step costs, and how the deviation falls with warm-ups."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py warmup`.")])
    if not summary["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case has a time; the notes of the table say why.")])
    return Findings(
        [
            *Finding.from_all(summary, "What the first step of a process costs", _first_step),
            *Finding.from_all(summary, "What warm-up does to the deviation", _deviation),
            *staleness(summary),
        ]
    )


def _first_step(rows: pd.DataFrame) -> Finding | None:
    firsts = [times[0] / statistics.median(times[1:]) for times in rows["steps_ms"] if len(times) > 1]
    if not firsts:
        return None
    first = statistics.median(firsts)
    return Finding.checked(
        f"The first step of a process takes {number(first, 2)} times the median of its later steps (median of "
        f"{len(firsts)} {'process' if len(firsts) == 1 else 'processes'})",
        first > 1.2,
        so=". What is done only once falls into it: kernels are loaded, handles created, pages of memory touched.",
        but=": of what is done only once nothing is to be seen here.",
    )


def _deviation(rows: pd.DataFrame) -> Finding | None:
    spread = (rows["std_ms"] / rows["mean_ms"]).groupby(rows["warmup"]).median().dropna()
    if 0 not in spread.index or len(spread) < 2:
        return None
    warm = spread.drop(0)
    return Finding.checked(
        f"Without warm-up the standard deviation is {percent(spread[0])} of the mean; "
        + ", ".join(f"after {plural(int(count), 'warm-up')} {percent(share)}" for count, share in warm.items()),
        bool(spread[0] > 2 * warm.iloc[-1]),  # beside the longest warm-up
        so=": warm-up steps keep the start out of the numbers.",
        but=": that is no great difference, and something else disturbs these steps as much as the start does.",
    )

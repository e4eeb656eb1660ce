"""The longest context of each size on each GPU, as a table, a heat map and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.bench import remarks
from cs336_systems.bench.report import (
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    beginning,
    figure_style,
    number,
    percent,
    verbatim,
)
from cs336_systems.model import SIZES
from cs336_systems.presentation.transformer_step import choices_in_words, shared_choices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT = "Longest context that fits, planned"


def table(summary: pd.DataFrame) -> Table:
    """A row per step, a column per GPU."""
    gpus = list(dict.fromkeys(summary["gpu"])) if len(summary) else []
    rows = (
        [
            {"name": _step_name(cases.iloc[0]), "status": cases["status"].iloc[0]}
            | {f"on_{index}": _longest(cases, gpu) for index, gpu in enumerate(gpus)}
            for _, cases in summary.groupby("case", sort=False)
        ]
        if len(summary)
        else []
    )
    columns = [
        Column("step", lambda row: row.name, "left"),
        *(Column(gpu, partial(_cell, column=f"on_{index}")) for index, gpu in enumerate(gpus)),
    ]
    told = (
        "Tokens per sequence, to the token: with one more the second step finds no memory, after every segment that is "
        "free as a whole was given back. 0: the weights and what comes with each do not fit."
    )
    notes = [told, *remarks.notes_below(summary, _step_name)] if len(summary) else []
    return Table.of(pd.DataFrame(rows), columns, caption=caption(summary), notes=notes)


def _longest(cases: pd.DataFrame, gpu: str) -> float | None:
    found = cases[cases["gpu"] == gpu]["longest"]
    return None if found.isna().all() else float(found.iloc[0])


def _cell(row: Any, column: str) -> str:
    value = getattr(row, column)
    if row.status != "ok":
        return str(row.status)
    return MISSING if value != value or value is None else f"{value:,.0f}"


def _step_name(row: pd.Series) -> str:
    return f"{row['phase']} of {row['size']}{choices_in_words(row)}"


def caption(summary: pd.DataFrame) -> str:
    """What all rows share."""
    if not len(summary):
        return WHAT
    return ", ".join([WHAT, f"batch {summary.iloc[0]['batch_size']}", *shared_choices(summary)])


def figure(summary: pd.DataFrame) -> Picture | Finding:
    """A heat map, size × GPU, for each phase and precision."""
    if not len(summary):
        return Finding("No longest context was planned.")
    return Picture(caption(summary), partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
    import seaborn as sns
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(zip(summary["phase"], summary["autocast"], strict=True)))
    order = [size for size in [*SIZES, "custom"] if size in set(summary["size"])]
    known = summary["longest"].dropna()
    least, most = (known.clip(lower=1).min(), max(known.max(), 2)) if len(known) else (1, 2)
    with figure_style():
        drawing = Figure(figsize=(2.0 + 4.0 * len(kinds), 1.4 + 0.38 * len(order)))
        panels = drawing.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, (phase, autocast) in zip(panels, kinds, strict=True):
            rows = summary[(summary["phase"] == phase) & (summary["autocast"] == autocast)]
            values = rows.pivot_table(index="size", columns="gpu", values="longest", sort=False, dropna=False)
            values = values.astype(float).reindex(order)[list(dict.fromkeys(rows["gpu"]))]
            if values.isna().all(axis=None):
                panel.annotate("no record yet", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
                panel.set(xlabel="GPU", ylabel="size", xticks=[], yticks=[])
                continue
            texts = values.map(lambda value: MISSING if math.isnan(value) else f"{value:,.0f}")
            sns.heatmap(
                values.clip(lower=1),
                ax=panel,
                annot=texts,
                fmt="",
                cmap="Greys",
                norm=LogNorm(vmin=max(1.0, least / 3), vmax=most),  # the palest cell is not white
                linewidths=0.5,
                cbar=panel is panels[-1],
                cbar_kws={"label": "longest context (tokens)"},
                annot_kws={"size": 8},
            )
            precision = "float32" if autocast == "none" else f"{autocast} autocast"
            panel.set(title=f"{phase}, {precision}", xlabel="GPU", ylabel="size" if panel is panels[0] else "")
            panel.tick_params(axis="x", rotation=35)
            panel.tick_params(axis="y", rotation=0)
    return drawing


def findings(summary: pd.DataFrame) -> Findings:
    """What limits the context."""
    if not len(summary):
        return Findings([Finding("No longest context was planned: run `python scripts/measure.py longest_context`.")])
    return Findings(
        [
            *Finding.from_all(summary, "How the longest context grows with the memory", _told(growth)),
            *Finding.from_all(summary, "What does not fit at all", _told(nothing)),
            *remarks.staleness(summary),
        ]
    )


def _told(tell: Callable[[pd.DataFrame], Finding | None]) -> Callable[[pd.DataFrame], Finding | None]:
    """`tell` of the rows that were planned."""
    return lambda rows: tell(rows[rows["status"] == "ok"])


def growth(rows: pd.DataFrame) -> Finding | None:
    """Scores grow with the square of the context, so the context grows more slowly than the memory."""
    fitting = rows[rows["longest"] > 0]
    pairs = []
    for _, cases in fitting.groupby("case", sort=False):
        ordered = cases.sort_values("usable_bytes")
        small, large = ordered.iloc[0], ordered.iloc[-1]
        if large["usable_bytes"] > small["usable_bytes"]:
            pairs.append((small, large, large["longest"] / small["longest"]))
    if not pairs:
        return None
    small, large, times = min(pairs, key=lambda pair: pair[2])
    memory = large["usable_bytes"] / small["usable_bytes"]
    return Finding.checked(
        f"{beginning(_step_name(small))} fits {small['longest']:,.0f} tokens on {verbatim(small['gpu'])} and "
        f"{large['longest']:,.0f} on {verbatim(large['gpu'])}: {number(memory, 2)} times the memory for "
        f"{number(times, 2)} times the context",
        bool(times < memory),
        so=", since the scores of attention grow with its square.",
        but=": what does not grow with the context is most of what the smaller one holds.",
    )


def nothing(rows: pd.DataFrame) -> Finding | None:
    """Where weights, gradients and moments alone are too much."""
    none = rows[rows["longest"] == 0]
    if not len(none):
        return None
    names = dict.fromkeys(f"{_step_name(row)} on {row['gpu']}" for _, row in none.iterrows())
    share = percent(len(none) / len(rows))
    return Finding(f"Not one token fits in {share} of the cells: {remarks.enumerated(list(names))}.")


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published plans, which are the same from any machine."""
    if not len(summary):
        return Finding("No machine has published records of this experiment yet: scripts/publish_records.py publishes.")
    return table(summary)

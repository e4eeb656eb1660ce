"""How the figure of problem `nsys_profile` is drawn: the time of each range by kind of work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.bench.report import COLOURS, figure_style, number
from cs336_systems.profiling.categories import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "")


def draw(rows: pd.DataFrame, units: str) -> Figure:
    """A bar for each row, divided by kind of work; `units` is what the profiles count."""
    from matplotlib.figure import Figure

    with figure_style():
        drawing = Figure(figsize=(7.4, 1.3 + 0.24 * max(1, len(rows))))
        axes = drawing.subplots()
        places = list(range(len(rows)))[::-1]
        left = [0.0] * len(rows)
        colours = (*COLOURS, "#c7ccd4", "#f1f3f5")
        for category, colour, hatch in zip(CATEGORIES, colours, HATCHES, strict=True):
            shares = [100 * row.categories.get(category, 0.0) / row.total_ms for row in rows.itertuples()]
            if any(shares):
                look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "hatch": hatch}
                axes.barh(places, shares, left=left, height=0.8, label=category, **look)
            left = [before + share for before, share in zip(left, shares, strict=True)]
        labels = [_bar_name(row) for row in rows.itertuples()]
        axes.set_yticks(places, labels, fontsize="small")
        for place, row in zip(places, rows.itertuples(), strict=True):
            axes.annotate(f" {number(row.total_ms)} ms", (100, place), va="center", fontsize="small")
        axes.grid(visible=False, axis="y")
        axes.set(
            xlim=(0, 100),
            ylim=(-0.6, max(1, len(rows)) - 0.4),
            xlabel=f"share of the time of {units} (%)",
            ylabel="case and range",
        )
        if len(rows):
            drawing.legend(loc="outside lower center", ncols=4)
    return drawing


def _bar_name(row: Any) -> str:
    where = "inference" if row.phase == "forward" else row.range if row.range != "step" else "whole step"
    autocast = "" if row.autocast == "none" else f", {row.autocast}"
    return f"{row.size} {row.context_length}{autocast}: {where}"

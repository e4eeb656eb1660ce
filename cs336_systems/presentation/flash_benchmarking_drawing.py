"""How the figure of problem `flash_benchmarking` is drawn from the rows that it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import H100
from cs336_systems.bench.report import BOUND, COLOURS, MARKERS, PUBLISHED, figure_style, lengths, logarithmic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: pd.DataFrame) -> Figure:
    """A panel for forward, one for backward and one for memory, a line for each implementation."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(rows["implementation"]))
    with figure_style():
        drawing = Figure(figsize=(7.4, 3.4))
        panels = drawing.subplots(1, 3)
        series: dict[str, Any] = {}
        for place, name in enumerate(names):
            timed = rows[(rows["implementation"] == name) & (rows["status"] == "ok")].sort_values("seq_len")
            style = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
                "linestyle": "-" if place < len(COLOURS) else "--",
                "markersize": 3.5,
                "linewidth": 1.1,
            }
            for panel, column in zip(panels, ("forward_ms", "backward_ms", "peak_bytes"), strict=True):
                scale = 2**20 if column == "peak_bytes" else 1
                (series[name],) = panel.plot(timed["seq_len"], timed[column] / scale, **style)
        shapes = rows.drop_duplicates("seq_len").sort_values("seq_len")
        for panel, part in zip(panels, ("forward", "backward"), strict=False):
            _draw_beside(panel, shapes, part, series)
            panel.set(title=part, ylabel="time per pass (ms)")
        panels[2].set(title="peak of both", ylabel="memory beyond the inputs (MiB)")
        for panel in panels:
            panel.set_xlabel("length (tokens)")
            logarithmic(panel.yaxis)
            lengths(panel.xaxis, shapes["seq_len"])
        drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=4)
    return drawing


def _draw_beside(panel: Any, shapes: pd.DataFrame, part: str, series: dict[str, Any]) -> None:
    """The floor, and what others published for the same shapes."""
    floor = shapes.dropna(subset=[f"{part}_bound_ms"])
    if len(floor):
        line = {"color": BOUND, "linestyle": ":", "marker": "", "linewidth": 1.4}
        (series["floor"],) = panel.plot(floor["seq_len"], floor[f"{part}_bound_ms"], **line)
    others = shapes.dropna(subset=[f"h100_{part}_triton_ms"])
    if len(others):
        style = {"color": PUBLISHED, "marker": "D", "markerfacecolor": "none", "linestyle": "none", "markersize": 5}
        (series[f"published Triton, {H100}"],) = panel.plot(
            others["seq_len"], others[f"h100_{part}_triton_ms"], **style
        )

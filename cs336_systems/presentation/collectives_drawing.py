"""How the figure of the collectives is drawn: the all-reduces that are compared, by size and number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.communication import ALTERNATE, RING
from cs336_systems.analysis.published import PublishedAllReduce
from cs336_systems.bench.report import BOUND, COLOURS, MARKERS, PUBLISHED, figure_style, logarithmic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIBRARY = "all_reduce"
SERIES = (LIBRARY, RING, ALTERNATE)


def draw(summary: pd.DataFrame) -> Figure:
    """A panel for each number of ranks, a line for each all-reduce."""
    from matplotlib.figure import Figure

    worlds = list(dict.fromkeys(summary["world_size"]))
    with figure_style():
        drawing = Figure(figsize=(1.2 + 3.1 * len(worlds), 3.4))
        panels = drawing.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
        series: dict[str, Any] = {}
        for panel, world in zip(panels, worlds, strict=True):
            rows = summary[summary["world_size"] == world]
            for place, name in enumerate(SERIES):
                timed = rows[(rows["operation"] == name) & (rows["status"] == "ok")]
                style = {"color": COLOURS[(0, 2, 3)[place]], "marker": MARKERS[place]}
                (series[in_legend(name)],) = panel.plot(timed["size_mb"], timed["slowest_ms"], markersize=4, **style)
            bound = rows[rows["operation"] == LIBRARY].dropna(subset=["bound_ms"])
            (series["ring's bound"],) = panel.plot(
                bound["size_mb"], bound["bound_ms"], color=BOUND, linestyle="--", marker="", linewidth=1.2
            )
            published = rows.dropna(subset=["published_ms"])
            if len(published):
                style = {"color": PUBLISHED, "marker": "D", "markerfacecolor": "none", "linestyle": "none"}
                (series[f"published, {PublishedAllReduce.HARDWARE}"],) = panel.plot(
                    published["size_mb"], published["published_ms"], markersize=5, **style
                )
            panel.set(
                title=f"{world} ranks", xlabel="array (MB)", ylabel="slowest rank (ms)" if world == worlds[0] else ""
            )
            logarithmic(panel.xaxis)
            logarithmic(panel.yaxis)
        drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=3)
    return drawing


def in_legend(name: str) -> str:
    """What the legend and the sentences call an all-reduce."""
    return "the library's" if name == LIBRARY else f"our {name}"

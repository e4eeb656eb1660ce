"""How the figures of data parallel are drawn, a panel for each case or wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cs336_systems.analysis.bucketing import CallCost
from cs336_systems.bench.report import BOUND, COLOURS, MARKERS, figure_style, logarithmic, percent, plural
from cs336_systems.experiments.data_parallel import BYTES_PER_MB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LANES = {"compute": COLOURS[4], "communication": COLOURS[0]}
_LABELS = ("computation", "communication")


def case_name(row: pd.Series) -> str:
    """What the title of a panel, a note and a sentence call a case."""
    return f"{row['size']} at context {row['context_length']} on {plural(row['world_size'], 'rank')}"


def cases_of(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each case."""
    return [case.reset_index(drop=True) for _, case in rows.groupby("case", sort=False)]


def cost_of(row: Any) -> CallCost | None:
    """The constants of the model of a call's cost, where they are known."""
    known = row["bytes_per_s"] == row["bytes_per_s"]
    return CallCost(row["bytes_per_s"], row["seconds_per_call"]) if known else None


def draw_steps(summary: pd.DataFrame) -> Figure:
    """A panel for each case, a bar for each wrapper."""
    from matplotlib.figure import Figure

    cases = cases_of(summary)
    with figure_style():
        drawing = Figure(figsize=(7.0, max(2.2, 0.6 + 0.34 * len(summary))))
        for panel, rows in zip(drawing.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
            places = np.arange(len(rows))[::-1]
            exposed = rows["exposed_ms"].fillna(0).clip(lower=0)
            alone = rows["mean_ms"] - exposed
            panel.barh(places, alone, color=COLOURS[4], label="as a rank alone")
            panel.barh(places, exposed, left=alone, color=COLOURS[0], label="exposed communication")
            panel.errorbar(rows["mean_ms"], places, xerr=rows["std_ms"], fmt="none", ecolor=COLOURS[1], capsize=2)
            panel.set(yticks=places, xlabel="step (ms)", title=case_name(rows.iloc[0]))
            panel.set_yticklabels(rows["variant"])
        drawing.legend(*panel.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return drawing


def draw_overhead(rows: pd.DataFrame) -> Figure:
    """A panel for each case: what is exposed over the size of a bucket, and the model's curve."""
    from matplotlib.figure import Figure

    cases = cases_of(rows)
    with figure_style():
        drawing = Figure(figsize=(6.0, 3.2 * len(cases)))
        for panel, case in zip(drawing.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
            for place, (wrapper, label) in enumerate({"bucketed": "ours", "torch": "PyTorch's"}.items()):
                own = case[case["wrapper"] == wrapper].sort_values("bucket_mb")
                if not len(own):
                    continue
                panel.plot(
                    own["bucket_mb"],
                    own["exposed_ms"],
                    color=COLOURS[place],
                    marker=MARKERS[place],
                    linestyle="-" if wrapper == "bucketed" else "none",
                    label=f"{label}, measured",
                )
            first = case.iloc[0]
            cost = cost_of(first)
            if cost is not None:
                sizes = np.geomspace(0.3, max(1.0, first["gradient_bytes"] / BYTES_PER_MB), 100)
                total = first["gradient_bytes"]
                modelled = [1e3 * cost.overlapped_s(total, max(1.0, total / (size * BYTES_PER_MB))) for size in sizes]
                panel.plot(sizes, modelled, color=BOUND, marker="", linestyle="--", label="model")
                best = cost.best_bucket_bytes(total)
                least_ms = 1e3 * cost.overlapped_s(total, total / best)
                panel.plot([best / BYTES_PER_MB], [least_ms], color=BOUND, marker="*", markersize=11, linestyle="none",
                           label="its best size")  # fmt: skip
            logarithmic(panel.xaxis)
            panel.set(xlabel="size of a bucket (MB)", ylabel="exposed (ms)", title=case_name(first))
            panel.legend()
    return drawing


def draw_timeline(rows: pd.DataFrame) -> Figure:
    """A panel for each wrapper, two lanes for each rank."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with figure_style():
        drawing = Figure(figsize=(7.5, 0.8 + 0.95 * len(rows)))
        panels = drawing.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
        for panel, (_, row) in zip(panels, rows.iterrows(), strict=True):
            ranks = row["recorded"]
            for rank, spans in enumerate(ranks):
                for offset, (name, colour) in enumerate(_LANES.items()):
                    parts = [(begin, end - begin) for begin, end in spans[f"{name}_spans_ms"]]
                    panel.broken_barh(parts, (-rank - 0.4 * offset, 0.36), color=colour)
            panel.set(yticks=[-rank + 0.0 for rank in range(len(ranks))])
            panel.set_yticklabels([f"rank {rank}" for rank in range(len(ranks))])
            without = f": {row['status']}" if row["is_left_out"] else ": no record yet"
            share = f", {percent(row['overlapped'])} overlapped" if ranks else without
            share += "" if row["is_matched"] else ", calls with their waiting"
            panel.set_title(f"{row['variant']}{share}", loc="left")
        panels[-1].set(xlabel="since the step began (ms)")
        handles = [Patch(color=colour, label=label) for colour, label in zip(_LANES.values(), _LABELS, strict=True)]
        drawing.legend(handles=handles, loc="outside upper right", ncols=2)
    return drawing

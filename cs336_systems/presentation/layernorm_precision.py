"""Problem `benchmarking_mixed_precision`, part (b), as a table, a heat map and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.cuda_autocast import rule_of
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    figure_style,
    number,
    percent,
)
from cs336_systems.experiments.layernorm_precision import (
    ALL,
    ALL_SUMMED_IN_FLOAT32,
    EPS,
    LOST,
    REFERENCE,
    REFERENCE_FLOAT32,
    STEPS,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.01
"""Of a roundoff: what is less is none."""
_SUMS = ("mean", "variance")


def table(summary: pd.DataFrame) -> Table:
    """A row per precision and step, a column per scale of the input: errors in unit roundoffs."""
    columns = [
        Column("precision", lambda row: row.precision, "left"),
        Column("in half precision", lambda row: row.step, "left"),
        *(Column(f"{scale:g}", partial(_cell_of, scale=scale)) for scale in _scales(summary)),
    ]
    roundoffs = {row.precision: row.unit_roundoff for row in summary.itertuples()}
    notes = [
        "Columns are scales of the input. Errors are against float64, in unit roundoffs: "
        + ", ".join(f"that of {name} is {percent(value)}" for name, value in roundoffs.items())
        + f". Lost: an error of {percent(LOST)} or more of the result; ∞: not finite. A row takes one step in half "
        "precision and all others in float64, but for the last four.",
        *notes_below(summary),
    ]
    return Table.of(_by_scale(summary), columns, caption=caption(summary), notes=notes if len(summary) else [])


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, an error to a row."""
    return remarks.by_machine(summary, _listed)


def _listed(summary: pd.DataFrame) -> Table:
    columns = [
        Column("precision", lambda row: row.precision, "left"),
        Column("scale", lambda row: f"{row.scale:g}"),
        Column("in half precision", lambda row: row.step, "left"),
        Column("error (unit roundoffs)", _cell),
    ]
    return Table.of(summary, columns, caption="Errors of LayerNorm by machine", notes=notes_below(summary))


def _scales(summary: pd.DataFrame) -> list[float]:
    return sorted(set(summary["scale"])) if len(summary) else []


def _by_scale(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per precision and step; the cells are in `cells`, by scale."""
    found: dict[tuple[str, str], dict[float, str]] = {}
    for row in summary.itertuples():
        found.setdefault((row.precision, row.step), {})[row.scale] = _cell(row)
    return pd.DataFrame(
        {"precision": precision, "step": step, "cells": cells} for (precision, step), cells in found.items()
    )


def _cell_of(row: Any, scale: float) -> str:
    return str(row.cells.get(scale, MISSING))


def _cell(row: Any) -> str:
    return str(row.status) if row.status != "ok" else f"{_error_text(row)}{marks(row)}"


def _error_text(row: Any) -> str:
    if math.isinf(row.error):
        return "∞"
    if row.error >= LOST:
        return "lost"
    return f"< {LEAST:g}" if row.roundoffs < LEAST else number(row.roundoffs, 2)


def caption(summary: pd.DataFrame) -> str:
    """What is computed, and where."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    what = f"LayerNorm of {first['rows']} rows of {first['width']} with steps in half precision"
    return f"{what}: {circumstances(summary)}"


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['precision']} at scale {_plain(row['scale'])}"


def _plain(scale: float) -> str:
    return f"{scale:,.6g}" if scale >= 1e-4 else f"{scale:g}"


# The heat map --------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """Errors by step and scale, a panel per precision; dark is more."""
    what = "Errors in unit roundoffs of the half precision, against float64, by step and scale of the input"
    return Picture(f"{what}; {caption(summary)}", partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    precisions = list(dict.fromkeys(summary["precision"]))
    darkness = LogNorm(LEAST, 4 * LOST / summary["unit_roundoff"].min())
    with figure_style():
        drawing = Figure(figsize=(4.6 * max(1, len(precisions)) + 2.4, 4.4))
        panels = drawing.subplots(1, max(1, len(precisions)), squeeze=False, sharey=True)[0]
        for panel, precision in zip(panels, precisions, strict=False):
            image = _draw_precision(panel, summary[summary["precision"] == precision], darkness)
            panel.set_title(precision)
        if precisions:
            colours = drawing.colorbar(image, ax=list(panels), shrink=0.8, extend="min")
            colours.set_label("error (unit roundoffs)")
    return drawing


def _draw_precision(panel: Any, rows: pd.DataFrame, darkness: Any) -> Any:
    steps, scales = list(dict.fromkeys(rows["step"])), _scales(rows)
    shown = [[_one(rows, step, scale) for scale in scales] for step in steps]
    # What is not finite is as dark as what is lost.
    values = [[min(row.roundoffs, LOST / row.unit_roundoff) for row in line] for line in shown]
    image = panel.imshow(values, cmap="Greys", norm=darkness, aspect="auto")
    for y, line in enumerate(shown):
        for x, row in enumerate(line):
            if row.status == "ok":
                colour = "white" if darkness(values[y][x]) > 0.55 else "black"
                panel.text(x, y, _error_text(row), ha="center", va="center", fontsize=7, color=colour)
    panel.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    panel.set_yticks(range(len(steps)), steps)
    panel.set_xlabel("scale of the input")
    panel.grid(visible=False)
    return image


def _one(rows: pd.DataFrame, step: str, scale: float) -> Any:
    return next(rows[(rows["step"] == step) & (rows["scale"] == scale)].itertuples())


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """The answer to (b): which steps are sensitive in float16, and what bfloat16 changes."""
    if not len(summary):
        return Findings([Finding("Nothing was computed: run `python scripts/measure.py layernorm_precision`.")])
    of_float16, of_bfloat16 = (summary[summary["precision"] == name] for name in ("float16", "bfloat16"))
    return Findings(
        [
            *Finding.from_all(of_float16, "Which steps leave the range of float16", _range_of_float16),
            *Finding.from_all(of_bfloat16, "Whether a step leaves the range of bfloat16", _range_of_bfloat16),
            *Finding.from_all(summary, "Which step loses the most digits", _digits),
            *Finding.from_all(summary, "Where eps hides the variance", _below_eps),
            *Finding.from_all(summary, "Whether LayerNorm may run in half precision", _conclusion),
            *staleness(summary),
        ]
    )


def _failing(rows: pd.DataFrame) -> pd.Series:
    return rows["error"] >= LOST


def _range_of_float16(rows: pd.DataFrame) -> Finding | None:
    steps = rows[(rows["status"] == "ok") & rows["step"].isin([*STEPS, ALL, ALL_SUMMED_IN_FLOAT32])]
    if not len(steps):
        return None
    failing = steps[_failing(steps)]
    firsts = failing[failing["step"].isin(STEPS)].groupby("step", sort=False)["scale"].min().sort_values(kind="stable")
    texts = [f"{step} from scale {_plain(scale)}" for step, scale in firsts.items()]
    as_predicted = int((_failing(steps) == (steps["largest"] > steps["most"])).sum())
    if not len(firsts):
        return Finding("No step leaves the range of float16 at these scales.")
    return Finding.checked(
        f"In float16 the result is lost by: {'; '.join(texts)}. The largest number that a step takes or makes, against "
        f"float16's {number(steps['most'].iloc[0], 5)}, predicts {as_predicted} of {len(steps)} cells",
        as_predicted == len(steps) and not {"input", "centre", "scale"} & set(firsts.index),
        so=": it is squares and sums that overflow, while the input and the result have plenty of room.",
        but=": it is not the squares and sums alone that overflow, or not all of it is overflow.",
    )


def _range_of_bfloat16(rows: pd.DataFrame) -> Finding | None:
    steps = rows[(rows["status"] == "ok")]
    if not len(steps):
        return None
    lost = int(_failing(steps).sum())
    return Finding.checked(
        f"In bfloat16 {lost} of {len(steps)} cells are lost",
        lost == 0,
        so=": it has the exponents of float32, so nothing overflows.",
        but=": its range does not suffice either.",
    )


def _digits(rows: pd.DataFrame) -> Finding | None:
    """Within the range: which step has the largest error, in units of PyTorch's own."""
    measured = _in_range(rows[rows["status"] == "ok"])
    steps = measured[measured["step"].isin(STEPS)]
    if not len(steps):
        return None
    times = (steps["error"] / steps["reference_error"]).groupby([steps["precision"], steps["step"]]).median()
    texts, leading = [], []
    for precision in dict.fromkeys(steps["precision"]):
        of_precision = times[precision].sort_values(ascending=False)
        first, *rest = of_precision.index[:3]
        leading += list(of_precision.index[:2])
        texts.append(
            f"in {precision} {first} with {number(of_precision[first], 2)} times that error, "
            + ", ".join(f"then {step} with {number(of_precision[step], 2)}" for step in rest)
        )
    return Finding.checked(
        "Where nothing is lost, the steps with the largest errors beside that of PyTorch's layer_norm in the same "
        f"precision (medians over scales) are {'; '.join(texts)}",
        set(leading) <= set(_SUMS),
        so=f": the two sums, each rounded {steps['width'].iloc[0]} times on its way.",
        but=": these are not the two sums alone.",
    )


def _in_range(rows: pd.DataFrame) -> pd.DataFrame:
    """The cases in which no row is lost."""
    lost = rows.groupby("case")["error"].transform("max") >= LOST
    return rows[~lost]


def _below_eps(rows: pd.DataFrame) -> Finding | None:
    measured = rows[(rows["status"] == "ok") & (rows["step"] == "variance")]
    below, above = measured[measured["scale"] ** 2 < EPS / 10], measured[measured["scale"] ** 2 > 10 * EPS]
    above = above[~_failing(above)]
    if not len(below) or not len(above):
        return None
    least, most = below["roundoffs"].max(), above["roundoffs"].min()
    return Finding.checked(
        f"Where the variance is less than a tenth of eps ({EPS:g}), summing it up in half precision costs "
        f"{number(least, 2)} unit roundoffs at most; where it is more than ten times eps, {number(most, 2)} at least",
        bool(least < most),
        so=": below eps its digits hardly matter.",
        but=": eps does not hide what it loses.",
    )


def _conclusion(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    of_all = measured[measured["step"].isin([ALL, ALL_SUMMED_IN_FLOAT32, REFERENCE, REFERENCE_FLOAT32])]
    if not len(of_all):
        return None
    texts, worst = [], []
    for precision, of_precision in of_all.groupby("precision", sort=False):
        by_step = dict(list(of_precision.groupby("step", sort=False)))
        kept = _shares_lost(by_step[ALL_SUMMED_IN_FLOAT32])
        alone = by_step[ALL][~_failing(by_step[ALL])]
        worst.append(float((alone["error"] / alone["reference_error"]).median()))
        texts.append(
            f"{precision}: all steps in it lose {_shares_lost(by_step[ALL])} scales, and have "
            f"{number(worst[-1], 2)} times the error of PyTorch's layer_norm elsewhere; with sums in float32 {kept} "
            f"are lost; PyTorch's own has {percent(by_step[REFERENCE]['error'].median())} in {precision} and "
            f"{percent(by_step[REFERENCE_FLOAT32]['error'].median())} in float32"
        )
    return Finding.checked(
        "; ".join(texts),
        min(worst) > 2 and rule_of("layer_norm") == "float32",
        so=(
            ". So LayerNorm's statistics want float32 in both: in float16 for range and digits, in bfloat16 for digits "
            "alone. Autocast on CUDA therefore runs it in float32 whichever of the two is asked for."
        ),
        but=". By these errors the statistics could be in half precision.",
    )


def _shares_lost(rows: pd.DataFrame) -> str:
    return f"{int(_failing(rows).sum())} of {len(rows)}"

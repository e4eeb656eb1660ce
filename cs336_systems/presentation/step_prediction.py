"""Predicted times of steps: published tables with their errors, and the plan of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from cs336_systems.analysis.published import A100, H100
from cs336_systems.analysis.published_times import TablePrediction, TimePlan
from cs336_systems.bench.report import (
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
    verbatim,
)
from cs336_systems.presentation.footprint import step_in_words
from cs336_systems.step import StepConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EAGER_ERROR, COMPILED_ERROR = 0.10, 0.15
"""Mean errors that are called good: compilers fuse in ways that three constants do not know."""
_NAMES = {"a100-40gb": A100, "h100-sxm": H100}

# Published tables ----------------------------------------------------------------------------------------------


def published_table(predictions: Sequence[TablePrediction]) -> Table:
    """A row per published table: its three constants, and how far predictions of left-out sizes are off."""
    rows = pd.DataFrame(
        {
            "gpu": _gpu_name(each),
            "title": each.table.title,
            "count": len(each.table.rows),
            "matrix": each.constants.matrix_fraction,
            "bandwidth": each.constants.bandwidth_fraction,
            "host_step_us": each.constants.host_step_us,
            "error": each.error,
            "worst": max(map(abs, each.errors)),
            "linear": each.linear_error,
        }
        for each in predictions
    )
    columns = [
        Column("GPU", lambda row: row.gpu, "left"),
        Column("step", lambda row: row.title, "left"),
        Column("rows", lambda row: str(row.count)),
        Column("of the matrix rate", lambda row: percent(row.matrix)),
        Column("of the bandwidth", lambda row: percent(row.bandwidth)),
        Column("step of the host (µs)", lambda row: number(row.host_step_us)),
        Column("mean error", lambda row: _error(row.error)),
        Column("largest error", lambda row: _error(row.worst)),
        Column("mean error, linear fit", lambda row: _error(row.linear)),
    ]
    notes = [
        "Constants are fitted to all rows of a table. Errors are of every size predicted by the constants of the "
        "others. The linear fit has three constants too: seconds per FLOP, per layer, and per layer, token and "
        "feature, by least squares of relative errors, sizes left out in the same way.",
    ]
    return Table.of(
        rows, columns, caption="Published times predicted from operators, three constants each", notes=notes
    )


def published_findings(predictions: Sequence[TablePrediction]) -> Findings:
    """How far the predictions are off, whether operators are worth counting, and what the constants mean."""
    eager = [each for each in predictions if each.table.chosen.compile == "none"]
    compiled = [each for each in predictions if each.table.chosen.compile != "none"]
    said = []
    for kind, of_kind, most in (("eager", eager, EAGER_ERROR), ("compiled", compiled, COMPILED_ERROR)):
        if not of_kind:
            continue
        errors = [each.error for each in of_kind]
        said.append(
            Finding.checked(
                f"Of {kind} steps a left-out size is predicted to within {_error(min(errors))} to "
                f"{_error(max(errors))} of its published time, in the mean of a table",
                max(errors) < most,
                so=": its operators, the datasheet and three constants tell it.",
                but=f", more than {percent(most)}: three constants do not tell it.",
            )
        )
    better = sum(each.error < each.linear_error for each in predictions)
    said.append(
        Finding.checked(
            f"The predictions are nearer than those of the linear fit in {better} of {len(predictions)} tables",
            better == len(predictions),
            so=": which kernel is bound by what, and when the host is, is no sum of three terms.",
            but=": in the others nothing is gained by counting operators.",
        )
    )
    if eager:
        host = [each.constants.host_step_us for each in eager]
        said.append(
            Finding.checked(
                f"A step of the host takes {number(min(host), 2)} to {number(max(host), 2)} µs in eager mode, "
                "whichever the phase and the GPU",
                max(host) < 2 * min(host),
                so=": it is Python's and PyTorch's time, and not the GPU's.",
                but=": hosts differ as much as GPUs do.",
            )
        )
    return Findings(said)


def published_figure(predictions: Sequence[TablePrediction]) -> Picture:
    """A panel per GPU: every row predicted by the other sizes, against its published time."""
    caption = "Published times of steps against those predicted by the other sizes; on the line they agree"
    return Picture(caption, partial(_draw, tuple(predictions)))


def _draw(predictions: tuple[TablePrediction, ...]) -> Figure:
    from matplotlib.figure import Figure

    gpus = list(dict.fromkeys(each.table.gpu for each in predictions))
    with figure_style():
        drawing = Figure(figsize=(3.4 * len(gpus), 4.2))
        panels = drawing.subplots(1, len(gpus), squeeze=False)[0]
        for panel, gpu in zip(panels, gpus, strict=True):
            own = [each for each in predictions if each.table.gpu == gpu]
            times = [1e3 * row.seconds for each in own for row in each.table.rows]
            ends = (min(times) / 1.3, max(times) * 1.3)
            panel.plot(ends, ends, color=COLOURS[-1], marker="", linewidth=1)
            for place, each in enumerate(own):
                panel.plot(
                    [1e3 * row.seconds for row in each.table.rows],
                    [1e3 * seconds for seconds in each.left_out_s],
                    MARKERS[place],
                    color=COLOURS[place],
                    markerfacecolor="none" if place % 2 else COLOURS[place],
                    markersize=5,
                    label=each.table.title,
                )
            logarithmic(panel.xaxis)
            logarithmic(panel.yaxis)
            panel.tick_params(axis="x", labelsize="small")
            panel.set(title=_NAMES.get(gpu, gpu), xlabel="published (ms)", aspect="equal")
            if panel is panels[0]:
                panel.set_ylabel("predicted by other sizes (ms)")
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return drawing


def _error(share: float) -> str:
    return f"{100 * share:.1f} %"


def _gpu_name(prediction: TablePrediction) -> str:
    return _NAMES.get(prediction.table.gpu, prediction.table.gpu)


# One step ------------------------------------------------------------------------------------------------------


def described(chosen: StepConfig, plan: TimePlan) -> str:
    """A plan as a document: the verdict, and what it is made of."""
    return f"{verdict(chosen, plan)}\n\n{plan_table(chosen, plan)}"


def verdict(chosen: StepConfig, plan: TimePlan) -> str:
    """How long a step should take, and how that is known."""
    source = f"the published times of {_gpu_name(plan.prediction)} ({plan.prediction.table.title})"
    takes = f"**{step_in_words(chosen)}, on {plan.gpu}**: about {number(1e3 * plan.estimate_s)} ms"
    floor = f"at the ceilings its operators take {number(1e3 * plan.floor_s)} ms"
    if plan.is_extrapolated:
        named = {"float32_matmul": "precision of float32 products", "compile": "compilation"}
        differs = " and ".join(named.get(name, name) for name in plan.differs_in)
        return (
            f"{takes}, **extrapolated** from {source}, which differ in {differs}, so that nothing says how far it is "
            f"off; {floor}."
        )
    off = _error(plan.prediction.error)
    return f"{takes}, estimated from {source}, which are predicted so to {off} in the mean; {floor}."


def plan_table(chosen: StepConfig, plan: TimePlan) -> Table:
    """Floor and estimate, with the constants of the estimate."""
    constants = plan.prediction.constants
    rows = pd.DataFrame(
        [
            {"what": "floor", "ms": 1e3 * plan.floor_s, "matrix": 1.0, "bandwidth": 1.0, "host": math.nan},
            {
                "what": "extrapolated" if plan.is_extrapolated else "estimate",
                "ms": 1e3 * plan.estimate_s,
                "matrix": constants.matrix_fraction,
                "bandwidth": constants.bandwidth_fraction,
                "host": constants.host_step_us,
            },
        ]
    )
    columns = [
        Column("time", lambda row: row.what, "left"),
        Column("ms", lambda row: number(row.ms)),
        Column("of the matrix rate", lambda row: percent(row.matrix)),
        Column("of the bandwidth", lambda row: percent(row.bandwidth)),
        Column("step of the host (µs)", lambda row: number(row.host)),
    ]
    note = f"Constants of data/reference/{plan.prediction.table.file}.csv, column {plan.prediction.table.column}."
    return Table.of(rows, columns, caption=f"Predicted: {step_in_words(chosen)}, on {plan.gpu}", notes=[verbatim(note)])

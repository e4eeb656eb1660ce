"""Published tables of step times, each predicted: by three constants, and by a fit that knows no operators.

    for table in published_tables(store.reference):
        prediction = predict_table(table)
        prediction.constants, prediction.error, prediction.linear_error
    plan_time(chosen, "h200", published_tables(store.reference))

A table is of one kind of step on one machine. Every size is predicted by the constants that are fitted to the other
sizes, so that no row is predicted from itself or from its own model at another context.

Beside it stands what anybody would fit first: seconds as a sum of FLOPs, layers (each costs the host the same) and
L·T·D (each layer moves its activations), with three coefficients by least squares of relative errors, sizes left out in
the same way. It has as many constants, and no ceilings, precisions or launches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cs336_systems.analysis.flops import phase_work, total
from cs336_systems.analysis.hardware import gpu_peaks, product_precision
from cs336_systems.analysis.step_time import (
    Constants,
    TimedStep,
    calibrate,
    estimate_seconds,
    floor_seconds,
    left_out,
)
from cs336_systems.step import Phase, StepConfig

_A100, _H100 = "a100-40gb", "h100-sxm"
_BATCH_SIZE = 4
_H100_TABLE = "transformer_train_step_h100"
# File, column, GPU, and what the step is beside its model.
_TABLES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("e2e_forward_a100", "mean_s", _A100, {"phase": "forward"}),
    ("e2e_forward_backward_a100", "mean_s", _A100, {"phase": "forward-backward"}),
    ("e2e_train_step_a100", "mean_s", _A100, {"phase": "step"}),
    ("e2e_train_step_bf16_autocast_a100", "mean_s", _A100, {"phase": "step", "autocast": "bfloat16"}),
    (_H100_TABLE, "eager_s", _H100, {"phase": "step"}),
    (_H100_TABLE, "compile_s", _H100, {"phase": "step", "compile": "model"}),
    (_H100_TABLE, "compile_tf32_s", _H100, {"phase": "step", "compile": "model", "float32_matmul": "high"}),
)
PUBLISHED_GPUS = tuple(dict.fromkeys(gpu for _, _, gpu, _ in _TABLES))
_MODEL = ("d_model", "d_ff", "num_layers", "num_heads", "context_length")
_SIZE = frozenset({*_MODEL, "vocab_size", "rope_theta", "batch_size"})
_KIND = tuple(field.name for field in dataclasses.fields(StepConfig) if field.name not in _SIZE)


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """One column of published times."""

    gpu: str
    """A key of `hardware.GPUS`."""
    file: str
    """In data/reference/, without its suffix."""
    column: str
    rows: tuple[TimedStep, ...]

    @property
    def chosen(self) -> StepConfig:
        """A step of the table: all agree in everything but the model."""
        return self.rows[0].chosen

    @property
    def title(self) -> str:
        """`forward-backward`, or `step, autocast bfloat16`."""
        chosen = self.chosen
        compiled = {"none": None, "model": "compiled"}.get(chosen.compile, f"compiled {chosen.compile}")
        autocast = None if chosen.autocast == "none" else f"autocast {chosen.autocast}"
        tf32 = "TF32" if chosen.float32_matmul == "high" else None
        return ", ".join(filter(None, (chosen.phase, autocast, compiled, tf32)))


@dataclasses.dataclass(frozen=True)
class TablePrediction:
    """What three constants make of a published table."""

    table: PublishedTable
    constants: Constants
    """Fitted to all rows: for a model that the table has not."""
    left_out_s: tuple[float, ...]
    """Every row by the constants of the other sizes."""
    linear_s: tuple[float, ...]
    """Every row by the linear fit to the other sizes."""

    @property
    def errors(self) -> tuple[float, ...]:
        """Of every row, predicted by published minus one."""
        return tuple(found / row.seconds - 1 for found, row in zip(self.left_out_s, self.table.rows, strict=True))

    @property
    def error(self) -> float:
        """The mean of the absolute relative errors."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def linear_error(self) -> float:
        measured = np.array([row.seconds for row in self.table.rows])
        return float(np.mean(np.abs(np.array(self.linear_s) / measured - 1)))


def published_tables(reference: Callable[[str], pd.DataFrame]) -> tuple[PublishedTable, ...]:
    """Every published table of step times; `reference` reads a file by its name."""
    return tuple(
        PublishedTable(gpu, file, column, tuple(_rows(reference(file), column, kind)))
        for file, column, gpu, kind in _TABLES
    )


def _rows(table: pd.DataFrame, column: str, kind: dict[str, str]) -> list[TimedStep]:
    rows = []
    for row in table.to_dict("records"):
        fields: dict[str, Any] = {**kind, **{name: int(row[name]) for name in _MODEL}}
        chosen = StepConfig(**fields, device="cuda", batch_size=int(row.get("batch_size", _BATCH_SIZE)))
        rows.append(TimedStep(chosen, float(row[column])))
    return rows


@functools.lru_cache(maxsize=32)
def predict_table(table: PublishedTable) -> TablePrediction:
    """Constants, and every row predicted without its size. Computed once per process."""
    peaks = gpu_peaks(table.gpu)
    return TablePrediction(
        table,
        calibrate(table.rows, peaks),
        tuple(left_out(table.rows, peaks)),
        tuple(linear_left_out(table.rows)),
    )


def kind_of(chosen: StepConfig) -> tuple[Any, ...]:
    """All of a step but model, context and batch: what the rows of a table share."""
    return tuple(getattr(chosen, name) for name in _KIND)


def linear_left_out(timed: Sequence[TimedStep]) -> list[float]:
    """Seconds of every step by the linear fit to all sizes but its own."""
    features = np.array([_features(each.chosen) for each in timed])
    measured = np.array([each.seconds for each in timed])
    models = [each.model for each in timed]
    found = np.full(len(timed), np.nan)
    for model in dict.fromkeys(models):
        own = np.array([each == model for each in models])
        weight = 1 / measured[~own]  # of relative errors
        coefficients = np.linalg.lstsq(features[~own] * weight[:, None], np.ones(len(weight)), rcond=None)[0]
        found[own] = features[own] @ coefficients
    return [float(each) for each in found]


def _features(chosen: StepConfig) -> tuple[float, float, float]:
    """FLOPs, layers and L·T·D, in units that make them of one order."""
    phase: Phase = chosen.phase  # type: ignore[assignment]
    work = total(phase_work(chosen.config, phase, chosen.batch_size, chosen.context_length).values())
    layers = chosen.num_layers
    return work.flops / 1e12, float(layers), layers * chosen.context_length * chosen.d_model / 1e6


# Steps that are in no table ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TimePlan:
    """How long a step should take on a GPU that is not there."""

    gpu: str
    floor_s: float
    """Its operators one after the other, each at its ceiling."""
    estimate_s: float
    prediction: TablePrediction
    """Of the table whose constants the estimate is made with."""
    differs_in: tuple[str, ...]
    """What the table's steps are not; empty where it is of the same kind of step on the same GPU."""

    @property
    def is_extrapolated(self) -> bool:
        return bool(self.differs_in)


def plan_time(chosen: StepConfig, gpu: str, tables: Sequence[PublishedTable]) -> TimePlan:
    """Floor and estimate of a step on a GPU by its key, with the constants of the published table that is nearest.

    Nearest in this order: whether anything is compiled, the precision of products, the GPU or else one with about the
    same matrix rate, the phase, all else. The device of `chosen` itself is not looked at.

    Raises:
        UserError: an unknown GPU, or one without a rate for these products; a step whose operators cannot be counted.
    """
    peaks = gpu_peaks(gpu)
    on_gpu = dataclasses.replace(chosen, device="cuda")
    floor_s = floor_seconds(on_gpu, peaks)
    table = min(tables, key=lambda each: _distance(on_gpu, gpu, each))
    prediction = predict_table(table)
    estimate_s = estimate_seconds(on_gpu, peaks, prediction.constants)
    return TimePlan(gpu, floor_s, estimate_s, prediction, _differences(on_gpu, gpu, table))


def published_estimate(chosen: StepConfig, gpu: str, reference: Callable[[str], pd.DataFrame]) -> float:
    """Seconds by the published table of the same kind of step on the same GPU; NaN where there is none.

    `reference` reads a published table by its name.
    """
    if gpu not in PUBLISHED_GPUS:
        return math.nan
    tables = published_tables(reference)
    on_gpu = dataclasses.replace(chosen, device="cuda")
    if all(_differences(on_gpu, gpu, table) for table in tables):
        return math.nan
    return plan_time(on_gpu, gpu, tables).estimate_s


def _distance(chosen: StepConfig, gpu: str, table: PublishedTable) -> tuple[float, ...]:
    other, differences = table.chosen, _differences(chosen, gpu, table)
    precisions = [product_precision(each.dtype, each.autocast, each.float32_matmul) for each in (chosen, other)]
    is_compiled = [each.compile != "none" for each in (chosen, other)]
    rates = [gpu_peaks(name).rate(precisions[0]) for name in (gpu, table.gpu)]
    return (
        is_compiled[0] != is_compiled[1],
        precisions[0] != precisions[1],
        "GPU" in differences,
        abs(math.log(rates[0] / rates[1])),
        "phase" in differences,
        len(differences),
    )


def _differences(chosen: StepConfig, gpu: str, table: PublishedTable) -> tuple[str, ...]:
    kinds = zip(_KIND, kind_of(chosen), kind_of(table.chosen), strict=True)
    fields = (name for name, own, other in kinds if own != other)
    return (*(("GPU",) if gpu != table.gpu else ()), *fields)

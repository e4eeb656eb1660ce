"""Measured steps, each predicted by the steps of other sizes that the same machine measured.

    predict_by_others(timed, peaks)

What shares constants is a family: steps of the same precision, compilation, attention and so on, of any size, context,
batch and phase. A family is predicted when all of it is measured, since a size is predicted by all others: with one
more time every prediction would be another.

On a CPU the ceilings are measured ones (experiment `machine_peaks`). What makes its times hard to predict is not in
three constants: memory that is new to the process comes from the kernel page by page, and tensors that stay in a cache
do not move at the memory's bandwidth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published_times import published_estimate
from cs336_systems.analysis.step_time import Constants, TimedStep, calibrate, left_out
from cs336_systems.errors import UserError
from cs336_systems.step import StepConfig

_OF_ITS_OWN = frozenset(
    {"d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "rope_theta", "batch_size", "phase"}
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the other sizes of a family say of one step."""

    seconds: float = math.nan
    constants: Constants | None = None
    """Fitted to the whole family: what it is told to be like."""


def family_of(chosen: StepConfig) -> tuple[Any, ...]:
    """All of a step that its family shares."""
    names = (field.name for field in dataclasses.fields(StepConfig) if field.name not in _OF_ITS_OWN)
    return tuple(getattr(chosen, name) for name in names)


def predict_by_others(timed: Sequence[TimedStep], peaks: Peaks) -> list[Prediction]:
    """A prediction for each step, empty where its family has too few sizes or cannot be counted.

    A step that is asked for and not measured has NaN seconds, and its family no predictions.
    """
    predictions = [Prediction()] * len(timed)
    for family in dict.fromkeys(family_of(each.chosen) for each in timed):
        places = [place for place, each in enumerate(timed) if family_of(each.chosen) == family]
        members = [timed[place] for place in places]
        if any(math.isnan(each.seconds) for each in members):
            continue
        try:
            constants = calibrate(members, peaks)
            seconds = left_out(members, peaks)
        except UserError:  # no ceiling, too few sizes, or operators that depend on the device
            continue
        for place, each in zip(places, seconds, strict=True):
            predictions[place] = Prediction(each, None if math.isnan(each) else constants)
    return predictions


def predicted_columns(
    rows: Sequence[Mapping[str, Any]], peaks: Peaks, reference: Callable[[str], pd.DataFrame]
) -> list[dict[str, float]]:
    """`predicted_ms` and the three constants for every row of a summary of steps; NaN where they are not known.

    Predicted is by the rows of other sizes, else by the published table of such steps on this GPU. Rows have the fields
    of a `StepConfig`, a `status` and a `median_ms`; `reference` reads a published table by its name.
    """
    names = [field.name for field in dataclasses.fields(StepConfig)]
    steps = [StepConfig(**{name: row[name] for name in names}) for row in rows]
    # What ran out of memory is not asked for again: a family lacks only what is missing.
    asked = [place for place, row in enumerate(rows) if row["status"] in ("ok", "missing")]
    timed = [TimedStep(steps[place], rows[place]["median_ms"] / 1e3) for place in asked]
    found = dict(zip(asked, predict_by_others(timed, peaks), strict=True))
    columns = []
    for place, step in enumerate(steps):
        prediction = found.get(place, Prediction())
        constants, seconds = prediction.constants, prediction.seconds
        if constants is None and step.device == "cuda":
            seconds = published_estimate(step, peaks.name, reference)
        columns.append(
            {
                "predicted_ms": 1e3 * seconds,
                "matrix_fraction": constants.matrix_fraction if constants else math.nan,
                "bandwidth_fraction": constants.bandwidth_fraction if constants else math.nan,
                "host_step_us": constants.host_step_us if constants else math.nan,
            }
        )
    return columns

"""What is shown of predicted times is what was predicted, and a claim that the numbers contradict says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from cs336_systems.analysis.published_times import PublishedTable, TablePrediction
from cs336_systems.analysis.step_time import Constants, TimedStep
from cs336_systems.presentation import step_prediction as presentation
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("benchmarking_script")

SIZES = [StepConfig(16 * width, 32, 1, 2, 8, "cuda", vocab_size=50) for width in (1, 2, 3)]


def predicted(
    off: float, linear_off: float, host_us: float = 8.0, gpu: str = "a100-40gb", **kind: Any
) -> TablePrediction:
    """A table of 10, 20 and 30 ms whose predictions are all off by a share."""
    rows = tuple(TimedStep(dataclasses.replace(size, **kind), 0.01 * (place + 1)) for place, size in enumerate(SIZES))
    table = PublishedTable(gpu, "toy", "seconds", rows)
    times = [row.seconds for row in rows]
    return TablePrediction(
        table,
        Constants(0.9, 0.6, host_us / 1e6),
        tuple(seconds * (1 + off) for seconds in times),
        tuple(seconds * (1 + linear_off) for seconds in times),
    )


GOOD = [predicted(0.05, 0.07), predicted(-0.12, 0.2, 17.0, "h100-sxm", compile="model")]


def test_a_table_has_the_constants_and_both_errors() -> None:
    text = str(presentation.published_table(GOOD))
    assert "| A100 40 GB | step           |" in text
    assert "| H100 80 GB | step, compiled |" in text
    assert "5.0 %" in text
    assert "20.0 %" in text
    assert "17.0" in text


def test_what_holds_is_said_of_eager_and_of_compiled_steps() -> None:
    findings = presentation.published_findings(GOOD)
    assert [each.holds for each in findings] == [True, True, True, True]
    assert "Of eager steps a left-out size is predicted to within 5.0 % to 5.0 %" in str(findings)
    assert "nearer than those of the linear fit in 2 of 2 tables" in str(findings)


@pytest.mark.parametrize(
    ("predictions", "holds"),
    [
        ([predicted(0.11, 0.2)], [False, True, True]),
        ([predicted(0.05, 0.02)], [True, False, True]),
        ([predicted(0.05, 0.2, 5.0), predicted(0.05, 0.2, 11.0)], [True, True, False]),
        ([predicted(0.16, 0.2, compile="model")], [False, True]),
    ],
)
def test_what_the_numbers_contradict_is_not_claimed(predictions: list[TablePrediction], holds: list[bool]) -> None:
    assert [each.holds for each in presentation.published_findings(predictions)] == holds


def test_the_figure_has_a_panel_per_gpu_and_every_row() -> None:
    drawing = presentation.published_figure(GOOD).draw()
    assert isinstance(drawing, Figure)
    assert [panel.get_title() for panel in drawing.axes] == ["A100 40 GB", "H100 80 GB"]
    for panel in drawing.axes:
        line, points = panel.get_lines()
        assert np.array_equal(line.get_xdata(), line.get_ydata())
        assert np.allclose(points.get_xdata(), [10.0, 20.0, 30.0])
        assert panel.get_legend() is not None

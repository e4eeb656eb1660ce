"""Tables, figures and sentences about warm-ups say what the summary says."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cs336_systems.presentation import warmup as presentation

pytestmark = pytest.mark.problem("benchmarking_script")

NAN = float("nan")


def row(warmup: int, *, first: float = 30.0, std_ms: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A process whose first step took `first` and every other 10 ms."""
    content: dict[str, Any] = {
        "size": "mini",
        "context_length": 128,
        "batch_size": 4,
        "phase": "forward",
        "warmup": warmup,
        "steps": 3,
        "machine": "toy-1c",
        "torch": "2.13.0",
        "threads": 2,
        "status": "ok",
        "reason": None,
        "mean_ms": 10.0,
        "std_ms": std_ms,
        "median_ms": 10.0,
        "bound_ms": 5.0,
        "noise": "",
        "stale": "",
        "a100_ms": NAN,
        "a100_std_ms": NAN,
        "steps_ms": [first, *[10.0] * (warmup + 2)],
    }
    return content | changes


def missing(warmup: int) -> dict[str, Any]:
    nothing: dict[str, Any] = {"mean_ms": NAN, "std_ms": NAN, "median_ms": NAN, "steps_ms": []}
    return row(warmup, status="missing", reason="run `what measures it`", **nothing)


def summary(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


USUAL = (row(0, std_ms=9.0), row(1, std_ms=0.2), row(5))


def test_the_table_has_the_deviation_as_a_share_and_no_column_of_what_nobody_published() -> None:
    text = str(presentation.table(summary(*USUAL)))
    assert "std / mean (%)" in text
    assert "each in a fresh process" in text
    assert "A100" not in text


def test_what_warm_up_takes_out_is_told_with_its_numbers() -> None:
    first_step, deviation = presentation.findings(summary(*USUAL))
    assert (first_step.holds, deviation.holds) == (True, True)
    assert "takes 3.0 times the median of its later steps (median of 3 processes)" in str(first_step)
    assert "is 90 % of the mean; after 1 warm-up 2.0 %, after 5 warm-ups 1.0 %: warm-up steps keep" in str(deviation)


def test_a_sentence_that_the_data_contradict_says_so() -> None:
    first_step, deviation = presentation.findings(summary(row(0, first=10.0), row(5, first=10.0, std_ms=3.0)))
    assert (first_step.holds, deviation.holds) == (False, False)
    assert "nothing is to be seen here" in str(first_step)
    assert "something else disturbed the steps" in str(deviation)


@pytest.mark.parametrize("hole", range(3))
def test_with_one_missing_row_every_sentence_says_what_to_run(hole: int) -> None:
    rows = [missing(each["warmup"]) if number == hole else each for number, each in enumerate(USUAL)]
    ending = "cannot be told: no record of 1 of 3 cases; run `what measures it`."
    assert [str(sentence) for sentence in presentation.findings(summary(*rows))] == [
        f"What the first step of a process costs {ending}",
        f"What warm-up does to the deviation {ending}",
    ]


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    failed = row(0, status="failed", reason="because", mean_ms=NAN, std_ms=NAN, steps_ms=[])
    for nothing in (summary(failed), pd.DataFrame()):
        assert "scripts/measure.py warmup" in str(presentation.findings(nothing))


def test_missing_rows_are_one_note_below_the_table() -> None:
    text = str(presentation.table(summary(USUAL[0], missing(1), missing(5))))
    assert text.count("run `what measures it`") == 1
    assert len(re.findall(r"\| +missing \|", text)) == 2


def test_a_figure_has_a_line_per_number_of_warm_ups_with_hollow_warm_ups_and_the_floor() -> None:
    (panel,) = presentation.figure(summary(*USUAL)).draw().axes
    assert panel.get_title() == "forward, mini, context 128"
    labels = ["0 warm-ups", "1 warm-up", "5 warm-ups", "hollow: a warm-up step", "floor"]
    assert panel.get_legend_handles_labels()[1] == labels
    hollow = [len(np.ravel(line.get_xdata())) for line in panel.lines if line.get_markerfacecolor() == "white"]
    assert [count for count in hollow if count] == [1, 5]
    assert [np.ravel(line.get_ydata()).tolist() for line in panel.lines if line.get_label() == "floor"] == [[5.0, 5.0]]


def test_a_figure_leaves_out_what_is_missing_and_is_drawn_even_of_nothing() -> None:
    (panel,) = presentation.figure(summary(USUAL[0], missing(1), USUAL[2])).draw().axes
    assert "1 warm-up" not in panel.get_legend_handles_labels()[1]
    assert presentation.figure(summary(missing(0))).svg()


# What others published ------------------------------------------------------------------------------------------


def deviations(*rows: tuple[float, float, float, float]) -> pd.DataFrame:
    """Per model: the mean after five warm-ups, and the deviations after none, one and five, all in ms."""
    return pd.DataFrame(
        [
            {
                # A first step that took 200 ms more, spread over ten steps.
                "mean_ms_0": five + 20.0,
                "std_ms_0": std_0,
                "mean_ms_1": five,
                "std_ms_1": std_1,
                "mean_ms_5": five,
                "std_ms_5": std_5,
            }
            for five, std_0, std_1, std_5 in rows
        ]
    )


def test_published_figures_that_bear_out_what_is_usually_said_are_told_so() -> None:
    spread, start = presentation.published_findings(deviations((80.0, 50.0, 0.8, 0.4), (80.0, 50.0, 0.8, 0.4)))
    assert (spread.holds, start.holds) == (True, True)
    assert "50 % of the mean without warm-up, 1.0 % after one step and 0.50 % after five" in str(spread)
    assert "in the median of 2 models and contexts: one step takes out most of the start." in str(spread)
    assert "took 200 ms longer than the others (from 200 to 200), about the same for every model" in str(start)


def test_published_figures_that_contradict_it_are_told_so() -> None:
    unlike = deviations((80.0, 5.0, 0.8, 0.9), (80.0, 5.0, 0.8, 0.9)).assign(mean_ms_0=[81.0, 120.0])
    spread, start = presentation.published_findings(unlike)
    assert (spread.holds, start.holds) == (False, False)
    assert "there, too, warm-up is not all that disturbs the times" in str(spread)
    assert "which differs by model: not all of it is the cost of starting" in str(start)


def test_the_real_published_figures_are_told_with_the_numbers_of_their_table() -> None:
    from cs336_systems.experiments import warmup

    found = warmup.published_deviations()
    spread, start = presentation.published_findings(found)
    assert f"in the median of {len(found)} models and contexts" in str(spread)
    longest = float((10 * (found["mean_ms_0"] - found["mean_ms_5"])).max())
    assert f"to {longest:,.0f})" in str(start)

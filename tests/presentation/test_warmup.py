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
    assert "is 1.0 % of the mean; after 5 warm-ups 30 %" in str(deviation)
    assert "no great difference, and something else disturbs these steps as much as the start does" in str(deviation)


@pytest.mark.parametrize(("longest", "holds"), [(0.4, True), (0.49, True), (0.51, False), (2.0, False)])
def test_the_deviation_is_compared_with_the_longest_warm_up_and_has_to_be_twice_as_great(
    longest: float, holds: bool
) -> None:
    """However much the steps after a shorter one vary, and in whatever order the rows come."""
    rows = (row(5, std_ms=longest), row(0, std_ms=1.0), row(1, std_ms=3.0))
    deviation = presentation.findings(summary(*rows))[-1]
    assert deviation.holds is holds
    assert ("warm-up steps keep the start out" in str(deviation)) is holds


@pytest.mark.parametrize("hole", range(3))
def test_with_one_missing_row_every_sentence_says_what_to_run(hole: int) -> None:
    rows = [missing(each["warmup"]) if number == hole else each for number, each in enumerate(USUAL)]
    ending = "cannot be told: no record of 1 of 3 cases; run `what measures it`."
    assert [str(sentence) for sentence in presentation.findings(summary(*rows))] == [
        f"What the first step of a process costs {ending}",
        f"What warm-up does to the deviation {ending}",
    ]


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py warmup" in str(only)


def test_of_cases_that_were_measured_and_have_no_time_nobody_is_told_to_measure_them() -> None:
    failed = row(0, status="failed", reason="because", mean_ms=NAN, std_ms=NAN, median_ms=NAN, steps_ms=[])
    (only,) = presentation.findings(summary(failed))
    assert str(only) == "No case has a time; the notes of the table say why."
    assert "`because`" in str(presentation.table(summary(failed)))


def test_that_sentences_speak_of_an_earlier_source_is_told() -> None:
    found = presentation.findings(summary(row(0, std_ms=9.0, stale="model changed"), *USUAL[1:]))
    assert str(found[-1]) == "Stale (†) are 1 of 3 cases: they say nothing of today's source."
    assert "tale" not in str(presentation.findings(summary(*USUAL)))


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


def test_where_no_floor_is_known_the_legend_has_none() -> None:
    (panel,) = presentation.figure(summary(*(each | {"bound_ms": NAN} for each in USUAL))).draw().axes
    assert panel.get_legend_handles_labels()[1][-1] == "hollow: a warm-up step"
    assert "floor" not in [line.get_label() for line in panel.lines]


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
    assert "50 % of the mean without warm-up, 1 % after one step and 0.5 % after five" in str(spread)
    assert "(medians of 2 cases, published to a tenth of a millisecond): one step takes out most of the start." in str(
        spread
    )
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
    assert f"(medians of {len(found)} cases, published to a tenth of a millisecond)" in str(spread)
    shares = [float((found[f"std_ms_{count}"] / found[f"mean_ms_{count}"]).median()) for count in (0, 1, 5)]
    figures = [100 * float(figure) for figure in re.findall(r"([\d.]+) %", str(spread))]
    assert [figure / 1e4 for figure in figures] == pytest.approx(shares, rel=0.1)
    longest = float((10 * (found["mean_ms_0"] - found["mean_ms_5"])).max())
    assert f"to {longest:,.0f})" in str(start)


def published_cells(*rows: tuple[float, float, float, float]) -> list[list[str]]:
    """The cells of the table of published deviations."""
    made = deviations(*rows).assign(size="small", context_length=128)
    lines = str(presentation.published(made)).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| small")]


@pytest.mark.parametrize(
    ("std", "mean", "text"),
    [
        (0.0, 100.0, "< 0.05"),
        (0.0, 40.0, "< 0.1"),
        (0.1, 100.0, "0.1"),
        (0.3, 40.4, "0.7"),
        (1.2, 40.0, "3.0"),
        (175.8, 96.6, "182"),
        (NAN, NAN, "–"),
    ],
)
def test_a_published_share_has_the_digits_of_its_deviation_and_none_is_nothing(
    std: float, mean: float, text: str
) -> None:
    assert presentation._published_percent(std, mean) == text
    beside = summary(row(0, a100_ms=mean, a100_std_ms=std), row(5, a100_ms=40.0, a100_std_ms=20.0))
    assert re.search(rf"\| +{re.escape(text)}[\u2007\u2008]* \|\n", str(presentation.table(beside)))


def test_a_published_deviation_of_nothing_is_at_most_what_rounding_hides() -> None:
    (cells,) = published_cells((100.0, 175.8, 0.4, 0.0))
    assert "100.0 ± 0.0" in cells
    assert "< 0.05" in cells
    assert "0" not in cells


def test_a_median_deviation_of_nothing_is_not_said_to_be_nothing() -> None:
    spread = presentation.published_findings(deviations(*[(100.0, 175.8, 0.4, 0.0)] * 2))[0]
    assert not re.search(r"(?<![\d.])0 %", str(spread))

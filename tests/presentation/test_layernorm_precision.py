"""What is said of LayerNorm's steps follows from their errors, and changes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, record_of
from shown_tables import cells

from cs336_systems.analysis.rounding import format_of
from cs336_systems.bench.records import Measurement, Record, missing_record
from cs336_systems.experiments import layernorm_precision as experiment
from cs336_systems.experiments.layernorm_precision import ALL, ROWS, VARIANTS, Case
from cs336_systems.presentation import layernorm_precision as presentation

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

SCALES = (0.0001, 1.0, 1000.0)
TO_RUN = "run `what computes it`"


def cases() -> list[Case]:
    return [cell.case for cell in experiment.grid(scales=SCALES, device="cpu")]


def record(case: Case, *, roundoffs: Mapping[str, float] | None = None, **changes: Any) -> Record:
    """A roundoff for each row but the two sums, which lose ten where the variance is no less than eps.

    In float16 squares are lost at the largest scale, and the sums are not finite.
    """
    unit, largest = format_of(case.precision).unit_roundoff, float(format_of(case.precision).largest)
    costly = dict.fromkeys(("mean", "variance", ALL), 10.0 if case.scale >= 1 else 1.0)
    errors = {name: unit * ({**costly, **(roundoffs or {})}).get(name, 1.0) for name in ROWS}
    overflows = case.precision == "float16" and case.scale > 100
    touched = dict.fromkeys(VARIANTS, 1.0)
    if overflows:
        errors["square"] = 1.0
        del errors["variance"], errors[ALL]
        touched |= dict.fromkeys(("square", "variance", ALL), 2 * largest)
    values = {
        "errors": errors,
        "not_finite": {name: int(name not in errors) for name in ROWS},
        "extremes": touched,
    }
    return record_of("layernorm_precision", case, Measurement(values=values), **changes)


def missing(case: Case) -> Record:
    return missing_record("layernorm_precision", "toy-1c", dataclasses.asdict(case), TO_RUN)


def summary(*records: Record, **options: Any) -> pd.DataFrame:
    return experiment.summarise(records, PEAKS, **options)


def test_a_table_has_a_column_per_scale_with_errors_in_roundoffs() -> None:
    table = presentation.table(summary(*map(record, cases())))
    assert table.headings[2:] == ("0.0001", "1", "1000")
    assert len(table.rows) == 2 * len(ROWS)
    by_step = dict(zip(ROWS, cells(table, "1000"), strict=False))  # those of float16 come first
    assert (by_step["square"], by_step["variance"], by_step["centre"]) == ("lost", "∞", "1.0")


def test_less_than_a_hundredth_of_a_roundoff_is_told_as_that() -> None:
    table = presentation.table(summary(record(cases()[0], roundoffs={"square": 1e-5})))
    assert cells(table, "0.0001")[ROWS.index("square")] == "< 0.01"


def test_the_usual_errors_bear_out_every_sentence() -> None:
    found = presentation.findings(summary(*map(record, cases())))
    assert [finding.holds for finding in found] == [True] * 5
    assert "variance from scale 1,000" in found[0].text
    assert "predicts 33 of 33 cells" in found[0].text


def test_errors_that_say_otherwise_are_told_otherwise() -> None:
    other = [record(case, roundoffs={"rsqrt": 100.0, "mean": 1.0, ALL: 1.0}) for case in cases()]
    digits, conclusion = presentation.findings(summary(*other))[2:5:2]
    assert digits.holds is False
    assert "rsqrt with 100 times" in digits.text
    assert conclusion.holds is False


def test_what_is_lost_without_a_number_too_large_contradicts_the_prediction() -> None:
    other = [record(case, roundoffs={"centre": 1e4}) for case in cases()]
    first, second, *_ = presentation.findings(summary(*other))
    assert (first.holds, second.holds) == (False, False)


def test_a_missing_record_leaves_its_cells_and_says_what_to_run() -> None:
    first, *rest = cases()
    rows = summary(missing(first), *map(record, rest))
    table = presentation.table(rows)
    assert cells(table, "0.0001")[0] == "missing"
    assert cells(table, "1")[0] == "1.0"
    texts = [finding.text for finding in presentation.findings(rows)]
    assert f"no record of 1 of 3 cases; {TO_RUN}" in texts[0]
    assert "In bfloat16 0 of 39 cells are lost" in texts[1]
    assert presentation.figure(rows).draw().axes


def test_the_figure_has_a_panel_per_precision_whose_cells_are_named() -> None:
    drawing = presentation.figure(summary(*map(record, cases()))).draw()
    panels = drawing.axes[:2]
    assert [panel.get_title() for panel in panels] == ["float16", "bfloat16"]
    assert all(len(panel.texts) == len(ROWS) * len(SCALES) for panel in panels)


def test_stale_records_are_marked() -> None:
    rows = summary(record(cases()[1]), fingerprint={**FINGERPRINT, "torch": "3.0"})
    assert cells(presentation.table(rows), "1")[0] == "1.0 †"


def test_without_cases_it_is_said_what_to_run() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py layernorm_precision" in only.text

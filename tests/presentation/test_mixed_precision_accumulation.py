"""What is said of the sums is what the records say, whether they agree with the prediction or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, record_of
from shown_tables import cells

from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Finding
from cs336_systems.experiments import mixed_precision_accumulation as experiment
from cs336_systems.presentation import mixed_precision_accumulation as presentation

pytestmark = pytest.mark.problem("mixed_precision_accumulation")

CASES = [cell.case for cell in experiment.grid(device="cpu")]
TO_RUN = "run `what measures it`"


def record(case: Any, *, off: float = 0.0, **changes: Any) -> Record:
    sums = [float(total) + off for total in experiment.expected(case).sums[experiment.EVERY :: experiment.EVERY]]
    return record_of("mixed_precision_accumulation", case, Measurement(values={"sums": sums}), **changes)


def missing(case: Any) -> Record:
    return missing_record("mixed_precision_accumulation", "toy-1c", dataclasses.asdict(case), TO_RUN)


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return experiment.summarise(records, PEAKS, store=store, **options)


def test_a_row_has_the_measured_beside_the_predicted_and_the_printed_sum(store: Store) -> None:
    table = presentation.table(summary(store, *map(record, CASES)))
    assert cells(table, "measured sum") == cells(table, "predicted sum")
    assert cells(table, "printed by others") == ["10.0001", "9.9531", "10.0021", "10.0021", "–", "–"]
    assert cells(table, "addend")[3] == "float16 cast to float32"


def test_the_stretches_of_half_precision_add_up_to_what_rounding_makes(store: Store) -> None:
    rows = summary(store, *map(record, CASES))
    table = presentation.stretches(rows)
    assert set(cells(table, "accumulator")) == {"float16", "bfloat16"}
    assert cells(table, "so one addition is")[-1] == "0"
    assert isinstance(presentation.stretches(rows[rows["accumulator"] == "float32"]), Finding)


def test_sums_as_predicted_bear_out_every_sentence(store: Store) -> None:
    found = presentation.findings(summary(store, *map(record, CASES)))
    assert [finding.holds for finding in found] == [True] * 4
    assert "600 of 600 recorded sums" in found[0].text
    assert "stands still for the last 650 additions" in found[2].text


def test_sums_of_a_device_that_rounds_otherwise_are_told_as_such(store: Store) -> None:
    found = presentation.findings(summary(store, *(record(case, off=0.01) for case in CASES)))
    assert found[0].text == (
        "0 of 600 recorded sums are bit for bit what exact arithmetic with rounding to the nearest predicts: "
        "this device rounds otherwise."
    )
    assert found[-1].holds is False


def test_a_missing_record_is_said_with_what_to_run_and_the_rest_stays(store: Store) -> None:
    rows = summary(store, missing(CASES[1]), *map(record, CASES[2:]))
    found = presentation.findings(rows)
    assert f"no record of 1 of 5 cases; {TO_RUN}" in found[0].text
    assert cells(presentation.table(rows), "measured sum")[0] == "missing"
    assert presentation.figure(rows).draw().axes


def test_stale_records_are_marked_and_noise_changes_no_bit(store: Store) -> None:
    stale = record(CASES[0], noise={"flags": ["busy"]})
    rows = summary(store, stale, fingerprint={**FINGERPRINT, "torch": "3.0"})
    assert cells(presentation.table(rows), "measured sum") == ["10.000134 †"]
    assert "Stale (†) are 1 of 1 case" in presentation.findings(rows)[-1].text


def test_without_cases_it_is_said_what_to_run() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py mixed_precision_accumulation" in only.text
    assert presentation.caption(pd.DataFrame()) == "No records"


def test_the_figure_has_a_panel_per_accumulation_that_is_not_the_same_as_another(store: Store) -> None:
    rows = summary(store, *map(record, CASES))
    titles = [axes.get_title() for axes in presentation.figure(rows).draw().axes if axes.get_visible()]
    assert len(titles) == 5
    assert "float32 += float16 cast to float32" not in titles


def test_the_prediction_is_shown_before_anything_is_measured() -> None:
    table = presentation.prediction(experiment.predict(CASES, PEAKS))
    assert cells(table, "sum")[4] == "4.000000"

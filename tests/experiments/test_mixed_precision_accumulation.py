"""What is measured of a sum of hundredths is what exact arithmetic predicts, and its error has two parts."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS

from cs336_systems.bench import sweep
from cs336_systems.bench.records import Record, Store, missing_record
from cs336_systems.errors import UserError
from cs336_systems.experiments import mixed_precision_accumulation as experiment
from cs336_systems.experiments.mixed_precision_accumulation import ACCUMULATIONS, EVERY, Case

pytestmark = pytest.mark.problem("mixed_precision_accumulation")


def records(store: Store, count: int = 1000) -> list[Record]:
    return sweep.run(experiment, experiment.grid(count=count, device="cpu"), store=store).records


def summary(store: Store, found: list[Record], **options: object) -> pd.DataFrame:
    return experiment.summarise(found, PEAKS, store=store, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("each", ACCUMULATIONS, ids=str)
def test_every_recorded_sum_is_the_one_that_must_come(each: tuple[str, str, bool]) -> None:
    case = Case(*each, device="cpu")
    sums = experiment.measure(case, lambda _: None).values["sums"]
    assert len(sums) == case.count // EVERY
    assert sums == [float(total) for total in experiment.expected(case).sums[EVERY::EVERY]]


@pytest.mark.gpu
@pytest.mark.parametrize("each", ACCUMULATIONS, ids=str)
def test_a_gpu_adds_to_the_same_sums(each: tuple[str, str, bool]) -> None:
    on_gpu, on_cpu = (experiment.measure(Case(*each, device=device), lambda _: None) for device in ("cuda", "cpu"))
    assert on_gpu.values == on_cpu.values


def test_casting_an_addend_that_is_rounded_already_changes_nothing() -> None:
    cast, plain = (
        experiment.measure(Case("float32", "float16", cast, device="cpu"), lambda _: None) for cast in (True, False)
    )
    assert cast.values == plain.values


def test_the_error_is_the_addends_and_that_of_rounding_the_sums_no_more_than_its_most(store: Store) -> None:
    rows = summary(store, records(store))
    assert (rows["of_the_addend"] + rows["of_rounding"]).tolist() == pytest.approx(rows["error"].tolist())
    assert (rows["of_rounding"].abs() <= rows["worst_of_rounding"]).all()
    assert (rows["agreeing"] == rows["sums"].map(len)).all()


def test_what_others_printed_stands_beside_the_same_sum_alone(store: Store) -> None:
    rows = summary(store, records(store))
    assert rows["printed"].notna().tolist() == [not addend.startswith("bfloat") for addend in rows["addend"]]
    assert rows["total"].round(4)[rows["printed"].notna()].tolist() == rows["printed"].dropna().tolist()
    assert summary(store, records(store, count=500))["printed"].isna().all()


def test_a_record_survives_the_way_to_a_file_and_back(store: Store) -> None:
    found = records(store)
    kept = store.local_records(found[0].machine, "mixed_precision_accumulation").values()
    assert [each.measurement for each in kept] == [each.measurement for each in found]


def test_a_missing_record_has_its_prediction_and_no_sum(store: Store) -> None:
    case = experiment.grid(device="cpu")[0].case
    missing = missing_record("mixed_precision_accumulation", "toy-1c", dataclasses.asdict(case), "run it")
    (row,) = summary(store, [missing], fingerprint=FINGERPRINT).to_dict("records")
    assert math.isnan(row["total"])
    assert row["sums"] == ()
    assert row["expected"] == float(experiment.expected(case).sums[-1])


def test_predictions_need_no_measurement() -> None:
    predicted = experiment.predict([cell.case for cell in experiment.grid(device="cpu")], PEAKS)
    assert len(predicted) == len(ACCUMULATIONS)
    assert (predicted["exact"] == 10).all()
    assert experiment.predicted_seconds(experiment.grid(device="cpu")[0].case, PEAKS, 2.0) > 0


@pytest.mark.parametrize("count", [0, -10, 5, 1005, 2.5])
def test_a_count_that_is_not_recorded_whole_is_an_error(count: object) -> None:
    with pytest.raises(UserError, match=f"count must be a positive multiple of {EVERY}, found {count}"):
        experiment.grid(count=count, device="cpu")  # type: ignore[arg-type]


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown format 'fp16'"):
        Case("fp16", "float16", False, device="cpu")

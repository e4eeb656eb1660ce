"""A step's profile keeps what ran in each range, beside the stopwatch, its floors and what arithmetic predicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, case_of, profile_record, record_of, usual_kernels

from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Measurement, Store, missing_record
from cs336_systems.errors import UserError
from cs336_systems.experiments import step_profile, transformer_step
from cs336_systems.experiments.step_profile import RANGES
from cs336_systems.profiling import recorder
from cs336_systems.profiling.kernels import Recording
from cs336_systems.profiling.recordings import read_recording
from cs336_systems.step import build_step

pytestmark = pytest.mark.problem("nsys_profile")


def tiny(**changes: Any) -> transformer_step.Case:
    return case_of("tiny", 16, **{"batch_size": 2, **changes})


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", list(RANGES))
def test_every_range_of_a_phase_is_kept_and_nothing_else(phase: str) -> None:
    parts: list[float] = []
    measurement = step_profile.measure(tiny(phase=phase), parts.append)
    found = measurement.values["ranges"]
    assert set(found) == set(RANGES[phase])
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_the_stopwatch_runs_before_and_after_the_profile_and_warm_ups_are_in_neither() -> None:
    measurement = step_profile.measure(tiny(steps=3, warmup=2), lambda _: None)
    assert {name: len(values) for name, values in measurement.samples.items()} == {"stopwatch_ms": 3, "profiled_ms": 3}
    assert measurement.values["ranges"]["forward"]["occurrences"] == 3
    # Of one step there is still one before and one after.
    single = step_profile.measure(tiny(steps=1), lambda _: None)
    assert len(single.samples["stopwatch_ms"]) == 2


def test_blocks_count_as_one_range_and_phases_divide_a_step() -> None:
    found = step_profile.measure(tiny(phase="step"), lambda _: None).values["ranges"]
    per_step = {name: told["occurrences"] / 2 for name, told in found.items()}
    assert per_step["block"] == per_step["softmax"] == 2  # the layers of tiny
    assert per_step["forward"] == per_step["optimizer"] == 1
    phases = ("forward", "loss", "backward", "optimizer")
    parts = sum(found[name]["total_ns"] for name in phases)
    assert 0.8 * found["step"]["total_ns"] <= parts <= found["step"]["total_ns"]
    assert sum(found[name]["instances"] for name in phases) <= found["step"]["instances"]


def test_the_products_of_a_forward_are_those_that_the_model_calls() -> None:
    values = step_profile.measure(tiny(steps=1), lambda _: None).values
    names, forward = values["names"], values["ranges"]["forward"]
    instances = {names[row[0]]: row[1] for row in forward["kernels"]}
    # Per layer seven linear layers and two products of attention, and the head: each an einsum, and each of them a bmm.
    assert instances["aten::bmm"] == 2 * 9 + 1
    assert forward["categories"]["matrix products"][0] == 2 * (2 * 9 + 1)


def test_a_record_survives_the_way_to_a_file_and_back_and_stays_small(store: Store) -> None:
    (record,) = sweep.run(
        step_profile, step_profile.grid(contexts={"tiny": [16]}, phases=["step"]), store=store
    ).records
    assert record.status == "ok"
    kept = json.loads(json.dumps(record.measurement.values))
    assert kept == record.measurement.values
    assert len(json.dumps(kept)) < 40_000
    assert max(len(told["kernels"]) for told in kept["ranges"].values()) <= step_profile.MOST_KERNELS


def test_what_a_record_has_of_a_range_adds_up(tmp_path: Path) -> None:
    """Kernels, where all are kept, and categories are the same work told in two ways."""
    trace = tmp_path / "trace.json"
    step = build_step(tiny(phase="step"))
    with recorder.record_trace(trace, "cpu"):
        step()
    recording = step_profile.with_blocks_together(read_recording(trace))
    values = step_profile.ranges_as_values(recording, RANGES["step"])
    for told in values["ranges"].values():
        assert sum(total for _, total in told["categories"].values()) == told["total_ns"]
        assert sum(instances for instances, _ in told["categories"].values()) == told["instances"]
        kept = sum(row[2] for row in told["kernels"])
        assert kept <= told["total_ns"]
        if len(told["kernels"]) < step_profile.MOST_KERNELS:
            assert kept == told["total_ns"]
        totals = [row[2] for row in told["kernels"]]
        assert totals == sorted(totals, reverse=True)


def test_ranges_that_differ_in_more_than_a_number_stay_apart() -> None:
    columns = {"start": 0, "end": 1, "process": 1, "thread": 1, "is_process_wide": False}
    names = ["block 0", "block 11", "block", "my block 1", "block 1 of 2"]
    ranges = pd.DataFrame([{"name": name, **columns} for name in names])
    merged = step_profile.with_blocks_together(Recording(pd.DataFrame(), ranges, "kernel")).ranges
    assert merged["name"].tolist() == ["block", "block", "block", "my block 1", "block 1 of 2"]


def test_names_that_do_not_exist_are_errors_before_anything_runs() -> None:
    with pytest.raises(UserError, match="phase"):
        step_profile.grid(phases=["sideways"])
    with pytest.raises(UserError, match="tinny"):
        step_profile.grid(contexts={"tinny": [16]})


# Predicting ----------------------------------------------------------------------------------------------------


def test_the_predicted_share_of_products_lies_between_none_and_all_and_falls_with_training() -> None:
    cases = [case_of(phase=phase) for phase in ("forward", "step")]
    forward, step = step_profile.predict(cases, PEAKS)["product_share"]
    assert 0 < step < forward < 1


def test_with_faster_memory_products_take_more_of_the_time() -> None:
    fast = PEAKS.__class__("fast-1c", PEAKS.matmul_flops_per_s, 1e12, 0, 2**33, "made up for a test")
    slow_share, fast_share = (step_profile.predict([case_of()], peaks)["product_share"][0] for peaks in (PEAKS, fast))
    assert slow_share < fast_share


def test_without_ceilings_nothing_is_predicted() -> None:
    unknown = PEAKS.__class__("new-1c", {}, math.nan, 0, 2**33, "nothing measured")
    row = step_profile.predict([case_of()], unknown).iloc[0]
    assert math.isnan(row["product_share"])
    assert step_profile.range_floors_ms(case_of(), unknown) == {}


@pytest.mark.parametrize("attention", ["reference", "flash"])
def test_floors_of_parts_are_no_more_than_that_of_the_whole(attention: str) -> None:
    case = case_of(phase="step", attention=attention)
    floors = step_profile.range_floors_ms(case, gpu_peaks("a100-40gb"))
    assert set(floors) == set(RANGES["step"])
    assert floors["feed-forward"] <= floors["block"]
    assert floors["block"] + floors["logits"] <= floors["forward"] * (1 + 1e-9)
    assert floors["forward"] + floors["backward"] <= floors["step"] * (1 + 1e-9)
    # The products alone of scores and value product are part of attention's.
    fast = PEAKS.__class__("fast-1c", PEAKS.matmul_flops_per_s, 1e18, 0, 2**33, "memory that costs nothing")
    of_products = step_profile.range_floors_ms(case, fast)
    assert of_products["scores"] + of_products["value product"] < of_products["attention"]


def test_nothing_bounds_the_ranges_of_somebody_elses_model() -> None:
    assert step_profile.range_floors_ms(case_of(model="somebody:Model"), PEAKS) == {}


# Summarising ---------------------------------------------------------------------------------------------------


def summary(store: Store, *records: Any, **options: Any) -> pd.DataFrame:
    return step_profile.summarise(records, PEAKS, store=store, **options)


def test_a_row_per_range_has_times_per_step(store: Store) -> None:
    case = case_of(phase="step", steps=4)
    rows = summary(store, profile_record(case, kernels=usual_kernels("step"))).set_index("range")
    assert rows.index.tolist() == list(RANGES["step"])
    softmax = rows.loc["softmax"]
    assert (softmax["occurrences"], softmax["total_ms"], softmax["instances"]) == (1.0, 20.0, 4.0)
    assert [kernel["name"] for kernel in softmax["kernels"]] == ["aten::exp", "aten::max"]
    assert softmax["kernels"][0]["share"] == 0.5
    assert softmax["categories"] == {"elementwise": 10.0, "softmax and other reductions": 10.0}
    assert (softmax["product_share"], rows.loc["value product", "product_share"]) == (0.0, 1.0)
    assert np.isclose(rows.loc["step", "profiled_ms"] / rows.loc["step", "stopwatch_ms"], 1.05)


def test_a_record_without_a_profile_has_every_range_of_its_phase_and_no_numbers(store: Store) -> None:
    case = case_of(phase="step")
    missing = missing_record(
        "step_profile", "toy-1c", profile_record(case, kernels=usual_kernels("step")).case, "run it"
    )
    oom = record_of("step_profile", case, Measurement(values={"available_bytes": 1}), status="oom", reason="too large")
    for record in (missing, oom):
        rows = summary(store, record)
        assert rows["range"].tolist() == list(RANGES["step"])
        assert rows[["total_ms", "stopwatch_ms", "product_share"]].isna().all(axis=None)
        assert rows["bound_ms"].notna().all()
        assert set(rows["status"]) == {record.status}


def test_ranges_that_a_form_of_attention_has_not_are_left_out_of_its_rows(store: Store) -> None:
    kernels = {name: found for name, found in usual_kernels("forward").items() if name not in ("scores", "softmax")}
    rows = summary(store, profile_record(case_of(attention="flash"), kernels=kernels))
    assert {"scores", "softmax"}.isdisjoint(rows["range"])


def test_stale_records_are_marked(store: Store) -> None:
    record = profile_record(case_of(), kernels=usual_kernels("forward"))
    assert set(summary(store, record, fingerprint=FINGERPRINT)["stale"]) == {""}
    (told,) = set(summary(store, record, fingerprint={**FINGERPRINT, "torch": "3.0"})["stale"])
    assert "torch" in told


def test_the_predicted_time_grows_with_the_steps() -> None:
    few, many = (step_profile.predicted_seconds(case_of(steps=steps), PEAKS, 2.0) for steps in (2, 20))
    assert few < many


# What others use ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_another_attention_can_be_profiled_under_autocast(attention: str) -> None:
    measurement = step_profile.measure(tiny(attention=attention, autocast="bfloat16", steps=1), lambda _: None)
    assert "attention" in measurement.values["ranges"]
    assert "scores" not in measurement.values["ranges"]


def test_the_step_that_begins_within_the_profiler_is_not_kept() -> None:
    """The first recorded step has what a profiler does once."""
    seen: list[int] = []
    measured = step_profile.measure(tiny(steps=2), lambda _: seen.append(1))
    assert len(seen) == 1 + 1 + (1 + 2) + 1  # warm-up, before, within, after
    assert measured.values["ranges"]["forward"]["occurrences"] == 2


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_kept_with_the_ranges_that_launched_them() -> None:
    values = step_profile.measure(tiny(phase="step", device="cuda", context_length=128), lambda _: None).values
    assert values["unit"] == "kernel"
    assert set(values["ranges"]) == set(RANGES["step"])
    for told in values["ranges"].values():
        assert told["instances"] > 0
        assert 0 < told["busy_ns"] <= told["total_ns"]
    phases = ("forward", "loss", "backward", "optimizer")
    assert sum(values["ranges"][name]["instances"] for name in phases) <= values["ranges"]["step"]["instances"]

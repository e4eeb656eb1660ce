"""A step's predicted time: never below its floor, no shorter for more work, and constants that are found again."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest

from cs336_systems.analysis.hardware import GPUS, Peaks, gpu_peaks
from cs336_systems.analysis.measured_times import predict_by_others, predicted_columns
from cs336_systems.analysis.roofline import operators_floor, step_bound
from cs336_systems.analysis.step_operators import stages_of
from cs336_systems.analysis.step_time import (
    CEILINGS,
    Constants,
    TimedStep,
    calibrate,
    estimate_seconds,
    floor_seconds,
    left_out,
)
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.step import PHASES, Phase, StepConfig

pytestmark = pytest.mark.problem("benchmarking_script")

A100 = gpu_peaks("a100-40gb")
# Slow enough that small models are bound by launches, by arithmetic and by traffic, each somewhere.
TOY = Peaks("toy", {"float32": 2e9, "bfloat16": 8e9}, 2e9, cache_bytes=0, memory_bytes=2**30, source="none")
SMALL = StepConfig(32, 64, 2, 2, 16, "cuda", vocab_size=50, batch_size=2)
SIZES = ({"d_model": 16, "d_ff": 32, "num_layers": 1}, {"num_layers": 2}, {"d_model": 64, "d_ff": 256, "num_layers": 2})


def step(**changes: Any) -> StepConfig:
    return dataclasses.replace(SMALL, **changes)


def family(device: str = "cuda") -> list[StepConfig]:
    return [
        step(**size, context_length=context, device=device) for size, context in itertools.product(SIZES, (16, 128))
    ]


def drawn(seed: int) -> Constants:
    draw = random.Random(seed)
    return Constants(draw.uniform(0.1, 1.0), draw.uniform(0.1, 1.0), draw.uniform(1e-6, 5e-5))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_floor_of_the_operators_is_no_lower_than_that_of_the_compulsory_bytes(gpu: str, phase: Phase) -> None:
    for chosen in (step(phase=phase), step(phase=phase, d_model=64, context_length=64)):
        least = step_bound(chosen.config, phase, chosen.batch_size, chosen.context_length, gpu_peaks(gpu), "float32")
        assert floor_seconds(chosen, gpu_peaks(gpu)) >= least.seconds


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_the_ceilings_with_a_host_that_takes_no_time_the_estimate_is_the_floor(device: str) -> None:
    for chosen in family(device):
        assert estimate_seconds(chosen, TOY, CEILINGS) == pytest.approx(floor_seconds(chosen, TOY), rel=1e-12)
        floors = [operators_floor(stage.operators, TOY) for stage in stages_of(chosen)]
        assert sum(floors) == pytest.approx(floor_seconds(chosen, TOY), rel=1e-12)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("seed", range(10))
def test_no_estimate_is_below_the_floor_or_below_what_the_host_takes(device: str, seed: int) -> None:
    constants = drawn(seed)
    for chosen in family(device):
        estimate = estimate_seconds(chosen, TOY, constants)
        assert estimate >= floor_seconds(chosen, TOY) * (1 - 1e-12)
        host = constants.host_step_s * sum(stage.host_steps for stage in stages_of(chosen))
        assert estimate >= host * (1 - 1e-12)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("seed", range(10))
def test_an_estimate_never_decreases_with_the_context_nor_with_worse_constants(device: str, seed: int) -> None:
    constants = drawn(seed)
    times = [estimate_seconds(step(context_length=context, device=device), TOY, constants) for context in (8, 16, 64)]
    assert times == sorted(times)
    chosen, before = step(device=device), times[1]
    for worse in (
        dataclasses.replace(constants, matrix_fraction=constants.matrix_fraction / 2),
        dataclasses.replace(constants, bandwidth_fraction=constants.bandwidth_fraction / 2),
        dataclasses.replace(constants, host_step_s=constants.host_step_s * 2),
    ):
        assert estimate_seconds(chosen, TOY, worse) >= before


def test_a_gpu_works_beside_its_host_and_a_cpu_does_not() -> None:
    constants = Constants(0.5, 0.5, 2e-5)
    for chosen in family():
        on_cpu = dataclasses.replace(chosen, device="cpu")
        host = constants.host_step_s * sum(stage.host_steps for stage in stages_of(on_cpu))
        kernels = estimate_seconds(on_cpu, TOY, dataclasses.replace(constants, host_step_s=0.0))
        assert estimate_seconds(on_cpu, TOY, constants) == pytest.approx(host + kernels, rel=1e-12)
        beside = estimate_seconds(chosen, TOY, constants)
        assert max(host, kernels) * (1 - 1e-12) <= beside < host + kernels


def test_a_step_bound_by_launches_takes_as_long_at_any_context() -> None:
    slow_host = Constants(1.0, 1.0, 1e-4)
    short, longer = (estimate_seconds(step(context_length=context), A100, slow_host) for context in (16, 32))
    host = slow_host.host_step_s * sum(stage.host_steps for stage in stages_of(step()))
    # Only the last kernels run after the host is done.
    assert short == pytest.approx(host, rel=1e-3)
    assert longer == pytest.approx(short, rel=1e-3)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("seed", range(4))
def test_the_constants_that_made_the_times_are_found_and_predict_a_size_left_out(device: str, seed: int) -> None:
    constants = drawn(seed)
    timed = [TimedStep(chosen, estimate_seconds(chosen, TOY, constants)) for chosen in family(device)]
    found = calibrate(timed, TOY)
    for each in timed:
        assert estimate_seconds(each.chosen, TOY, found) == pytest.approx(each.seconds, rel=0.01)
    assert dataclasses.astuple(found) == dataclasses.astuple(calibrate(timed[::-1], TOY))


def test_a_size_is_predicted_by_the_others_alone() -> None:
    constants = drawn(0)
    timed = [TimedStep(chosen, estimate_seconds(chosen, TOY, constants)) for chosen in family()]
    own = timed[0].model
    wrong = [dataclasses.replace(each, seconds=each.seconds * (3 if each.model == own else 1)) for each in timed]
    right_s, wrong_s = left_out(timed, TOY), left_out(wrong, TOY)
    for each, before, after in zip(timed, right_s, wrong_s, strict=True):
        assert (before == after) == (each.model == own)


def test_without_enough_sizes_or_times_there_are_no_constants() -> None:
    constants = drawn(0)
    timed = [TimedStep(chosen, estimate_seconds(chosen, TOY, constants)) for chosen in family()]
    with pytest.raises(UserError, match="at least three times, of 2 sizes; found 3 of 1: measure more sizes"):
        calibrate([*timed[:2], timed[0]], TOY)
    with pytest.raises(UserError, match="found 2 of 2"):
        calibrate([timed[0], timed[-1]], TOY)
    assert all(map(math.isnan, left_out(timed[:4], TOY)))  # of two sizes each has one other


def test_without_a_ceiling_there_is_no_time() -> None:
    with pytest.raises(UserError, match="bandwidth of toy is not known: measure it"):
        floor_seconds(step(), dataclasses.replace(TOY, bandwidth_bytes_per_s=math.nan, lacks="measure it"))
    with pytest.raises(UserError, match="float16"):
        estimate_seconds(step(autocast="float16"), TOY, CEILINGS)


# Records -------------------------------------------------------------------------------------------------------


def test_families_are_predicted_apart_and_one_that_lacks_a_time_is_not() -> None:
    constants = {"none": drawn(1), "bfloat16": drawn(2)}
    timed = [
        TimedStep(chosen, estimate_seconds(chosen, TOY, constants[chosen.autocast]))
        for plain in family("cpu")
        for chosen in (plain, dataclasses.replace(plain, autocast="bfloat16"))
    ]
    for each, found in zip(timed, predict_by_others(timed, TOY), strict=True):
        assert found.seconds == pytest.approx(each.seconds, rel=0.25)
    holed = [dataclasses.replace(timed[0], seconds=math.nan), *timed[1:]]
    for each, found in zip(holed, predict_by_others(holed, TOY), strict=True):
        assert math.isnan(found.seconds) == (found.constants is None) == (each.chosen.autocast == "none")


def rows_of(steps: list[StepConfig], **changes: Any) -> list[dict[str, Any]]:
    constants = drawn(3)
    return [
        {**dataclasses.asdict(chosen), "status": "ok", "median_ms": 1e3 * estimate_seconds(chosen, TOY, constants)}
        | changes
        for chosen in steps
    ]


def test_what_ran_out_of_memory_keeps_nobody_from_being_predicted_and_what_is_missing_does(store: Store) -> None:
    lost = dataclasses.asdict(step(context_length=512, device="cpu"))
    rows = rows_of(family("cpu"))
    for status, is_predicted in (("oom", True), ("missing", False)):
        more = [*rows, {**lost, "status": status, "median_ms": math.nan}]
        columns = predicted_columns(more, TOY, store.reference)
        assert [math.isfinite(each["predicted_ms"]) for each in columns] == [is_predicted] * len(rows) + [False]


def test_steps_that_cannot_be_counted_have_no_prediction(store: Store) -> None:
    rows = rows_of(family("cpu"), attention="sdpa")
    assert all(math.isnan(each["predicted_ms"]) for each in predicted_columns(rows, TOY, store.reference))

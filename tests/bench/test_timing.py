"""Timing keeps every sample, and warm-ups apart."""

from __future__ import annotations

import gc
import math
import time

import pytest
import torch

from cs336_systems.bench.timing import describe, float32_matmul_precision, no_garbage_collection, time_steps
from cs336_systems.errors import UserError


def test_every_step_runs_once_and_warm_ups_are_kept_apart() -> None:
    ran: list[int] = []
    seen: list[int] = []
    timing = time_steps(
        lambda: ran.append(len(ran)), warmup=2, steps=3, device="cpu", on_step=lambda: seen.append(len(ran))
    )
    assert ran == [0, 1, 2, 3, 4]
    assert seen == [1, 2, 3, 4, 5]
    assert (len(timing.warmup_ms), len(timing.samples_ms), timing.device_ms) == (2, 3, ())


def test_samples_stand_in_the_order_they_ran_and_the_slow_step_is_the_slow_sample() -> None:
    waits = iter([0.0, 0.0, 0.03, 0.0])
    timing = time_steps(lambda: time.sleep(next(waits)), warmup=1, steps=3, device="cpu")
    assert max(timing.samples_ms) == timing.samples_ms[1]
    # sleep never returns early, which is a property of the clock and no speed of this machine
    assert timing.samples_ms[1] >= 30.0


def test_what_happens_between_steps_is_not_timed() -> None:
    started = time.perf_counter()
    timing = time_steps(lambda: None, warmup=0, steps=2, device="cpu", on_step=lambda: time.sleep(0.05))
    elapsed_ms = 1e3 * (time.perf_counter() - started)
    assert sum(timing.samples_ms) <= elapsed_ms - 2 * 50.0


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (-1, 1), (2, -3)])
def test_no_measured_step_or_a_negative_warm_up_is_an_error(warmup: int, steps: int) -> None:
    with pytest.raises(UserError, match="at least 1 measured step"):
        time_steps(lambda: None, warmup=warmup, steps=steps, device="cpu")


def test_the_garbage_collector_is_off_while_timing_and_back_on_after_an_error() -> None:
    states: list[bool] = []
    time_steps(lambda: states.append(gc.isenabled()), warmup=0, steps=1, device="cpu")
    assert states == [False]
    with pytest.raises(RuntimeError), no_garbage_collection():
        raise RuntimeError
    assert gc.isenabled()


def test_statistics_are_those_of_the_samples() -> None:
    samples = [3.0, 1.0, 2.0, 10.0]
    found = describe(samples)
    reference = torch.tensor(samples, dtype=torch.float64)
    assert found.mean == reference.mean().item()
    assert math.isclose(found.std, reference.std(unbiased=True).item(), rel_tol=1e-12)
    assert found.median == 2.5


def test_a_single_sample_has_no_deviation() -> None:
    assert math.isnan(describe([1.0]).std)


@pytest.mark.gpu
def test_device_time_is_within_wall_time_on_a_gpu() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    timing = time_steps(lambda: a @ a, warmup=2, steps=5, device="cuda")
    assert len(timing.device_ms) == 5
    assert all(0 < device <= wall for device, wall in zip(timing.device_ms, timing.samples_ms, strict=True))


def test_the_float32_matmul_precision_is_set_for_the_measurement_and_set_back() -> None:
    before = torch.get_float32_matmul_precision()
    with float32_matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before

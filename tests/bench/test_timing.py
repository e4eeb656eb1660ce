"""Timing keeps every sample, and warm-ups apart."""

from __future__ import annotations

import gc
import math
import time
from functools import partial

import pytest
import torch

from cs336_systems.bench.timing import (
    describe,
    float32_matmul_precision,
    no_garbage_collection,
    time_rounds,
    time_steps,
)
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


# Rounds --------------------------------------------------------------------------------------------------------


def test_calls_run_in_turn_one_round_after_the_other_with_warm_ups_like_the_rest() -> None:
    ran: list[str] = []
    calls = {name: partial(ran.append, name) for name in ("b", "a", "c")}
    time_rounds(calls, warmup=1, rounds=2, device="cpu", on_round=lambda: ran.append("|"))
    assert "".join(ran) == "bac|bac|bac|"


def test_each_call_has_its_own_samples_and_the_slow_one_of_a_round_is_its_slow_sample() -> None:
    # By call, how long each of its runs takes; the first is a warm-up.
    waits = {"a": iter([0.02, 0.0, 0.02, 0.0]), "b": iter([0.0, 0.0, 0.0, 0.02])}
    calls = {name: partial(lambda each: time.sleep(next(each)), each) for name, each in waits.items()}
    found = time_rounds(calls, warmup=1, rounds=3, device="cpu")
    assert list(found) == ["a", "b"]
    for timing in found.values():
        assert (len(timing.warmup_ms), len(timing.samples_ms), timing.device_ms) == (1, 3, ())
    # sleep never returns early, which is a property of the clock and no speed of this machine
    assert found["a"].warmup_ms[0] >= 20.0
    assert found["a"].samples_ms[1] == max(found["a"].samples_ms) >= 20.0
    assert found["b"].samples_ms[2] == max(found["b"].samples_ms) >= 20.0


def test_a_call_may_use_what_the_one_before_it_left() -> None:
    waiting: list[int] = []
    calls = {"put": lambda: waiting.append(1), "take": lambda: waiting.pop()}
    time_rounds(calls, warmup=0, rounds=3, device="cpu")
    assert waiting == []


def test_steps_are_rounds_of_one_call() -> None:
    ran: list[int] = []
    found = time_rounds({"only": lambda: ran.append(1)}, warmup=2, rounds=3, device="cpu")["only"]
    assert (len(ran), len(found.warmup_ms), len(found.samples_ms)) == (5, 2, 3)


def test_rounds_of_no_call_still_count() -> None:
    rounds: list[int] = []
    assert time_rounds({}, warmup=1, rounds=2, device="cpu", on_round=lambda: rounds.append(1)) == {}
    assert len(rounds) == 3


@pytest.mark.parametrize(("warmup", "rounds"), [(0, 0), (-1, 1), (2, -3)])
def test_no_measured_round_or_a_negative_warm_up_is_an_error_before_anything_runs(warmup: int, rounds: int) -> None:
    ran: list[int] = []
    with pytest.raises(UserError, match=f"at least 1 measured round and 0 warm-ups, found {rounds} and {warmup}"):
        time_rounds({"a": lambda: ran.append(1)}, warmup=warmup, rounds=rounds, device="cpu")
    assert ran == []


def test_an_error_of_a_call_comes_out_and_the_garbage_collector_is_back_on() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time_rounds({"a": lambda: None, "b": fail}, warmup=0, rounds=1, device="cpu")
    assert gc.isenabled()


@pytest.mark.gpu
def test_every_call_of_a_round_has_its_time_by_the_device_on_a_gpu() -> None:
    a = torch.randn(1024, 1024, device="cuda")
    found = time_rounds({"one": lambda: a @ a, "two": lambda: a @ a @ a}, warmup=1, rounds=3, device="cuda")
    for timing in found.values():
        assert len(timing.device_ms) == len(timing.samples_ms) == 3
        assert all(0 < device <= wall for device, wall in zip(timing.device_ms, timing.samples_ms, strict=True))

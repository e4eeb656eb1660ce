"""The best size of a bucket is that which trying all numbers of buckets finds, and its constants come from times."""

from __future__ import annotations

import math
import random

import pytest

from cs336_systems.analysis.bucketing import CallCost, call_cost

pytestmark = pytest.mark.problem("ddp_bucketed_benchmarking")

SETTINGS = [
    (gradient_bytes, CallCost(bytes_per_s, seconds_per_call))
    for gradient_bytes in (1e6, 4e8, 6.8e9)
    for bytes_per_s in (1e8, 1e10, 4.5e11)
    for seconds_per_call in (1e-6, 3e-5, 1e-3)
]


@pytest.mark.parametrize(("gradient_bytes", "cost"), SETTINGS)
def test_the_best_bucket_is_that_of_the_best_of_all_numbers_of_buckets(gradient_bytes: float, cost: CallCost) -> None:
    best = gradient_bytes / cost.best_bucket_bytes(gradient_bytes)
    counts = range(1, 2 + math.ceil(2 * best))
    tried = min(counts, key=lambda count: cost.overlapped_s(gradient_bytes, count))
    assert abs(tried - best) <= 1
    assert cost.overlapped_s(gradient_bytes, best) <= cost.overlapped_s(gradient_bytes, tried) * (1 + 1e-12)


@pytest.mark.parametrize(("gradient_bytes", "cost"), SETTINGS)
def test_at_the_best_size_calls_cost_as_much_as_the_last_bucket(gradient_bytes: float, cost: CallCost) -> None:
    buckets = gradient_bytes / cost.best_bucket_bytes(gradient_bytes)
    if buckets == 1:  # where a call costs more than all bytes, all of them make one
        assert cost.seconds_per_call >= gradient_bytes / cost.bytes_per_s
        return
    calls_s = buckets * cost.seconds_per_call
    assert cost.overlapped_s(gradient_bytes, buckets) == pytest.approx(2 * calls_s)
    assert 2 * calls_s == pytest.approx(2 * math.sqrt(gradient_bytes * cost.seconds_per_call / cost.bytes_per_s))


@pytest.mark.parametrize(("gradient_bytes", "cost"), SETTINGS)
def test_with_one_bucket_there_is_nothing_to_overlap(gradient_bytes: float, cost: CallCost) -> None:
    assert cost.overlapped_s(gradient_bytes, 1) == cost.in_turn_s(gradient_bytes, 1)
    assert cost.overlapped_s(gradient_bytes, 2) < cost.in_turn_s(gradient_bytes, 2)


def test_where_a_call_costs_nothing_buckets_cannot_be_too_small() -> None:
    cost = CallCost(1e9, 0.0)
    assert cost.best_bucket_bytes(1e8) == 0
    overheads = [cost.overlapped_s(1e8, 10**power) for power in range(9)]
    assert overheads == sorted(overheads, reverse=True)
    assert cost.in_turn_s(1e8, 1) == cost.in_turn_s(1e8, 1000)


def test_where_a_call_costs_more_than_all_bytes_one_bucket_has_them_all() -> None:
    assert CallCost(1e9, 1.0).best_bucket_bytes(1e6) == 1e6


def test_a_better_network_takes_smaller_buckets_the_cheaper_its_calls_are() -> None:
    usual = CallCost(1e9, 1e-4).best_bucket_bytes(1e8)
    assert CallCost(1e9, 1e-5).best_bucket_bytes(1e8) < usual < CallCost(1e10, 1e-4).best_bucket_bytes(1e8)


# Constants from times ------------------------------------------------------------------------------------------


def test_both_constants_are_found_again_in_times_made_with_them() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        made = CallCost(10 ** numbers.uniform(6, 12), 10 ** numbers.uniform(-6, -2))
        few, many = numbers.uniform(1, 1000), 10 ** numbers.uniform(5, 10)
        found = call_cost(few, made.in_turn_s(few, 1), many, made.in_turn_s(many, 1))
        assert found is not None
        # The bandwidth is in a difference of times, of which a price far above it leaves few digits.
        lost = made.in_turn_s(many, 1) / (many / made.bytes_per_s)
        assert found.bytes_per_s == pytest.approx(made.bytes_per_s, rel=1e-12 * lost)
        assert found.seconds_per_call == pytest.approx(made.seconds_per_call, rel=1e-9)


@pytest.mark.parametrize(
    ("few_bytes", "few_s", "many_bytes", "many_s"),
    [
        pytest.param(4, 2e-3, 1e6, 1e-3, id="few bytes took longer than many"),
        pytest.param(4, 1e-3, 1e6, 1e-3, id="they took the same"),
        pytest.param(4, 0.0, 1e6, 1e-3, id="a time of nothing"),
        pytest.param(4, -1e-3, 1e6, 1e-3, id="a time below nothing"),
        pytest.param(4, 1e-3, 4, 2e-3, id="the same bytes twice"),
        pytest.param(-4, 1e-3, 1e6, 2e-3, id="fewer bytes than none"),
        pytest.param(500_000, 1e-3, 1e6, 2e-3, id="all of the time is of the bytes"),
        pytest.param(4, math.nan, 1e6, 1e-3, id="no time of few"),
        pytest.param(4, 1e-3, math.nan, 2e-3, id="no number of bytes"),
    ],
)
def test_nothing_follows_from_times_that_no_constants_make(
    few_bytes: float, few_s: float, many_bytes: float, many_s: float
) -> None:
    assert call_cost(few_bytes, few_s, many_bytes, many_s) is None

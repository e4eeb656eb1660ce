"""All wrappers take their turns on real ranks and call what they should; summaries say what the records do."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from data_parallel_records import COST, GRADIENT_BYTES, case_of, narrow_case, record_for
from ddp_workers import toy
from profile_records import FINGERPRINT, PEAKS, record_of

from cs336_systems.analysis.footprint import plan_step
from cs336_systems.bench.records import Measurement, case_key, missing_record
from cs336_systems.bench.sweep import AVAILABLE, OutOfMemory
from cs336_systems.distributed.ddp import BYTES_PER_MB, buckets_of
from cs336_systems.distributed.launch import RankFailed
from cs336_systems.errors import UserError
from cs336_systems.experiments import data_parallel
from cs336_systems.experiments.data_parallel import Case
from cs336_systems.experiments.data_parallel_memory import gradient_bytes, planned_bytes, without_room
from cs336_systems.experiments.data_parallel_ranks import (
    ALONE,
    AT_ONCE,
    ONE_NUMBER,
    TIMES,
    replica_of,
    variant_name,
)
from cs336_systems.experiments.data_parallel_together import measurement_of
from cs336_systems.model import build_model
from cs336_systems.profiling.overlap import Overlap

pytestmark = [
    pytest.mark.problem("naive_ddp_benchmarking"),
    pytest.mark.problem("minimal_ddp_flat_benchmarking"),
    pytest.mark.problem("ddp_overlap_individual_parameters_benchmarking"),
    pytest.mark.problem("ddp_bucketed_benchmarking"),
]

OWN = "own_wrappers:Summed"
SMALL_MB = 0.004
"""Of which the narrow model fills several buckets."""


# Cases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 3}, "a batch of 3 cannot be divided among 2 ranks"),
        ({"batch_size": 4, "world_size": 3}, "expected a multiple of 3"),
        ({"world_size": 1}, "world_size must be a whole number of at least 2"),
        ({"world_size": 2.0}, "world_size must be a whole number"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"wrappers": ("naiv",)}, "did you mean 'naive'"),
        ({"wrappers": ()}, "wrappers is empty"),
        ({"wrappers": ("bucketed",), "buckets_mb": ()}, "bucketed needs the size of a bucket"),
        ({"buckets_mb": (1, 0)}, "larger than 0 MB, found 0"),
        ({"buckets_mb": (-1.5,)}, "found -1.5"),
        ({"buckets_mb": (math.inf,)}, "found inf"),
        ({"buckets_mb": (math.nan,)}, "found nan"),
        ({"buckets_mb": (True,)}, "found True"),
        ({"buckets_mb": ("1",)}, "found '1'"),
        ({"phase": "forward"}, "whole eager steps"),
        ({"compile": "model"}, "whole eager steps"),
        ({"dtype": "bfloat16"}, "float32 weights"),
    ],
)
def test_a_case_that_cannot_be_is_an_error_that_says_what_can(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        narrow_case(**changes)


def test_a_case_comes_back_from_json_as_the_same_case() -> None:
    case = narrow_case(wrappers=["naive", OWN], buckets_mb=[0.5, 10])
    content = json.loads(json.dumps(dataclasses.asdict(case)))
    assert Case(**content) == case
    assert hash(Case(**content)) == hash(case)
    assert case_key(content) == case_key(dataclasses.asdict(case))
    assert case.object_references == (OWN,)


def test_a_case_whose_wrapper_is_not_here_can_be_read_and_not_measured() -> None:
    case = narrow_case(wrappers=("not_a_module_of_this_machine:DDP",))
    with pytest.raises(UserError, match="not_a_module_of_this_machine"):
        data_parallel.measure(case, lambda _: None)


def test_every_wrapper_takes_a_turn_and_buckets_one_for_each_size() -> None:
    case = narrow_case(wrappers=("naive", "flat", "overlapped", "bucketed", "torch", OWN), buckets_mb=(100, 1, 10, 1))
    assert list(case.variants) == [
        ("naive", None), ("flat", None), ("overlapped", None),
        ("bucketed", 1), ("bucketed", 10), ("bucketed", 25), ("bucketed", 100), ("torch", 25), (OWN, None),
    ]  # fmt: skip
    names = [variant_name(*variant) for variant in case.variants]
    assert len(set(names)) == len(names)
    assert names[5] == "bucketed 25 MB"


def test_ours_is_compared_at_the_size_of_pytorchs_only_where_that_is_there() -> None:
    assert list(narrow_case(wrappers=("bucketed", "bucketed"), buckets_mb=(1,)).variants) == [("bucketed", 1)]
    both = narrow_case(wrappers=("torch", "bucketed"), buckets_mb=(25.0,))
    assert list(both.variants) == [("torch", 25), ("bucketed", 25)]
    assert narrow_case(wrappers=("torch", "bucketed"), buckets_mb=()).variants == both.variants


def test_a_rank_has_its_part_of_the_batch_and_else_the_same_step() -> None:
    case = case_of(batch_size=12, world_size=3, autocast="bfloat16")
    assert case.step_of_rank.batch_size == 4
    assert dataclasses.replace(case.step_of_rank, batch_size=12).config == case.config
    assert case.step_of_rank.autocast == "bfloat16"
    assert case.size == "small"
    assert narrow_case().size == "custom"
    assert (case.backend, dataclasses.replace(case, device="cuda").backend) == ("gloo", "nccl")


# The grid ------------------------------------------------------------------------------------------------------


def test_more_ranks_than_gpus_are_skipped_with_the_reason() -> None:
    cells = data_parallel.grid(device="cuda", device_count=2, world_sizes=(2, 4), batch_size=4)
    assert [cell.skip_reason for cell in cells] == [None, "4 ranks need as many GPUs, and this machine has 2"]
    on_cpu = data_parallel.grid(device="cpu", device_count=0, world_sizes=(2, 4), batch_size=4)
    assert [cell.skip_reason for cell in on_cpu] == [None, None]


def test_the_grid_has_sizes_by_contexts_by_ranks_and_a_case_all_wrappers() -> None:
    cells = data_parallel.grid(
        contexts={"tiny": [16, 32], "mini": [16]}, layers=None, world_sizes=(2, 4), batch_size=8, device="cpu"
    )
    cases = [cell.case for cell in cells]
    assert [(case.size, case.context_length, case.world_size) for case in cases] == [
        ("tiny", 16, 2), ("tiny", 16, 4), ("tiny", 32, 2), ("tiny", 32, 4), ("mini", 16, 2), ("mini", 16, 4),
    ]  # fmt: skip
    assert {case.wrappers for case in cases} == {data_parallel.WRAPPERS}
    assert [case.num_layers for case in cases] == [2, 2, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"contexts": {"smal": [64]}}, "did you mean 'small'"),
        ({"world_sizes": (2, 3)}, "cannot be divided among 3 ranks"),
        ({"wrappers": ["flatt"]}, "did you mean 'flat'"),
        ({"buckets_mb": [0]}, "larger than 0 MB"),
        ({"world_sizes": ()}, "empty"),
    ],
)
def test_what_no_grid_can_have_is_an_error(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        data_parallel.grid(device="cpu", **changes)


# Replicas ------------------------------------------------------------------------------------------------------


def test_a_replica_lies_in_the_memory_of_the_model() -> None:
    model = toy(seed=0)
    replica = replica_of(model)
    for named in ("named_parameters", "named_buffers"):
        pairs = list(zip(getattr(model, named)(), getattr(replica, named)(), strict=True))
        assert pairs
        for (name, one), (other_name, other) in pairs:
            assert (name, one.requires_grad, one.dtype) == (other_name, other.requires_grad, other.dtype)
            assert one is not other
            assert one.data_ptr() == other.data_ptr()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = replica(x)
    with torch.no_grad():
        for each in [*model.parameters(), model.get_buffer("scale")]:
            each.mul_(2)
    assert torch.equal(replica(x), model(x))
    assert not torch.equal(replica(x), before)


def test_tied_parameters_stay_tied_in_a_replica() -> None:
    replica = replica_of(toy(seed=0))
    assert replica.get_parameter("head.weight") is replica.get_parameter("head_again.weight")


def test_hooks_and_gradients_of_a_replica_are_its_own() -> None:
    model, fired = toy(seed=0), []
    x = torch.randn(3, 6, dtype=torch.float64)

    def watch(module: torch.nn.Module, name: str) -> None:
        for each in module.parameters():
            if each.requires_grad:
                each.register_post_accumulate_grad_hook(lambda _: fired.append(name))

    watch(model, "model")
    model(x).sum().backward()
    one, other = replica_of(model), replica_of(model)
    watch(one, "one")
    watch(other, "other")
    assert all(each.grad is None for replica in (one, other) for each in replica.parameters())
    fired.clear()
    model.zero_grad()
    one(x).sum().backward()
    assert set(fired) == {"one"}
    assert all(each.grad is None for module in (model, other) for each in module.parameters())


# Measuring -----------------------------------------------------------------------------------------------------


@functools.cache
def measured() -> tuple[Case, Measurement, tuple[float, ...]]:
    """All wrappers on the narrow model, and one of somebody else's; with its parts."""
    parts: list[float] = []
    wrappers = (*data_parallel.WRAPPERS, OWN)
    case = narrow_case(wrappers=wrappers, buckets_mb=(SMALL_MB,), warmup=1, rounds=2)
    return case, data_parallel.measure(case, parts.append), tuple(parts)


def calls_on_ranks(name: str) -> list[int]:
    return [rank["recorded"][name]["calls"] for rank in measured()[1].values["ranks"]]


def reductions_on_ranks(name: str) -> list[int]:
    return [rank["recorded"][name]["reductions"] for rank in measured()[1].values["ranks"]]


@pytest.mark.distributed
def test_every_variant_has_its_samples_and_each_is_of_the_slowest_rank() -> None:
    case, measurement, _ = measured()
    names = [ALONE, *(variant_name(*variant) for variant in case.variants)]
    expected = {f"{name} {time}" for name in names for time in TIMES} | {f"{ONE_NUMBER} ms", f"{AT_ONCE} ms"}
    times = {**measurement.samples, **measurement.values["parts_ms"]}
    assert times.keys() == expected
    assert measurement.samples.keys() == {f"{name} step_ms" for name in names}
    assert {len(taken) for taken in times.values()} == {case.rounds}
    assert all(value > 0 for name in names for value in times[f"{name} step_ms"])
    for name in names:
        of_ranks = [rank["times"][name] for rank in measurement.values["ranks"]]
        for time in TIMES[:2]:
            assert times[f"{name} {time}"] == [
                max(taken) for taken in zip(*(each[time] for each in of_ranks), strict=True)
            ]
        for turn, finish in enumerate(times[f"{name} finish_ms"]):
            backward_ends = max(each["gradients_ms"][turn] - each["finish_ms"][turn] for each in of_ranks)
            assert finish == pytest.approx(times[f"{name} gradients_ms"][turn] - backward_ends)
        steps, gradients, finish = (times[f"{name} {time}"] for time in TIMES)
        assert all(a >= b >= c for a, b, c in zip(steps, gradients, finish, strict=True))
    assert json.loads(json.dumps(measurement.values)) == measurement.values


@pytest.mark.distributed
def test_wrappers_call_once_per_parameter_once_for_all_or_once_per_bucket() -> None:
    parameters = list(build_model(narrow_case().config).parameters())
    telling = 1  # which gradients there are
    for name in ("naive", "flat", "overlapped", variant_name("bucketed", SMALL_MB)):
        assert reductions_on_ranks(name) == [calls - telling for calls in calls_on_ranks(name)]
    assert reductions_on_ranks(OWN) == [len(parameters)] * 2
    assert reductions_on_ranks("torch 25 MB") == [1] * 2  # of buckets that were arranged anew after the first step
    assert calls_on_ranks("naive") == [len(parameters) + telling] * 2
    assert calls_on_ranks("flat") == [1 + telling] * 2
    assert calls_on_ranks("overlapped") == [len(parameters) + telling] * 2
    buckets = buckets_of(parameters, SMALL_MB * BYTES_PER_MB)
    assert 1 < len(buckets) < len(parameters)
    assert calls_on_ranks(variant_name("bucketed", SMALL_MB)) == [len(buckets) + telling] * 2
    assert calls_on_ranks("bucketed 25 MB") == [1 + telling] * 2
    assert calls_on_ranks(OWN) == [len(parameters)] * 2


@pytest.mark.distributed
def test_the_bytes_of_gradients_are_those_that_were_predicted() -> None:
    case, measurement, _ = measured()
    parameters = list(build_model(case.config).parameters())
    assert measurement.values["gradients"] == len(parameters)
    assert measurement.values["gradient_bytes"] == sum(each.numel() * 4 for each in parameters)
    assert data_parallel.predict([case], PEAKS)["gradient_bytes"].tolist() == [measurement.values["gradient_bytes"]]


@pytest.mark.distributed
def test_what_communicates_after_backward_overlaps_with_nothing() -> None:
    case, measurement, _ = measured()
    record = record_of("data_parallel", case, measurement)
    rows = data_parallel.summarise([record], PEAKS).set_index("variant")
    assert rows.loc[["naive", "flat"], "overlapped"].tolist() == [0, 0]
    known = rows.drop(index=ALONE)
    assert known["overlapped"].between(0, 1).all()
    assert (known["communication_ms"] > 0).all()
    for rank in measurement.values["ranks"]:
        for found in rank["recorded"].values():
            assert found["compute_spans_ms"]
            assert found["communication_spans_ms"]


@pytest.mark.distributed
def test_progress_goes_up_to_the_whole_and_no_further() -> None:
    parts = measured()[2]
    assert list(parts) == sorted(parts)
    assert 0 < parts[0] < parts[-1] == 1
    assert parts.count(1) == 1


@pytest.mark.distributed
def test_a_rank_that_is_killed_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="rank 1 of 2 was killed by SIGKILL"):
        data_parallel.measure(narrow_case(wrappers=("own_wrappers:Killed",)), lambda _: None)


@pytest.mark.distributed
def test_a_rank_that_fails_otherwise_is_not_out_of_memory() -> None:
    with pytest.raises(RankFailed, match="the numbers are wrong"):
        data_parallel.measure(narrow_case(wrappers=("own_wrappers:Raising",)), lambda _: None)


@pytest.mark.distributed
def test_a_wrapper_that_is_none_is_a_users_error() -> None:
    with pytest.raises(UserError, match="finish_gradient_synchronization"):
        data_parallel.measure(narrow_case(wrappers=("own_wrappers:Unfinished",)), lambda _: None)


def least_bytes(case: Case, left_out: int = 0) -> int:
    """The least memory with which so many wrappers have no room."""
    low, high = 0, 2**50
    while low < high:
        available = (low + high) // 2
        try:
            fits = len(without_room(case, available)) <= left_out
        except OutOfMemory:
            fits = False
        low, high = (low, available) if fits else (available + 1, high)
    return low


def test_what_cannot_fit_is_told_with_ranks_and_bytes_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(world_size=4)
    monkeypatch.setattr(data_parallel, "launch", lambda *_, **__: pytest.fail("it was built"))
    monkeypatch.setattr(data_parallel, "available_bytes", lambda _: 2**20)
    with pytest.raises(OutOfMemory, match=r"4 ranks would hold at least [\d.]+ GiB .*, and 1\.00 MiB are available"):
        data_parallel.measure(case, lambda _: None)
    with pytest.raises(OutOfMemory, match=r"1 rank would hold"):
        data_parallel.measure(dataclasses.replace(case, device="cuda"), lambda _: None)


def test_ranks_share_the_memory_of_a_cpu_and_have_a_gpu_each() -> None:
    for ranks in (2, 4):
        case = narrow_case(world_size=ranks, batch_size=2 * ranks)
        assert least_bytes(case) == case.world_size * planned_bytes(case, case.wrappers)
        on_gpus = dataclasses.replace(case, device="cuda")
        assert least_bytes(on_gpus) == planned_bytes(on_gpus, case.wrappers)


def test_a_set_of_gradients_is_planned_for_buffers_and_one_more_for_what_pytorchs_wrapper_keeps() -> None:
    case = case_of()
    gradients = gradient_bytes(case)
    bare = planned_bytes(case, ["naive"])
    assert 4 * gradients < bare < 5 * gradients
    assert planned_bytes(case, ["naive", OWN]) == bare
    for wrappers in (["naive", "flat"], ["flat", "overlapped", "bucketed"]):
        assert planned_bytes(case, wrappers) == 5 * gradients
    assert planned_bytes(case, ["torch"]) == bare + gradients
    assert planned_bytes(case, data_parallel.WRAPPERS) == 6 * gradients


def test_the_whole_batch_in_one_process_is_planned_with_its_activations() -> None:
    small, large = (narrow_case(batch_size=batch) for batch in (4, 64))
    whole = plan_step(large.as_step(phase="forward-backward"), "cpu").peak_allocated_bytes
    part = plan_step(large.step_of_rank.as_step(phase="step"), "cpu").peak_allocated_bytes
    assert planned_bytes(large, ["naive"]) == whole > part
    assert planned_bytes(large, ["naive"]) > 2 * planned_bytes(small, ["naive"])


def test_a_model_that_cannot_be_planned_is_counted_by_its_weights() -> None:
    case = case_of(attention="flash-triton", wrappers=("naive",))
    assert planned_bytes(case, case.wrappers) == 4 * gradient_bytes(case)


def test_where_not_all_fit_pytorchs_wrapper_is_left_out_first_then_those_that_need_a_buffer() -> None:
    case = case_of()
    everything, unbuffered, bare = (
        case.world_size * planned_bytes(case, wrappers)
        for wrappers in (case.wrappers, ("naive", "flat", "overlapped", "bucketed"), ("naive",))
    )
    assert everything > unbuffered > bare
    assert without_room(case, everything) == {}
    assert set(without_room(case, everything - 1)) == {"torch"}
    assert set(without_room(case, unbuffered - 1)) == {"torch", "flat", "overlapped", "bucketed"}
    with pytest.raises(OutOfMemory):
        without_room(case, bare - 1)
    with pytest.raises(OutOfMemory):
        without_room(dataclasses.replace(case, wrappers=("torch",)), bare)


@pytest.mark.distributed
def test_wrappers_without_room_are_told_and_the_others_measured_at_the_same_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = narrow_case(wrappers=("naive", "bucketed", "torch"), buckets_mb=(1,))
    available = least_bytes(case) - 1
    monkeypatch.setattr(data_parallel, "available_bytes", lambda _: available)
    parts: list[float] = []
    measurement = data_parallel.measure(case, parts.append)
    rows = by_variant(record_of("data_parallel", case, measurement))
    assert list(rows.index) == [ALONE, "naive", "bucketed 1 MB", "bucketed 25 MB", "torch 25 MB"]
    assert rows["status"].tolist() == ["ok"] * 4 + ["oom"]
    assert "are available" in rows["reason"]["torch 25 MB"]
    assert rows["mean_ms"].notna().tolist() == [True] * 4 + [False]
    assert rows["wrong"][1:4].tolist() == [[]] * 3
    assert measurement.values[AVAILABLE] == available
    assert parts[-1] == 1


# Predictions ---------------------------------------------------------------------------------------------------


def test_predictions_have_a_row_per_case_and_more_takes_longer() -> None:
    case = case_of()
    cases = [case, dataclasses.replace(case, rounds=9), dataclasses.replace(case, wrappers=("naive",))]
    predicted = data_parallel.predict(cases, PEAKS)
    assert predicted["variants"].tolist() == [8, 8, 1]
    assert (predicted["bound_ms"] > 0).all()
    usual, more, fewer = (data_parallel.predicted_seconds(each, PEAKS, 2.0) for each in cases)
    assert 0 < fewer < usual < more
    assert data_parallel.predicted_seconds(case, PEAKS, 4.0) == pytest.approx(2 * usual)


def test_ranks_on_one_cpu_take_its_cores_and_on_gpus_one_each() -> None:
    two, four = (case_of(world_size=ranks, batch_size=64) for ranks in (2, 4))
    assert data_parallel.floor_ms(two, PEAKS) == data_parallel.floor_ms(four, PEAKS)
    on_gpus = [data_parallel.floor_ms(dataclasses.replace(case, device="cuda"), PEAKS) for case in (two, four)]
    assert on_gpus[1] < on_gpus[0] < data_parallel.floor_ms(two, PEAKS)


# Summarising ---------------------------------------------------------------------------------------------------


def summary(*records: Any, **options: Any) -> pd.DataFrame:
    return data_parallel.summarise(records, PEAKS, **options)


def by_variant(*records: Any) -> pd.DataFrame:
    return summary(*records).set_index("variant")


def test_what_is_exposed_is_the_difference_of_the_means() -> None:
    case = case_of()
    record = record_for(case, exposed_ms={"naive": 42.0, "flat": -3.0})
    rows, samples = by_variant(record), data_parallel.times_of(record)
    for name in rows.index.drop(ALONE):
        means = [
            sum(taken) / len(taken) for taken in (samples[f"{name} gradients_ms"], samples[f"{ALONE} gradients_ms"])
        ]
        assert rows["exposed_ms"][name] == pytest.approx(means[0] - means[1])
        assert rows["exposed_share"][name] == pytest.approx(rows["exposed_ms"][name] / rows["mean_ms"][name])
    assert rows["exposed_ms"]["naive"] == pytest.approx(42)
    assert rows["exposed_ms"]["flat"] == pytest.approx(-3)
    assert math.isnan(rows["exposed_ms"][ALONE])
    assert rows["std_ms"].tolist() == pytest.approx([1.0] * len(rows))


def test_the_model_has_the_constants_of_the_record_and_the_buckets_of_each_wrapper() -> None:
    rows = by_variant(record_for(case_of(wrappers=(*data_parallel.WRAPPERS, OWN))))
    # One bucket: all its bytes and one call, although ours makes another of a byte per parameter.
    whole = 1e3 * (GRADIENT_BYTES / COST.bytes_per_s + COST.seconds_per_call)
    assert rows["modelled_ms"]["bucketed 100 MB"] == pytest.approx(whole)
    assert rows["bytes_per_s"].tolist() == pytest.approx([COST.bytes_per_s] * len(rows))
    assert rows["seconds_per_call"].tolist() == pytest.approx([COST.seconds_per_call] * len(rows))
    for name in ("naive", "flat"):
        assert rows["modelled_ms"][name] == pytest.approx(
            1e3 * COST.in_turn_s(GRADIENT_BYTES, rows["reductions"][name])
        )
    for name in ("overlapped", "bucketed 1 MB", "bucketed 100 MB", "torch 25 MB"):
        assert rows["modelled_ms"][name] == pytest.approx(
            1e3 * COST.overlapped_s(GRADIENT_BYTES, rows["reductions"][name])
        )
    assert rows.loc[[ALONE, OWN], "modelled_ms"].isna().all()


def test_the_overlapped_share_is_of_the_communication_of_all_ranks() -> None:
    record = record_for(case_of())
    ranks = json.loads(json.dumps(record.measurement.values["ranks"]))
    ranks[0]["recorded"]["overlapped"] |= {"communication_ms": 30.0, "overlapped_ms": 30.0, "reductions": 40}
    ranks[1]["recorded"]["overlapped"] |= {"communication_ms": 10.0, "overlapped_ms": 0.0, "reductions": 60}
    record.measurement.values["ranks"] = ranks
    row = by_variant(record).loc["overlapped"]
    assert (row["overlapped"], row["communication_ms"], row["reductions"]) == (0.75, 20.0, 50)
    assert len(row["recorded"]) == 2


def test_without_constants_the_model_says_nothing_and_times_stay() -> None:
    rows = by_variant(record_for(case_of(), cost=None))
    assert rows[["modelled_ms", "bytes_per_s", "seconds_per_call"]].isna().all(axis=None)
    assert rows["mean_ms"].notna().all()


@pytest.mark.parametrize("status", ["missing", "oom", "failed"])
def test_a_record_without_times_keeps_its_rows_and_their_floor(status: str) -> None:
    case = case_of()
    whole = record_for(case)
    record: Any = (
        missing_record("data_parallel", "toy-1c", whole.case, "run it")
        if status == "missing"
        else record_of("data_parallel", case, Measurement(), status=status, reason="too large")
    )
    rows, full = summary(record), summary(whole)
    measured_columns = [
        "mean_ms",
        "std_ms",
        "median_ms",
        "finish_ms",
        "exposed_ms",
        "reductions",
        "overlapped",
        "modelled_ms",
    ]
    assert rows[measured_columns].isna().all(axis=None)
    assert rows["variant"].tolist() == full["variant"].tolist()
    assert rows["bound_ms"].tolist() == full["bound_ms"].tolist()
    assert rows["recorded"].tolist() == [[]] * len(rows)
    assert set(rows["status"]) == {status}
    assert set(rows.columns) == set(full.columns)


def test_two_cases_stay_apart_and_stale_records_are_marked() -> None:
    records = [record_for(case_of(world_size=ranks)) for ranks in (2, 4)]
    rows = summary(*records, fingerprint={**FINGERPRINT, "torch": "3.0"})
    assert rows.groupby("case")["world_size"].nunique().tolist() == [1, 1]
    assert all("torch" in text for text in rows["stale"])


# Right gradients ------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_averaged_gradients_are_those_of_one_process_to_rounding_and_the_same_bits_on_all_ranks() -> None:
    _, measurement, _ = measured()
    checked = measurement.values["checked"]
    assert set(checked) == set(measurement.values["ranks"][0]["recorded"])
    assert all(each["ranks_equal"] and each["same_parameters"] for each in checked.values())
    eps = torch.finfo(torch.float32).eps
    assert 0 < max(each["relative_error"] for each in checked.values()) < 10 * eps


WRONGS = {
    "NoAverage": {"ranks differ", "too far off"},
    "AnotherBit": {"ranks differ"},
    "NotDivided": {"too far off"},
    "LacksOne": {"a gradient is missing or too many"},
    "LacksOneOnTheLastRank": {"ranks differ", "a gradient is missing or too many"},
    "LacksAll": {"a gradient is missing or too many", "too far off"},
    "NoNumber": {"too far off"},
}
"""Of each wrong wrapper what is the matter."""


@pytest.mark.distributed
def test_wrappers_whose_gradients_are_wrong_are_found_out_each_for_its_cause() -> None:
    names = {f"wrong_wrappers:{name}": causes for name, causes in WRONGS.items()}
    case = narrow_case(wrappers=("naive", *names), warmup=0, rounds=1)
    record = record_of("data_parallel", case, data_parallel.measure(case, lambda _: None))
    json.dumps(record.measurement.values, allow_nan=False)
    found = by_variant(record)["wrong"]
    assert found["naive"] == []
    assert {name: set(found[name]) for name in names} == names


@pytest.mark.distributed
def test_under_autocast_gradients_are_right_within_the_rounding_of_its_products() -> None:
    case = narrow_case(wrappers=("naive",), autocast="bfloat16")
    row = by_variant(record_of("data_parallel", case, data_parallel.measure(case, lambda _: None))).loc["naive"]
    assert row["wrong"] == []
    assert data_parallel.MOST_OFF["none"] < row["relative_error"] < data_parallel.MOST_OFF["bfloat16"]


# Ranks side by side ---------------------------------------------------------------------------------------------


def of_rank(name: str, backward_ms: float, gradients_ms: float, calls: tuple, compute: tuple) -> dict[str, Any]:
    """What a rank gives of one round."""
    times = {"step_ms": [gradients_ms + 1], "gradients_ms": [gradients_ms], "finish_ms": [gradients_ms - backward_ms]}
    return {
        "times": {ALONE: times, name: times},
        "recorded": {name: Overlap(compute, calls, len(calls))},
        "reductions": {name: None},
        "checked": {name: {"relative_error": backward_ms, "same_parameters": True, "ranks_equal": True}},
        "reductions_ms": {ONE_NUMBER: [1.0], AT_ONCE: [2.0]},
        "gradient_bytes": 8,
        "gradients": 2,
    }


def test_waiting_for_a_slower_rank_is_neither_finishing_nor_communicating() -> None:
    # The first is done with its backward at 10 and waits until 50; both communicate from then until 60.
    fast = of_rank("naive", 10.0, 60.0, ((10.0, 60.0),), ((0.0, 40.0),))
    slow = of_rank("naive", 50.0, 60.0, ((50.0, 60.0),), ((0.0, 50.0),))
    for ranks in ([fast, slow], [slow, fast]):
        values = measurement_of(["naive"], ranks).values
        assert values["parts_ms"]["naive finish_ms"] == [10.0]
        assert values["checked"]["naive"]["relative_error"] == 50.0
        for rank in values["ranks"]:
            found = rank["recorded"]["naive"]
            assert (found["communication_ms"], found["overlapped_ms"]) == (10.0, 0.0)
            assert found["communication_spans_ms"] == [[50.0, 60.0]]
            assert found["is_matched"]


def test_calls_of_ranks_that_made_different_numbers_are_left_as_they_were_seen() -> None:
    one = of_rank("naive", 10.0, 60.0, ((10.0, 60.0),), ((0.0, 40.0),))
    two = of_rank("naive", 50.0, 60.0, ((50.0, 52.0), (54.0, 60.0)), ((0.0, 50.0),))
    found = [rank["recorded"]["naive"] for rank in measurement_of(["naive"], [one, two]).values["ranks"]]
    assert [each["communication_ms"] for each in found] == [50.0, 8.0]
    assert [each["is_matched"] for each in found] == [False, False]

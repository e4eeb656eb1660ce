"""Collectives are timed on every rank, checked, and bounded by the links of their own rounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import collective_ranks as ranks
import pytest
import torch
from collective_records import LINK_BYTES_PER_S, case_of, record_for
from profile_records import PEAKS

from cs336_systems.analysis.communication import ALTERNATE, RING, alternate_over_ring
from cs336_systems.bench import sweep
from cs336_systems.bench.grid import Cell, runnable
from cs336_systems.bench.records import Record, Store
from cs336_systems.distributed.launch import launch
from cs336_systems.errors import UserError
from cs336_systems.experiments import collectives
from cs336_systems.experiments.collectives import MB, OPERATIONS, OTHERS, Case, grid, planned_bytes
from cs336_systems.experiments.collectives_ranks import ALL_AT_ONCE, ALL_WHOLE, BOTH_WAYS, ONE_WAY

pytestmark = [
    pytest.mark.problem("distributed_communication_single_node"),
    pytest.mark.problem("alternate_ring_all_reduce"),
]

SMALL = case_of(0.001, 3)


def run_one(store: Store, case: Case) -> Record:
    (record,) = sweep.run(collectives, [Cell(case)], store=store).records
    return record


# The grid ------------------------------------------------------------------------------------------------------


def test_the_grid_is_numbers_of_ranks_times_sizes_and_the_others_are_timed_where_asked() -> None:
    cells = grid(sizes_mb=[1, 10], world_sizes=[2, 4], others_mb=[10], device="cpu")
    assert [(cell.case.world_size, cell.case.size_bytes) for cell in cells] == [
        (world, size * MB) for world in (2, 4) for size in (1, 10)
    ]
    for cell in cells:
        assert (set(OTHERS) <= set(cell.case.operations)) == (cell.case.size_bytes == 10 * MB)
        assert {"all_reduce", RING, ALTERNATE} <= set(cell.case.operations)
    everywhere = grid(sizes_mb=[1, 10], others_mb=None, device="cpu")
    assert all(cell.case.operations == OPERATIONS for cell in everywhere)


def test_large_arrays_have_fewer_rounds_but_never_more_than_were_asked_for() -> None:
    rounds = [cell.case.rounds for cell in grid(sizes_mb=[1, 10, 20, 1000], world_sizes=[2], rounds=50, device="cpu")]
    assert rounds == [50, 50, 25, 5]
    assert {cell.case.rounds for cell in grid(sizes_mb=[1, 1000], rounds=2, device="cpu")} == {2}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_more_ranks_than_gpus_are_skipped_with_the_reason_and_more_than_cores_are_not(count: int) -> None:
    cells = grid(world_sizes=[2, 4, 6], sizes_mb=[1], device="cuda", device_count=count)
    assert [case.world_size for case in runnable(cells)] == [each for each in (2, 4, 6) if each <= count]
    for cell in cells:
        if cell.case.world_size > count:
            assert f"{cell.case.world_size} ranks, and the machine has {count}" in str(cell.skip_reason)
    assert len(runnable(grid(world_sizes=[64], sizes_mb=[1], device="cpu", device_count=1))) == 1


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_an_array_is_what_was_asked_for_and_shared_evenly(world_size: int) -> None:
    case = case_of(1, world_size)
    assert 0 <= case.array_bytes - case.size_bytes < 4 * world_size
    assert case.length % world_size == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"world_size": 1}, "world_size must be a whole number of at least 2, found 1"),
        ({"size_mb": 0}, "size_bytes must be a whole number of at least 4, found 0"),
        ({"rounds": 0}, "rounds must be"),
        ({"operations": ("gather",)}, r"unknown operation 'gather'.*all_gather"),
        ({"operations": ()}, "operations is empty"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        case_of(**changes)


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_record_has_every_rank_of_every_operation_and_is_summarised(store: Store) -> None:
    record = run_one(store, SMALL)
    assert record.status == "ok", record.traceback
    values, samples = record.measurement.values, record.measurement.samples
    assert {name for name in values if isinstance(values[name], dict) and "status" in values[name]} == set(OPERATIONS)
    for name, of_ranks in values["ranks_ms"].items():
        taking_part = 2 if name in (ONE_WAY, BOTH_WAYS) else SMALL.world_size
        assert len(of_ranks) == taking_part
        assert {len(times) for times in of_ranks} == {SMALL.rounds}
        slowest = [max(times) for times in zip(*of_ranks, strict=True)]
        assert samples.get(f"{name} ms") == (slowest if name in OPERATIONS else None)
    rows = collectives.summarise([record], None, store=store)
    assert list(rows["operation"]) == list(OPERATIONS)
    assert (rows["bound_ms"] > 0).all()
    assert (rows["slowest_ms"] >= rows["mean_ms"]).all()


@pytest.mark.distributed
def test_a_wrong_result_is_a_failed_record_with_the_ranks_traceback(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "take_part", ranks.find_a_wrong_result)
    record = run_one(store, SMALL)
    assert record.status == "failed"
    assert "all_reduce gave" in str(record.reason)
    assert "--- rank" in str(record.traceback)
    assert "require_right" in str(record.traceback)


@pytest.mark.distributed
def test_what_was_finished_before_a_rank_failed_is_told_with_the_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "take_part", ranks.fail_after_rounds)
    record = run_one(store, dataclasses.replace(SMALL, warmup=1, rounds=3))
    assert record.status == "failed"
    assert "broken on purpose" in str(record.reason)
    assert '{"all_reduce": [[1.5], [1.5], [1.5]]}' in str(record.traceback)


@pytest.mark.distributed
def test_a_rank_that_the_system_killed_is_out_of_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "take_part", ranks.be_killed)
    record = run_one(store, SMALL)
    assert record.status == "oom"
    assert "was killed by SIGKILL" in str(record.reason)


@pytest.mark.distributed
def test_an_operation_that_the_library_lacks_leaves_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "take_part", ranks.take_part_without_reduce_scatter)
    record = run_one(store, SMALL)
    rows = collectives.summarise([record], None, store=store).set_index("operation")
    assert record.status == "ok"
    assert rows.loc["reduce_scatter", "status"] == "skipped"
    assert "leave reduce_scatter out" in str(rows.loc["reduce_scatter", "reason"])
    assert (rows.drop("reduce_scatter")["status"] == "ok").all()


def test_what_cannot_fit_is_refused_before_any_rank_is_started(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(1000, 6)
    needed = case.world_size * planned_bytes(case)
    monkeypatch.setattr(collectives, "available_bytes", lambda _: needed - 1)
    monkeypatch.setattr(collectives, "launch", lambda *_, **__: pytest.fail("a rank was started"))
    record = run_one(store, case)
    assert record.status == "oom"
    assert f"({needed:,} bytes)" in str(record.reason)
    assert "6 ranks with arrays of 1000 MB" in str(record.reason)


@pytest.mark.distributed
def test_what_is_planned_covers_the_arrays_of_a_rank() -> None:
    for operations in (OPERATIONS, ("all_reduce",), (RING,)):
        case = dataclasses.replace(SMALL, operations=operations)
        for held in launch(ranks.bytes_of_buffers, case.length, case.scratch_length, world_size=case.world_size):
            assert held <= planned_bytes(case) - collectives.PROCESS_BYTES


# Summarising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_takes_a_share_of_the_links_speed_reaches_that_share_of_its_bound(store: Store, world_size: int) -> None:
    rows = collectives.summarise([record_for(case_of(10, world_size), reached=0.5)], None, store=store)
    for _, row in rows.iterrows():
        wasted = alternate_over_ring(world_size) if row["operation"] == ALTERNATE else 1.0
        assert row["fraction"] == pytest.approx(0.5 / wasted)
        assert row["bus_bytes_per_s"] == pytest.approx(0.5 * LINK_BYTES_PER_S / wasted)
        assert row["slowest_ms"] > row["mean_ms"]
        assert row["std_ms"] > 0


def message_ms(case: Case, name: str, bytes_per_s: float) -> list[list[float]]:
    size = case.array_bytes if name == ALL_WHOLE else case.array_bytes / case.world_size
    return [[1e3 * size / bytes_per_s] * case.rounds] * 2


def test_the_bound_is_by_the_fastest_message_that_is_sent_while_one_comes(store: Store) -> None:
    case = case_of(10, 4)
    for fastest in (BOTH_WAYS, ALL_AT_ONCE, ALL_WHOLE):
        record = record_for(case)
        ranks_ms = record.measurement.values["ranks_ms"]
        ranks_ms[fastest] = message_ms(case, fastest, 3 * LINK_BYTES_PER_S)
        ranks_ms[ONE_WAY] = message_ms(case, ONE_WAY, 5 * LINK_BYTES_PER_S)
        rows = collectives.summarise([record], None, store=store).set_index("operation")
        usual = collectives.summarise([record_for(case)], None, store=store).set_index("operation")
        faster = usual["bound_ms"] / rows["bound_ms"]
        assert faster["broadcast"] == pytest.approx(5)  # the root only sends
        assert faster.drop("broadcast").tolist() == pytest.approx([3] * (len(OPERATIONS) - 1))


def test_the_bound_of_a_record_is_the_same_whatever_others_there_are(store: Store) -> None:
    small, large = record_for(case_of(1, 4)), record_for(case_of(100, 4))
    ranks_ms = large.measurement.values["ranks_ms"]
    for name in ranks_ms.keys() & collectives.LINKS.keys():
        ranks_ms[name] = message_ms(case_of(100, 4), name, 3 * LINK_BYTES_PER_S)
    alone, beside = (collectives.summarise(each, None, store=store) for each in ([small], [small, large]))
    assert beside["bound_ms"][: len(alone)].tolist() == alone["bound_ms"].tolist()


def test_what_was_published_stands_beside_the_librarys_all_reduce_alone(store: Store) -> None:
    reference = store.reference("all_reduce_gloo_cpu").set_index(["megabytes", "world_size"])["seconds"]
    rows = collectives.summarise([record_for(case_of(10, 4)), record_for(case_of(11, 4))], None, store=store)
    known = rows.dropna(subset=["published_ms"])
    assert list(known["operation"]) == ["all_reduce"]
    assert known.iloc[0]["published_ms"] == pytest.approx(1e3 * reference[10, 4])


def test_predictions_need_no_measurement_and_more_bytes_take_longer() -> None:
    cases = [case_of(10, world) for world in (2, 4)]
    rows = collectives.predict(cases, PEAKS)
    assert len(rows) == len(cases) * len(OPERATIONS)
    assert (rows["memory_ms"] > 0).all()
    assert collectives.predicted_seconds(cases[0], PEAKS, 3.0) < collectives.predicted_seconds(cases[1], PEAKS, 3.0)


@pytest.mark.gpu
@pytest.mark.distributed
def test_gpus_are_timed_over_nccl_as_many_as_there_are(store: Store) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    record = run_one(store, case_of(1, 2, device="cuda"))
    assert record.status == "ok", record.traceback

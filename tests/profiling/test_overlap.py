"""When a step computed and communicated is read from a trace, and how much was both is what a plain count finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import overlap_workers
import pytest
from traces import MAIN, event, named, operator, written

from cs336_systems.distributed.launch import launch
from cs336_systems.errors import UserError
from cs336_systems.profiling.overlap import Overlap, Span, common, length_of, merged, read_overlap, without_waiting

pytestmark = pytest.mark.problem("ddp_overlap_individual_parameters_benchmarking")

GLOO, OTHER_GLOO = 20, 21
"""Threads."""
MOMENTS = 60


def random_spans(numbers: random.Random, most: int = 8) -> list[Span]:
    """Spans with whole ends, in no order, that may touch, overlap and be empty."""
    spans = []
    for _ in range(numbers.randint(0, most)):
        begin = numbers.randint(0, MOMENTS)
        spans.append((float(begin), float(min(MOMENTS, begin + numbers.randint(0, 15)))))
    return spans


def moments(spans: Sequence[Span]) -> set[int]:
    """The unit cells of the grid that lie in one of the spans."""
    return {cell for cell in range(MOMENTS) if any(begin <= cell and cell + 1 <= end for begin, end in spans)}


def is_in_order(spans: Sequence[Span]) -> bool:
    return all(one[1] < other[0] for one, other in itertools.pairwise(spans))


@pytest.mark.parametrize("seed", range(20))
def test_unions_and_intersections_have_the_moments_that_a_grid_counts(seed: int) -> None:
    numbers = random.Random(seed)
    for _ in range(30):
        some, others = random_spans(numbers), random_spans(numbers)
        first, second = merged(some), merged(others)
        assert is_in_order(first)
        assert moments(first) == moments(some)
        assert length_of(first) == len(moments(some))
        both = common(first, second)
        assert moments(both) == moments(some) & moments(others)
        assert length_of(both) == len(moments(both))
        assert length_of(common(second, first)) == length_of(both)


@pytest.mark.parametrize("seed", range(5))
def test_spans_that_are_close_are_one_and_no_gap_that_is_left_is_small(seed: int) -> None:
    numbers = random.Random(seed)
    for gap in (0.0, 1.0, 3.0):
        spans = random_spans(numbers)
        found = merged(spans, gap)
        assert moments(spans) <= moments(found)
        assert all(other[0] - one[1] > gap for one, other in itertools.pairwise(found))
        assert length_of(found) <= length_of(merged(spans)) + gap * len(spans)


# A CPU's trace -------------------------------------------------------------------------------------------------


def of_cpu() -> list[dict[str, Any]]:
    """In microseconds; the step lasts from 1000 to 2000."""
    return [
        {"ph": "M", "name": "process_name", "pid": MAIN, "tid": 0, "args": {"name": "python"}},
        named("gloo:barrier", 900, 50, GLOO),
        operator("aten::zeros", 950, 30),
        named("step", 1000, 1000),
        operator("aten::mm", 990, 210),  # began before
        named("backward", 1000, 600),
        operator("aten::mm", 1300, 200),
        operator("aten::empty", 1350, 10),  # within the other
        operator("c10d::allreduce_", 1510, 80),
        named("gloo:all_reduce", 1400, 150, GLOO),
        named("gloo:all_reduce", 1450, 250, OTHER_GLOO),
        operator("aten::div_", 1900, 300),  # ends after
        named("gloo:all_reduce", 1950, 200, GLOO),
        operator("aten::add", 2300, 100),
        named("gloo:barrier", 2300, 100, GLOO),
    ]


def read(path: Path, events: list[Any]) -> Overlap:
    return read_overlap(written(path / "trace.json", events), "step")


def test_on_a_cpu_operators_compute_and_the_threads_of_gloo_communicate(tmp_path: Path) -> None:
    found = read(tmp_path, of_cpu())
    assert found.compute == (
        (0.0, 0.2),
        (0.3, 0.5),
        (0.9, 1.0),
    )
    assert found.communication == (
        (0.4, 0.7),
        (0.95, 1.0),
    )
    assert found.all_reduces == len(found.calls) == 3
    assert found.communication_ms == pytest.approx(0.35)
    assert found.overlapped_ms == pytest.approx(0.1 + 0.05)


def test_the_order_of_events_in_the_file_does_not_matter(tmp_path: Path) -> None:
    events = [*of_cpu(), named("step", 5000, 100), operator("aten::mm", 5000, 100)]
    found = read(tmp_path, events)
    assert read(tmp_path, events[::-1]) == found
    assert found == read(tmp_path, of_cpu())  # the first step is the first in time


def test_a_step_that_communicates_nothing_overlaps_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, [each for each in of_cpu() if not each["name"].startswith("gloo")])
    assert (found.all_reduces, found.calls, found.communication) == (0, (), ())
    assert found.communication_ms == found.overlapped_ms == 0
    assert found.compute


def test_only_all_reduces_are_counted_and_every_call_communicates(tmp_path: Path) -> None:
    found = read(tmp_path, [*of_cpu(), named("gloo:broadcast", 1750, 50, GLOO), named("gloo:barrier", 1810, 10, GLOO)])
    assert found.all_reduces == 3
    assert len(found.calls) == 5
    assert (0.75, 0.8) in found.communication


# Ranks side by side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_without_waiting_each_call_begins_with_the_last_rank_and_ends_where_it_ended(seed: int) -> None:
    numbers = random.Random(seed)
    begins = sorted(numbers.uniform(0, 100) for _ in range(8))
    ranks = []
    for _ in range(3):
        late = sorted(begin + numbers.uniform(0, 3) for begin in begins)
        ranks.append(Overlap(((0.0, 50.0),), tuple((begin, begin + 5) for begin in late), len(late)))
    found = without_waiting(ranks)
    assert found is not None
    assert without_waiting(found) == found
    for before, after in zip(ranks, found, strict=True):
        assert after.compute == before.compute
        assert [end for _, end in after.calls] == [end for _, end in before.calls]
        for call, (begin, end) in enumerate(after.calls):
            assert begin == min(end, max(rank.calls[call][0] for rank in ranks))
        assert after.communication_ms <= before.communication_ms


def test_what_a_rank_had_ended_before_the_last_began_took_no_time() -> None:
    root, other = Overlap((), ((0.0, 1.0),), 0), Overlap((), ((2.0, 3.0),), 0)
    found = without_waiting([root, other])
    assert found is not None
    assert [rank.communication_ms for rank in found] == [0.0, 1.0]


def test_different_numbers_of_calls_are_not_matched() -> None:
    assert without_waiting([Overlap((), ((0.0, 1.0),), 1), Overlap((), (), 0)]) is None


# A GPU's trace -------------------------------------------------------------------------------------------------


def of_gpu() -> list[dict[str, Any]]:
    """A step from 0 to 1000: kernels on two streams, and what the host does to launch them."""
    return [
        named("step", 0, 1000),
        operator("aten::mm", 0, 900),
        operator("c10d::allreduce_", 100, 50),
        named("nccl:all_reduce", 100, 50),
        event("gpu_user_annotation", "nccl:all_reduce", 200, 500),
        event("gpu_user_annotation", "step", 100, 900),
        event("cuda_runtime", "cudaLaunchKernel", 10, 900),
        event("kernel", "ampere_sgemm_128x64_tn", 100, 200),
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 300),
        event("gpu_memcpy", "Memcpy DtoD", 450, 100),
        event("gpu_memset", "Memset", 600, 10),
        event("kernel", "ampere_sgemm_128x64_tn", 1100, 50),
    ]


def test_on_a_gpu_kernels_of_nccl_communicate_and_all_others_compute(tmp_path: Path) -> None:
    found = read(tmp_path, of_gpu())
    assert found.compute == (
        (0.1, 0.3),
        (0.45, 0.55),
        (0.6, 0.61),
    )
    assert found.communication == ((0.2, 0.5),)
    assert found.all_reduces == len(found.calls) == 1
    assert found.overlapped_ms == pytest.approx(0.1 + 0.05)


def test_what_the_host_does_beside_a_gpu_is_neither(tmp_path: Path) -> None:
    alone = [
        each for each in of_gpu() if each["cat"] in ("kernel", "gpu_memcpy", "gpu_memset") or each["name"] == "step"
    ]
    assert read(tmp_path, alone) == read(tmp_path, of_gpu())


# What is no trace ----------------------------------------------------------------------------------------------

DAMAGED: list[Any] = [
    None,
    7,
    ["gloo:all_reduce"],
    {},
    {**operator("aten::mm", 1000, 900), "ts": "soon"},
    {**operator("aten::mm", 1000, 900), "dur": None},
    {**operator("aten::mm", 1000, 900), "ts": float("nan")},
    {**operator("aten::mm", 1000, 900), "dur": float("inf")},
    {**operator("aten::mm", 1000, 900), "ts": 10**400},
    {**operator("aten::mm", 1500, 900), "dur": -300},
    {**operator("aten::mm", 1000, 900), "name": 3},
    {**operator("aten::mm", 1000, 900), "cat": ["cpu_op"]},
    {**named("gloo:all_reduce", 1000, 900), "cat": {}},
    {"cat": "user_annotation", "name": "step", "ts": 0, "dur": True},
]


def test_damaged_events_are_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, [*DAMAGED, *of_cpu()]) == read(tmp_path, of_cpu())


@pytest.mark.parametrize(
    ("events", "told"),
    [
        pytest.param(DAMAGED, "no range called 'step'", id="nothing but damaged events"),
        pytest.param([], "no range called 'step'", id="no events"),
        pytest.param([operator("step", 0, 10)], "no range called 'step'", id="an operator of that name"),
        pytest.param([named("steps", 0, 10)], "record_function", id="another range"),
    ],
)
def test_a_trace_without_the_range_says_how_to_record_it(tmp_path: Path, events: list[Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read(tmp_path, events)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x80\x00", b'{"events": []}', b"3", b"\x1f\x8b\x08broken", b"[" * 100_000]
)
def test_what_is_no_trace_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"trace\.json"):
        read_overlap(path, "step")


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trace\.json"):
        read_overlap(tmp_path / "trace.json", "step")


# Recorded ------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_reduction_begun_before_the_products_overlaps_and_one_after_them_does_not(tmp_path: Path) -> None:
    for rank in launch(overlap_workers.recorded, str(tmp_path), world_size=2):
        after, during = (rank[way] for way in overlap_workers.WAYS)
        assert after.all_reduces == during.all_reduces == 1
        assert after.communication_ms > 0
        assert after.overlapped_ms == 0
        assert 0 < during.overlapped_ms <= during.communication_ms
        assert length_of(after.compute) > 0

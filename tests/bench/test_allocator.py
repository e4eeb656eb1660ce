"""Peak memory sees what was allocated and freed again, and a cap turns too much into an error."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

from cs336_systems.bench import allocator
from cs336_systems.bench.allocator import (
    PeakMemory,
    allocated_bytes,
    describe_memory,
    heap_set_aside,
    is_out_of_memory,
    memory_cap,
)

MIB = 2**20


def test_the_peak_on_a_cpu_counts_memory_that_was_freed_again() -> None:
    with PeakMemory("cpu") as memory:
        block = torch.ones(256 * MIB, dtype=torch.uint8)
        del block
    growth = memory.values["growth_resident_bytes"]
    assert 250 * MIB <= growth <= 320 * MIB
    assert memory.values["peak_resident_bytes"] > growth


class Knot:
    """Keeps itself, so that only a collection lets it go."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_before_is_set_aside_and_what_comes_after_is_collected_as_ever() -> None:
    gc.unfreeze()
    try:
        before = gc.get_freeze_count()
        with heap_set_aside():
            aside = gc.get_freeze_count()
            with heap_set_aside():
                assert gc.get_freeze_count() >= aside
            assert gc.get_freeze_count() >= aside > before
            there = weakref.ref(Knot())
            gc.collect()
            assert there() is None
        assert gc.get_freeze_count() == before
    finally:
        gc.freeze()


def test_a_collection_goes_through_the_less_the_more_is_set_aside() -> None:
    kept = [[number] for number in range(10_000)]
    with heap_set_aside():
        gone_through = {id(each) for each in gc.get_objects()}
        assert not gone_through & {id(each) for each in kept}


def test_a_second_region_does_not_see_the_peak_of_the_first() -> None:
    with PeakMemory("cpu") as first:
        torch.ones(256 * MIB, dtype=torch.uint8)
    with PeakMemory("cpu") as second:
        torch.ones(32 * MIB, dtype=torch.uint8)
    assert second.values["growth_resident_bytes"] < first.values["growth_resident_bytes"] / 2


def test_without_the_kernels_own_mark_samples_find_a_peak_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def write_text(self, _: str) -> None:
            raise OSError("read-only")

    monkeypatch.setattr(allocator, "_CLEAR_REFS", Refused())
    monkeypatch.setattr(allocator._ResidentPeak, "INTERVAL_S", 0.001)
    with PeakMemory("cpu") as memory:
        for _ in range(20):
            torch.ones(128 * MIB, dtype=torch.uint8)
    assert memory.values["growth_resident_bytes"] > 100 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the cap is Linux's")
def test_beyond_the_cap_an_allocation_raises_and_after_it_the_same_allocation_works() -> None:
    with memory_cap("cpu", headroom_bytes=64 * MIB), pytest.raises(RuntimeError) as caught:
        torch.ones(512 * MIB, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert torch.ones(512 * MIB, dtype=torch.uint8).sum() == 512 * MIB


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, means_it: bool) -> None:
    assert is_out_of_memory(error) is means_it


def test_the_peak_to_show_is_the_allocators_on_a_gpu_and_the_growth_on_a_cpu() -> None:
    assert describe_memory({"peak_allocated_bytes": 5, "peak_reserved_bytes": 9}) == 5
    assert describe_memory({"peak_resident_bytes": 9, "growth_resident_bytes": 4}) == 4
    assert describe_memory({}) is None


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_allocators_own() -> None:
    with PeakMemory("cuda") as memory:
        torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    assert memory.values["peak_allocated_bytes"] >= 256 * MIB
    assert memory.values["peak_reserved_bytes"] >= memory.values["peak_allocated_bytes"]


# What one call allocates ---------------------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def block(mebibytes: int, device: str) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_most_at_once_and_what_is_left_of_it_are_counted_to_the_byte(device: str) -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(block(3, device))
        block(4, device)  # freed at once
        kept.append(block(2, device))

    assert allocated_bytes(call, device) == (7 * MIB, 5 * MIB)


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_before_does_not_count(device: str) -> None:
    before = block(8, device)
    kept: list[torch.Tensor] = []
    assert allocated_bytes(lambda: kept.append(block(1, device)), device) == (MIB, MIB)
    assert before.nbytes + kept[0].nbytes == 9 * MIB


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_that_allocates_nothing_counts_nothing_and_its_result_is_not_kept(device: str) -> None:
    assert allocated_bytes(lambda: None, device) == (0, 0)
    assert allocated_bytes(lambda: block(1, device), device) == (MIB, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_call_counts_the_same_again(device: str) -> None:
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()  # a library's workspace is the first call's
    counts = {allocated_bytes(lambda: (x @ x).exp().sum().backward(), device) for _ in range(3)}
    assert len(counts) == 1
    ((peak, left),) = counts
    assert peak >= 2 * x.nbytes
    assert left == 0  # the gradient is added to the one that is there


def test_an_error_of_the_call_comes_out_and_counting_goes_on_after_it() -> None:
    def call() -> None:
        block(1, "cpu")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        allocated_bytes(call, "cpu")
    assert allocated_bytes(lambda: block(2, "cpu"), "cpu") == (2 * MIB, 0)


def test_counting_tells_the_terminal_nothing() -> None:
    """In a process of its own: whoever uses the profiler first settles what it says."""
    program = (
        "import torch; from cs336_systems.bench.allocator import allocated_bytes;"
        "allocated_bytes(lambda: torch.ones(9), 'cpu')"
    )
    known = {name: text for name, text in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=known, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")

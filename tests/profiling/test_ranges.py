"""Named ranges show in a profiler when they are recorded, and are nothing otherwise."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.reference import attention
from cs336_systems.bench.timing import time_steps
from cs336_systems.experiments import transformer_step
from cs336_systems.profiling import ranges
from cs336_systems.profiling.ranges import named_range, record_ranges
from cs336_systems.step import build_step

PARTS = ["scores", "softmax", "value product"]
BLOCK = ["attention", *PARTS, "feed-forward"]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 8, 4, generator=generator) for _ in range(3)]


def names_profiled(recording: bool) -> list[str]:
    """The ranges of one call of attention that PyTorch's profiler saw, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_ranges(recording):
        attention(*inputs(), is_causal=True)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name in PARTS]


def test_the_parts_of_attention_show_in_a_profile_in_their_order() -> None:
    assert names_profiled(recording=True) == PARTS


def names_of_a_step(recording: bool) -> list[str]:
    """The ranges of a training step of a model of two blocks, in order."""
    (cell,) = transformer_step.grid(contexts={"tiny": [16]}, phases=["step"], device="cpu")
    step = build_step(cell.case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_ranges(recording):
        step()
    known = {"forward", "loss", "backward", "optimizer", "logits", "block 0", "block 1", *BLOCK}
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name in known]


def test_a_step_shows_its_phases_its_blocks_and_their_parts_in_order() -> None:
    forward = ["forward", "block 0", *BLOCK, "block 1", *BLOCK, "logits"]
    assert names_of_a_step(recording=True) == [*forward, "loss", "backward", "optimizer"]


def test_a_step_that_is_not_recorded_calls_neither_profiler_nor_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ranges, "recorded_range", lambda name: calls.append(name))
    assert names_of_a_step(recording=False) == []
    assert calls == []


def test_warm_ups_and_measured_steps_are_a_range_each_around_their_steps() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_ranges():
        time_steps(lambda: None, warmup=2, steps=1, device="cpu")
    found = [event for event in profile.events() if event.name in ("warm-up", "measured", "step")]
    found.sort(key=lambda event: event.time_range.start)
    assert [event.name for event in found] == ["warm-up", "step", "step", "measured", "step"]
    warmup, first, second, measured, last = (event.time_range for event in found)
    assert first.end <= second.start <= second.end <= warmup.end <= measured.start <= last.start <= measured.end


class CountingNvtx:
    """Stands for the package of that name."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[str] = []

    def push_range(self, name: str) -> None:
        self.open.append(name)
        self.seen.append("/".join(self.open))

    def pop_range(self) -> None:
        self.open.pop()


def test_nvtx_sees_the_same_ranges_nested_and_closed_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx = CountingNvtx()
    monkeypatch.setattr(ranges, "_nvtx", lambda: nvtx)
    with record_ranges(), named_range("block", 3):
        attention(*inputs(), is_causal=True)
        with pytest.raises(ValueError, match="on purpose"), named_range("fails"):
            raise ValueError("on purpose")
    assert nvtx.seen == ["block 3", *(f"block 3/{part}" for part in PARTS), "block 3/fails"]
    assert nvtx.open == []


def test_a_pytorch_with_cuda_opens_its_ranges_by_its_own_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's may not reach an Nsight Systems that is older than it."""
    binding = CountingNvtx()
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", binding.push_range)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", binding.pop_range)
    monkeypatch.setattr(ranges, "_nvtx", ranges._nvtx.__wrapped__)
    with record_ranges(), named_range("block", 3), named_range("attention"):
        pass
    assert binding.seen == ["block 3", "block 3/attention"]
    assert binding.open == []


def test_without_the_package_the_profiler_alone_sees_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_nvtx", lambda: None)
    assert names_profiled(recording=True) == PARTS


def test_while_nobody_records_nothing_shows() -> None:
    assert names_profiled(recording=False) == []


def test_while_nobody_records_every_range_is_the_same_object_that_does_nothing() -> None:
    assert named_range("a") is named_range("b")


def test_recording_changes_no_result() -> None:
    plain = attention(*inputs(), is_causal=True)
    with record_ranges():
        assert torch.equal(attention(*inputs(), is_causal=True), plain)


def test_recording_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), record_ranges():
        raise RuntimeError
    assert named_range("a") is named_range("b")


def test_another_thread_keeps_its_own_setting() -> None:
    seen: list[bool] = []
    with record_ranges():
        thread = threading.Thread(target=lambda: seen.append(named_range("a") is named_range("b")))
        thread.start()
        thread.join()
    assert seen == [True]


def test_ranges_break_no_compiled_graph() -> None:
    def doubled(x: Tensor) -> Tensor:
        with named_range("doubling"):
            return 2 * x

    compiled = torch.compile(doubled, fullgraph=True, backend="eager")
    with record_ranges():
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))

"""Named ranges show in a profiler when they are recorded, and are nothing otherwise."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.reference import attention
from cs336_systems.profiling.ranges import named_range, record_ranges

PARTS = ["scores", "softmax", "value product"]


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

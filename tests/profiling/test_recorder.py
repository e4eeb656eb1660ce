"""What is recorded can be read: traces with their ranges, and on a CPU allocations to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cs336_systems.errors import UserError
from cs336_systems.profiling.kernels import overview, summarise
from cs336_systems.profiling.ranges import named_range
from cs336_systems.profiling.recorder import record_memory, record_trace
from cs336_systems.profiling.recordings import read_recording


@pytest.mark.parametrize("name", ["trace.json", "folder/trace.json.gz"])
def test_a_trace_has_the_named_ranges_and_the_operators_within(tmp_path: Path, name: str) -> None:
    x = torch.randn(16, 16)
    with record_trace(tmp_path / name, "cpu"):
        for _ in range(3):
            with named_range("product"):
                x @ x
        x.exp()
    recording = read_recording(tmp_path / name)
    assert overview(recording)[["range", "occurrences"]].to_numpy().tolist() == [["product", 3]]
    instances = summarise(recording, range_name="product").set_index("name")["instances"]
    assert instances["aten::mm"] == 3
    assert "aten::exp" in set(recording.work["name"])
    assert "aten::exp" not in instances


def test_ranges_are_off_again_after_recording_and_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_trace(tmp_path / "failed.json", "cpu"):
        raise ZeroDivisionError
    assert not (tmp_path / "failed.json").exists()
    with record_trace(tmp_path / "trace.json", "cpu"), named_range("once"):
        torch.ones(1).exp()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, named_range("never"):
        torch.ones(1).exp()
    assert "never" not in {event.name for event in profile.events()}


def test_a_trace_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the place of the folder")
    with pytest.raises(UserError, match="cannot write"), record_trace(tmp_path / "file" / "trace.json", "cpu"):
        torch.ones(1).exp()


def test_recorded_memory_has_every_allocation_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    kept = []
    with record_memory(path, "cpu"), named_range("work"):
        kept.append(torch.empty(1000))
        torch.empty(500)
    text = path.read_text()
    for size in (4000, 2000, -2000):
        assert f'"Bytes": {size},' in text
    assert '"Bytes": -4000,' not in text

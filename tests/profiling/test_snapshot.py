"""Memory snapshots of the A100 and of our own making, against figures worked out by hand."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from snapshots import (
    A100_SNAPSHOT,
    allocated,
    annotation,
    event,
    frame,
    freed,
    segment,
    snapshot,
    written,
)

from cs336_systems.errors import UserError
from cs336_systems.profiling.live_memory import summarise
from cs336_systems.profiling.snapshot import Snapshot, read_snapshot
from cs336_systems.repository import repository_root

GIB = 2**30


@pytest.fixture(scope="module")
def a100() -> Snapshot:
    return read_snapshot(A100_SNAPSHOT)


# The sample ----------------------------------------------------------------------------------------------------


def test_the_samples_peak_and_baseline_are_its_published_ones_to_the_byte(a100: Snapshot) -> None:
    assert a100.timeline.peak_bytes == 13_581_844_992
    assert a100.timeline.start_bytes == 8_192_293_376
    assert f"{a100.timeline.start_bytes / GIB:.3f}" == "7.630"
    assert f"{a100.peak_reserved_bytes / GIB:.3f}" == "13.150"
    assert a100.peak_reserved_bytes == a100.reserved_at_end == 14_120_124_416


def test_the_samples_figures_equal_a_count_with_dictionaries(a100: Snapshot) -> None:
    content = pickle.loads(A100_SNAPSHOT.read_bytes())
    live: dict[int, tuple[int, int]] = {}
    net = highest = 0
    at_peak: list[int] = []
    for number, entry in enumerate(content["device_traces"][0]):
        if entry["action"] == "alloc":
            live[entry["addr"]] = (number, entry["size"])
            net += entry["size"]
            if net > highest:
                highest, at_peak = net, [size for _, size in live.values()]
        elif entry["action"] == "free_requested":
            net -= live.pop(entry["addr"])[1]
    sizes = a100.timeline.size
    assert [int(sizes[index]) for index in a100.timeline.live_at_peak()] == at_peak
    assert a100.timeline.peak_bytes - a100.timeline.start_bytes == highest
    assert a100.allocated_at_end == sum(part["allocated_size"] for part in content["segments"])
    assert sum(a100.blocks_at_end) == a100.allocated_at_end


def test_the_samples_groups_add_up_to_its_peak(a100: Snapshot) -> None:
    summary = summarise(a100)
    of_trace = 13_581_844_992 - 8_192_293_376
    for groups in (summary.by_size, summary.by_place, summary.largest):
        assert sum(group.total_bytes for group in groups) == of_trace
        assert sum(group.count for group in groups) == summary.live_count == 1157


def test_the_samples_block_keeps_what_its_shapes_say(a100: Snapshot) -> None:
    """Batch 4, context 128, width 1600, 25 heads, feed-forward 6400, float32."""
    block = summarise(a100).block
    assert block is not None
    assert (block.calls, block.alike, block.called_from) == (48, 48, "model.py:266 forward")
    assert block.total_bytes == 111_650_816
    sizes = [group.bytes for group in block.groups for _ in range(group.count)]
    hidden, scores, stream = 4 * 128 * 6400 * 4, 4 * 25 * 128 * 128 * 4, 4 * 128 * 1600 * 4
    assert sizes[:7] == [hidden] * 5 + [scores] * 2
    assert sizes[7:17] == [stream] * 10
    assert sum(sizes) == block.total_bytes  # type: ignore[arg-type]


def test_the_samples_largest_allocation_comes_with_its_calls(a100: Snapshot) -> None:
    largest = summarise(a100).largest[0]
    assert (largest.bytes, largest.count) == (4 * 128 * 10_000 * 4, 1)
    assert [str(called) for called in largest.trace[:3]] == [
        "model.py:43 forward",
        "model.py:272 forward",
        "benchmark.py:85 run",
    ]


def test_of_the_sample_what_is_under_a_function_can_be_told(a100: Snapshot) -> None:
    under = summarise(a100, under="softmax").under
    assert under is not None
    assert under.count == 4 * 48
    assert under.total_bytes == 48 * (2 * 6_553_600 + 102_400 + 51_200)
    with pytest.raises(UserError, match=r"unknown frame 'sofmax'.*known: .*model\.py:\d+ forward"):
        summarise(a100, under="sofmax")


# Made ----------------------------------------------------------------------------------------------------------

FORWARD, STEP = frame("forward", 10), frame("step", 3, "/project/train.py")


def test_peak_moment_phase_and_place_are_those_of_the_event_that_reached_it(tmp_path: Path) -> None:
    trace = [
        allocated(64, 100, [FORWARD, STEP], 1000),
        allocated(512, 300, [frame("attend", 20), FORWARD, STEP], 3500),
        *freed(64, 100, 4000),
        allocated(64, 50, [FORWARD, STEP], 5000),
    ]
    notes = [
        annotation("step", "START", 900),
        annotation("forward", "START", 1500),
        annotation("forward", "END", 3900),
        annotation("backward", "START", 3950),
    ]
    path = written(tmp_path / "file", snapshot(trace, segments=[segment(4096, 1350)], annotations=notes))
    read = read_snapshot(path)
    summary = summarise(read)
    assert (summary.before_trace_bytes, summary.peak_allocated_bytes) == (1000, 1400)
    assert (summary.peak_ms, summary.peak_phases, summary.peak_place) == (
        2.5,
        ("step", "forward"),
        "model.py:20 attend",
    )
    assert summary.events == 5
    assert [(phase.name, phase.depth, phase.end_us) for phase in read.timeline.phases] == [
        ("step", 0, None),
        ("forward", 1, 3900.0),
        ("backward", 1, None),
    ]


def test_reserved_memory_has_a_peak_of_its_own(tmp_path: Path) -> None:
    trace = [
        allocated(64, 10),
        event("segment_alloc", 8192, 1000),
        event("segment_map", 16384, 500),
        event("segment_unmap", 16384, 500),
        event("segment_free", 8192, 1000),
        event("segment_alloc", 8192, 200),
    ]
    read = read_snapshot(written(tmp_path / "file", snapshot(trace, segments=[segment(4096, 10)])))
    assert read.reserved_at_end == 4096
    assert read.peak_reserved_bytes == 4096 - 200 + 1500


def test_what_a_cut_trace_frees_without_having_allocated_it_was_there_before(tmp_path: Path) -> None:
    trace = [*freed(64, 700), allocated(64, 100), *freed(512, 30), *freed(64, 100)]
    summary = summarise(read_snapshot(written(tmp_path / "file", snapshot(trace, segments=[segment(4096, 1000)]))))
    assert (summary.freed_from_before_count, summary.freed_from_before_bytes) == (2, 730)
    assert (summary.before_trace_bytes, summary.peak_allocated_bytes) == (1730, 1730)


def test_segments_that_have_less_than_the_trace_leaves_are_told_and_the_trace_counts(tmp_path: Path) -> None:
    trace = [allocated(64, 700), allocated(1024, 300)]
    summary = summarise(read_snapshot(written(tmp_path / "file", snapshot(trace, segments=[segment(512, 400)]))))
    assert (summary.missing_from_segments_bytes, summary.before_trace_bytes) == (600, 0)
    assert summary.peak_allocated_bytes == 1000


def test_the_device_with_most_events_is_read_and_another_can_be_named(tmp_path: Path) -> None:
    traces = [[], [allocated(64, 5)], [allocated(64, 7), allocated(128, 8)]]
    segments = [segment(4096, 105, device=1), segment(8192, 1015, device=2)]
    path = written(tmp_path / "file", snapshot(*traces, segments=segments))
    busiest, other = read_snapshot(path), read_snapshot(path, 1)
    assert (busiest.device, busiest.other_devices, busiest.timeline.peak_bytes) == (2, (1,), 1015)
    assert (other.device, other.timeline.peak_bytes, other.peak_reserved_bytes) == (1, 105, 4096)
    with pytest.raises(UserError, match=r"no trace of device 0; there is one of 1, 2$"):
        read_snapshot(path, 0)


def test_stacks_are_the_same_however_the_pickle_shares_them(tmp_path: Path) -> None:
    one, other = [frame("f", 1), frame("g", 2)], [frame("h", 3), frame("g", 2)]
    fresh = [allocated(64 * number, 8, [dict(made) for made in (one, other)[number % 2]]) for number in range(6)]
    shared = [allocated(64 * number, 8, (one, other)[number % 2]) for number in range(6)]
    same_list = [dict(made, frames=(one, other)[number % 2]) for number, made in enumerate(shared)]
    for name, trace in (("fresh", fresh), ("shared", shared), ("same", same_list)):
        read = read_snapshot(written(tmp_path / name, snapshot(trace)))
        found = [[str(made) for made in read.stack(index)] for index in range(6)]
        assert found == [["model.py:1 f", "model.py:2 g"], ["model.py:3 h", "model.py:2 g"]] * 3


# Refused -------------------------------------------------------------------------------------------------------


def without_trace() -> dict[str, Any]:
    return snapshot([], segments=[segment(4096, 1000)])


def with_broken_event(**changed: object) -> dict[str, Any]:
    return snapshot([allocated(64, 8), allocated(64, 8) | changed])


def with_shared_event() -> dict[str, Any]:
    return snapshot([allocated(64, 8)] * 3)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (without_trace(), r"has no trace.*_record_memory_history\(max_entries="),
        ([1, 2], "a pickle, but no memory snapshot.* one list"),
        (7, "a pickle, but no memory snapshot.* one int"),
        ({"weights": [1], "step": 2}, r"holds a dictionary of \['weights', 'step'\]"),
        (snapshot() | {"segments": 3}, "no lists of entries"),
        (snapshot([1, 2]), "no lists of entries"),  # type: ignore[list-item]
        (with_broken_event(size="8"), "event 1 of the trace"),
        (with_broken_event(addr=-1), "event 1 of the trace"),
        (with_broken_event(frames=[1, 2]), "no list of frames"),
        (with_broken_event(frames="text"), "no list of frames"),
        (with_broken_event(frames=[{"filename": "x", "name": "f"}]), "a frame of a stack trace lacks 'line'"),
        (with_shared_event(), "is damaged: its traces have 3 events, of 1 in it"),
        (snapshot([allocated(64, 8)], segments=[{"device": 0, "blocks": []}]), "lacks 'allocated_size'"),
    ],
)
def test_what_is_no_snapshot_with_a_trace_is_told_in_one_sentence(tmp_path: Path, content: object, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        read_snapshot(written(tmp_path / "file.pickle", content))
    assert str(tmp_path / "file.pickle") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# Memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from cs336_systems.profiling.live_memory import summarise
from cs336_systems.profiling.snapshot import read_snapshot
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summarise(read_snapshot(Path(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
@pytest.mark.parametrize("depth", [0, 20])
def test_reading_a_large_snapshot_takes_less_than_four_times_its_size(tmp_path: Path, depth: int) -> None:
    """Without stacks an event has fewest bytes in the file; with a stack of its own each has most in memory."""
    pool = [frame("f", line) for line in range(400)]
    trace = []
    for number in range(200_000):
        frames = [pool[(number * (place + 7) + place) % 400] for place in range(depth)]
        # Every other one is freed a while later; the sum still grows.
        older = number - 1001 if number % 2 and number > 1001 else None
        known = number if older is None else older
        action = "alloc" if older is None else "free_requested"
        made_at = 1_750_000_000_000_000 + number
        trace.append(event(action, 2**40 + 512 * known, 4096 + known, frames, made_at))
    path = written(tmp_path / "file", snapshot(trace, segments=[segment(2**34, 2**33)]))
    command = [sys.executable, "-c", MEASURE, str(path)]
    environment = os.environ | {"PYTHONPATH": str(repository_root())}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(ended.stdout) * 1024 < 4 * path.stat().st_size

"""The tables and the figure of a memory snapshot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from snapshots import A100_SNAPSHOT, allocated, annotation, frame, freed, segment, snapshot, written

from cs336_systems.presentation.memory_snapshot import figure, tables
from cs336_systems.profiling.live_memory import summarise
from cs336_systems.profiling.snapshot import read_snapshot
from cs336_systems.profiling.timeline import Change, Phase, timeline_of_changes


def texts_of(svg: bytes) -> list[str]:
    """The texts of a figure, which matplotlib leaves beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", svg.decode())


def test_the_samples_tables_state_its_figures_in_bytes_and_gibibytes() -> None:
    made = tables(summarise(read_snapshot(A100_SNAPSHOT), under="attention"), top=3)
    facts = {row[0]: row[1:] for row in made[0].rows}
    assert [text.strip() for text in facts["peak allocated"]] == ["13,581,844,992", "12.649"]
    assert [text.strip() for text in facts["peak reserved"]] == ["14,120,124,416", "13.150"]
    assert [text.strip() for text in facts["allocated when the trace began"]] == ["8,192,293,376", "7.630"]
    assert "1 GiB = 2\\^30 bytes" in made[0].notes[0]
    assert len(made) == 6
    assert all(len(table.rows) <= 3 for table in made[1:])


def test_rows_that_are_not_shown_are_told_with_their_bytes(tmp_path: Path) -> None:
    trace = [allocated(64 * number, 2**20 * number, [frame("f", number)]) for number in range(1, 6)]
    summary = summarise(read_snapshot(written(tmp_path / "file", snapshot(trace))))
    assert tables(summary, top=3)[1].notes == ("Not shown: 2 further rows of 3.00 MiB in all.",)
    assert tables(summary, top=5)[1].notes == ()


def test_a_cut_trace_a_failed_allocation_and_other_devices_are_told(tmp_path: Path) -> None:
    trace = [*freed(64, 2**21), allocated(64, 8), {**allocated(0, 99), "action": "oom"}]
    path = written(tmp_path / "file", snapshot(trace, [allocated(64, 8)], segments=[segment(2**22, 2**20)]))
    notes = " ".join(tables(summarise(read_snapshot(path)), top=3)[0].notes)
    assert "frees 2.00 MiB in 1 piece that it did not allocate" in notes
    assert "Memory ran out 1 time" in notes
    assert "trace of device 1 too" in notes


def test_the_timeline_shows_its_peak_its_phases_and_its_largest_lines(tmp_path: Path) -> None:
    trace = [
        allocated(64, 3 * 2**30, [frame("attend", 20)], 1000),
        allocated(128, 2**30, [frame("mix", 30)], 3000),
        *freed(64, 3 * 2**30, 5000),
        *freed(128, 2**30, 9000),
    ]
    notes = [annotation("forward", stage, time) for stage, time in (("START", 1000), ("END", 4000))]
    path = written(tmp_path / "file", snapshot(trace, segments=[segment(2**33, 2**31)], annotations=notes))
    read = read_snapshot(path)
    texts = texts_of(figure(read.timeline, "A title").svg())
    for shown in ("peak 6.000 GiB", "forward", "model.py:20 attend: 3.00 GiB", "model.py:30 mix: 1.00 GiB"):
        assert shown in texts
    assert "before the trace: 2.00 GiB" in texts
    assert "smaller allocations" not in texts
    assert "smaller allocations" in texts_of(figure(read.timeline, "A title", most=1).svg())


def test_an_axis_that_does_not_begin_at_zero_says_so() -> None:
    small = timeline_of_changes([Change(0, 2**30, "x"), Change(9, -(2**30), "x")], start_bytes=10 * 2**30)
    large = timeline_of_changes([Change(0, 20 * 2**30, "x"), Change(9, -20 * 2**30, "x")], start_bytes=10 * 2**30)
    assert "live memory (GiB), axis from 9.88 GiB" in texts_of(figure(small, "").svg())
    assert "live memory (GiB)" in texts_of(figure(large, "").svg())


def test_the_memory_of_a_cpu_is_drawn_by_the_same_code() -> None:
    changes = [Change(0, 2**28, "aten::mm"), Change(10, 2**27, "aten::add"), Change(20, -(2**28), "aten::mm")]
    timeline = timeline_of_changes(changes, phases=[Phase("forward", 0, 15)])
    texts = texts_of(figure(timeline, "", by="operator").svg())
    assert {"at the peak, by operator", "aten::mm: 256 MiB", "forward", "peak 0.375 GiB"} <= set(texts)


@pytest.mark.parametrize("changes", [[], [Change(5, -7, "old")], [Change(5, 7, "a")]], ids=["none", "freed", "one"])
def test_a_timeline_with_next_to_nothing_in_it_can_be_drawn(changes: list[Change]) -> None:
    assert figure(timeline_of_changes(changes), "").png().startswith(b"\x89PNG")


def test_the_same_timeline_gives_the_same_bytes() -> None:
    timeline = read_snapshot(A100_SNAPSHOT).timeline
    assert figure(timeline, "x").svg() == figure(timeline, "x").svg()

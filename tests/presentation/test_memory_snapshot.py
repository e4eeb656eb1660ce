"""The tables and the figure of a memory snapshot and of a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import traces
from snapshots import A100_SNAPSHOT, allocated, annotation, frame, freed, segment, snapshot, written
from traces import change, function, named, operator

from cs336_systems.bench.report import Table
from cs336_systems.presentation.memory_snapshot import figure, tables
from cs336_systems.profiling.live_memory import summarise
from cs336_systems.profiling.outline import Outline, outline
from cs336_systems.profiling.recordings import read_memory
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
    assert "1 GiB = 2³⁰ bytes" in made[0].notes[0]
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


def of_trace(path: Path, *events: dict[str, Any], top: int = 5) -> list[Table]:
    return tables(summarise(read_memory(traces.written(path, list(events)))), top=top)


def test_what_a_cpu_has_not_is_left_out_and_what_is_not_known_is_told(tmp_path: Path) -> None:
    made = of_trace(tmp_path / "trace.json", operator("aten::exp", 0, 50), change(2**20, 10, 1), change(2**19, 20, 2))
    assert made[0].caption == "Memory of the CPU, 2 events"
    assert made[0].headings == ("quantity", "bytes", "MiB")
    assert [row[0] for row in made[0].rows] == ["peak allocated", "of it 2 allocations of the trace"]
    assert "Sizes are as asked for." in made[0].notes[0]
    assert "allocated before the profiler began is not in the trace" in made[0].notes[1]
    assert len(made[0].notes) == 2
    assert made[1].headings[3] == "total (MiB)"
    assert made[2].caption == "Live at the peak, by named range and operator"
    assert "no Python functions" in made[2].notes[0]
    assert "`with_stack=True` records them" in made[2].notes[0]


def test_a_trace_of_a_gpu_has_what_it_reserves_and_tells_that_sizes_are_rounded_up(tmp_path: Path) -> None:
    told = {"Device Type": 1, "Device Id": 0, "Total Allocated": 2**31, "Total Reserved": 2**32}
    made = of_trace(tmp_path / "trace.json", change(2**30, 10, 1, **told), change(8, 20, 2))
    assert [row[0] for row in made[0].rows][-2:] == ["allocated when the trace began", "peak reserved"]
    assert made[0].headings[2] == "GiB"
    assert "Sizes are as the allocator rounds up." in made[0].notes[0]
    assert "There is a trace of device cpu too" in made[0].notes[1]


def test_of_functions_it_is_told_that_their_line_is_the_first(tmp_path: Path) -> None:
    made = of_trace(
        tmp_path / "trace.json",
        function("/project/model.py(190): forward", 0, 50),
        operator("aten::exp", 5, 10),
        change(2**20, 10, 1),
        change(3, 10, 2, **{"Device Type": "cpu"}),
    )
    assert made[2].rows[0][0] == "model.py:190 forward"
    assert made[2].notes == ("A trace has the line that a function begins at, not the one that ran.",)
    assert made[3].rows[0][-1] == "aten::exp < model.py:190 forward"
    assert made[0].notes[-1] == "Left out because they make no sense: 1 of the events."


def test_a_peak_below_a_tenth_of_a_gibibyte_is_told_in_mebibytes_everywhere() -> None:
    for size, unit, told in ((2**30 // 8, "GiB", "0.125"), (2**30 // 16, "MiB", "64.000")):
        texts = texts_of(figure(timeline_of_changes([Change(0, size, "x"), Change(9, -size, "x")]), "").svg())
        assert {f"live memory ({unit})", f"peak {told} {unit}"} <= set(texts)


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


def test_an_outline_out_of_a_record_gives_the_same_picture_as_the_timeline(tmp_path: Path) -> None:
    events = [named("forward", 0, 50), *(change(2**20 + time, time, time) for time in range(1, 90))]
    events += [change(-(2**20) - time, 200.0004 + time, time) for time in range(1, 60)]
    events.append(change(-(2**19), 230.1, 2**40))
    timeline = read_memory(traces.written(tmp_path / "trace.json", events)).timeline
    kept = json.loads(json.dumps(outline(timeline, most=50, points=10_000).to_json()))
    assert figure(Outline.from_json(kept), "x").svg() == figure(timeline, "x", most=50).svg()


def test_of_phases_whose_names_would_lie_on_one_another_the_longer_is_named() -> None:
    long, short = "-".join(["long"] * 20), "-".join(["short"] * 10)
    phases = [Phase(long, 0, 500), Phase(short, 500, 990), Phase("within", 500, 990, depth=1)]
    timeline = timeline_of_changes([Change(0, 8, "x"), Change(1000, 8, "x")], phases=phases)
    texts = texts_of(figure(timeline, "").svg())
    assert [name in texts for name in (long, short, "within")] == [True, False, True]


def test_a_long_name_is_shown_in_two_lines() -> None:
    name = "autograd: LogSoftmaxBackward0 of model.py:190 forward"
    texts = " ".join(texts_of(figure(timeline_of_changes([Change(0, 2**28, name)]), "").svg()))
    assert f"{name}: 256 MiB" in " ".join(texts.split())

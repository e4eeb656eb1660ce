"""What is drawn of a timeline: its bands, its curve, and that as numbers in a record they are the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from snapshots import A100_SNAPSHOT
from timelines import timeline_of

from cs336_systems.errors import UserError
from cs336_systems.profiling.outline import OTHER, Band, Outline, bands, outline, thinned
from cs336_systems.profiling.snapshot import read_snapshot
from cs336_systems.profiling.timeline import Change, Phase, Timeline, timeline_of_changes


def drawn(timeline: Timeline, most: int) -> list[tuple[str, Band]]:
    """The bands with their names, of which there are as many as there may be."""
    made = outline(timeline, most=most, labels=10**6)
    names = [timeline.labels[timeline.label[index]] for index in range(len(timeline.birth))]
    births = [round(timeline.milliseconds(timeline.time_us[at]), 3) for at in timeline.birth]
    named = dict(zip(births, names, strict=True))
    return [(named[band.start_ms[0]], band) for band in bands(made)]


# Bands ---------------------------------------------------------------------------------------------------------


def test_a_band_lies_on_those_before_it_and_sinks_when_one_below_is_freed() -> None:
    timeline = timeline_of((100, "a"), (50, "b"), (-100, "a"), (70, "c"), (-50, "b"), start_bytes=1000)
    found = {name: (band.start_ms, band.below, band.end_ms) for name, band in drawn(timeline, 3)}
    assert found == {
        "a": ((0.0,), (1000,), 2.0),
        "b": ((1.0, 2.0), (1100, 1000), 4.0),
        "c": ((3.0, 4.0), (1050, 1000), 4.0),
    }


def test_all_bands_sink_when_something_from_before_is_freed() -> None:
    timeline = timeline_of((100, "a"), (-400, "old"), (50, "b"), start_bytes=1000)
    found = {name: band.below for name, band in drawn(timeline, 2)}
    assert found == {"a": (1000, 600), "b": (700,)}


def test_the_bands_that_are_drawn_are_those_of_the_largest_area() -> None:
    timeline = timeline_of((90, "short"), (-90, "short"), (20, "long"), (1, "small"), (-1, "small"), (-20, "long"))
    assert [name for name, _ in drawn(timeline, 1)] == ["short"]
    assert [name for name, _ in drawn(timeline, 2)] == ["short", "long"]
    later = timeline_of((90, "short"), (-90, "short"), (50, "long"), (1, "small"), (-1, "small"), (-50, "long"))
    assert [name for name, _ in drawn(later, 1)] == ["long"]


def test_corners_are_a_closed_way_around_the_bytes_of_the_band() -> None:
    timeline = timeline_of((100, "a"), (50, "b"), (-100, "a"), (-50, "b"))
    _, (_, band) = drawn(timeline, 2)
    assert band.corners() == [
        *((1.0, 100.0), (2.0, 100.0), (2.0, 0.0), (3.0, 0.0)),
        *((3.0, 50.0), (2.0, 50.0), (2.0, 150.0), (1.0, 150.0)),
    ]


def test_where_every_allocation_is_drawn_the_bands_add_up_to_the_total_at_each_moment() -> None:
    generator = np.random.default_rng(0)
    live: list[tuple[int, int]] = []
    changes = []
    for time in range(0, 4000, 10):
        if live and generator.random() < 0.45:
            address, size = live.pop(int(generator.integers(len(live))))
            changes.append(Change(time, -size, "x", address))
        else:
            live.append((time, int(generator.integers(1, 1000))))
            changes.append(Change(time, live[-1][1], "x", time))
    timeline = timeline_of_changes(changes, start_bytes=77)
    stacked = bands(outline(timeline, most=len(changes), points=len(changes)))
    for index in range(0, len(changes) - 1):
        moment = timeline.milliseconds(timeline.time_us[index]) + 0.005
        reached = []
        for band in stacked:
            if band.start_ms[0] <= moment < band.end_ms:
                below = [height for start, height in zip(band.start_ms, band.below, strict=True) if start <= moment]
                reached.append((below[-1], below[-1] + band.bytes))
        # Each stands on the one below it, and the highest reaches the total.
        edges = [77, *(top for _, top in sorted(reached))]
        assert [low for low, _ in sorted(reached)] == edges[:-1]
        assert edges[-1] == timeline.total[index]


@pytest.mark.parametrize("most", [10, 100])
def test_thinning_a_long_timeline_keeps_its_peak_and_its_ends(most: int) -> None:
    changes = [(5 + index % 7, "a") for index in range(2000)] + [(-5 - index % 7, "a") for index in range(1500)]
    timeline = timeline_of(*changes, start_bytes=3)
    times, totals, before = thinned(timeline, most)
    assert len(times) <= most + 3
    assert max(totals) == timeline.peak_bytes
    assert (totals[0], totals[-1]) == (3, timeline.total[-1])
    assert (times[0], times[-1]) == (0.0, timeline.milliseconds(timeline.time_us[-1]))
    assert set(before) == {3}
    assert times == sorted(times)


def test_a_level_that_holds_on_is_kept_by_thinning_however_short_what_came_before() -> None:
    """Ten thousand changes in ten milliseconds, then nothing for a second: the curve rests where they ended."""
    changes = [Change(index, 9 if index % 2 else -7, "a") for index in range(10_000)]
    timeline = timeline_of_changes([*changes, Change(1_000_000, 1, "a")], start_bytes=10)
    times, totals, _ = thinned(timeline, 50)
    assert len(times) <= 53
    before_the_rest = max(index for index, time in enumerate(times) if time < 10)
    assert totals[before_the_rest] == timeline.total[-2]


# As numbers ----------------------------------------------------------------------------------------------------


def several() -> Timeline:
    """Frees of what was there before, an address given twice, phases, and times between the digits."""
    changes = [
        Change(0.0, 100, "a", 1),
        Change(10.00041, 50, "b", 2),
        Change(10.0004, -30, "old", 9),
        Change(20.7777, -100, "a", 1),
        Change(30, 70, "c", 1),
        Change(30.0001, -70, "c", 1),
        Change(44, -20, "old", 8),
    ]
    phases = [Phase("step", -5, None), Phase("forward", 1, 22.2222, 1), Phase("after", 50, 60)]
    return timeline_of_changes(changes, start_bytes=1000, phases=phases)


@pytest.mark.parametrize("which", ["several", "sample", "nothing", "freed"])
def test_an_outline_comes_back_from_json_as_it_was(which: str) -> None:
    timelines = {
        "several": several,
        "sample": lambda: read_snapshot(A100_SNAPSHOT).timeline,
        "nothing": lambda: timeline_of_changes([], start_bytes=7),
        "freed": lambda: timeline_of((-30, "old"), (-12, "older")),
    }
    made = outline(timelines[which]())
    again = Outline.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert again == made
    assert bands(again) == bands(made)


def test_an_outline_tells_what_the_timeline_does() -> None:
    timeline = several()
    made = outline(timeline)
    assert (made.allocations, made.start_bytes, made.peak_bytes) == (3, 1000, timeline.peak_bytes)
    assert made.peak_ms == pytest.approx(timeline.peak_ms, abs=0.0005)
    at_peak = {made.labels[place]: size for place, size in enumerate(made.at_peak)}
    live = {timeline.labels[timeline.label[index]]: timeline.size[index] for index in timeline.live_at_peak()}
    assert at_peak == live
    assert made.phases == (("step", 0.0, 0.044, 0), ("forward", 0.001, 0.022, 1))
    assert made.before == (1000, 1000, 970, 970, 970, 970, 970, 950)
    assert made.death_ms == (0.021, None, 0.03)


def test_names_beyond_those_that_are_told_apart_count_together() -> None:
    timeline = timeline_of((5, "a"), (40, "b"), (30, "c"), (7, "a"), (20, "d"))
    made = outline(timeline, labels=2)
    assert (made.labels, made.at_peak, made.others_at_peak) == (("b", "c"), (40, 30), 32)
    assert made.label == (OTHER, 0, 1, OTHER, OTHER)


def test_of_phases_those_that_take_longest_are_kept_in_the_order_of_their_beginning() -> None:
    phases = [Phase("short", 0, 10), Phase("long", 10, 900), Phase("longest", 20, None, 1), Phase("beyond", 5000, None)]
    timeline = timeline_of_changes([Change(0, 1, "a"), Change(1000, 1, "a")], phases=phases)
    assert [phase.name for phase in outline(timeline, phases=2).phases] == ["long", "longest"]


def test_a_large_timelines_outline_takes_about_twenty_kilobytes() -> None:
    timeline = read_snapshot(A100_SNAPSHOT).timeline
    made = outline(timeline, most=300, points=500)
    assert len(made.label) == 300
    assert len(made.times_ms) <= 503
    assert len(json.dumps(made.to_json())) < 25_000


@pytest.mark.parametrize(
    "damage",
    [
        {"bytes": [1]},
        {"labels": []},
        {"label": ["x", 0, 0]},
        {"label": None},
        {"before": []},
        {"before": [[0, 1], [900, 2]]},
        {"times_ms": []},
        {"death_ms": [-1.0, None, None]},
        {"birth_ms": [float("nan"), 0.0, 0.0]},
        {"phases": [["forward", 0.0]]},
        {"peak_ms": "soon"},
        {"further": 3},
    ],
)
def test_what_is_no_outline_is_an_error_of_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no outline") as caught:
        Outline.from_json(outline(several()).to_json() | damage)
    assert "\n" not in str(caught.value)
    plain = outline(several()).to_json()
    del plain["totals"]
    with pytest.raises(UserError, match="is no outline"):
        Outline.from_json(plain)

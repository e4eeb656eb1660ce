"""Bytes that come and go, as totals over time and as the bands of a drawing."""

from __future__ import annotations

import numpy as np
import pytest

from cs336_systems.profiling.timeline import Change, Timeline, bands, thinned, timeline_of_changes


def timeline_of(*changes: tuple[int, str], start_bytes: int | None = None) -> Timeline:
    """Changes a millisecond apart."""
    made = [Change(1000 * index, size, name) for index, (size, name) in enumerate(changes)]
    return timeline_of_changes(made, start_bytes=start_bytes)


def test_the_peak_is_the_highest_sum_and_who_is_live_then_was_not_yet_freed() -> None:
    timeline = timeline_of((100, "a"), (50, "b"), (-100, "a"), (70, "c"), (-50, "b"), (-70, "c"))
    assert timeline.total.tolist() == [100, 150, 50, 120, 70, 0]
    assert (timeline.peak_bytes, timeline.peak_ms) == (150, 1.0)
    assert [timeline.labels[timeline.label[index]] for index in timeline.live_at_peak()] == ["a", "b"]


def test_changes_are_taken_in_the_order_of_their_time() -> None:
    timeline = timeline_of_changes([Change(9, -5, "a"), Change(1, 5, "a"), Change(4, 7, "b")])
    assert timeline.total.tolist() == [5, 12, 7]
    assert timeline.death.tolist() == [2, 3]


def test_an_address_that_is_given_again_is_another_allocation() -> None:
    changes = [Change(0, 8, "a", 64), Change(1, -8, "a", 64), Change(2, 9, "b", 64), Change(3, -9, "b", 64)]
    timeline = timeline_of_changes(changes)
    assert timeline.birth.tolist() == [0, 2]
    assert timeline.death.tolist() == [1, 3]
    assert timeline.unmatched.tolist() == []


def test_without_addresses_the_youngest_of_a_name_and_size_is_freed_first() -> None:
    timeline = timeline_of((8, "a"), (8, "a"), (9, "a"), (-8, "a"), (-8, "a"))
    assert timeline.death.tolist() == [4, 3, 5]


def test_what_is_freed_without_having_been_made_was_there_before() -> None:
    timeline = timeline_of((10, "a"), (-30, "old"), (5, "b"), start_bytes=100)
    assert timeline.unmatched.tolist() == [1]
    assert timeline.before.tolist() == [100, 70, 70]
    assert timeline.total.tolist() == [110, 80, 85]
    assert (timeline.peak_bytes, timeline.before_at_peak) == (110, 100)


def test_without_a_known_start_it_is_as_much_as_is_freed_of_it() -> None:
    timeline = timeline_of((10, "a"), (-30, "old"), (-12, "older"))
    assert timeline.start_bytes == 32
    assert timeline.total.tolist() == [42, 12, 0]


def test_where_memory_only_falls_the_peak_is_before_the_first_change() -> None:
    timeline = timeline_of((-30, "old"), (10, "a"), start_bytes=100)
    assert (timeline.peak_index, timeline.peak_bytes, timeline.before_at_peak) == (-1, 100, 100)
    assert timeline.live_at_peak().tolist() == []


# Bands ---------------------------------------------------------------------------------------------------------


def test_a_band_lies_on_those_before_it_and_sinks_when_one_below_is_freed() -> None:
    timeline = timeline_of((100, "a"), (50, "b"), (-100, "a"), (70, "c"), (-50, "b"), start_bytes=1000)
    found = {band.label: (band.start_ms, band.below, band.end_ms) for band in bands(timeline, most=3)}
    assert found == {
        "a": ((0.0,), (1000,), 2.0),
        "b": ((1.0, 2.0), (1100, 1000), 4.0),
        "c": ((3.0, 4.0), (1050, 1000), 4.0),
    }


def test_all_bands_sink_when_something_from_before_is_freed() -> None:
    timeline = timeline_of((100, "a"), (-400, "old"), (50, "b"), start_bytes=1000)
    found = {band.label: band.below for band in bands(timeline, most=2)}
    assert found == {"a": (1000, 600), "b": (700,)}


def test_the_bands_that_are_drawn_are_those_of_the_largest_area() -> None:
    timeline = timeline_of((90, "short"), (-90, "short"), (20, "long"), (1, "small"), (-1, "small"), (-20, "long"))
    assert [band.label for band in bands(timeline, most=1)] == ["short"]
    assert [band.label for band in bands(timeline, most=2)] == ["short", "long"]
    later = timeline_of((90, "short"), (-90, "short"), (50, "long"), (1, "small"), (-1, "small"), (-50, "long"))
    assert [band.label for band in bands(later, most=1)] == ["long"]


def test_an_outline_is_a_closed_way_around_the_bytes_of_the_band() -> None:
    timeline = timeline_of((100, "a"), (50, "b"), (-100, "a"), (-50, "b"))
    _, band = bands(timeline, most=2)
    assert band.outline() == [
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
    drawn = bands(timeline, most=len(changes))
    for index in range(0, len(changes) - 1):
        moment = timeline.milliseconds(timeline.time_us[index]) + 0.005
        reached = []
        for band in drawn:
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

"""Bytes that come and go, as totals over time."""

from __future__ import annotations

from timelines import timeline_of

from cs336_systems.profiling.timeline import Change, timeline_of_changes


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
    assert timeline.start_bytes == 42
    assert timeline.before.tolist() == [42, 12, 0]
    assert timeline.total.tolist() == [52, 22, 10]


def test_where_memory_only_falls_the_peak_is_before_the_first_change() -> None:
    timeline = timeline_of((-30, "old"), (10, "a"), start_bytes=100)
    assert (timeline.peak_index, timeline.peak_bytes, timeline.before_at_peak) == (-1, 100, 100)
    assert timeline.live_at_peak().tolist() == []

"""Bytes that come and go, as totals over time."""

from __future__ import annotations

import pytest
from timelines import timeline_of

from cs336_systems.profiling.timeline import Change, Phase, Timeline, timeline_of_changes


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


# A part --------------------------------------------------------------------------------------------------------


def a_step() -> Timeline:
    """Two phases, the second with one inside; allocations that end within, after and never."""
    changes = [
        Change(0, 10, "weights"),
        Change(1, 5, "forward"),
        Change(2, 3, "forward"),
        Change(3, -3, "forward"),
        Change(5, 7, "gradient"),
        Change(6, 2, "temporary"),
        Change(7, -2, "temporary"),
        Change(8, -5, "forward"),
        Change(9, -10, "weights"),
    ]
    phases = [
        Phase("step", 0.5, 10, 0),
        Phase("forward", 1, 4, 1),
        Phase("backward", 5, 8.5, 1),
        Phase("block", 5, 7.5, 2),
    ]
    return timeline_of_changes(changes, start_bytes=100, phases=phases)


def phase_of(timeline: Timeline, name: str) -> Phase:
    return next(phase for phase in timeline.phases if phase.name == name)


@pytest.mark.parametrize("name", ["step", "forward", "backward", "block"])
def test_a_part_has_the_same_totals_as_the_whole_at_the_same_moments(name: str) -> None:
    whole = a_step()
    part = whole.within(phase_of(whole, name))
    totals = dict(zip(whole.time_us, whole.total, strict=True))
    assert [totals[time] for time in part.time_us] == part.total.tolist()
    assert len(part.time_us) > 0


@pytest.mark.parametrize("name", ["step", "forward", "backward", "block"])
def test_a_part_counts_what_was_there_as_before_and_frees_it_as_such(name: str) -> None:
    whole = a_step()
    phase = phase_of(whole, name)
    part = whole.within(phase)
    alive = (whole.birth < whole.changes_in(phase).start) & (whole.death >= whole.changes_in(phase).start)
    assert part.start_bytes == 100 + whole.size[alive].sum()
    assert (part.before >= 0).all()
    live = part.total - part.before
    # What is live of the part's own is the sum of its own allocations, change by change.
    for at in range(len(part.change)):
        own = (part.birth <= at) & (part.death > at)
        assert live[at] == part.size[own].sum()


def test_a_part_has_the_phases_within_it_and_its_own_beginning() -> None:
    whole = a_step()
    part = whole.within(phase_of(whole, "backward"))
    assert [(phase.name, phase.depth) for phase in part.phases] == [("block", 0)]
    assert part.milliseconds(part.time_us[0]) == 0.0
    assert [part.labels[label] for label in part.label] == ["gradient", "temporary"]


def test_what_a_phase_leaves_is_what_is_still_there_when_another_ends() -> None:
    whole = a_step()
    forward, backward, block, step = (phase_of(whole, name) for name in ("forward", "backward", "block", "step"))
    assert whole.left_by(forward, until=forward) == 5
    assert whole.left_by(forward, until=backward) == 0
    assert whole.left_by(block, until=block) == whole.left_by(block, until=backward) == 7
    assert whole.left_by(step, until=step) == 7


def test_a_phase_that_was_still_open_lasts_to_the_end() -> None:
    whole = timeline_of_changes([Change(0, 4, "a"), Change(2, 6, "b")], start_bytes=0)
    assert whole.left_by(Phase("open", 1, None), until=Phase("open", 1, None)) == 6
    assert whole.within(Phase("open", 1, None)).start_bytes == 4

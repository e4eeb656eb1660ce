"""Timelines with known answers."""

from __future__ import annotations

from cs336_systems.profiling.timeline import Change, Timeline, timeline_of_changes


def timeline_of(*changes: tuple[int, str], start_bytes: int | None = None) -> Timeline:
    """Changes a millisecond apart."""
    made = [Change(1000 * index, size, name) for index, (size, name) in enumerate(changes)]
    return timeline_of_changes(made, start_bytes=start_bytes)

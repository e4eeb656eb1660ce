"""What a memory snapshot or a trace tells as tables, and the timeline of what was live as a figure."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    GIB,
    MIB,
    MISSING,
    Column,
    Picture,
    Table,
    bytes_in_words,
    escaped,
    figure_style,
    number,
    percent,
    plural,
)
from cs336_systems.profiling.live_memory import Group, Summary
from cs336_systems.profiling.memory_history import Device, Unit
from cs336_systems.profiling.outline import OTHER, Band, Outline, Stretch, bands, outline
from cs336_systems.profiling.stacks import OPERATOR
from cs336_systems.profiling.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = "1 GiB = 2³⁰ bytes, 1 MiB = 2²⁰ bytes"
SMALL_GIB = 0.1
"""A peak below this is told in MiB."""


class Scale(NamedTuple):
    """The unit that totals of memory are told in."""

    name: str
    bytes: int

    def of(self, count: float) -> float:
        """Bytes in this unit."""
        return count / self.bytes


def scale_of(peak_bytes: int) -> Scale:
    """GiB, or MiB where the peak is less than a tenth of one."""
    return Scale("GiB", GIB) if peak_bytes >= SMALL_GIB * GIB else Scale("MiB", MIB)


def device_in_words(device: Device) -> str:
    """`device 0`, or `the CPU`."""
    return "the CPU" if device == "cpu" else f"device {device}"


# Tables --------------------------------------------------------------------------------------------------------


def tables(summary: Summary, *, top: int) -> list[Table]:
    """The whole summary, of each list the `top` first."""
    made = [facts(summary), by_size(summary, top), by_place(summary, top), largest(summary, top)]
    if summary.block is not None:
        made.append(block(summary, top))
    if summary.under is not None:
        made.append(under(summary, top))
    return made


def facts(summary: Summary) -> Table:
    """The peak and what it is made of; what is not known is left out."""
    of_trace = summary.peak_allocated_bytes - summary.before_trace_at_peak_bytes
    before = summary.before_trace_at_peak_bytes
    found = [
        ("peak allocated", summary.peak_allocated_bytes),
        ("of it allocated before the trace", before if before or summary.before_trace_bytes is not None else None),
        (f"of it {plural(summary.live_count, 'allocation')} of the trace", of_trace),
        ("allocated when the trace began", summary.before_trace_bytes),
        ("peak reserved", summary.peak_reserved_bytes),
    ]
    rows = pd.DataFrame([row for row in found if row[1] is not None], columns=["quantity", "size"])
    scale = scale_of(summary.peak_allocated_bytes)
    columns = [
        Column("quantity", lambda row: row.quantity, "left"),
        Column("bytes", lambda row: f"{row.size:,}"),
        Column(scale.name, lambda row: f"{scale.of(row.size):.3f}"),
    ]
    caption = f"Memory of {device_in_words(summary.device)}, {summary.events:,} events"
    return Table.of(rows, columns, caption=caption, notes=_notes(summary))


def _notes(summary: Summary) -> list[str]:
    is_snapshot = summary.unit == "line"
    within = f", within {' / '.join(map(escaped, summary.peak_phases))}" if summary.peak_phases else ""
    if is_snapshot:
        sizes = "Sizes of the trace are as asked for; what was there before it, and reserved, is as the allocator "
        sizes += "rounds up."
    else:
        sizes = f"Sizes are as {'the allocator rounds up' if summary.rounds_up else 'asked for'}."
    notes = [
        f"Peak {number(summary.peak_ms, 6)} ms after the first event{within}, at {escaped(summary.peak_place)}. "
        f"{escaped(UNITS)}. {sizes}"
    ]
    if summary.before_trace_bytes is None:
        notes.append(
            "What was allocated before the profiler began is not in the trace: the peak is that of what came after."
        )
    if summary.freed_from_before_count:
        cut = ", or the trace was cut at its max\\_entries" if is_snapshot else ""
        notes.append(
            f"The trace frees {bytes_in_words(summary.freed_from_before_bytes)} in "
            f"{plural(summary.freed_from_before_count, 'piece')} that it did not allocate: recording began after "
            f"that{cut}; the peak is that of the trace alone."
        )
    if summary.missing_from_segments_bytes:
        notes.append(
            f"The segments hold {bytes_in_words(summary.missing_from_segments_bytes)} less than the trace leaves "
            "allocated, so the two are not of one moment: the peak is that of the trace alone."
        )
    if summary.out_of_memory:
        notes.append(f"Memory ran out {plural(summary.out_of_memory, 'time')} during the trace.")
    if summary.damaged:
        notes.append(f"Left out because they make no sense: {summary.damaged:,} of the events.")
    if summary.other_devices:
        others = ", ".join(map(str, summary.other_devices))
        notes.append(f"There is a trace of device {others} too: --device tells which to read.")
    return notes


PLACES: dict[Unit, str] = {
    "line": "line of the user's code",
    "function": "function of the user's code",
    "operator": "named range and operator",
}
PLACES_OF: dict[Unit, tuple[str, ...]] = {
    "line": (),
    "function": ("A trace has the line that a function begins at, not the one that ran.",),
    "operator": (
        "The trace has no Python functions, so the innermost named range and the operator stand in their place; "
        "`with_stack=True` records them.",
    ),
}
"""What the table of them is followed by."""


def by_size(summary: Summary, top: int) -> Table:
    """Live allocations at the peak by their size."""
    mostly = Column("most of it from", partial(_mostly, summary.unit), "left")
    columns = [_bytes, _mebibytes, _count, _total(summary), _share(summary), mostly]
    return _table(summary.by_size, columns, "Live at the peak, by size", top)


def by_place(summary: Summary, top: int) -> Table:
    """Live allocations at the peak by the line that made them, or by what a trace has in place of lines."""
    columns = [_from, _count, _mebibytes, _total(summary), _share(summary)]
    return _table(
        summary.by_place, columns, f"Live at the peak, by {PLACES[summary.unit]}", top, PLACES_OF[summary.unit]
    )


def largest(summary: Summary, top: int) -> Table:
    """The largest allocations that are live at the peak, with the calls that led to them."""
    columns = [_bytes, _mebibytes, _count, Column("trace, from the innermost frame out", _trace, "left")]
    return _table(summary.largest, columns, "Largest allocations live at the peak; equal ones are one row", top)


def block(summary: Summary, top: int) -> Table:
    """What one call of the block keeps."""
    found = summary.block
    assert found is not None
    caption = f"Live at the peak of one call of {found.function}, called by {found.called_from}"
    note = (
        f"One call keeps {found.total_bytes:,} bytes ({bytes_in_words(found.total_bytes)}); {found.alike} of "
        f"{plural(found.calls, 'call')} keep the same."
    )
    if summary.unit == "line":
        note += " Calls are told apart by the function's lines, which go back where the next call begins."
    return _table(found.groups, [_bytes, _mebibytes, _count, _from, _operator], caption, top, [note])


def under(summary: Summary, top: int) -> Table:
    """What was allocated below the frame that was asked for."""
    found = summary.under
    assert found is not None
    total = f"{plural(found.count, 'allocation')}, {found.total_bytes:,} bytes ({bytes_in_words(found.total_bytes)})"
    caption = f"Live at the peak and allocated under {found.text}: {total}"
    return _table(
        found.groups, [_bytes, _mebibytes, _count, _total(summary), _share(summary), _from, _operator], caption, top
    )


def _table(
    groups: Sequence[Group], columns: Sequence[Column], caption: str, top: int, notes: Sequence[str] = ()
) -> Table:
    rest = groups[top:]
    left_out = sum(group.total_bytes for group in rest)
    told = [f"Not shown: {plural(len(rest), 'further row')} of {bytes_in_words(left_out)} in all."] if rest else []
    rows = pd.DataFrame({"group": list(groups[:top])})
    return Table.of(rows, columns, caption=caption, notes=[*notes, *told])


_bytes = Column("bytes", lambda row: MISSING if row.group.bytes is None else f"{row.group.bytes:,}")
_mebibytes = Column("MiB each", lambda row: MISSING if row.group.bytes is None else f"{row.group.bytes / MIB:.3f}")
_count = Column("count", lambda row: str(row.group.count))
_from = Column("from", lambda row: row.group.place, "left")
_operator = Column("operator", lambda row: _operator_of(row.group), "left")


def _operator_of(group: Group) -> str:
    """What a trace's stack begins with; a snapshot has none."""
    return group.trace[0].name if group.trace and group.trace[0].filename == OPERATOR else MISSING


def _total(summary: Summary) -> Column:
    scale = scale_of(summary.peak_allocated_bytes)
    return Column(f"total ({scale.name})", lambda row: f"{scale.of(row.group.total_bytes):.3f}")


def _share(summary: Summary) -> Column:
    return Column("of the peak", lambda row: percent(row.group.total_bytes / summary.peak_allocated_bytes))


def _mostly(unit: Unit, row: Any) -> str:
    others = row.group.other_places
    return f"{row.group.place}, and {plural(others, f'other {unit}')}" if others else row.group.place


def _trace(row: Any) -> str:
    """Every frame without its folders; of a stack without the user's code what it is put down to."""
    return " < ".join(map(str, row.group.trace)) or row.group.place


# Figure --------------------------------------------------------------------------------------------------------

BEFORE, REST, OTHERS = "#eef0f3", "#d9dee5", "#c3cbd6"
SMALLER = "smaller allocations"
FEW_BANDS = 60
POINTS = 4000
"""Of the curve of a timeline that is drawn at once."""
ROOM_PER_LETTER, WIDTH_PER_LETTER = 0.004, 0.009
"""Of the width of the axes; a phase that has less room, or whose name would lie on another's, goes without."""


def figure(drawn: Timeline | Outline, caption: str, *, most: int = 1000, by: str = "line") -> Picture:
    """What is live over time: of a timeline the `most` largest allocations a band each, the others above them in one.

    An outline has chosen its bands. `by` says what the labels are: lines of code, or what a trace has (its `unit`).
    """
    chosen = drawn if isinstance(drawn, Outline) else outline(drawn, most=most, points=POINTS)
    return Picture(caption, partial(_draw, chosen, by))


def _draw(drawn: Outline, by: str) -> Figure:
    from matplotlib.figure import Figure

    scale = scale_of(drawn.peak_bytes)
    times = drawn.times_ms
    heights, floor = [scale.of(total) for total in drawn.totals], [scale.of(size) for size in drawn.before]
    with figure_style():
        drawing = Figure(figsize=(9.5, 4.8))
        axes = drawing.subplots()
        axes.grid(False)
        _draw_bands(axes, drawn, bands(drawn), scale, by)
        # What no band covers: the smaller ones, between the highest band and the total.
        if len(drawn.label) < drawn.allocations:
            axes.fill_between(times, heights, step="post", color=REST, linewidth=0, label=SMALLER, zorder=1)
        axes.plot(times, heights, color="black", linewidth=0.7, drawstyle="steps-post", marker="none", zorder=5)
        bottom, top = (scale.of(limit) for limit in _limits(drawn.peak_bytes, min(drawn.before)))
        span = (times[-1] - times[0]) or 1.0
        label = f"live memory ({scale.name})"
        axes.set(
            xlim=(times[0], times[0] + span),
            ylim=(bottom, top),
            xlabel="time since the first event (ms)",
            ylabel=label if not bottom else f"{label}, axis from {bottom:.2f} {scale.name}",
        )
        if drawn.start_bytes:
            _draw_before(axes, times, floor, f"before the trace: {bytes_in_words(drawn.start_bytes)}")
        _mark_peak(axes, drawn, scale, (drawn.peak_ms - times[0]) / span)
        _mark_phases(axes, drawn)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(loc="outside right upper", title=f"at the peak, by {by}", alignment="left", fontsize="small")
    return drawing


def _limits(peak_bytes: int, lowest_before: int) -> tuple[float, float]:
    """Where the axis of bytes begins and ends: most of what was there before is cut off if it is the larger part."""
    varied = peak_bytes - lowest_before
    bottom = lowest_before - 0.12 * varied if lowest_before > varied > 0 else 0.0
    return bottom, peak_bytes + 0.08 * ((peak_bytes - bottom) or 1.0)


def _draw_before(axes: Axes, times: Sequence[float], floor: Sequence[float], label: str) -> None:
    """What was live before the trace began, below all bands."""
    axes.fill_between(times, floor, step="post", color=BEFORE, linewidth=0, zorder=3)
    axes.plot(times, floor, color=BOUND, linewidth=0.6, drawstyle="steps-post", marker="none", zorder=3)
    middle = (axes.get_ylim()[0] + floor[0]) / 2
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
    axes.annotate(label, (0.02, middle), zorder=4, **where)


def _draw_bands(axes: Axes, drawn: Outline, stacked: Sequence[Band], scale: Scale, by: str) -> None:
    """The bands in the colours of the lines that have most at the peak, other lines in one grey."""
    from matplotlib.collections import PolyCollection

    leading = min(len(drawn.labels), len(COLOURS))
    corners: defaultdict[int, list[list[tuple[float, float]]]] = defaultdict(list)
    for band in stacked:
        number = band.label if band.label < leading else OTHER
        corners[number].append([(time, scale.of(height)) for time, height in band.corners()])
    # Lines between the bands would cover hundreds of thin ones.
    edge = "white" if len(stacked) <= FEW_BANDS else "none"
    for number, colour in [*enumerate(COLOURS[:leading]), (OTHER, OTHERS)]:
        told = _wrapped(drawn.labels[number]) if number != OTHER else f"other {by}s"
        size = drawn.at_peak[number] if number != OTHER else drawn.others_at_peak + sum(drawn.at_peak[leading:])
        told += f": {bytes_in_words(size)}" if size else ""
        if number in corners:
            style: dict[str, Any] = {
                "facecolor": colour,
                "edgecolor": edge,
                "linewidth": 0.3,
                "label": told,
                "zorder": 2,
            }
            axes.add_collection(PolyCollection(corners[number], **style))


def _wrapped(label: str, most: int = 34) -> str:
    """A label in two lines at most, the rest of it cut off."""
    return textwrap.fill(label, most, max_lines=2, placeholder=" …")


def _mark_peak(axes: Axes, drawn: Outline, scale: Scale, place: float) -> None:
    peak = scale.of(drawn.peak_bytes)
    axes.plot([drawn.peak_ms], [peak], "v", color="black", markersize=5, zorder=6, clip_on=False)
    axes.annotate(
        f"peak {peak:.3f} {scale.name}",
        (drawn.peak_ms, peak),
        xytext=(-6 if place > 0.5 else 6, 4),
        textcoords="offset points",
        ha="right" if place > 0.5 else "left",
        va="bottom",
        zorder=6,
    )


def _mark_phases(axes: Axes, drawn: Outline) -> None:
    """A line where each phase begins and ends, its name above."""
    depths = sorted({phase.depth for phase in drawn.phases})
    named = _with_room(drawn)
    for phase in drawn.phases:
        height = 1.015 + 0.055 * (len(depths) - 1 - depths.index(phase.depth))
        for time in (phase.start_ms, phase.end_ms):
            axes.axvline(time, color=BOUND, linewidth=0.7, linestyle=(0, (4, 2)), marker="none", zorder=5)
        # A bracket over the phase.
        transform = axes.get_xaxis_transform()
        bracket: dict[str, Any] = {
            "color": BOUND,
            "linewidth": 0.8,
            "marker": "|",
            "markersize": 5,
            "markeredgewidth": 0.8,
        }
        axes.plot([phase.start_ms, phase.end_ms], [height, height], transform=transform, clip_on=False, **bracket)
        if phase not in named:
            continue
        axes.annotate(
            phase.name,
            ((phase.start_ms + phase.end_ms) / 2, height + 0.008),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
            annotation_clip=False,
        )


def _with_room(drawn: Outline) -> list[Stretch]:
    """The phases whose names can be read: of two that would lie on one another that of the longer."""
    span = drawn.times_ms[-1]
    named: list[Stretch] = []
    for phase in sorted(drawn.phases, key=lambda phase: phase.start_ms - phase.end_ms):
        beside = (other for other in named if other.depth == phase.depth)
        if phase.end_ms - phase.start_ms >= ROOM_PER_LETTER * len(phase.name) * span and all(
            abs(phase.start_ms + phase.end_ms - other.start_ms - other.end_ms)
            >= WIDTH_PER_LETTER * (len(phase.name) + len(other.name)) * span
            for other in beside
        ):
            named.append(phase)
    return named

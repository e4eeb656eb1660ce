"""A memory snapshot as tables, and the timeline of what was live, of a GPU or a CPU, as a figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
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
from cs336_systems.profiling.timeline import Band, Phase, Timeline, bands, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB, MIB = 2**30, 2**20
UNITS = "1 GiB = 2^30 bytes, 1 MiB = 2^20 bytes"

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
    """The peak and what it is made of."""
    of_trace = summary.peak_allocated_bytes - summary.before_trace_at_peak_bytes
    rows = pd.DataFrame(
        [
            ("peak allocated", summary.peak_allocated_bytes),
            ("of it allocated before the trace", summary.before_trace_at_peak_bytes),
            (f"of it {plural(summary.live_count, 'allocation')} of the trace", of_trace),
            ("allocated when the trace began", summary.before_trace_bytes),
            ("peak reserved", summary.peak_reserved_bytes),
        ],
        columns=["quantity", "size"],
    )
    columns = [
        Column("quantity", lambda row: row.quantity, "left"),
        Column("bytes", lambda row: f"{row.size:,}"),
        Column("GiB", lambda row: f"{row.size / GIB:.3f}"),
    ]
    caption = f"Memory of device {summary.device}, {summary.events:,} events"
    return Table.of(rows, columns, caption=caption, notes=_notes(summary))


def _notes(summary: Summary) -> list[str]:
    within = f", within {' / '.join(map(escaped, summary.peak_phases))}" if summary.peak_phases else ""
    notes = [
        f"Peak {number(summary.peak_ms, 6)} ms after the first event{within}, at {escaped(summary.peak_place)}. "
        f"{escaped(UNITS)}. Sizes of the trace are as asked for; what was there before it, and reserved, is as the "
        "allocator rounds up."
    ]
    if summary.freed_from_before_count:
        notes.append(
            f"The trace frees {bytes_in_words(summary.freed_from_before_bytes)} in "
            f"{plural(summary.freed_from_before_count, 'piece')} that it did not allocate: recording began after "
            "that, or the trace was cut at its max\\_entries; the peak is that of the trace alone."
        )
    if summary.missing_from_segments_bytes:
        notes.append(
            f"The segments hold {bytes_in_words(summary.missing_from_segments_bytes)} less than the trace leaves "
            "allocated, so the two are not of one moment: the peak is that of the trace alone."
        )
    if summary.out_of_memory:
        notes.append(f"Memory ran out {plural(summary.out_of_memory, 'time')} during the trace.")
    if summary.other_devices:
        others = ", ".join(map(str, summary.other_devices))
        notes.append(f"There is a trace of device {others} too: --device tells which to read.")
    return notes


def by_size(summary: Summary, top: int) -> Table:
    """Live allocations at the peak by their size."""
    columns = [_bytes, _mebibytes, _count, _total, _share(summary), Column("most of it from", _mostly, "left")]
    return _table(summary.by_size, columns, "Live at the peak, by size", top)


def by_place(summary: Summary, top: int) -> Table:
    """Live allocations at the peak by the line that made them."""
    columns = [_from, _count, _mebibytes, _total, _share(summary)]
    return _table(summary.by_place, columns, "Live at the peak, by line of the user's code", top)


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
        f"{plural(found.calls, 'call')} keep the same. Calls are told apart by the function's lines, which go back "
        "where the next call begins."
    )
    return _table(found.groups, [_bytes, _mebibytes, _count, _from], caption, top, [note])


def under(summary: Summary, top: int) -> Table:
    """What was allocated below the frame that was asked for."""
    found = summary.under
    assert found is not None
    total = f"{plural(found.count, 'allocation')}, {found.total_bytes:,} bytes ({bytes_in_words(found.total_bytes)})"
    caption = f"Live at the peak and allocated under {found.text}: {total}"
    return _table(found.groups, [_bytes, _mebibytes, _count, _total, _share(summary), _from], caption, top)


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
_total = Column("total (GiB)", lambda row: f"{row.group.total_bytes / GIB:.3f}")
_from = Column("from", lambda row: row.group.place, "left")


def _share(summary: Summary) -> Column:
    return Column("of the peak", lambda row: percent(row.group.total_bytes / summary.peak_allocated_bytes))


def _mostly(row: Any) -> str:
    others = row.group.other_places
    return f"{row.group.place}, and {plural(others, 'other line')}" if others else row.group.place


def _trace(row: Any) -> str:
    """Every frame without its folders; of a stack without the user's code what it is put down to."""
    return " < ".join(map(str, row.group.trace)) or row.group.place


# Figure --------------------------------------------------------------------------------------------------------

BEFORE, REST, OTHERS = "#eef0f3", "#d9dee5", "#c3cbd6"
SMALLER = "smaller allocations"
MOST_PHASES, FEW_BANDS = 12, 150
ROOM_PER_LETTER = 0.004
"""Of the width of the figure; a phase with less goes without its name."""


def figure(timeline: Timeline, caption: str, *, most: int = 1000, by: str = "line") -> Picture:
    """What is live over time: the `most` largest allocations a band each, the others above them in one.

    `by` says what the timeline's labels are: lines of code, or the operators of a CPU's profile.
    """
    return Picture(caption, partial(_draw, timeline, most, by))


def _draw(timeline: Timeline, most: int, by: str) -> Figure:
    from matplotlib.figure import Figure

    drawn = bands(timeline, most)
    times, totals, before = thinned(timeline)
    heights, floor = [total / GIB for total in totals], [size / GIB for size in before]
    with figure_style():
        drawing = Figure(figsize=(9.5, 4.8))
        axes = drawing.subplots()
        axes.grid(False)
        _draw_bands(axes, timeline, drawn, by)
        # What no band covers: the smaller ones, between the highest band and the total.
        if len(drawn) < len(timeline.birth):
            axes.fill_between(times, heights, step="post", color=REST, linewidth=0, label=SMALLER, zorder=1)
        axes.plot(times, heights, color="black", linewidth=0.7, drawstyle="steps-post", marker="none", zorder=5)
        bottom, top = _limits(timeline, min(floor) * GIB)
        span = (times[-1] - times[0]) or 1.0
        axes.set(
            xlim=(times[0], times[0] + span),
            ylim=(bottom / GIB, top / GIB),
            xlabel="time since the first event (ms)",
            ylabel="live memory (GiB)" if not bottom else f"live memory (GiB), axis from {bottom / GIB:.2f} GiB",
        )
        if timeline.start_bytes:
            _draw_before(axes, times, floor, f"before the trace: {bytes_in_words(timeline.start_bytes)}")
        _mark_peak(axes, timeline, (timeline.peak_ms - times[0]) / span)
        _mark_phases(axes, timeline)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(loc="outside right upper", title=f"at the peak, by {by}", alignment="left", fontsize="small")
    return drawing


def _limits(timeline: Timeline, lowest_before: float) -> tuple[float, float]:
    """Where the axis of bytes begins and ends: most of what was there before is cut off if it is the larger part."""
    varied = timeline.peak_bytes - lowest_before
    bottom = lowest_before - 0.12 * varied if lowest_before > varied > 0 else 0.0
    return bottom, timeline.peak_bytes + 0.08 * ((timeline.peak_bytes - bottom) or 1.0)


def _draw_before(axes: Axes, times: Sequence[float], floor: Sequence[float], label: str) -> None:
    """What was live before the trace began, below all bands."""
    axes.fill_between(times, floor, step="post", color=BEFORE, linewidth=0, zorder=3)
    axes.plot(times, floor, color=BOUND, linewidth=0.6, drawstyle="steps-post", marker="none", zorder=3)
    middle = (axes.get_ylim()[0] + floor[0]) / 2
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
    axes.annotate(label, (0.02, middle), zorder=4, **where)


def _draw_bands(axes: Axes, timeline: Timeline, drawn: Sequence[Band], by: str) -> None:
    """The bands in the colours of the lines that have most at the peak, other lines in one grey."""
    from matplotlib.collections import PolyCollection

    at_peak: defaultdict[str, int] = defaultdict(int)
    for index in timeline.live_at_peak():
        at_peak[timeline.labels[int(timeline.label[index])]] += int(timeline.size[index])
    leading = sorted(at_peak, key=lambda label: -at_peak[label])[: len(COLOURS)]
    outlines: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for band in drawn:
        name = band.label if band.label in leading else ""
        outlines[name].append([(time, height / GIB) for time, height in band.outline()])
    others = sum(at_peak.values()) - sum(at_peak[label] for label in leading)
    # Lines between the bands would cover hundreds of thin ones.
    edge = "white" if len(drawn) <= FEW_BANDS else "none"
    for label, colour in [*zip(leading, COLOURS, strict=False), ("", OTHERS)]:
        size = at_peak[label] if label else others
        told = _shortened(label) if label else f"other {by}s"
        told += f": {bytes_in_words(size)}" if size else ""
        if label in outlines:
            style: dict[str, Any] = {
                "facecolor": colour,
                "edgecolor": edge,
                "linewidth": 0.3,
                "label": told,
                "zorder": 2,
            }
            axes.add_collection(PolyCollection(outlines[label], **style))


def _shortened(label: str, most: int = 34) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _mark_peak(axes: Axes, timeline: Timeline, place: float) -> None:
    peak = timeline.peak_bytes / GIB
    axes.plot([timeline.peak_ms], [peak], "v", color="black", markersize=5, zorder=6, clip_on=False)
    axes.annotate(
        f"peak {peak:.3f} GiB",
        (timeline.peak_ms, peak),
        xytext=(-6 if place > 0.5 else 6, 4),
        textcoords="offset points",
        ha="right" if place > 0.5 else "left",
        va="bottom",
        zorder=6,
    )


def _mark_phases(axes: Axes, timeline: Timeline) -> None:
    """A line where each phase begins and ends, its name above; of many phases those that take longest."""
    if not timeline.phases:
        return
    last = float(timeline.time_us[-1])

    def seconds(phase: Phase) -> float:
        return (last if phase.end_us is None else phase.end_us) - phase.start_us

    first = float(timeline.time_us[0])
    within = [phase for phase in timeline.phases if phase.start_us < last and first < phase.start_us + seconds(phase)]
    chosen = sorted(sorted(within, key=seconds, reverse=True)[:MOST_PHASES], key=lambda phase: phase.start_us)
    depths = sorted({phase.depth for phase in chosen})
    for phase in chosen:
        start = timeline.milliseconds(max(phase.start_us, first))
        end = timeline.milliseconds(min(phase.start_us + seconds(phase), last))
        height = 1.015 + 0.055 * (len(depths) - 1 - depths.index(phase.depth))
        for time in (start, end):
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
        axes.plot([start, end], [height, height], transform=transform, clip_on=False, **bracket)
        if end - start < ROOM_PER_LETTER * len(phase.name) * timeline.milliseconds(last):
            continue
        axes.annotate(
            phase.name,
            ((start + end) / 2, height + 0.008),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
            annotation_clip=False,
        )

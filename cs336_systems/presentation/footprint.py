"""Planned memory in words: what a step takes on a GPU, of what, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from cs336_systems.analysis.footprint import Footprint
from cs336_systems.analysis.longest import Longest
from cs336_systems.bench.remarks import enumerated
from cs336_systems.bench.report import Column, Finding, Table, bytes_in_words, number, percent, plural, verbatim
from cs336_systems.step import StepConfig

_FORMS = {"inference": "inference", "forward": "forward with autograd on", "forward-backward": "forward and backward"}


def described(chosen: StepConfig, plan: Footprint) -> str:
    """A plan as a document: the verdict, what makes up the peak, and its largest allocations."""
    return "\n\n".join([verdict(chosen, plan), str(kinds(chosen, plan)), str(largest(plan))])


def longest_described(chosen: StepConfig, found: Longest) -> str:
    """What was searched for, and the plan of it."""
    unit = "a context of" if found.axis == "context" else "a batch of"
    return (
        f"The largest that fits is {unit} **{found.value:,}**; with one more, memory ends in "
        f"{verbatim(found.next_fails_at)}.\n\n{described(found.step_of(chosen), found.plan)}"
    )


def step_in_words(chosen: StepConfig) -> str:
    """Which step is planned."""
    name = chosen.model or chosen.size
    precision = chosen.dtype if chosen.autocast == "none" else f"{chosen.autocast} autocast"
    phase = _FORMS.get(chosen.phase, "training step")
    return f"{phase} of {name}, context {chosen.context_length}, batch {chosen.batch_size}, {precision}"


def verdict(chosen: StepConfig, plan: Footprint) -> str:
    """Whether a step fits, in a sentence or two."""
    what = step_in_words(chosen)
    takes = f"{bytes_in_words(plan.peak_allocated_bytes)} allocated ({plan.peak_allocated_bytes:,} bytes)"
    if plan.usable_bytes is None:
        return f"**{what}** takes at most {takes}."
    room = f"{bytes_in_words(plan.usable_bytes)} that {plan.device} can give a process"
    takes += f" and {bytes_in_words(plan.peak_reserved_bytes)} reserved at most"
    if plan.fits:
        share = percent(plan.peak_reserved_bytes / plan.usable_bytes)
        return (
            f"**{what} fits on {plan.device}**: {takes}, {share} of the {room}. The peak is in {verbatim(plan.place)}."
        )
    return (
        f"**{what} does not fit on {plan.device}**: it would take {takes}, more than the {room}. Memory ends in "
        f"{verbatim(plan.fails_at or 'the parameters')}. How long a context or how large a batch fits instead, "
        f"`--find max-context` and `--find max-batch` say."
    )


def kinds(chosen: StepConfig, plan: Footprint) -> Table:
    """What is allocated at the peak, by kind."""
    rows = pd.DataFrame({"kind": kind, "bytes": size} for kind, size in plan.by_kind.items())
    columns = [
        Column("at the peak", lambda row: row.kind, "left"),
        Column("MiB", lambda row: number(row.bytes / 2**20, 5)),
        Column("bytes", lambda row: f"{row.bytes:,}"),
        Column("share", lambda row: percent(row.bytes / plan.peak_allocated_bytes)),
    ]
    return Table.of(rows, columns, caption=f"Planned memory of a {step_in_words(chosen)}, on {plan.device}")


def largest(plan: Footprint) -> Table:
    """The groups of like allocations that hold the most at the peak."""
    rows = pd.DataFrame(
        {"kind": group.kind, "operator": group.operator, "count": group.count, "each": group.bytes_each}
        for group in plan.largest
    )
    columns = [
        Column("what", lambda row: row.kind, "left"),
        Column("made by", lambda row: verbatim(row.operator) if row.operator else "the program", "left"),
        Column("count", lambda row: f"{row.count:,}"),
        Column("MiB each", lambda row: number(row.each / 2**20, 4)),
        Column("MiB", lambda row: number(row.each * row.count / 2**20, 5)),
    ]
    shown = plural(len(rows), "group")
    return Table.of(rows, columns, caption=f"The largest {shown} of like allocations, as requested")


def against_the_allocator(rows: pd.DataFrame, name: Callable[[pd.Series], str]) -> Finding | None:
    """How far planned peaks are from those of a GPU's allocator; nothing of a CPU, which has no such count.

    `name` says which row is meant. A deviation beyond one per cent is named, each with its size.
    """
    measured = rows[(rows["status"] == "ok") & (rows["device"] == "cuda")].dropna(subset=["planned_bytes"])
    if not len(measured):
        return None
    off = measured["peak_bytes"].astype(float) / measured["planned_bytes"] - 1
    exact = int((measured["peak_bytes"] == measured["planned_bytes"]).sum())
    far = measured[off.abs() > NEAR]
    texts = [f"{name(row)}: {100 * off[index]:+.2g} %" for index, row in far.iterrows()]
    return Finding.checked(
        f"The allocator's peaks are {100 * off.min():+.2g} to {100 * off.max():+.2g} % from the planned ones in "
        f"{plural(len(measured), 'case')}, {exact} of them met to the byte",
        not len(far),
        so=f": none is further off than {percent(NEAR)}.",
        but=f"; further off than {percent(NEAR)} are {enumerated(texts)}.",
    )


NEAR = 0.01
"""How near a plan is to be to what the allocator says."""

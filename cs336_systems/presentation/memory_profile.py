"""Problem `memory_profiling` as tables, figures and sentences."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis import activations
from cs336_systems.analysis.published import A100
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import marks, staleness
from cs336_systems.bench.report import (
    GIB,
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    figure_style,
    mebibytes,
    number,
    percent,
    plural,
    verbatim,
)
from cs336_systems.presentation.memory_snapshot import UNITS
from cs336_systems.presentation.memory_snapshot import figure as timeline_figure
from cs336_systems.presentation.transformer_step import (
    caption_of,
    choices_in_words,
    identity,
    model_in_words,
    same_but,
    without_autocast,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 5


def prediction(predicted: pd.DataFrame) -> Table:
    """What every case must hold, before anything runs."""
    columns = [
        *identity(predicted),
        Column("weights (MiB)", lambda row: mebibytes(row.weights_bytes)),
        Column("moments (MiB)", lambda row: mebibytes(row.moments_bytes)),
        Column("saved for backward by one block (MiB)", lambda row: mebibytes(row.saved_accounted_bytes)),
        Column("blocks", lambda row: str(row.num_layers)),
        Column("least peak (MiB)", lambda row: mebibytes(row.accounted_bytes)),
        Column("planned peak (MiB)", lambda row: mebibytes(row.planned_bytes)),
        Column("planned within", lambda row: row.planned_place or MISSING, "left"),
        Column("one residual activation (MiB)", lambda row: mebibytes(row.residual_bytes)),
        Column("one matrix of scores (MiB)", lambda row: mebibytes(row.score_matrix_bytes)),
    ]
    notes = [
        "The least peak is what is there at one of two moments: when forward ends, weights, moments, logits and what "
        "is saved for backward; when backward ends, weights, moments and gradients. The planned peak has temporary "
        f"tensors too: the step is followed on tensors without data. {UNITS}."
    ]
    return Table.of(predicted, columns, caption="What a step must hold in memory, predicted", notes=notes)


def table(summary: pd.DataFrame) -> Table:
    """Part (b), (c): peaks by context, phase and precision, beside what must be there, and what was published."""
    columns = [
        *identity(summary),
        Column("peak (GiB)", lambda row: gibibytes(row, row.peak_bytes)),
        Column("planned (GiB)", lambda row: number(row.planned_bytes / GIB, 4)),
        Column("peak − planned (B)", lambda row: signed(row.peak_bytes - row.planned_bytes)),
        Column("before the step (GiB)", lambda row: number(row.before_bytes / GIB, 4)),
        Column("least peak (GiB)", lambda row: number(row.accounted_bytes / GIB, 4)),
        Column("peak / least", lambda row: number(row.peak_bytes / row.accounted_bytes, 3)),
        Column("of the device", lambda row: percent(row.peak_bytes / row.memory_bytes)),
        Column("the allocator's own peak (GiB)", lambda row: number(row.allocator_bytes / GIB, 4)),
        Column("reserved (GiB)", lambda row: number(row.reserved_bytes / GIB, 4)),
        Column("within", lambda row: row.peak_phase or MISSING, "left"),
        Column(f"{A100} (GB)", published_text),
    ]
    notes = [
        "Peaks of tensors: on a CPU to the byte; on a GPU what was there before is rounded up as the allocator does. "
        f"Published peaks are decimal GB with their decimals cut off. {UNITS}.",
        *notes_below(summary),
    ]
    return Table.of(summary, columns, caption=caption_of(summary, "Peak memory of one step"), notes=notes)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    return remarks.by_machine(summary, table)


def gibibytes(row: Any, count: float) -> str:
    return str(row.status) if row.status != "ok" else number(count / GIB, 4) + marks(row)


def signed(count: float) -> str:
    """A difference in bytes."""
    return MISSING if count != count else f"{count:+,.0f}"


def published_text(row: Any) -> str:
    """The published peak as it was printed, in whole decimal gigabytes; ? where it is in doubt."""
    least = row.a100_peak_at_least_bytes
    return MISSING if least != least else f"{least / 1e9:.0f}" + (" ?" if row.a100_peak_remark else "")


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['phase']} of {model_in_words(row)}"


def chosen(summary: pd.DataFrame, phase: str) -> pd.Series | None:
    """The case of a phase that must hold the most, measured or yet to be; without autocast, if there is one."""
    rows = summary[summary["phase"] == phase] if len(summary) else summary
    rows = rows[rows["status"].isin(["ok", "missing"])] if len(rows) else rows
    if not len(rows):
        return None
    holds = rows["weights_bytes"].fillna(0) + rows["num_layers"] * (rows["residual_bytes"] + rows["score_matrix_bytes"])
    return rows.assign(plain=rows["autocast"] == "none", holds=holds).sort_values(["plain", "holds"]).iloc[-1]


def nothing_of(summary: pd.DataFrame, phase: str) -> Finding:
    """Why there is no case of a phase to show."""
    if len(summary) and (summary["phase"] == phase).any():
        return Finding(f"No case of phase {phase} could be recorded: the table says why.")
    return Finding(f"No case of phase {phase} was asked for.")


# The timeline --------------------------------------------------------------------------------------------------


def timeline(summary: pd.DataFrame, phase: str = "forward") -> Picture | Finding:
    """Part (a): what was live over time, in the case of a phase that holds the most."""
    row = chosen(summary, phase)
    if row is None:
        return nothing_of(summary, phase)
    told = f"Live memory over one step: {_name(row)}, batch {row['batch_size']}, on {row['machine']}"
    if row["outline"] is None:
        return Picture(told, partial(_draw_nothing, "no record yet"))
    return timeline_figure(row["outline"], told, by=row["unit"])


def _draw_nothing(why: str) -> Figure:
    from matplotlib.figure import Figure

    with figure_style():
        drawing = Figure(figsize=(9.5, 1.2))
        axes = drawing.subplots()
        axes.set(xlabel="time since the first event (ms)", ylabel="live memory (GiB)", xticks=[], yticks=[])
        axes.annotate(why, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
    return drawing


def step_timeline(summary: pd.DataFrame) -> Picture | Finding:
    """The same of a whole training step."""
    return timeline(summary, "step")


# What is live at the peak --------------------------------------------------------------------------------------


def largest(summary: pd.DataFrame, phase: str = "forward", top: int = TOP) -> Table | Finding:
    """Part (e): of what the step allocates the largest that is live at the peak, and the calls that led to it."""
    row = chosen(summary, phase)
    if row is None:
        return nothing_of(summary, phase)
    what = f"Largest allocations of the step that are live at the peak: {_name(row)} on {row['machine']}"
    shown = pd.DataFrame(list(row["largest"][:top]))
    if not len(shown):
        return remarks.without_record(row, what, notes_below)
    columns = [
        Column("bytes", lambda group: f"{group.bytes:,}"),
        Column("MiB", lambda group: mebibytes(group.bytes)),
        Column("count", lambda group: f"{group.count:,}"),
        Column("accounted as", lambda group: accounted_as(row, group.bytes), "left"),
        Column("trace, from the innermost frame out", lambda group: verbatim(trace_text(group)), "left"),
    ]
    together = percent(shown["total_bytes"].sum() / row["peak_bytes"])
    note = (
        f"Equal allocations of one line are one row. Together they are {together} of the peak; what was there before "
        "the step, weights and moments, is not among them."
    )
    return Table.of(shown, columns, caption=what, notes=[note])


def trace_text(group: Any, most: int = 4) -> str:
    """The innermost calls that led to an allocation."""
    frames = list(group.trace) or [group.place]
    return " < ".join(frames[:most]) + (" < …" if len(frames) > most else "")


def accounted_as(row: pd.Series, count: int) -> str:
    """What of a known size an allocation may be."""
    for name, size in row["known_sizes"].items():
        if size == count:
            return str(name)
    return MISSING


# One block -----------------------------------------------------------------------------------------------------


def saved(summary: pd.DataFrame, top: int = TOP) -> Table | Finding:
    """Part (f): what one block saves for its backward, its largest contributors beside the accounting."""
    row = chosen(summary, "forward")
    if row is None:
        return nothing_of(summary, "forward")
    what = f"Saved for backward by one block: {_name(row)} on {row['machine']}"
    if row["saved_reason"]:
        return Finding(f"What one block saves is not known: {verbatim(row['saved_reason'])}.")
    items = list(row["saved"])
    shown = pd.DataFrame(items[:top])
    if not len(shown):
        return remarks.without_record(row, what, notes_below)
    columns = [
        Column("contributor", lambda item: item.name or MISSING, "left"),
        Column("shape", lambda item: " × ".join(map(str, item.shape)), "left"),
        Column("dtype", lambda item: item.dtype, "left"),
        Column("bytes", lambda item: f"{item.bytes:,}"),
        Column("MiB", lambda item: mebibytes(item.bytes)),
        Column("of the block", lambda item: percent(item.bytes / row["saved_bytes"])),
        Column("saved first by", lambda item: verbatim(item.place), "left"),
    ]
    rest = items[top:]
    notes = [
        f"One block saves {row['saved_bytes']:,.0f} bytes ({bytes_in_words(row['saved_bytes'])}), parameters not "
        f"counted; accounted are {_bytes(row['saved_accounted_bytes'])}. Not shown: "
        f"{plural(len(rest), 'further tensor')} of {bytes_in_words(sum(item['bytes'] for item in rest))} in all."
    ]
    return Table.of(shown, columns, caption=what, notes=notes)


def _bytes(count: float) -> str:
    return "none, since only our reference attention's are known" if count != count else f"{count:,.0f}"


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """The answers to (a) to (f)."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py memory_profile`.")])
    if not summary["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case was recorded; the notes of the table say why.")])
    plain = without_autocast(summary)
    forward = plain[plain["phase"] == "forward"]
    trained = plain[plain["phase"] != "forward"]
    return Findings(
        [
            *Finding.from_all(plain, "When the peaks are reached", moments),
            *Finding.from_all(summary, "How far the plan is from what was recorded", planned),
            *Finding.from_all(plain, "How peaks grow with the context", growth),
            *Finding.from_all(summary, "What mixed precision does to the peaks", mixed_precision),
            *Finding.from_all(plain, "The size of a residual activation", residual),
            *Finding.from_all(plain, "Which allocations of a step are the largest", largest_finding),
            *Finding.from_all(forward, "What one block saves for its backward", block_saved),
            *Finding.from_all(trained, "What gradients one block's backward makes", block_gradients),
            *staleness(summary),
        ]
    )


def moments(rows: pd.DataFrame) -> Finding | None:
    """Part (a): in which phase the peak of a step lies, and whether what forward saved is all there then."""
    step = chosen(rows, "step")
    if step is None:
        return None
    fact = f"(a) The peak of {_name(step)} is reached within {step['peak_phase'] or 'no range'}"
    of_step, saved = step["peak_bytes"] - step["before_bytes"], step["num_layers"] * step["saved_accounted_bytes"]
    if saved != saved:
        return Finding(f"{fact}.")
    return Finding.checked(
        f"{fact}, {bytes_in_words(of_step)} above what was there before; the blocks save {bytes_in_words(saved)}",
        bool(of_step >= saved and step["peak_phase"] in ("forward", "loss", "backward")),
        so=": what forward saves goes as backward uses it, while gradients come.",
        but=": what forward saves is not what makes this peak.",
    )


def planned(rows: pd.DataFrame) -> Finding | None:
    """How exact the plan is: in float32 everything is known but what no dispatched operator shows."""
    measured = rows[rows["status"] == "ok"].dropna(subset=["planned_bytes"])
    if not len(measured):
        return None
    off = measured["peak_bytes"] - measured["planned_bytes"]
    worst = measured.loc[(off / measured["peak_bytes"]).abs().idxmax()]
    exact = int((off.abs() <= activations.SCALE_BYTES * measured["num_layers"]).sum())
    return Finding.checked(
        f"(b) Of {plural(len(measured), 'peak')}, each planned before it was recorded, {exact} are met to the byte but "
        f"for {activations.SCALE_BYTES} B a block, the √d that autograd keeps. The plan of {_name(worst)} is furthest "
        f"off, by {signed(off[worst.name])} B, {percent(abs(off[worst.name]) / worst['peak_bytes'])} of its peak",
        bool((off >= 0).all()),
        so=". What is more than planned, kernels allocate inside themselves.",
        but=". Some plans are of more than was recorded.",
    )


def growth(rows: pd.DataFrame) -> Finding | None:
    """Part (b)."""
    measured = rows[(rows["status"] == "ok")]
    same = same_but(measured, "context_length")
    several = measured.groupby(same, dropna=False)["context_length"].transform("nunique") > 1
    measured = measured[several]
    if not len(measured):
        return None
    texts, ratios = [], []
    for _, group in measured.groupby(same, sort=False, dropna=False):
        group = group.sort_values("context_length")
        peaks = ", ".join(f"{bytes_in_words(row.peak_bytes)} at {row.context_length}" for row in group.itertuples())
        first = group.iloc[0]
        texts.append(f"{first['phase']} of {first['size']}{choices_in_words(first)}: {peaks}")
        short, long = group.iloc[0], group.iloc[-1]
        grown = (long["peak_bytes"] - long["before_bytes"]) / (short["peak_bytes"] - short["before_bytes"])
        ratios.append(grown / (long["context_length"] / short["context_length"]))
    return Finding.checked(
        f"(b) Peaks by context length: {'; '.join(texts)}",
        min(ratios) > 1,
        so=". What comes on top of the weights grows faster than the context, since scores grow with its square.",
        but=". What comes on top of the weights does not grow faster than the context here.",
    )


def mixed_precision(rows: pd.DataFrame) -> Finding | None:
    """Part (c): peaks under autocast over those in float32."""
    measured = rows[rows["status"] == "ok"]
    same = same_but(measured, "autocast")
    plain, mixed = measured[measured["autocast"] == "none"], measured[measured["autocast"] == "bfloat16"]
    pairs = plain.merge(mixed, on=same, suffixes=("", "_mixed"))
    if not len(pairs):
        return None
    ratio = pairs["peak_bytes_mixed"] / pairs["peak_bytes"]
    least, most = pairs.loc[ratio.idxmin()], pairs.loc[ratio.idxmax()]
    return Finding.checked(
        f"(c) Under bfloat16 autocast peaks are {number(ratio.min(), 2)} ({_name(least)}) to {number(ratio.max(), 2)} "
        f"({_name(most)}) times those in float32",
        bool(ratio.min() > 0.5),
        so=(
            ": not half, since weights and norms stay in float32, and so do gradients and moments where there are any, "
            "while every weight that a product uses is cast as well."
        ),
        but=": half or less.",
    )


def residual(rows: pd.DataFrame) -> Finding | None:
    """Part (d)."""
    row = chosen(rows, "forward")
    if row is None:
        return None
    return Finding.checked(
        f"(d) One activation of the residual stream of {row['size']} at context {row['context_length']} is "
        f"{row['batch_size']} · {row['context_length']} · {row['d_model']} · 4 B = {row['residual_bytes']:,} B = "
        f"{mebibytes(row['residual_bytes'])} MiB; {plural(int(row['residual_count']), 'allocation')} of that size are "
        "live at the peak of forward",
        bool(row["residual_count"] > row["num_layers"]),
        so=f", more than one for each of the {row['num_layers']} blocks.",
        but=f", no more than the {row['num_layers']} blocks.",
    )


def largest_finding(rows: pd.DataFrame) -> Finding | None:
    """Part (e)."""
    row = chosen(rows, "forward")
    if row is None or not row["largest"]:
        return None
    first = row["largest"][0]
    known = accounted_as(row, first["bytes"])
    return Finding.checked(
        f"(e) Of what {_name(row)} allocates, the largest that is live at the peak is {first['count']} of "
        f"{first['bytes']:,} B ({bytes_in_words(first['bytes'])}), from {verbatim(first['place'])}",
        known != MISSING,
        so=f": the size of {known}.",
        but=": of a size that the accounting does not name.",
    )


def block_saved(rows: pd.DataFrame) -> Finding | None:
    """Part (f), what is kept."""
    measured = rows[(rows["status"] == "ok")].dropna(subset=["saved_bytes"])
    known = measured.dropna(subset=["saved_accounted_bytes"])
    if not len(known):
        row = chosen(measured, "forward")
        if row is None:
            return None
        told = f"(f) One block of {model_in_words(row)} saves {bytes_in_words(row['saved_bytes'])} for its backward"
        return Finding(f"{told}; the accounting knows only our model with the reference attention.")
    off = (known["saved_bytes"] - known["saved_accounted_bytes"]).abs().max()
    row = chosen(known, "forward")
    assert row is not None
    share = sum(item["bytes"] for item in row["saved"][:TOP]) / row["saved_bytes"]
    return Finding.checked(
        f"(f) One block of {model_in_words(row)} saves "
        f"{bytes_in_words(row['saved_bytes'])} for its backward, {percent(share)} of it in its {TOP} largest "
        f"contributors; over {plural(len(known), 'case')} the accounting is off by {bytes_in_words(off)} at most",
        bool(off == 0),
        so=": every byte is accounted for.",
        but=": something is saved that the accounting does not know.",
    )


def block_gradients(rows: pd.DataFrame) -> Finding | None:
    """Part (f), what is made."""
    known = rows[(rows["status"] == "ok")].dropna(subset=["block_gradient_bytes", "accounted_gradient_bytes"])
    if not len(known):
        return None
    row = known.loc[known["peak_bytes"].idxmax()]
    off = (known["block_gradient_bytes"] - known["accounted_gradient_bytes"]).abs().max()
    return Finding.checked(
        f"(f) Backward of one block of {row['size']} leaves {row['block_gradient_bytes']:,.0f} B of gradients "
        f"({bytes_in_words(row['block_gradient_bytes'])}), as the record has it; over {plural(len(known), 'case')} "
        f"that differs from the size of a block's parameters by {bytes_in_words(off)} at most",
        bool(off == 0),
        so=": a gradient for each parameter, and nothing else stays.",
        but=": something else stays too, or not all of it is seen.",
    )

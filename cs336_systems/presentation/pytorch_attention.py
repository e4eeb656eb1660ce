"""Problems `pytorch_attention` and `torch_compile` (a), as tables, a figure and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch

from cs336_systems.analysis.attention import AttentionShape, kept_for_backward, materialised_peak
from cs336_systems.analysis.published import H100
from cs336_systems.attention.backends import COMPILED
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MARKERS,
    MIB,
    PUBLISHED,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    figure_style,
    lengths,
    logarithmic,
    mebibytes,
    number,
    plural,
    verbatim,
    with_deviation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "reference"


def prediction(predicted: pd.DataFrame) -> Table:
    """What every shape costs, before anything runs: floors, the materialised form's traffic, and memory."""
    columns = [
        Column("d", lambda row: str(row.head_dim)),
        Column("length", lambda row: f"{row.seq_len:,}"),
        Column("precision", lambda row: row.dtype, "left"),
        Column("forward: floor (ms)", lambda row: number(row.forward_bound_ms)),
        Column("traffic, materialised (ms)", lambda row: number(row.forward_traffic_ms)),
        Column("backward: floor (ms)", lambda row: number(row.backward_bound_ms)),
        Column("traffic, materialised (ms)", lambda row: number(row.backward_traffic_ms)),
        Column("kept, materialised (MiB)", lambda row: mebibytes(row.kept_bytes)),
        Column("kept by FlashAttention (MiB)", lambda row: mebibytes(row.flash_bytes)),
        Column("peak, materialised (MiB)", lambda row: mebibytes(row.peak_bytes)),
    ]
    ceilings = predicted["ceilings"].iloc[0] if len(predicted) else "no machine"
    notes = [
        "Traffic is what the materialised form's operators read and write, at the bandwidth of memory. Kept is what is "
        "in use between forward and backward, inputs and gradients included; the peak comes on top of those."
    ]
    return Table.of(predicted, columns, caption=f"The least attention can take on {ceilings}, predicted", notes=notes)


def table(summary: pd.DataFrame) -> Table:
    """Every shape and implementation: times with their floors, memory between the passes, and what was published."""
    columns = [
        *identity(summary),
        *(column for part in ("forward", "backward") for column in _times(part)),
        Column("kept (MiB)", lambda row: mebibytes(row.kept_bytes)),
        Column("accounted (MiB)", lambda row: mebibytes(row.accounted_bytes)),
        Column(f"{H100} kept (MiB)", lambda row: mebibytes(row.h100_kept_bytes)),
    ]
    note = (
        "Kept is what is in use between forward and backward: Q, K, V, their gradients of an earlier backward, the "
        "output, and what backward needs. Of the published figure the 64 MiB that the matrix library reserves are "
        "taken off."
    )
    return Table.of(summary, columns, caption=caption(summary), notes=[note, *notes_below(summary)])


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, eager and compiled, each with its own floor."""
    return remarks.by_machine(summary, table)


def _times(part: str) -> list[Column]:
    return [
        Column(f"{part} (ms)", partial(_measured, part=part)),
        Column("floor (ms)", lambda row: number(getattr(row, f"{part}_bound_ms"))),
        Column(f"{H100} (ms)", lambda row: number(getattr(row, f"h100_{part}_ms"))),
    ]


def _measured(row: Any, part: str) -> str:
    if row.status != "ok":
        return str(row.status)
    return with_deviation(getattr(row, f"{part}_mean_ms"), getattr(row, f"{part}_std_ms")) + marks(row)


def identity(summary: pd.DataFrame) -> list[Column]:
    """The columns that tell rows apart: d, length, and where they vary implementation and float32 products."""
    varying = [name for name in ("implementation", "float32_matmul") if len(summary) and summary[name].nunique() > 1]
    columns = {
        "implementation": Column("implementation", lambda row: row.implementation, "left"),
        "float32_matmul": Column("float32 products", lambda row: _FLOAT32[row.float32_matmul], "left"),
    }
    return [
        Column("d", lambda row: str(row.head_dim)),
        Column("length", lambda row: f"{row.seq_len:,}"),
        *(columns[name] for name in varying),
    ]


_FLOAT32 = {"highest": "float32", "high": "TF32"}


def caption(summary: pd.DataFrame) -> str:
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    mask = "causal" if first["is_causal"] else "no mask"
    only = f"{first['implementation']}, " if summary["implementation"].nunique() == 1 else ""
    shape = f"batch {first['batch_size']}, {first['dtype']}, {mask}"
    passes = f"{first['passes']} {'pass' if first['passes'] == 1 else 'passes'}"
    return f"One-head attention: {only}{circumstances(summary)}, {shape}; mean and deviation of {passes}"


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name, _case_name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['implementation']} at {_case_name(row)}"


def _case_name(row: pd.Series) -> str:
    tf32 = ", TF32" if row["float32_matmul"] == "high" else ""
    return f"d {row['head_dim']}, length {row['seq_len']:,}{tf32}"


def compile_table(summary: pd.DataFrame) -> Table:
    """Eager over compiled on every shape, beside the same ratio of the published times, with TF32 products too."""
    columns = [
        *(column for column in identity(summary) if column.heading != "implementation"),
        *(column for part in ("forward", "backward") for column in _ratios(part)),
        Column("kept, compiled / eager", lambda row: number(row.kept_bytes_compiled / row.kept_bytes_eager, 2)),
    ]
    pairs = _side_by_side(summary) if len(summary) else summary
    return Table.of(pairs, columns, caption=f"Compiled beside eager. {caption(summary)}", notes=notes_below(summary))


def _ratios(part: str) -> list[Column]:
    return [
        Column(f"{part}: eager (ms)", lambda row: number(getattr(row, f"{part}_ms_eager"))),
        Column("compiled (ms)", lambda row: number(getattr(row, f"{part}_ms_compiled"))),
        Column(
            "eager / compiled",
            lambda row: number(getattr(row, f"{part}_ms_eager") / getattr(row, f"{part}_ms_compiled"), 2),
        ),
        Column(
            f"{H100} eager / compiled",
            lambda row: number(getattr(row, f"h100_{part}_ms_eager") / getattr(row, f"h100_{part}_ms_compiled"), 2),
        ),
    ]


# The accounting of one case ------------------------------------------------------------------------------------


def accounting(summary: pd.DataFrame) -> Table | Finding:
    """What the materialised form holds on the longest shape, whether it ran out of memory or not, item by item."""
    rows = summary[summary["implementation"] == REFERENCE] if len(summary) else summary
    if not len(rows):
        return Finding("The accounting is of the materialised form, which is not among the implementations.")
    row = rows.sort_values(["seq_len", "head_dim"]).iloc[-1]
    shape = _shape(row)
    kept = kept_for_backward(shape)
    peak = materialised_peak(shape, "forward-backward")
    items = [{"what": what, "bytes": size} for what, size in kept.items()]
    items += [
        {"what": "in use between forward and backward", "bytes": sum(kept.values())},
        {"what": "at most at once beside inputs and gradients, in backward", "bytes": peak},
    ]
    columns = [
        Column("what", lambda item: item.what, "left"),
        Column("MiB", lambda item: mebibytes(item.bytes)),
    ]
    size = f"batch {shape.batch_size}, length {shape.seq_len:,}, d {shape.head_dim}"
    notes = [f"It did not fit on {row['machine']}: {verbatim(str(row['reason']))}."] if row["status"] == "oom" else []
    caption = f"Memory accounting of eager attention, the longest shape: {size}"
    return Table.of(pd.DataFrame(items), columns, caption=caption, notes=notes)


def _shape(row: pd.Series) -> AttentionShape:
    itemsize = getattr(torch, row["dtype"]).itemsize
    batch_size, heads, seq_len, head_dim = (int(row[name]) for name in ("batch_size", "heads", "seq_len", "head_dim"))
    return AttentionShape(batch_size, heads, seq_len, head_dim, bool(row["is_causal"]), itemsize)


# Figure --------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """Time of both passes, and memory kept between them, over the length, for the largest head dimension."""
    head_dim = summary["head_dim"].max() if len(summary) else 0
    products = max(summary["float32_matmul"], default="highest", key="highest".__eq__)
    rows = summary[(summary["head_dim"] == head_dim) & (summary["float32_matmul"] == products)]
    return Picture(f"{caption(summary)}; d {head_dim}", partial(_draw, rows))


def _draw(rows: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    with figure_style():
        drawing = Figure(figsize=(7.4, 3.0))
        panels = drawing.subplots(1, 3)
        series: dict[str, Any] = {}
        for panel, part in zip(panels, ("forward", "backward"), strict=False):
            for place, (name, group) in enumerate(rows.groupby("implementation", sort=False)):
                timed, colour = group[group["status"] == "ok"], COLOURS[2 * place % len(COLOURS)]
                (series[str(name)],) = panel.plot(
                    timed["seq_len"], timed[f"{part}_ms"], marker=MARKERS[place % 5], color=colour, markersize=4
                )
                published = group.dropna(subset=[f"h100_{part}_ms"])
                if name == REFERENCE and len(published):
                    style = {"color": PUBLISHED, "marker": "D", "markerfacecolor": "none", "linestyle": "none"}
                    (series[f"{name}, published, {H100}"],) = panel.plot(
                        published["seq_len"], published[f"h100_{part}_ms"], markersize=5, **style
                    )
            floor = rows.drop_duplicates("seq_len").dropna(subset=[f"{part}_bound_ms"])
            if len(floor):
                (series["floor"],) = panel.plot(
                    floor["seq_len"], floor[f"{part}_bound_ms"], color=BOUND, linestyle="--", marker="", linewidth=1.2
                )
            panel.set(title=part, ylabel="time per pass (ms)")
        _draw_memory(panels[2], rows, series)
        for panel in panels:
            panel.set_xlabel("length (tokens)")
            logarithmic(panel.yaxis)
            lengths(panel.xaxis, rows["seq_len"])
        drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=3)
    return drawing


def _draw_memory(panel: Any, rows: pd.DataFrame, series: dict[str, Any]) -> None:
    """What is kept: measured, accounted, and what FlashAttention would keep of the same shape."""
    shapes = rows[rows["implementation"] == REFERENCE]
    line = {"marker": "", "linewidth": 1.2}
    if len(shapes):
        (series["accounted"],) = panel.plot(
            shapes["seq_len"], shapes["accounted_bytes"] / MIB, color=BOUND, linestyle=":", **line
        )
        (series["FlashAttention would keep"],) = panel.plot(
            shapes["seq_len"], shapes["flash_bytes"] / MIB, color=COLOURS[3], linestyle="-.", **line
        )
    for place, (_, group) in enumerate(rows.groupby("implementation", sort=False)):
        colour, marker = COLOURS[2 * place % len(COLOURS)], MARKERS[place % 5]
        panel.plot(group["seq_len"], group["kept_bytes"] / MIB, marker, color=colour, markersize=4)
    panel.set(title="kept for backward", ylabel="memory (MiB)")


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """How what is kept grows, whether it is as accounted, why eager is slow, and what compiling changes."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py pytorch_attention`.")])
    return Findings([*_of_eager(summary), *_of_compiled(summary), *staleness(summary)])


def eager_findings(summary: pd.DataFrame) -> Findings:
    """Of the materialised form alone: problem `pytorch_attention`."""
    return Findings([*_of_eager(summary), *staleness(summary[summary["implementation"] == REFERENCE])])


def _of_eager(summary: pd.DataFrame) -> list[Finding]:
    eager = summary[summary["implementation"] == REFERENCE]
    plain = eager[eager["float32_matmul"] == "highest"]
    return [
        *Finding.from_all(plain, "How what is kept for backward grows", growth),
        *Finding.from_all(eager, "Whether what is kept is as accounted", agreement),
        *Finding.from_all(plain, "What sets eager attention's time", roofline),
    ]


def compile_findings(summary: pd.DataFrame) -> Findings:
    """Of eager beside compiled: problem `torch_compile` (a)."""
    pair = summary["implementation"].isin([REFERENCE, REFERENCE + COMPILED])
    return Findings([*_of_compiled(summary), *staleness(summary[pair])])


def _of_compiled(summary: pd.DataFrame) -> list[Finding]:
    pair = summary["implementation"].isin([REFERENCE, REFERENCE + COMPILED])
    return Finding.from_all(summary[pair], "What compiling changes", compiled)


def growth(rows: pd.DataFrame) -> Finding | None:
    """Between the two longest lengths with a measurement, where the square tells, and what removes it."""
    measured = rows[(rows["status"] == "ok") & (rows["head_dim"] == rows["head_dim"].min())]
    measured = measured.sort_values("seq_len").drop_duplicates("seq_len")
    if len(measured) < 2:
        return None
    short, long = measured.iloc[-2], measured.iloc[-1]
    longer, more = long["seq_len"] / short["seq_len"], long["kept_bytes"] / short["kept_bytes"]
    exponent = math.log(more) / math.log(longer)
    return Finding.checked(
        f"{longer:g} times the length keeps {number(more)} times the memory for backward (d {long['head_dim']}, "
        f"from length {short['seq_len']:,} to {long['seq_len']:,}), a growth with the power {number(exponent, 2)}",
        bool(1.8 <= exponent <= 2.05),
        so=(
            ": quadratic, since exponentials and weights, a matrix of scores each, are kept. FlashAttention "
            "recomputes them from the logsumexp of each row and would keep "
            f"{bytes_in_words(long['flash_bytes'])} where this keeps {bytes_in_words(long['kept_bytes'])}."
        ),
        but=", not the square that two matrices of scores make of it at long lengths.",
    )


def agreement(rows: pd.DataFrame) -> Finding | None:
    """The allocator's count beside the accounting, and beside the published figures."""
    known = rows[(rows["status"] == "ok")].dropna(subset=["kept_bytes", "accounted_bytes"])
    if not len(known):
        return None
    off = (known["kept_bytes"] - known["accounted_bytes"]).abs().max()
    published = rows.dropna(subset=["h100_kept_bytes", "accounted_bytes"])
    beside = ""
    if len(published):
        apart = (published["h100_kept_bytes"] / published["accounted_bytes"] - 1).abs().max()
        beside = f" The published figures of {plural(len(published), 'shape')} agree to {number(100 * apart, 2)} %."
    return Finding.checked(
        f"What is kept differs from the accounting by {bytes_in_words(off)} at most, over {plural(len(known), 'case')}",
        bool(off <= 0.001 * known["accounted_bytes"].max()),
        so=f": every byte is accounted for.{beside}",
        but=f": something is kept that the accounting does not know.{beside}",
    )


def roofline(rows: pd.DataFrame) -> Finding | None:
    """The intensity of the materialised form beside the machine's ridge, and the traffic's time beside the measured."""
    measured = rows[rows["status"] == "ok"].dropna(subset=["forward_traffic_ms", "ridge"])
    if not len(measured):
        return None
    row = measured.sort_values(["seq_len", "head_dim"]).iloc[-1]
    traffic, floor = row["forward_traffic_ms"], row["forward_bound_ms"]
    fact = (
        f"At d {row['head_dim']} and length {row['seq_len']:,} the materialised form does {number(row['intensity'])} "
        f"FLOPs for every byte that its operators move, and {row['machine']} can do {number(row['ridge'])}. Moving "
        f"them takes {number(traffic)} ms at the bandwidth of memory, {number(traffic / floor, 2)} times what the "
        f"products need; forward was measured at {number(row['forward_ms'])} ms"
    )
    nearest = max(traffic, floor)
    return Finding.checked(
        fact,
        bool(row["intensity"] < row["ridge"] and row["forward_ms"] <= 2.5 * traffic),
        so=": bandwidth sets its time, not arithmetic. A tile of scores that stays on the chip has no such traffic.",
        but=(
            f", {number(row['forward_ms'] / nearest, 2)} times the longer of the two: here neither ceiling explains "
            "it, but what the operators between the products cost beside their traffic."
        ),
    )


def published_findings(others: pd.DataFrame) -> Findings:
    """Why eager attention takes what it takes on a GPU, from figures that others published and a datasheet."""
    length = int(others["seq_len"].max())
    long = others[others["seq_len"] == length]
    share = 100 * long["traffic_ms"] / long["forward_ms"]
    fact = (
        f"On an {H100} others measured eager forward at length {length:,} as {_span(long['forward_ms'])} ms, by head "
        f"dimension. There the traffic of its operators takes {_span(long['traffic_ms'])} ms, {_span(share)} % of "
        f"that, and the products of the whole matrix {_span(long['products_ms'])} ms"
    )
    told = Finding.checked(
        fact,
        bool((long["traffic_ms"] > long["products_ms"]).all() and share.min() > 50),
        so=": most of eager attention's time is traffic, at every head dimension.",
        but=": traffic alone does not explain eager attention's time at every head dimension.",
    )
    return Findings([told])


def _span(values: pd.Series) -> str:
    least, most = number(values.min(), 2), number(values.max(), 2)
    return least if least == most else f"{least} to {most}"


def compiled(rows: pd.DataFrame) -> Finding | None:
    """Eager over compiled, by medians of the same rounds."""
    pairs = _pairs(rows)
    if not len(pairs):
        return None
    texts = []
    for part in ("forward", "backward"):
        ratio = pairs[f"{part}_ms_eager"] / pairs[f"{part}_ms_compiled"]
        span = f" ({number(ratio.min(), 2)} to {number(ratio.max(), 2)})" if len(ratio) > 1 else ""
        texts.append(f"{part} {number(ratio.median(), 2)} times as fast{span}")
    kept = (pairs["kept_bytes_compiled"] / pairs["kept_bytes_eager"]).median()
    ratio = pairs["forward_ms_eager"] / pairs["forward_ms_compiled"]
    return Finding.checked(
        f"Compiled, {' and '.join(texts)}, over {plural(len(pairs), 'shape')}; it keeps {number(kept, 2)} times the "
        "memory",
        bool(ratio.median() > 1 and kept > 0.9),
        so=(
            ": the compiler makes one pass over the scores of what lies between two products, but still stores them "
            "for backward."
        ),
        but=", not what fusing the operators between two products should give.",
    )


def _pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Eager and compiled of the same shape, both measured."""
    return _side_by_side(rows[rows["status"] == "ok"], how="inner")


def _side_by_side(rows: pd.DataFrame, how: Literal["inner", "left"] = "left") -> pd.DataFrame:
    """Eager and compiled of the same shape, the columns of the one ending in `_eager`, of the other in `_compiled`."""
    same = ["batch_size", "heads", "head_dim", "seq_len", "dtype", "is_causal", "float32_matmul"]
    eager, other = (rows[rows["implementation"] == name] for name in (REFERENCE, REFERENCE + COMPILED))
    return eager.merge(other, on=same, suffixes=("_eager", "_compiled"), how=how)

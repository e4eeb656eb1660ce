"""Problem `flash_benchmarking`, as tables, a figure and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd

from cs336_systems.analysis.published import H100, LEADERBOARD_2025_MS
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    number,
    percent,
    plural,
    within,
)
from cs336_systems.presentation.flash_benchmarking_drawing import draw

REFERENCE = "reference"
OURS = ("flash-triton", "flash")
"""Whichever there is stands for ours, the first before the second."""
_PARTS = (("forward", "forward"), ("backward", "backward"), ("both", "forward + backward"))
TERA = 1e12


def table(summary: pd.DataFrame) -> Table:
    """Every shape and implementation: time, rate, share of the peak, memory, and error beside eager's own."""
    columns = [
        *identity(summary),
        Column("forward (ms)", partial(_time, column="forward")),
        Column("backward (ms)", partial(_time, column="backward")),
        Column("both (ms)", partial(_time, column="both")),
        Column("floor of both (ms)", lambda row: number(row.both_bound_ms)),
        Column("eager / this", lambda row: number(row.both_speedup, 2)),
        Column("TFLOP/s", lambda row: number(row.both_flops_per_s / TERA)),
        Column("of peak", lambda row: percent(row.both_share)),
        Column("peak memory (MiB)", lambda row: number(row.peak_bytes / 2**20)),
        Column("error of output", lambda row: _power(row.output_error)),
        Column("of gradients", lambda row: _power(row.gradient_error)),
        Column("tiles", tiles, "left"),
    ]
    notes = [
        "TFLOP/s and the share of the peak are of forward with backward, 3.5 times the products of forward, and count "
        "visible pairs alone. Peak memory is what both allocate on top of the inputs. Errors are ‖found − exact‖ / "
        "‖exact‖, exact being float64; of the gradients the largest of the three.",
        *notes_below(summary),
    ]
    return Table.of(summary, columns, caption=caption(summary), notes=notes)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, each with its own floor."""
    return remarks.by_machine(summary, table)


def identity(summary: pd.DataFrame) -> list[Column]:
    """The columns that tell rows apart; what is the same for all stands in the caption."""
    varying = [name for name in ("dtype", "is_causal", "batch_size", "heads") if _varies(summary, name)]
    return [
        Column("length", lambda row: f"{row.seq_len:,}"),
        Column("d", lambda row: str(row.head_dim)),
        *(Column(_HEADINGS[name], partial(_choice, name=name), "left") for name in varying),
        Column("implementation", lambda row: row.implementation, "left"),
    ]


_HEADINGS = {"dtype": "precision", "is_causal": "mask", "batch_size": "batch", "heads": "heads"}


def _choice(row: Any, name: str) -> str:
    value = getattr(row, name)
    return ("causal" if value else "none") if name == "is_causal" else str(value)


def _varies(summary: pd.DataFrame, name: str) -> bool:
    return bool(len(summary)) and summary[name].nunique() > 1


def _time(row: Any, column: str) -> str:
    if row.status != "ok":
        return str(row.status)
    return within(getattr(row, f"{column}_ms"), getattr(row, f"{column}_std_ms")) + marks(row)


def _power(value: float) -> str:
    """An error as 2.4e-07: what counts is its power of ten."""
    return MISSING if math.isnan(value) else f"{value:.1e}"


def tiles(row: Any) -> str:
    """Queries × keys per tile of each kernel, where an implementation tells; "untuned" where they were not chosen."""
    if not row.configuration:
        return MISSING
    texts = [f"{each['queries']} × {each['keys']}" for each in row.configuration.values()]
    untuned = any(not each["tuned"] for each in row.configuration.values())
    return ", ".join(texts) + (" (untuned)" if untuned else "")


def speedups(summary: pd.DataFrame) -> Table:
    """Ours in Triton over eager attention, shape by shape, beside what others published: times, ratios and tiles."""
    name = _our_name(summary)
    ours, eager = (summary[summary["implementation"] == each] for each in (name, REFERENCE))
    times = [f"{column}_ms" for column, _ in _PARTS]
    rows = ours.merge(eager[[*_SHAPE, *times]], on=_SHAPE, suffixes=("", "_eager"), how="left")
    columns = [
        Column("length", lambda row: f"{row.seq_len:,}"),
        Column("d", lambda row: str(row.head_dim)),
        Column("precision", lambda row: row.dtype, "left"),
        *(column for name, heading in _PARTS for column in _comparison(name, heading)),
        Column("tiles", tiles, "left"),
        Column(f"{H100} tile", _published_tile, "left"),
    ]
    notes = []
    if "float32" in set(rows["dtype"]) and name.startswith("flash-triton"):
        notes = ["Ours multiplies float32 in IEEE precision; the published figures do not say whether theirs is TF32."]
    return Table.of(rows, columns, caption=f"{name} over eager: {_shared(summary)}", notes=[*notes, *notes_below(ours)])


def _comparison(name: str, heading: str) -> list[Column]:
    return [
        Column(f"{heading}: eager (ms)", lambda row: number(getattr(row, f"{name}_ms_eager"))),
        Column("ours (ms)", lambda row: number(getattr(row, f"{name}_ms"))),
        Column("eager / ours", lambda row: number(getattr(row, f"{name}_ms_eager") / getattr(row, f"{name}_ms"), 2)),
        Column(f"{H100} eager / Triton", partial(_published_speedup, name=name)),
    ]


def _published_speedup(row: Any, name: str) -> str:
    return number(getattr(row, f"h100_{name}_eager_ms") / getattr(row, f"h100_{name}_triton_ms"), 2)


def _published_tile(row: Any) -> str:
    return MISSING if math.isnan(row.h100_q_tile) else f"{row.h100_q_tile:.0f} × {row.h100_k_tile:.0f}"


def published(others: pd.DataFrame) -> Table:
    """The published figures alone: a Triton forward with a compiled backward, against eager attention."""
    columns = [
        Column("length", lambda row: f"{row.seq_len:,}"),
        Column("d", lambda row: str(row.head_dim)),
        Column("precision", lambda row: row.dtype, "left"),
        *(column for name, heading in _PARTS for column in _published_columns(name, heading)),
        Column("tile", _published_tile, "left"),
    ]
    return Table.of(others, columns, caption=f"Published: FlashAttention-2 on an {H100}, batch 1, one head, causal")


def _published_columns(name: str, heading: str) -> list[Column]:
    return [
        Column(f"{heading}: eager (ms)", lambda row: number(getattr(row, f"h100_{name}_eager_ms"))),
        Column("Triton (ms)", lambda row: number(getattr(row, f"h100_{name}_triton_ms"))),
        Column("eager / Triton", partial(_published_speedup, name=name)),
    ]


def caption(summary: pd.DataFrame) -> str:
    return f"Attention by implementation: {_shared(summary)}" if len(summary) else "No records"


def _shared(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return "no records"
    first = summary.iloc[0]
    settings = [circumstances(summary)]
    triton = summary["triton"].dropna().unique()
    settings += [f"Triton {' and '.join(triton)}"] if len(triton) else []
    settings += [
        text
        for name, text in (
            ("batch_size", f"batch {first['batch_size']}"),
            ("heads", plural(int(first["heads"]), "head")),
            ("dtype", str(first["dtype"])),
            ("is_causal", "causal" if first["is_causal"] else "no mask"),
        )
        if not _varies(summary, name)
    ]
    return ", ".join([*settings, f"medians of {plural(int(first['rounds']), 'round')}"])


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name, _case_name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['implementation']} at {_case_name(row)}"


def _case_name(row: pd.Series) -> str:
    parts = [f"length {row['seq_len']:,}", f"d {row['head_dim']}", str(row["dtype"])]
    parts += ["no mask"] * (not row["is_causal"])
    if (row["batch_size"], row["heads"]) != (1, 1):
        parts += [f"batch {row['batch_size']}", plural(int(row["heads"]), "head")]
    return ", ".join(parts)


# Figure --------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """Forward, backward and memory over the length for every implementation, of shapes alike in all but that."""
    rows = _alike(summary)
    at = f"d {rows['head_dim'].iloc[0]}" if len(rows) else "no records"
    return Picture(f"{caption(rows)}, {at}", partial(draw, rows))


def _alike(rows: pd.DataFrame) -> pd.DataFrame:
    """The shapes of one precision, batch, number of heads and mask, as the first has them, at the largest dimension."""
    for name in ("dtype", "batch_size", "heads", "is_causal"):
        rows = rows[rows[name] == rows[name].iloc[0]] if len(rows) else rows
    return rows[rows["head_dim"] == rows["head_dim"].max()] if len(rows) else rows


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """What tiling changes in memory and time, against whom it wins, how near the floor, and at what error."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py flash_benchmarking`.")])
    return Findings(
        [
            *Finding.from_all(summary, "What tiling does to memory", memory),
            *Finding.from_all(summary, "Which implementation is the fastest", fastest),
            *Finding.from_all(summary, "How ours compares with PyTorch's FlashAttention", against_flash),
            *Finding.from_all(summary, "Whether ours is ever slower than eager attention", against_eager),
            *([] if (told := leaderboard(summary)) is None else [told]),
            *Finding.from_all(summary, "How large the errors are", errors),
            *Finding.from_all(summary, "How near their floors the times come", nearness),
            *staleness(summary),
        ]
    )


def _our_name(summary: pd.DataFrame) -> str:
    """Our best implementation that has a time, or else one that is asked for."""
    of = {name: summary[summary["implementation"] == name] for name in OURS} if len(summary) else {}
    timed = [name for name, rows in of.items() if rows["status"].eq("ok").any()]
    return [*timed, *(name for name, rows in of.items() if len(rows)), OURS[0]][0]


def beside(summary: pd.DataFrame, other: str) -> pd.DataFrame:
    """Ours and another's on the same shapes, both measured; the columns of the other end in `_other`."""
    measured = summary[summary["status"] == "ok"]
    ours, others = (measured[measured["implementation"] == name] for name in (_our_name(summary), other))
    return ours.merge(others, on=_SHAPE, suffixes=("", "_other"))


_SHAPE = ["seq_len", "head_dim", "dtype", "is_causal", "batch_size", "heads"]


def memory(rows: pd.DataFrame) -> Finding | None:
    pairs = _alike(beside(rows, REFERENCE)).sort_values("seq_len").drop_duplicates("seq_len")
    if len(pairs) < 2:
        return None
    short, long = pairs.iloc[0], pairs.iloc[-1]
    longer = long["seq_len"] / short["seq_len"]
    grew, eager_grew = (long[name] / short[name] for name in ("peak_bytes", "peak_bytes_other"))
    return Finding.checked(
        f"From length {short['seq_len']:,} to {long['seq_len']:,}, {longer:g} times as long, the peak of "
        f"{long['implementation']} grows {number(grew, 2)} times and eager's {number(eager_grew, 2)} times, to "
        f"{bytes_in_words(long['peak_bytes'])} and {bytes_in_words(long['peak_bytes_other'])}",
        bool(grew < 1.5 * longer < eager_grew),
        so=": linear in length, where stored scores are quadratic.",
        but=", not the linear growth that tiling is for.",
    )


def fastest(rows: pd.DataFrame) -> Finding | None:
    """Who wins forward with backward on the longest shape."""
    measured = rows[(rows["status"] == "ok") & rows["both_ms"].notna()]
    if not len(measured):
        return None
    long = measured[measured["seq_len"] == measured["seq_len"].max()]
    best = long.loc[long["both_ms"].idxmin()]
    speedup = best["both_speedup"]
    than_eager = "" if math.isnan(speedup) else f", {number(speedup, 2)} times as fast as eager"
    return Finding(
        f"At {_case_name(best)} the fastest forward with backward is {best['implementation']} with "
        f"{number(best['both_ms'])} ms{than_eager}, at {number(best['both_flops_per_s'] / TERA)} TFLOP/s."
    )


FORWARD_AIM, BACKWARD_AIM = 1.15, 0.9
"""Times as fast as PyTorch's flash backend: what the Triton kernels are to reach on training's shapes."""


def against_flash(rows: pd.DataFrame) -> Finding | None:
    """Forward and backward of ours over PyTorch's flash backend, on training's shapes where there are any."""
    pairs = beside(rows, "sdpa-flash")
    training = pairs[pairs["heads"] > 1] if len(pairs) else pairs
    pairs = training if len(training) else pairs
    if not len(pairs):
        return None
    forward, backward = (pairs[f"{part}_ms_other"] / pairs[f"{part}_ms"] for part in ("forward", "backward"))
    name = pairs["implementation"].iloc[0]
    below = pairs[(forward < FORWARD_AIM) | (backward < BACKWARD_AIM)]
    aims = f"{FORWARD_AIM:g} times forward and {BACKWARD_AIM:g} times backward"
    return Finding.checked(
        f"{name} is {_span(forward)} times as fast as PyTorch's flash backend forward and {_span(backward)} times "
        f"backward, over {plural(len(pairs), 'shape')}",
        not len(below),
        so=f": everywhere at least the {aims} that are aimed at.",
        but=_why_not(name) if name == "flash" else f": the {aims} aimed at are missed at {_places(below)}.",
    )


def _why_not(name: str) -> str:
    return f": {name} is a loop over tiles in Python, for reading, and a CPU's cache holds what a GPU must tile for."


def _places(rows: pd.DataFrame) -> str:
    return remarks.enumerated([_case_name(row) for _, row in rows.iterrows()])


def leaderboard(rows: pd.DataFrame) -> Finding | None:
    """Forward with backward on the shape of 2025's leaderboard, beside the best that is published."""
    shape = {"batch_size": 1, "heads": 16, "seq_len": 16_384, "head_dim": 64, "dtype": "bfloat16", "is_causal": True}
    is_shape = (rows[list(shape)] == pd.Series(shape)).all(axis="columns")
    found = rows[is_shape & (rows["implementation"] == "flash-triton") & (rows["status"] == "ok")]
    if not len(found):
        return None
    took = found["both_ms"].iloc[0]
    return Finding.checked(
        f"On the shape of 2025's leaderboard flash-triton takes {number(took)} ms forward with backward; the best that "
        f"is published for it is {LEADERBOARD_2025_MS:g} ms",
        bool(took < LEADERBOARD_2025_MS),
        so=": it is beaten.",
        but=": it is not reached.",
    )


def against_eager(rows: pd.DataFrame) -> Finding | None:
    """Each phase on its own: a gain in one must not hide a loss in another."""
    pairs = beside(rows, REFERENCE)
    if not len(pairs):
        return None
    ratios = pd.DataFrame({part: pairs[f"{part}_ms_other"] / pairs[f"{part}_ms"] for part, _ in _PARTS})
    slower = pairs[ratios.min(axis="columns") < 1]
    parts = ", ".join(f"{heading} {_span(ratios[part])}" for part, heading in _PARTS)
    return Finding.checked(
        f"Times as fast as eager attention is {pairs['implementation'].iloc[0]}: {parts}, over "
        f"{plural(len(pairs), 'shape')}",
        not len(slower),
        so="; it is never the slower one.",
        but=f"; it is the slower one in some phase at {_places(slower)}.",
    )


def errors(rows: pd.DataFrame) -> Finding | None:
    """Ours over the materialised form's own error in the same precision."""
    pairs = beside(rows, REFERENCE).dropna(subset=["output_error", "output_error_other"])
    if not len(pairs):
        return None
    output, gradients = (pairs[f"{what}_error"] / pairs[f"{what}_error_other"] for what in ("output", "gradient"))
    return Finding.checked(
        f"Against float64, {pairs['implementation'].iloc[0]} errs {_span(output)} times as much as the materialised "
        f"form in its output and {_span(gradients)} times in its gradients, over {plural(len(pairs), 'shape')}",
        bool(max(output.max(), gradients.max()) <= 2),
        so=": tiling costs no accuracy.",
        but=": more than twice the error of the materialised form is too much.",
    )


def nearness(rows: pd.DataFrame) -> Finding | None:
    measured = rows[(rows["status"] == "ok")].dropna(subset=["both_bound_ms", "both_ms"])
    if not len(measured):
        return None
    times = measured["both_ms"] / measured["both_bound_ms"]
    best = measured.loc[times.idxmin()]
    parts = [measured[f"{part}_ms"] >= measured[f"{part}_bound_ms"] for part, _ in _PARTS]
    return Finding.checked(
        f"Nearest its floor is {_name(best)}, {number(times.min(), 2)} times the least time of forward with backward",
        bool(all(part.all() for part in parts)),
        so="; no time lies below its floor, as it must be.",
        but="; a time lies below its floor: a ceiling is too low, or the work was not done as it is counted.",
    )


def _span(values: pd.Series) -> str:
    least, most = number(values.min(), 2), number(values.max(), 2)
    return least if least == most else f"{least} to {most}"

"""Problem `benchmarking_script`, part (b), as a table, a figure and sentences."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import A100, H100
from cs336_systems.bench.report import (
    BOUND,
    MEASURED,
    MISSING,
    PUBLISHED,
    PUBLISHED_TOO,
    Column,
    Finding,
    Findings,
    Table,
    bytes_in_words,
    figure_style,
    logarithmic,
    number,
    percent,
    plural,
    with_deviation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The axes a row may differ in beyond size, context and phase: the constant ones go into the caption.
_CHOICES = (
    "dtype",
    "autocast",
    "float32_matmul",
    "compile",
    "attention",
    "formulation",
    "optimizer",
    "model",
)
_PLAIN = {
    "autocast": "none",
    "float32_matmul": "highest",
    "compile": False,
    "attention": "reference",
    "formulation": "reference",
    "optimizer": "reference",
}


def prediction(predicted: pd.DataFrame) -> Table:
    """What every case must do and the least it can take, before anything runs."""
    columns = [
        *_identity(predicted),
        Column("parameters (M)", lambda row: number(row.parameters / 1e6)),
        Column("products (GFLOP)", lambda row: number(row.flops / 1e9)),
        Column("compulsory bytes", lambda row: bytes_in_words(row.bytes)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("set by", lambda row: row.bound_by or MISSING, "left"),
    ]
    ceilings = predicted["ceilings"].iloc[0] if len(predicted) else "no machine"
    notes = [
        "Compulsory bytes are distinct data that no implementation can leave unread or unwritten. Forward hands on its "
        "logits; with backward they need never be stored, so forward can have more of them."
    ]
    return Table.of(predicted, columns, caption=f"The least a step can take on {ceilings}, predicted", notes=notes)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, each with its own floor."""
    if not len(summary):
        return Finding("No machine has published records of this experiment yet: scripts/publish_records.py publishes.")
    columns = [
        Column("machine", lambda row: row.machine, "left"),
        *_identity(summary),
        Column("mean ± std (ms)", measured_text),
        Column("median (ms)", lambda row: number(row.median_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("median / floor", lambda row: number(row.times_bound, 2)),
        _memory(summary),
    ]
    return Table.of(summary, columns, caption="Published records of this workbook", notes=notes_below(summary))


def _memory(rows: pd.DataFrame) -> Column:
    """A GPU's allocator counts tensors; a CPU's resident set also what libraries and the C allocator keep."""
    kinds = set(rows["device"]) if len(rows) else set()
    heading = {frozenset({"cuda"}): "peak allocated", frozenset({"cpu"}): "resident growth"}.get(frozenset(kinds))
    return Column(heading or "peak memory", lambda row: bytes_in_words(row.peak_bytes))


def _choice(row: Any, name: str) -> str:
    return str(getattr(row, name))


def _identity(rows: pd.DataFrame) -> list[Column]:
    """The columns that tell cases apart: size, context, phase, and whatever choice is not the same for all."""
    varying = [name for name in _CHOICES if len(rows) and rows[name].nunique(dropna=False) > 1]
    return [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        *(Column(name, partial(_choice, name=name), "left") for name in varying),
    ]


def table(summary: pd.DataFrame) -> Table:
    """Every case: measured, its floor, how far above it, peak memory, and the published times."""
    columns = [
        *_identity(summary),
        Column("mean ± std (ms)", measured_text),
        Column("median (ms)", lambda row: number(row.median_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("set by", lambda row: row.bound_by or MISSING, "left"),
        Column("median / floor", lambda row: number(row.times_bound, 2)),
        _memory(summary),
        Column(f"{A100} (ms)", lambda row: with_deviation(row.a100_ms, row.a100_std_ms)),
        Column(f"{H100} (ms)", lambda row: number(row.h100_ms)),
    ]
    return Table.of(summary, columns, caption=caption(summary), notes=notes_below(summary))


def measured_text(row: Any) -> str:
    """Mean ± standard deviation with its marks, or why there is none."""
    if row.status != "ok":
        return str(row.status)
    return with_deviation(row.mean_ms, row.std_ms) + (" ~" if row.noise else "") + (" †" if row.stale else "")


def caption(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    settings = [str(first["machine"]), f"batch {first['batch_size']}"]
    for name in _CHOICES:
        same = summary[name].nunique(dropna=False) == 1
        if same and first[name] is not None and first[name] != _PLAIN.get(name):
            settings.append(str(first[name]) if name == "dtype" else f"{name} {first[name]}")
    settings.append(f"{first['warmup']} warm-up and {first['steps']} measured steps")
    return f"Time per step: {', '.join(settings)}"


def notes_below(summary: pd.DataFrame) -> list[str]:
    notes = []
    if summary["noise"].any():
        disturbed = summary[summary["noise"] != ""]
        notes.append(
            f"~ noisy, {len(disturbed)} of {len(summary)} cases: "
            + "; ".join(f"{_name(row)} ({row['noise']})" for _, row in disturbed.iterrows())
        )
    if summary["stale"].any():
        notes.append("† stale: " + "; ".join(sorted({text for text in summary["stale"] if text})))
    return notes + [
        f"{row.size}, context {row.context_length}, {row.phase}: {row.status}, {row.reason}"
        for row in summary[summary["status"] != "ok"].itertuples()
    ]


def figure(summary: pd.DataFrame) -> Figure:
    """A panel per phase: measured, floor and published time of every size and context, on a logarithmic scale."""
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(summary["phase"]))
    most = max((int((summary["phase"] == phase).sum()) for phase in phases), default=1)
    stacked = most > 8  # many sizes need the whole width each
    shape = (max(1, len(phases)), 1) if stacked else (1, max(1, len(phases)))
    width, height = (max(6.0, 0.45 * most), 2.4 * shape[0]) if stacked else (2.7 * shape[1] + 0.6, 3.0)
    with figure_style():
        drawing = Figure(figsize=(width, height + 0.4))
        panels = drawing.subplots(*shape, sharey=not stacked, squeeze=False).ravel()
        series: dict[str, Any] = {}
        for panel, phase in zip(panels, phases, strict=False):
            series |= _draw_phase(panel, summary[summary["phase"] == phase])
            panel.set_title(phase)
            if stacked or panel is panels[0]:
                panel.set_ylabel("time per step (ms)")
        drawing.suptitle(caption(summary), fontsize=9)
        drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=2)
    return drawing


def _draw_phase(panel: Any, rows: pd.DataFrame) -> dict[str, Any]:
    """One panel; returns its series by label."""
    places = range(len(rows))
    machine = rows["machine"].iloc[0]
    series = {
        f"median, and least to most, {machine}": panel.errorbar(
            places,
            rows["median_ms"],
            yerr=(rows["median_ms"] - rows["min_ms"], rows["max_ms"] - rows["median_ms"]),
            fmt="o",
            color=MEASURED,
            capsize=2,
        ),
        f"floor, {machine}": panel.plot(places, rows["bound_ms"], "_", color=BOUND, markersize=14, markeredgewidth=2)[
            0
        ],
    }
    for column, name, marker, colour in (
        ("a100_ms", A100, "D", PUBLISHED),
        ("h100_ms", H100, "s", PUBLISHED_TOO),
    ):
        if rows[column].notna().any():
            style = {"color": colour, "markerfacecolor": "none", "linestyle": "none"}
            series[f"published, {name}"] = panel.plot(places, rows[column], marker, **style)[0]
    logarithmic(panel.yaxis)
    panel.set_xticks(places, [f"{row.size}\n{row.context_length}" for row in rows.itertuples()])
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.set_xlabel("size and context length (tokens)")
    return series


def findings(summary: pd.DataFrame) -> Findings:
    """How backward compares with forward, how variable the times are, and how near the floor."""
    measured = summary[summary["status"] == "ok"]
    if not len(measured):
        return Findings([Finding("No case was measured: run `python scripts/measure.py transformer_step`.")])
    sentences = _backward_against_forward(measured)
    spread = (measured["std_ms"] / measured["mean_ms"]).dropna()
    if len(spread):
        sentences.append(
            Finding.checked(
                f"The standard deviation is {percent(spread.median())} of the mean in the median case and "
                f"{percent(spread.max())} at most",
                bool(spread.median() < 0.05),
                so=": the times vary little.",
                but=": these times vary, and want more steps or a quieter machine.",
            )
        )
    floors = measured.dropna(subset=["times_bound"])
    if len(floors):
        best, worst = (floors.loc[index()] for index in (floors["times_bound"].idxmin, floors["times_bound"].idxmax))
        sentences.append(
            Finding.checked(
                f"Nearest its floor is {_name(best)}, a median of {number(best['median_ms'])} ms or "
                f"{number(best['times_bound'], 2)} times the floor; farthest {_name(worst)}, "
                f"{number(worst['median_ms'])} ms or {number(worst['times_bound'], 2)} times",
                bool(best["times_bound"] >= 1.0),
                so=". No time lies below its floor, as it must be.",
                but=". No time can lie below its floor: this machine was disturbed when its ceilings were measured.",
            )
        )
    return Findings(sentences)


def _backward_against_forward(measured: pd.DataFrame) -> list[Finding]:
    """Backward is forward-backward minus forward, by medians; it has twice the products of forward."""
    same = ["d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size", *_CHOICES]
    forward = measured[measured["phase"] == "forward"]
    both = measured[measured["phase"] == "forward-backward"]
    pairs = forward.merge(both, on=same, suffixes=("_forward", "_both"))
    if not len(pairs):
        return []
    quiet = pairs[(pairs["noise_forward"] == "") & (pairs["noise_both"] == "")]
    if not len(quiet):
        return [Finding("How long backward takes beside forward cannot be told: every pair of times is noisy.")]
    ratios = (quiet["median_ms_both"] - quiet["median_ms_forward"]) / quiet["median_ms_forward"]
    span = f" (from {number(ratios.min(), 2)} to {number(ratios.max(), 2)})" if len(quiet) > 1 else ""
    return [
        Finding.checked(
            f"Loss and backward take {number(ratios.median(), 2)} times as long as forward, the median of "
            f"{plural(len(quiet), 'quiet case')}{span}",
            bool(1.5 <= ratios.median() <= 2.5),
            so=", about the two times that the products alone predict.",
            but=", not the two times that the products alone predict.",
        )
    ]


def _name(row: pd.Series) -> str:
    return f"{row['phase']} of {row['size']} at context {row['context_length']}"

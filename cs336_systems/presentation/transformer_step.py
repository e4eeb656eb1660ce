"""Problem `benchmarking_script`, part (b), as a table, a figure and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import A100, H100, PUBLISHED_DECIMALS_MS
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MISSING,
    PUBLISHED,
    PUBLISHED_TOO,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    figure_style,
    logarithmic,
    number,
    percent,
    plural,
    with_deviation,
    within,
)
from cs336_systems.presentation.footprint import against_the_allocator

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
    "rope",
    "model",
)
_PLAIN = {
    "autocast": "none",
    "float32_matmul": "highest",
    "compile": "none",
    "attention": "reference",
    "formulation": "reference",
    "optimizer": "reference",
    "rope": "2025",
}

_GOOD_PREDICTION = 0.10


def prediction(predicted: pd.DataFrame) -> Table:
    """What every case must do and the least it can take, before anything runs."""
    columns = [
        *identity(predicted),
        Column("parameters (M)", lambda row: number(row.parameters / 1e6)),
        Column("products (GFLOP)", lambda row: number(row.flops / 1e9)),
        Column("compulsory bytes", lambda row: bytes_in_words(row.bytes)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("set by", lambda row: row.bound_by or MISSING, "left"),
        Column("planned peak (MiB)", lambda row: number(row.planned_bytes / 2**20)),
    ]
    ceilings = predicted["ceilings"].iloc[0] if len(predicted) else "no machine"
    notes = [
        "Compulsory bytes are distinct data that no implementation can leave unread or unwritten. Forward hands on its "
        "logits; with backward they need never be stored, so forward can have more of them."
    ]
    return Table.of(predicted, columns, caption=f"The least a step can take on {ceilings}, predicted", notes=notes)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, each with its own floor and what others published for the same work."""
    if not len(summary):
        return Finding("No machine has published records of this experiment yet: scripts/publish_records.py publishes.")
    columns = [
        Column("machine", lambda row: row.machine, "left"),
        *identity(summary),
        *_times(),
        *_memory(summary),
        *_published(),
    ]
    first = summary.iloc[0]
    shared = ", ".join([f"batch {first['batch_size']}", *shared_choices(summary)])
    return Table.of(summary, columns, caption=f"Time per step by machine: {shared}", notes=notes_below(summary))


def _times() -> list[Column]:
    return [
        Column("mean ± std (ms)", measured_text),
        Column("median (ms)", lambda row: within(row.median_ms, row.std_ms)),
        Column("predicted (ms)", lambda row: number(row.predicted_ms)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("median / floor", lambda row: number(row.times_bound, 2)),
    ]


def _published() -> list[Column]:
    return [
        Column(f"{A100} (ms)", lambda row: published_text(row.a100_ms, row.a100_std_ms)),
        Column(f"{H100} (ms)", lambda row: number(row.h100_ms)),
    ]


def _memory(rows: pd.DataFrame) -> list[Column]:
    """A GPU's allocator counts tensors; a CPU's resident set also what libraries and the C allocator keep."""
    kinds = set(rows["device"]) if len(rows) else set()
    heading = {frozenset({"cuda"}): "peak allocated", frozenset({"cpu"}): "resident growth"}.get(frozenset(kinds))
    return [
        Column(f"{heading or 'peak memory'} (MiB)", lambda row: number(row.peak_bytes and row.peak_bytes / 2**20)),
        Column("planned (MiB)", lambda row: number(row.planned_bytes / 2**20)),
    ]


def _choice(row: Any, name: str) -> str:
    return str(getattr(row, name))


def identity(rows: pd.DataFrame) -> list[Column]:
    """The columns that tell cases apart: size, context, phase, and whatever choice is not the same for all."""
    return [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        *(Column(name, partial(_choice, name=name), "left") for name in _varying(rows)),
    ]


def _varying(rows: pd.DataFrame) -> list[str]:
    """The choices that are not the same for all rows."""
    return [name for name in _CHOICES if len(rows) and rows[name].nunique(dropna=False) > 1]


def table(summary: pd.DataFrame) -> Table:
    """Every case: measured, its floor, how far above it, peak memory, and the published times."""
    limits = [limit for limit in summary["bound_by"].unique() if limit] if len(summary) else []
    limit = [Column("set by", lambda row: row.bound_by or MISSING, "left")] if len(limits) > 1 else []
    columns = [*identity(summary), *_times(), *limit, *_memory(summary), *_published()]
    limited = [f"Every floor is set by {limits[0]}."] if len(limits) == 1 else []
    return Table.of(summary, columns, caption=caption(summary), notes=limited + notes_below(summary))


def published_text(mean_ms: float, std_ms: float) -> str:
    """Mean ± deviation with the digits that were published."""
    decimals = PUBLISHED_DECIMALS_MS
    return MISSING if mean_ms != mean_ms else f"{mean_ms:,.{decimals}f} ± {std_ms:,.{decimals}f}"


def measured_text(row: Any) -> str:
    """Mean ± standard deviation with its marks, or why there is none."""
    if row.status != "ok":
        return str(row.status)
    return with_deviation(row.mean_ms, row.std_ms) + marks(row)


def caption(summary: pd.DataFrame) -> str:
    """What all rows share, from the records themselves."""
    if not len(summary):
        return caption_of(summary, "")
    first = summary.iloc[0]
    steps = f"{first['warmup']} warm-up and {plural(first['steps'], 'measured step')}"
    return f"{caption_of(summary, 'Time per step')}, {steps}"


def caption_of(summary: pd.DataFrame, what: str) -> str:
    """`what`, then where it was measured and every choice that all rows share."""
    if not len(summary):
        return "No records"
    settings = [circumstances(summary), f"batch {summary.iloc[0]['batch_size']}", *shared_choices(summary)]
    return f"{what}: {', '.join(settings)}"


def shared_choices(summary: pd.DataFrame) -> list[str]:
    """The choices that are the same for all rows and not the plain ones."""
    first = summary.iloc[0]
    return [
        str(first[name]) if name == "dtype" else f"{name} {first[name]}"
        for name in _CHOICES
        if summary[name].nunique(dropna=False) == 1 and first[name] is not None and first[name] != _PLAIN.get(name)
    ]


def model_in_words(row: pd.Series) -> str:
    """Size and context of a case, and every choice in which it is not plain."""
    return f"{row['size']} at context {row['context_length']}{choices_in_words(row)}"


def choices_in_words(row: pd.Series) -> str:
    """Every choice in which a case is not plain, each behind a comma."""
    chosen = [
        f"{name} {row[name]}"
        for name in _CHOICES
        if row[name] is not None and row[name] != _PLAIN.get(name) and (name, row[name]) != ("dtype", "float32")
    ]
    return "".join(f", {choice}" for choice in chosen)


def without_autocast(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows without autocast; all, where every one is under it."""
    plain = summary["autocast"] == "none"
    return summary[plain] if plain.any() else summary


def same_but(rows: pd.DataFrame, *names: str) -> list[str]:
    """The columns in which two cases must agree to differ in `names` alone."""
    fields = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size", "phase")
    return [name for name in (*fields, *_CHOICES) if name in rows and name not in names]


def notes_below(summary: pd.DataFrame) -> list[str]:
    """What the marks mean, and why a row has no time."""
    return remarks.notes_below(summary, _name)


def figure(summary: pd.DataFrame) -> Picture:
    """A panel per phase: measured, floor and published time of every size and context, on a logarithmic scale."""
    return Picture(f"{caption(summary)}; bars from the least to the most", partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(summary["phase"]))
    places = list(dict.fromkeys(zip(summary["size"], summary["context_length"], strict=True)))
    stacked = len(places) > 8  # many sizes need the whole width each
    shape = (max(1, len(phases)), 1) if stacked else (1, max(1, len(phases)))
    width, height = (max(6.5, 0.32 * len(places)), 2.2 * shape[0]) if stacked else (2.2 * shape[1] + 0.6, 2.8)
    with figure_style():
        drawing = Figure(figsize=(width, height))
        panels = drawing.subplots(*shape, sharex=stacked, sharey=not stacked, squeeze=False).ravel()
        series: dict[str, Any] = {}
        for panel, phase in zip(panels, phases, strict=False):
            rows = summary[summary["phase"] == phase]
            for kind, values in enumerate(_kinds(summary)):
                chosen = rows[(rows[list(values)] == pd.Series(values)).all(axis="columns")] if values else rows
                series |= _draw_kind(panel, chosen, places, kind, values)
            logarithmic(panel.yaxis)
            _name_places(panel, places)
            panel.set_title(phase)
            if stacked or panel is panels[0]:
                panel.set_ylabel("time per step (ms)")
            if not stacked or panel is panels[-1]:
                panel.set_xlabel("size, context (tokens)")
        drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=2)
    return drawing


def _name_places(panel: Any, places: list[tuple[str, int]]) -> None:
    """Context lengths along the axis, and below them each size once, in the middle of its own."""
    panel.set_xticks(range(len(places)), [str(context) for _, context in places])
    sizes = list(dict.fromkeys(size for size, _ in places))
    own = [[place for place, (name, _) in enumerate(places) if name == size] for size in sizes]
    panel.xaxis.remove_overlapping_locs = False  # a single context stands in the middle itself
    panel.set_xticks([sum(group) / len(group) for group in own], sizes, minor=True)
    panel.tick_params(axis="x", labelsize="small" if len(places) > 8 else None)
    panel.tick_params(axis="x", which="minor", length=0, pad=16)
    panel.grid(visible=False, axis="x", which="minor")
    panel.set_xlim(-0.6, len(places) - 0.4)


def _kinds(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """The combinations of choices that differ between rows, one series each: [{}] where none does."""
    varying = _varying(summary)
    return list(summary[varying].drop_duplicates().to_dict("records")) if varying else [{}]


def _draw_kind(
    panel: Any, rows: pd.DataFrame, places: list[tuple[str, int]], kind: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The rows of one combination of choices in one panel; returns its series by label.

    Measured is filled, its floor a dash, published hollow; a further combination has another marker to the right.
    """
    if not len(rows):
        return {}
    at = [places.index(place) + 0.24 * kind for place in zip(rows["size"], rows["context_length"], strict=True)]
    machine = rows["machine"].iloc[0]
    chosen = "".join(f", {name} {value}" for name, value in values.items())
    look = {"color": COLOURS[2 * kind % len(COLOURS)], "markersize": 4.5}
    series = {
        f"measured median, {machine}{chosen}": panel.errorbar(
            at,
            rows["median_ms"],
            yerr=(rows["median_ms"] - rows["min_ms"], rows["max_ms"] - rows["median_ms"]),
            fmt=("o", "^", "v", "P")[kind % 4],
            capsize=2,
            **look,
        ),
    }
    if rows["bound_ms"].notna().any():
        style = {"color": BOUND, "markersize": 9, "markeredgewidth": 2}
        series[f"floor, {machine}"] = panel.plot(at, rows["bound_ms"], "_", **style)[0]
    for column, name, marker, colour in (
        ("a100_ms", A100, "D", PUBLISHED),
        ("h100_ms", H100, "s", PUBLISHED_TOO),
    ):
        if rows[column].notna().any():
            style = {"color": colour, "markerfacecolor": "none", "linestyle": "none", "markersize": 5}
            series[f"published, {name}"] = panel.plot(at, rows[column], marker, **style)[0]
    return series


def findings(summary: pd.DataFrame) -> Findings:
    """How backward compares with forward, how variable the times are, and how near the floor."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py transformer_step`.")])
    if not summary["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case has a time; the notes of the table say why.")])
    two_phases = summary[summary["phase"].isin(["forward", "forward-backward"])]
    on_gpu = summary[summary["device"] == "cuda"]
    return Findings(
        [
            *Finding.from_all(two_phases, "How long backward takes beside forward", _backward_against_forward),
            *Finding.from_all(summary, "How much the times vary", _variability),
            *Finding.from_all(summary, "How near their floors the times come", _nearness),
            *Finding.from_all(summary, "How well sizes predict one another", _predictability),
            *Finding.from_all(on_gpu, "How near planned memory is to the allocator's", _planned_memory),
            *staleness(summary),
        ]
    )


def _backward_against_forward(rows: pd.DataFrame) -> Finding | None:
    """Backward is forward-backward minus forward, by medians; it has twice the products of forward."""
    measured = rows[rows["status"] == "ok"]
    same = ["d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size", *_CHOICES]
    forward = measured[measured["phase"] == "forward"]
    both = measured[measured["phase"] == "forward-backward"]
    pairs = forward.merge(both, on=same, suffixes=("_forward", "_both"))
    if not len(pairs):
        return None
    quiet = pairs[(pairs["noise_forward"] == "") & (pairs["noise_both"] == "")]
    if not len(quiet):
        return Finding("How long backward takes beside forward cannot be told: every pair of times is noisy.")
    ratios = (quiet["median_ms_both"] - quiet["median_ms_forward"]) / quiet["median_ms_forward"]
    span = f" (from {number(ratios.min(), 2)} to {number(ratios.max(), 2)})" if len(quiet) > 1 else ""
    return Finding.checked(
        f"Loss and backward take {number(ratios.median(), 2)} times as long as forward, the median of "
        f"{plural(len(quiet), 'quiet case')}{span}",
        bool(1.6 <= ratios.median() <= 2.4),
        so=", about the two times that the products alone predict.",
        but=", not the two times that the products alone predict.",
    )


def _variability(rows: pd.DataFrame) -> Finding | None:
    spread = (rows["std_ms"] / rows["mean_ms"]).dropna()
    if not len(spread):
        return None
    return Finding.checked(
        f"The standard deviation is {percent(spread.median())} of the mean in the median case and "
        f"{percent(spread.max())} at most",
        bool(spread.median() < 0.05),
        so=": most of the times vary little.",
        but=": these times vary, and want more steps or a quieter machine.",
    )


def _nearness(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    if not len(measured):
        return None
    floors = measured.dropna(subset=["times_bound"])
    if not len(floors):
        lacks = "; ".join(dict.fromkeys(text for text in measured["bound_lacks"] if text))
        return Finding(
            f"How near their floors the times come cannot be told: {lacks or 'no ceiling is known for them'}."
        )
    quiet = floors[floors["noise"] == ""]
    fact = "How near their floors the times come cannot be told: every time is noisy"
    if len(quiet):
        best, worst = (quiet.loc[index()] for index in (quiet["times_bound"].idxmin, quiet["times_bound"].idxmax))
        fact = (
            f"Nearest its floor is {_name(best)}, a median of {within(best['median_ms'], best['std_ms'])} ms or "
            f"{number(best['times_bound'], 2)} times the floor; farthest {_name(worst)}, "
            f"{within(worst['median_ms'], worst['std_ms'])} ms or {number(worst['times_bound'], 2)} times (the quiet "
            f"ones of {plural(len(floors), 'case')})"
        )
    return Finding.checked(
        fact,
        bool((floors["times_bound"] >= 1.0).all()),
        so=". No time lies below its floor, as it must be.",
        but=". No time can lie below its floor: a ceiling is too low, or the work was not done as it is counted.",
    )


def _predictability(rows: pd.DataFrame) -> Finding | None:
    """Of every family of steps the constants, and how far a size is off that the others predict."""
    measured = rows[rows["status"] == "ok"].dropna(subset=["predicted_ms", "host_step_us"])
    if not len(measured):
        return None
    errors = (measured["predicted_ms"] / measured["median_ms"] - 1).abs()
    constants = measured[["matrix_fraction", "bandwidth_fraction", "host_step_us"]].drop_duplicates()
    told = "; ".join(
        f"{percent(row.matrix_fraction)} of the matrix rate, {percent(row.bandwidth_fraction)} of the bandwidth and "
        f"{number(row.host_step_us, 2)} µs for a step of the host"
        for row in constants.itertuples()
    )
    return Finding.checked(
        f"Predicted by the other sizes, with three constants ({told}, fitted to all), times are off by "
        f"{percent(errors.mean())} in the mean and {percent(errors.max())} at most",
        bool(errors.mean() < _GOOD_PREDICTION),
        so=": operators, ceilings and three constants tell them.",
        but=": three constants do not tell them; what a cache keeps, and memory that is new to the process, are in "
        "none.",
    )


def _planned_memory(rows: pd.DataFrame) -> Finding | None:
    return against_the_allocator(rows, _name)


def _name(row: pd.Series) -> str:
    return f"{row['phase']} of {row['size']} at context {row['context_length']}"

"""Problem `benchmarking_mixed_precision`, part (c): every step without and with autocast, side by side.

The records are those of the experiment `transformer_step`; a row here is two of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import A100
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import marks, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MARKERS,
    MIB,
    MISSING,
    PUBLISHED,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    figure_style,
    logarithmic,
    number,
    plural,
    within,
)
from cs336_systems.presentation.transformer_step import caption_of, same_but

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAIN, _MIXED = "none", "bfloat16"


def both(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of a summary of which both twins are asked for: without autocast, and under bfloat16."""
    if not len(summary):
        return summary
    rows = summary[summary["autocast"].isin([_PLAIN, _MIXED])]
    return rows[rows.groupby(same_but(rows, "autocast"), dropna=False)["autocast"].transform("nunique") == 2]


def pairs(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per pair; what is of the one under autocast ends in `_mixed`."""
    rows = both(summary)
    if not len(rows):
        return rows
    plain, mixed = rows[rows["autocast"] == _PLAIN], rows[rows["autocast"] == _MIXED]
    found = plain.merge(mixed, on=same_but(rows, "autocast"), suffixes=("", "_mixed"))
    return found.assign(
        speedup=found["median_ms"] / found["median_ms_mixed"],
        operators_speedup=found["operators_ms"] / found["operators_ms_mixed"],
        memory_ratio=found["peak_bytes_mixed"].astype(float) / found["peak_bytes"].astype(float),
        a100_speedup=found["a100_ms"] / found["a100_ms_mixed"],
    )


# Tables --------------------------------------------------------------------------------------------------------


def table(summary: pd.DataFrame) -> Table:
    """Every pair: times, floors and peaks of both, their ratios, and what others published."""
    found = pairs(summary)
    kinds = set(found["device"]) if len(found) else set()
    peak = "peak allocated" if kinds == {"cuda"} else "resident growth" if kinds == {"cpu"} else "peak memory"
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        Column("float32 (ms)", partial(_time, of="")),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("under bfloat16 (ms)", partial(_time, of="_mixed")),
        Column("floor under bfloat16 (ms)", lambda row: number(row.bound_ms_mixed)),
        Column("times as fast", lambda row: number(row.speedup)),
        Column("by its operators", lambda row: number(row.operators_speedup)),
        Column(f"{peak}, float32 (MiB)", lambda row: _mebibytes(row.peak_bytes)),
        Column("under bfloat16 (MiB)", lambda row: _mebibytes(row.peak_bytes_mixed)),
        Column("times the memory", lambda row: number(row.memory_ratio)),
        Column(f"{A100}, float32 (ms)", lambda row: number(row.a100_ms, 4)),
        Column(f"{A100}, under bfloat16 (ms)", lambda row: number(row.a100_ms_mixed, 4)),
        Column(f"{A100}, times as fast", lambda row: number(row.a100_speedup)),
    ]
    notes = [
        "Times are medians. By its operators: what the ratio would be if every component were one perfect kernel, "
        "limited by its products or its traffic, of which autocast leaves norms, residual stream, loss and AdamW in "
        "float32.",
        *notes_below(summary),
    ]
    return Table.of(found, columns, caption=caption(summary), notes=notes if len(found) else [])


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The pairs of all machines."""
    if not len(pairs(summary)):
        return Finding("No machine has published steps under autocast yet: scripts/publish_records.py publishes.")
    machines = [group for _, group in summary.groupby("machine", sort=False) if len(pairs(group))]
    columns = [
        Column("machine", lambda row: row.machine, "left"),
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("phase", lambda row: row.phase, "left"),
        Column("float32 (ms)", partial(_time, of="")),
        Column("under bfloat16 (ms)", partial(_time, of="_mixed")),
        Column("times as fast", lambda row: number(row.speedup)),
        Column("times the memory", lambda row: number(row.memory_ratio)),
        Column(f"{A100}, times as fast", lambda row: number(row.a100_speedup)),
    ]
    rows = pd.concat([pairs(group) for group in machines], ignore_index=True)
    return Table.of(rows, columns, caption="Steps without and with bfloat16 autocast, by machine")


def published(steps: pd.DataFrame) -> Table:
    """What others published: training steps without and with autocast."""
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("float32 (ms)", lambda row: f"{row.none_ms:,.1f}"),
        Column("under bfloat16 (ms)", lambda row: f"{row.bfloat16_ms:,.1f}"),
        Column("times as fast", lambda row: number(row.none_ms / row.bfloat16_ms)),
        Column("by its operators", lambda row: number(row.none_operators_ms / row.bfloat16_operators_ms)),
        Column("operators, float32 (ms)", lambda row: number(row.none_operators_ms)),
        Column("operators, under bfloat16 (ms)", lambda row: number(row.bfloat16_operators_ms)),
    ]
    note = "By its operators: every component one perfect kernel, by the datasheet. It is no floor, but near one."
    what = f"Published: training steps on an {A100}, batch 4, without and with bfloat16 autocast"
    return Table.of(steps, columns, caption=what, notes=[note])


def caption(summary: pd.DataFrame) -> str:
    """What is compared, and where."""
    rows = both(summary)
    if not len(rows):
        return "No steps without and with autocast were asked for"
    return caption_of(rows, "Steps without and with bfloat16 autocast")


def notes_below(summary: pd.DataFrame) -> list[str]:
    rows = both(summary)
    return remarks.notes_below(rows, _name) if len(rows) else []


def _name(row: pd.Series) -> str:
    under = "" if row["autocast"] == _PLAIN else f" under {row['autocast']}"
    return f"{_work(row)}{under}"


def _work(row: Any) -> str:
    return f"{row['phase']} of {row['size']} at context {row['context_length']}"


def _time(row: Any, of: str) -> str:
    """The median of one of a pair, with its marks, or why there is none."""
    status, median, std, noise, stale = (
        getattr(row, f"{name}{of}") for name in ("status", "median_ms", "std_ms", "noise", "stale")
    )
    if status != "ok":
        return str(status)
    return within(median, std) + marks(pd.Series({"noise": noise, "stale": stale}))


def _mebibytes(count: float | None) -> str:
    return MISSING if count is None or count != count else number(count / MIB)


# The figure ----------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """How many times as fast each step is under autocast, by its FLOPs; what its operators allow, and the published."""
    return Picture(
        f"Times as fast under autocast, by the size of the step; {caption(summary)}", partial(_draw, summary)
    )


def _draw(summary: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    found = pairs(summary)
    phases = list(dict.fromkeys(found["phase"])) if len(found) else []
    with figure_style():
        drawing = Figure(figsize=(3.6 * max(1, len(phases)) + 0.6, 3.4))
        panels = drawing.subplots(1, max(1, len(phases)), squeeze=False, sharey=True)[0]
        entries: dict[str, Any] = {}
        for panel, phase in zip(panels, phases, strict=False):
            rows = found[found["phase"] == phase].sort_values("flops")
            for column, label, look in (
                ("speedup", "measured", {"color": COLOURS[0], "marker": MARKERS[0]}),
                ("operators_speedup", "by its operators", {"color": BOUND, "marker": "_", "markersize": 9}),
                ("a100_speedup", f"published, {A100}", {"color": PUBLISHED, "marker": "D", "markerfacecolor": "none"}),
            ):
                known = rows.dropna(subset=[column])
                if len(known):
                    (entries[label],) = panel.plot(known["flops"] / 1e9, known[column], linestyle="none", **look)
            panel.axhline(1, color=COLOURS[4], linewidth=1, marker="none")
            panel.set_title(phase)
            panel.set_xlabel("products of a step (GFLOP)")
            logarithmic(panel.xaxis)
        panels[0].set_ylabel("times as fast")
        if entries:
            drawing.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3)
    return drawing


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """How time and memory change under autocast, and how that follows from FLOPs against bytes."""
    rows = both(summary)
    if not len(rows):
        return Findings([Finding("No step was asked for both without and with autocast.")])
    mixed = rows[rows["autocast"] == _MIXED]
    if (mixed["status"] == "missing").all():
        to_do = "; ".join(dict.fromkeys(mixed["reason"]))
        return Findings([Finding(f"No step under autocast is recorded: {to_do}.")])
    if not rows["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case has a time; the notes of the table say why.")])
    return Findings(
        [
            *Finding.from_all(rows, "How much faster steps are under autocast", _times),
            *Finding.from_all(rows, "Whether that follows from FLOPs against bytes", _by_operators),
            *Finding.from_all(rows, "What autocast does to memory", _memory),
            *staleness(rows),
        ]
    )


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    found = pairs(rows)
    return found[(found["status"] == "ok") & (found["status_mixed"] == "ok")]


def _quiet(rows: pd.DataFrame) -> pd.DataFrame:
    found = _measured(rows)
    return found[(found["noise"] == "") & (found["noise_mixed"] == "")]


def _times(rows: pd.DataFrame) -> Finding | None:
    """Per phase, from the pair with the fewest products to the one with the most."""
    found = _quiet(rows)
    if not len(found):
        noisy = "How much faster steps are under autocast cannot be told: every pair of times is noisy."
        return Finding(noisy) if len(_measured(rows)) else None
    texts, grows = [], []
    for phase, group in found.groupby("phase", sort=False):
        least, most = (group.loc[index()] for index in (group["flops"].idxmin, group["flops"].idxmax))
        told = f"{phase} of {least['size']} at context {least['context_length']} {number(least['speedup'])}"
        if most["flops"] > least["flops"]:
            told += f", of {most['size']} at context {most['context_length']} {number(most['speedup'])}"
            grows.append(bool(most["speedup"] > least["speedup"]))
        texts.append(told)
    fact = (
        f"Under bfloat16 autocast steps are so many times as fast as in float32: {'; '.join(texts)} "
        f"({plural(len(found), 'quiet pair')})"
    )
    if not grows:
        return Finding(f"{fact}.")
    return Finding.checked(
        fact,
        all(grows),
        so=": where there are more products, autocast gains more.",
        but=": more products do not mean that autocast gains more here.",
    )


def _by_operators(rows: pd.DataFrame) -> Finding | None:
    """Of two sizes in the same phase and context, does the one gain more that should?"""
    found = _quiet(rows).dropna(subset=["operators_speedup"])
    agreeing, compared = ordered_as_expected(found, "speedup", "operators_speedup")
    if not compared:
        return None
    least, most = found["operators_speedup"].min(), found["operators_speedup"].max()
    return Finding.checked(
        f"By their operators, each limited by its products or its traffic, they would be {number(least)} to "
        f"{number(most)} times as fast; of {plural(compared, 'comparison')} of two sizes in one phase and context, "
        f"{agreeing} come out in that order",
        agreeing > 0.75 * compared,
        so=(
            ": wider models do more FLOPs for every byte, and it is FLOPs that get cheaper, while norms, residual "
            "stream and AdamW move as many bytes as before."
        ),
        but=": what products and traffic predict is not what decides here.",
    )


def ordered_as_expected(found: pd.DataFrame, column: str, expected: str) -> tuple[int, int]:
    """Of all pairs of rows of one phase and context, in how many the larger is expected to be larger; and how many."""
    agreeing, compared = 0, 0
    for _, group in found.groupby(["phase", "context_length"], sort=False) if len(found) else ():
        values = list(zip(group[column], group[expected], strict=True))
        for index, (one, one_expected) in enumerate(values):
            for other, other_expected in values[index + 1 :]:
                compared += 1
                agreeing += (one > other) == (one_expected > other_expected)
    return agreeing, compared


def _memory(rows: pd.DataFrame) -> Finding | None:
    found = _measured(rows).dropna(subset=["memory_ratio"])
    if not len(found):
        return None
    least, most = (found.loc[index()] for index in (found["memory_ratio"].idxmin, found["memory_ratio"].idxmax))
    what = "allocate" if set(found["device"]) == {"cuda"} else "make the resident set grow by"
    return Finding.checked(
        f"Under autocast steps {what} {number(least['memory_ratio'])} ({_work(least)}) to "
        f"{number(most['memory_ratio'])} ({_work(most)}) times what they do in float32",
        bool(least["memory_ratio"] > 0.5),
        so=": not half, since weights, gradients and moments stay in float32, and every weight matrix is cast besides.",
        but=": half or less.",
    )


def published_findings(steps: pd.DataFrame, peaks: pd.DataFrame) -> Findings:
    """What others published of the same question: times and peaks on an A100."""
    steps = steps.assign(
        phase="step",
        speedup=steps["none_ms"] / steps["bfloat16_ms"],
        operators_speedup=steps["none_operators_ms"] / steps["bfloat16_operators_ms"],
    )
    return Findings([_published_times(steps), _published_growth(steps), _published_peaks(peaks)])


def _published_times(steps: pd.DataFrame) -> Finding:
    shortest = steps[steps["context_length"] == steps["context_length"].min()].sort_values("flops")
    agreeing, compared = ordered_as_expected(steps, "speedup", "operators_speedup")
    texts = ", ".join(f"{number(row.speedup)} for {row.size}" for row in shortest.itertuples())
    return Finding.checked(
        f"On an {A100} others' training steps at context {shortest['context_length'].iloc[0]} were, under autocast, so "
        f"many times as fast as in float32: {texts}. {agreeing} of {plural(compared, 'comparison')} of two sizes at "
        "one context come out in the order that their operators' FLOPs and bytes give",
        agreeing == compared,
        so=": the wider the model, the more of its time are products.",
        but=".",
    )


def _published_growth(steps: pd.DataFrame) -> Finding:
    """From one context to twice that: what grows as FLOPs do is bound by them."""
    doubled = steps.assign(context_length=2 * steps["context_length"])
    found = doubled.merge(steps, on=["d_model", "d_ff", "num_layers", "num_heads", "context_length"])
    found = found[found["context_length"] == found["context_length"].min()]
    grown = {name: found[f"{name}_y"] / found[f"{name}_x"] for name in ("flops", "none_ms", "bfloat16_ms")}
    texts = {name: f"{number(ratio.min(), 3)} to {number(ratio.max(), 3)} times" for name, ratio in grown.items()}
    context = int(found["context_length"].iloc[0])
    return Finding.checked(
        f"From context {context // 2} to {context} the FLOPs of a step grow to {texts['flops']}, its time in float32 "
        f"to {texts['none_ms']}, and under autocast to {texts['bfloat16_ms']}",
        bool(grown["bfloat16_ms"].max() < 1.05 < grown["none_ms"].min()),
        so=(
            ". Under autocast these steps do not wait for their products any more, but for what is the same at both "
            "contexts: the launches of their kernels, to which autocast adds its casts."
        ),
        but=".",
    )


def _published_peaks(peaks: pd.DataFrame) -> Finding:
    sound = peaks[(peaks["remark"] == "") & (peaks["phase"] == "forward")]
    plain, mixed = (sound[sound["autocast"] == name].set_index("context_length") for name in (_PLAIN, _MIXED))
    shared = sorted(set(plain.index) & set(mixed.index))
    texts, grown = [], []
    for context in shared:
        before, after = plain.loc[context, "at_least_bytes"] / 1e9, mixed.loc[context, "at_least_bytes"] / 1e9
        grown.append(after - before)
        texts.append(f"{before:.0f} GB in float32 and {after:.0f} GB under autocast at context {context}")
    return Finding.checked(
        f"The published peaks of GPT-2 XL's forward, decimals cut off, are {'; '.join(texts)}",
        grown[0] > 0 > grown[-1],
        so=(
            ". A short context holds more under autocast, for the weights' copies in bfloat16 come on top; a long one "
            "less, since what blocks keep for backward becomes smaller, and there is more of that."
        ),
        but=".",
    )

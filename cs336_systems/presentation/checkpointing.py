"""Problem `gradient_checkpointing` as tables, figures and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import marks, staleness
from cs336_systems.bench.report import (
    COLOURS,
    GIB,
    MARKERS,
    MIB,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    figure_style,
    logarithmic,
    mebibytes,
    number,
    plural,
    with_deviation,
)
from cs336_systems.presentation.transformer_step import caption_of, model_in_words, same_but

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = (
    "Inputs are activations between blocks, or between halves of them under the selective policy; kept is what those "
    "blocks keep for backward that have it. The least peak has logits and gradients too, and nothing temporary. Work "
    "is the FLOPs of all products as a multiple of those without checkpointing."
)


def prediction(predicted: pd.DataFrame) -> Table:
    """What every policy must hold and do, before anything runs."""
    columns = [*_identity(predicted), *_counted(), Column("floor of none (ms)", lambda row: number(row.bound_ms))]
    return Table.of(predicted, columns, caption="What checkpoints hold and do, counted", notes=[NOTE])


def _identity(rows: pd.DataFrame) -> list[Column]:
    varying = [
        Column(name, partial(_text, name=field), "left")
        for name, field in (("autocast", "autocast"), ("compile", "compile"), ("context", "context_length"))
        if len(rows) and rows[field].nunique() > 1
    ]
    return [
        Column("size", lambda row: row.size, "left"),
        Column("blocks", lambda row: str(row.num_layers)),
        *varying,
        Column("checkpointing", lambda row: row.checkpointing, "left"),
    ]


def _text(row: Any, name: str) -> str:
    return str(getattr(row, name))


def _counted() -> list[Column]:
    return [
        Column("inputs", lambda row: number_of(row.accounted_inputs)),
        Column("kept (MiB)", lambda row: mebibytes(row.accounted_kept_bytes)),
        Column("both (MiB)", lambda row: mebibytes(row.accounted_activation_bytes)),
        Column("least peak (MiB)", lambda row: mebibytes(row.accounted_step_bytes)),
        Column("runs of a block", lambda row: number(row.accounted_block_runs)),
        Column("work", lambda row: number(row.accounted_work)),
    ]


def number_of(count: float) -> str:
    return number(count) if count != count else f"{count:.0f}"


# Policies on a size --------------------------------------------------------------------------------------------


def table(summary: pd.DataFrame) -> Table:
    """Part (b): peak and time of each policy, beside what is counted."""
    return _table(summary[~summary["is_of_depth"].astype(bool)] if len(summary) else summary, "Checkpointing by policy")


def depth_table(summary: pd.DataFrame) -> Table:
    """Part (a): the same of a narrow model, as it gets deeper."""
    return _table(summary[summary["is_of_depth"].astype(bool)] if len(summary) else summary, "Checkpointing by depth")


def _table(rows: pd.DataFrame, what: str) -> Table:
    columns = [
        *_identity(rows),
        Column("peak (MiB)", _peak),
        Column("planned (MiB)", lambda row: mebibytes(row.planned_bytes)),
        Column("least (MiB)", lambda row: mebibytes(row.accounted_step_bytes)),
        Column("peak / none", lambda row: number(row.peak_of_none, 2)),
        Column("mean ± std (ms)", _time),
        Column("time / none", lambda row: number(row.times_none)),
        Column("work", lambda row: number(row.accounted_work)),
        Column("runs of a block", lambda row: number(row.block_runs)),
        Column("counted", lambda row: number(row.accounted_block_runs)),
    ]
    note = (
        "Peak is the most that one forward, loss and backward allocate at once, on top of the weights; planned is the "
        "same, followed on tensors without data; least is what is counted of it, without what is temporary. Work is "
        "the FLOPs of products, reruns included, over those of none."
    )
    notes = [note, *(remarks.notes_below(rows, _name) if len(rows) else [])]
    return Table.of(rows, columns, caption=_caption(rows, what), notes=notes)


def _caption(rows: pd.DataFrame, what: str) -> str:
    return caption_of(rows, what) + (f", context {rows['context_length'].iloc[0]}" if _one_context(rows) else "")


def _one_context(rows: pd.DataFrame) -> bool:
    return len(rows) > 0 and rows["context_length"].nunique() == 1


def _peak(row: Any) -> str:
    return str(row.status) if row.status != "ok" else mebibytes(row.peak_bytes) + marks(row)


def _time(row: Any) -> str:
    return str(row.status) if row.status != "ok" else with_deviation(row.mean_ms, row.std_ms) + marks(row)


def _name(row: pd.Series) -> str:
    return f"{model_in_words(row)}, {plural(row['num_layers'], 'block')}"


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    rows = summary[~summary["is_of_depth"].astype(bool)].reset_index(drop=True) if len(summary) else summary
    return remarks.by_machine(rows, table)


# The best group ------------------------------------------------------------------------------------------------


def best(groups: pd.DataFrame, most: int = 6) -> Table:
    """Part (b): what groups of each size hold, those around the best."""
    first = groups.iloc[0]
    shown = groups[groups["group"].isin(_around(groups, most))]
    columns = [
        Column("blocks per checkpoint", _group_text),
        Column("inputs", lambda row: str(row.inputs)),
        Column("kept (MiB)", lambda row: mebibytes(row.kept_bytes)),
        Column("both (MiB)", lambda row: mebibytes(row.activation_bytes)),
        Column("both, compiled (MiB)", lambda row: mebibytes(row.compiled_bytes)),
        Column("least peak of a step (MiB)", lambda row: mebibytes(row.step_bytes)),
        Column("work", lambda row: number(row.work)),
    ]
    caption = (
        f"Activations held by size of a group, counted: {first['size']}, {first['blocks']} blocks, context "
        f"{first['context_length']}, batch {first['batch_size']}, float32"
    )
    note = (
        "Half a block is its attention or its feed-forward, each with its norm, as under the selective policy. "
        "Compiled: blocks keep what torch.compile has them keep."
    )
    return Table.of(shown, columns, caption=caption, notes=[NOTE, note])


def _around(groups: pd.DataFrame, most: int) -> set[float]:
    """The best and those next to it, some larger, and none at all in checkpoints."""
    place = int(groups["activation_bytes"].to_numpy().argmin())
    sizes = groups["group"].tolist()
    near = sizes[max(0, place - 1) : place + 2]
    larger = [size for size in sizes if size > near[-1] and math.log2(size).is_integer()]
    return {*near, *larger[: most - len(near)]}


def _group_text(row: Any) -> str:
    return "½" if row.group == 0.5 else f"{row.group:.0f}"


def best_finding(groups: pd.DataFrame) -> Finding:
    """Part (b), by what is counted."""
    held = groups["activation_bytes"].to_numpy()
    place = int(held.argmin())
    row = groups.iloc[place]
    neighbours = [groups.iloc[near] for near in (place - 1, place + 1) if 0 <= near < len(groups)]
    beside = " and ".join(
        f"{number(each['activation_bytes'] / GIB)} GiB with {_group_text(each)}" for each in neighbours
    )
    one, none = groups[groups["group"] == 1].iloc[0], groups.iloc[-1]
    between = (none["activation_bytes"] - none["kept_bytes"]) / none["inputs"]
    root = math.sqrt(row["blocks"] * between / one["kept_bytes"])
    blocks = "block" if row["group"] <= 1 else "blocks"
    return Finding.checked(
        f"(b) Of {row['size']} at context {row['context_length']}, batch {row['batch_size']}, checkpoints of "
        f"{_group_text(row)} {blocks} hold the least, {number(row['activation_bytes'] / GIB)} GiB of activations, "
        f"against {beside}, and {number(none['kept_bytes'] / GIB)} GiB that all blocks keep. One block keeps as much "
        f"as {number(one['kept_bytes'] / between)} activations between blocks, so that √(N·S/A) is {number(root, 2)}",
        bool(row["group"] <= 1) == bool(root < 1.5),
        so=": no group of several can be worth it." if root < 1.5 else ": the root tells it.",
        but=": the root does not tell it here.",
    )


# The handout's block -------------------------------------------------------------------------------------------


def residuals(found: pd.DataFrame) -> Table:
    """What compiled blocks save, beside what the handout quotes."""
    columns = [
        Column("blocks", lambda row: str(row.blocks)),
        Column("blocks per checkpoint", lambda row: str(row.group) if row.group else "none"),
        Column("tensors", lambda row: str(row.tensors)),
        Column("bytes", lambda row: f"{row.bytes:,}"),
        Column("MiB", lambda row: mebibytes(row.bytes)),
        Column("handout (MiB)", lambda row: f"{row.published_mib:,.2f}"),
    ]
    caption = (
        "Saved for backward by compiled blocks: d_model 2560, d_ff 10240, 16 heads, batch 4, context 2048, float32"
    )
    note = "Every tensor that autograd saves, each with its own size and as often as it is saved, without parameters."
    return Table.of(found, columns, caption=caption, notes=[note])


def residuals_finding(found: pd.DataFrame) -> Finding:
    """Whether they are the handout's figures."""
    off = (found["bytes"] / MIB - found["published_mib"]).abs().max()
    return Finding.checked(
        f"The compiler, asked here, keeps {', '.join(mebibytes(each) for each in found['bytes'])} MiB of compiled "
        "blocks",
        bool(off < 0.005),
        so=": the handout's figures, to their last digit.",
        but=f": up to {number(off)} MiB off the handout's figures.",
    )


# By depth ------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """Part (a): peak and work over the number of blocks, measured and counted."""
    rows = summary[summary["is_of_depth"].astype(bool)] if len(summary) else summary
    told = _caption(rows, "Peak and time of checkpoints by depth")
    return Picture(f"{told}; lines are counted, marks measured", partial(_draw, rows))


def _draw(rows: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    with figure_style():
        drawing = Figure(figsize=(8.2, 3.2))
        memory, time = drawing.subplots(1, 2)
        for place, (policy, group) in enumerate(rows.groupby("checkpointing", sort=False)):
            group = group.sort_values("num_layers")
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            for panel, counted, measured in (
                (memory, group["accounted_step_bytes"] / MIB, group["peak_bytes"] / MIB),
                (time, group["accounted_work"], group["times_none"]),
            ):
                panel.plot(group["num_layers"], counted, color=colour, marker="", linewidth=1.1)
                style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5}
                panel.plot(group["num_layers"], measured, label=policy, **style)
        memory.set(ylabel="peak (MiB)", title="memory: least, and measured peak")
        time.set(ylabel="multiple of none", title="work, and measured time")
        for panel in (memory, time):
            panel.set_xlabel("blocks")
            panel.set_xscale("log", base=2)
            panel.set_xticks(depths := sorted(set(rows["num_layers"])), map(str, depths))
            if len(rows):
                logarithmic(panel.yaxis)
        handles, labels = memory.get_legend_handles_labels()
        if handles:
            drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawing


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """The answers to (a) and (b), as far as they are measured."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py checkpointing`.")])
    if not summary["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case was measured; the notes of the table say why.")])
    of_depth = summary["is_of_depth"].astype(bool)
    return Findings(
        [
            *Finding.from_all(summary[of_depth], "How memory and work grow with the depth", by_depth),
            *Finding.from_all(summary, "How often blocks run", counts),
            *Finding.from_all(summary[~of_depth], "Which group holds the least", best_measured),
            *Finding.from_all(summary[~of_depth], "What the saved memory costs in time", cost),
            *staleness(summary),
        ]
    )


def by_depth(rows: pd.DataFrame) -> Finding | None:
    """Part (a): the growth from the shallowest to the deepest model."""
    measured = rows[rows["status"] == "ok"]
    texts, agree = [], []
    for policy, group in measured.groupby("checkpointing", sort=False):
        group = group.sort_values("num_layers")
        if len(group) < 2 or not group["accounted_step_bytes"].notna().all():
            continue
        first, last = group.iloc[0], group.iloc[-1]
        grown, expected = (last[name] / first[name] for name in ("peak_bytes", "accounted_step_bytes"))
        texts.append(f"{policy} {number(grown)} times (counted: {number(expected)})")
        agree.append(grown / expected)
    if not texts:
        return None
    shallow, deep = measured["num_layers"].min(), measured["num_layers"].max()
    return Finding.checked(
        f"(a) From {shallow} to {deep} blocks the peak grows: {', '.join(texts)}",
        all(0.7 < ratio < 1.4 for ratio in agree),
        so=". Halves hold one activation more for twice the blocks; gradients are what else grows.",
        but=": not all as counted.",
    )


def counts(rows: pd.DataFrame) -> Finding | None:
    """Whether reruns are those of the plan."""
    known = rows[rows["status"] == "ok"].dropna(subset=["block_runs", "accounted_block_runs"])
    if not len(known):
        return None
    same = (known["block_runs"] == known["accounted_block_runs"]) & (known["flops"] == known["accounted_flops"])
    return Finding.checked(
        f"In {int(same.sum())} of {plural(len(known), 'case')} blocks run as often as counted, and PyTorch's counter "
        "finds the same FLOPs",
        bool(same.all()),
        so=": every product that is done once more is accounted for.",
        but=": something else is done as well, or less.",
    )


def best_measured(rows: pd.DataFrame) -> Finding | None:
    """Part (b), by measured peaks."""
    measured = rows[(rows["status"] == "ok") & rows["checkpointing"].str.startswith("every-")]
    groups = [group for _, group in measured.groupby(same_but(measured, "checkpointing"), sort=False, dropna=False)]
    texts, agree = [], []
    for group in groups:
        if len(group) < 2:
            continue
        order = group.sort_values("peak_bytes")
        least, then = order.iloc[0], order.iloc[1]
        texts.append(
            f"{model_in_words(pd.Series({**least, 'checkpointing': 'none'}))}: {least['checkpointing']} with "
            f"{bytes_in_words(least['peak_bytes'])}, before {then['checkpointing']} with "
            f"{bytes_in_words(then['peak_bytes'])}"
        )
        agree.append(least["accounted_step_bytes"] == group["accounted_step_bytes"].min())
    if not texts:
        return None
    return Finding.checked(
        f"(b) The lowest measured peak of groups has, of {'; '.join(texts)}",
        all(agree),
        so=": the size that is counted to be the best.",
        but=": another size than is counted to be the best.",
    )


def cost(rows: pd.DataFrame) -> Finding | None:
    """What the policies cost, beside the work that they do."""
    measured = rows[(rows["status"] == "ok") & (rows["checkpointing"] != "none")].dropna(subset=["times_none"])
    if not len(measured):
        return None
    texts = [
        f"{row.checkpointing} {number(row.peak_of_none, 2)} of the peak"
        + (f" for {number(row.accounted_work, 2)} times the work" if row.accounted_work == row.accounted_work else "")
        + (f" in {number(row.times_none, 2)} times the time" if row.is_quiet_beside_none else "")
        for row in measured.itertuples()
    ]
    fact = f"Beside no checkpointing: {'; '.join(texts)}"
    lower = measured[measured["peak_of_none"] < 1]
    if not len(lower):
        return Finding(f"{fact}. No policy lowers the peak here.")
    timed = lower[lower["is_quiet_beside_none"]]
    if not len(timed):
        return Finding(f"{fact}. What memory costs in time cannot be told: every pair of times is noisy.")
    return Finding.checked(
        f"{fact}{'' if len(timed) == len(lower) else ' (noisy times are left out)'}",
        bool((timed["times_none"] > 1).all()),
        so=". Memory is bought with time.",
        but=". Yet not every policy that lowers the peak takes longer here.",
    )

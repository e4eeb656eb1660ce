"""Problem `nsys_profile` as tables, a figure and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd

from cs336_systems.analysis.published import A100
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import enumerated, marks, staleness
from cs336_systems.bench.report import (
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    number,
    percent,
    plural,
    shortened,
    verbatim,
    with_deviation,
)
from cs336_systems.experiments.step_profile import PRODUCTS
from cs336_systems.presentation.step_profile_attention import attention_rows
from cs336_systems.presentation.step_profile_drawing import draw
from cs336_systems.presentation.transformer_step import (
    caption_of,
    identity,
    model_in_words,
    published_text,
    same_but,
    without_autocast,
)
from cs336_systems.profiling.categories import CATEGORIES

TOP = 8
PHASES_OF_STEP = ("forward", "loss", "backward", "optimizer")


def prediction(predicted: pd.DataFrame) -> Table:
    """What share of the time products would have if every part ran at its ceiling, before anything runs."""
    columns = [
        *identity(predicted),
        Column("floor of the phase (ms)", lambda row: number(row.bound_ms)),
        Column("products' share if all ran at their ceilings", lambda row: percent(row.product_share)),
        Column("softmax / products of attention: FLOPs", lambda row: number(row.softmax_flops_ratio, 2)),
        Column("bytes moved", lambda row: number(row.softmax_traffic_ratio, 2)),
    ]
    ceilings = predicted["ceilings"].iloc[0] if len(predicted) else "no machine"
    notes = [
        "Operators that are not fused move more bytes than a single kernel, which lowers the share; products that miss "
        "their ceiling raise it. Bytes moved are those of the reference's operators."
    ]
    return Table.of(predicted, columns, caption=f"Where the time should go on {ceilings}, predicted", notes=notes)


# The stopwatch -------------------------------------------------------------------------------------------------


def stopwatch(summary: pd.DataFrame) -> Table:
    """Part (a): whole steps by the stopwatch, under the profiler, and as the profile has them."""
    columns = [
        *identity(summary),
        Column("stopwatch, median (ms)", partial(_timed, name="stopwatch")),
        Column("under the profiler (ms)", partial(_timed, name="profiled")),
        Column("ratio", lambda row: number(row.profiled_ms / row.stopwatch_ms, 3)),
        Column("range open (ms)", lambda row: number(row.open_ms, 4)),
        Column(f"{_units(summary)} busy (ms)", lambda row: number(row.busy_ms, 4)),
        Column(_units(summary), lambda row: _count(row.instances)),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        Column("stopwatch / floor", lambda row: number(row.stopwatch_ms / row.bound_ms, 2)),
        Column(f"{A100} (ms)", lambda row: published_text(row.a100_ms, row.a100_std_ms)),
    ]
    rows = whole_phases(summary)
    note = (
        "By stopwatch and under the profiler: medians of whole steps with their synchronisation, and deviations. How "
        "long the range was open, and how long at least one of what it launched ran, are averages of recorded steps."
    )
    return Table.of(rows, columns, caption=caption(summary, "Stopwatch and profiler"), notes=[note, *_notes(rows)])


def table(summary: pd.DataFrame) -> Table:
    """The table that stands for the experiment where one alone is printed: (a)."""
    return stopwatch(summary)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    return remarks.by_machine(whole_phases(summary), stopwatch)


def whole_phases(summary: pd.DataFrame) -> pd.DataFrame:
    """Of each record the range that is its phase."""
    if not len(summary):
        return summary
    whole = summary["phase"].where(summary["phase"] == "forward", "step")
    return summary[summary["range"] == whole]


def _timed(row: Any, name: str) -> str:
    if row.status != "ok":
        return str(row.status)
    return with_deviation(getattr(row, f"{name}_ms"), getattr(row, f"std_{name}_ms")) + marks(row)


def _units(summary: pd.DataFrame) -> str:
    """What the profiles count: kernels on a GPU, operators on a CPU."""
    kinds = set(summary["unit"]) if len(summary) else set()
    return f"{kinds.pop()}s" if len(kinds) == 1 else "kernels or operators"


def _count(instances: float) -> str:
    return MISSING if instances != instances else f"{instances:,.0f}"


def caption(summary: pd.DataFrame, what: str) -> str:
    """What all rows share, from the records themselves."""
    steps = f"; {plural(int(summary.iloc[0]['steps']), 'recorded step')}" if len(summary) else ""
    return f"{caption_of(summary, what)}{steps}"


def _notes(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name, _name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['phase']} of {model_in_words(row)}"


# Kernels -------------------------------------------------------------------------------------------------------


def kernels(summary: pd.DataFrame, range_name: str = "forward", top: int = TOP) -> Table | Finding:
    """Part (b): of the largest case the kernels of a range that take the most time, in Nsight Systems' columns."""
    row = largest(summary, range_name)
    if row is None:
        return Finding(f"No case that has a range {range_name} could be profiled: the table above says why.")
    within = "alone" if row["phase"] == range_name else f"within a {row['phase']}"
    what = f"{range_name.capitalize()} of {model_in_words(row)}, {within}, on {row['machine']}, by {row['unit']}"
    shown = pd.DataFrame(row["kernels"][:top])
    if not len(shown):
        return remarks.without_record(row, what, _notes)
    columns = [
        Column("time %", lambda kernel: f"{100 * kernel.share:.1f}"),
        Column("total (ms)", lambda kernel: number(kernel.total_ms, 4)),
        Column("instances", lambda kernel: _count(kernel.instances)),
        Column("average (ms)", lambda kernel: number(kernel.total_ms / kernel.instances, 4)),
        Column("median (ms)", lambda kernel: number(kernel.median_ms, 4)),
        Column("min (ms)", lambda kernel: number(kernel.min_ms, 4)),
        Column("max (ms)", lambda kernel: number(kernel.max_ms, 4)),
        Column("std (ms)", lambda kernel: number(kernel.std_ms, 4)),
        Column("category", lambda kernel: kernel.category, "left"),
        Column(row["unit"], lambda kernel: verbatim(shortened(kernel.name)), "left"),
    ]
    own = " Times are the operators' own, without what they call." if row["unit"] == "operator" else ""
    left = row["total_ms"] - shown["total_ms"].sum()
    note = (
        f"Total and instances are per step; the others of single {row['unit']}s.{own} Not shown are "
        f"{percent(max(0.0, left) / row['total_ms'])} of the time."
    )
    return Table.of(shown, columns, caption=what, notes=[note])


def largest(summary: pd.DataFrame, range_name: str) -> pd.Series | None:
    """The row of a range that does the most work, measured or yet to be.

    Of several alike one without autocast goes before, then one whose phase is that range alone.
    """
    rows = summary[summary["range"] == range_name] if len(summary) else summary
    rows = rows[rows["status"].isin(["ok", "missing"])] if len(rows) else rows
    if not len(rows):
        return None
    order = {
        "work": rows["num_layers"] * rows["d_model"] ** 2 * rows["context_length"],
        "is_plain": rows["autocast"] == "none",
        "is_alone": rows["phase"] == range_name,
    }
    return rows.assign(**order).sort_values(list(order), kind="stable").iloc[-1]


def largest_pair(summary: pd.DataFrame, first: str, second: str) -> tuple[pd.Series, pd.Series] | None:
    """The rows of two ranges of the same model, of that which does the most work; the first one alone, if there is."""
    measured = summary[summary["status"] == "ok"]
    models = measured[same_but(measured, "phase")].map(str).agg(" ".join, axis="columns") if len(measured) else None
    if models is None:
        return None
    known = models[measured["range"] == second]
    row = largest(measured[models.isin(known)], first)
    if row is None:
        return None
    other = largest(measured[models == models[row.name]], second)
    return None if other is None else (row, other)


# Categories ----------------------------------------------------------------------------------------------------


def categories(summary: pd.DataFrame) -> Table:
    """Parts (c) and (d): how every phase's time divides among the kinds of work."""
    rows = divided(summary)
    columns = [
        *identity(rows),
        Column("range", lambda row: row.range, "left"),
        Column("time (ms)", lambda row: number(row.total_ms, 4)),
        *(Column(name, partial(_share, category=name)) for name in CATEGORIES),
        Column("floor (ms)", lambda row: number(row.range_bound_ms or None)),
        Column(f"{A100} (ms)", lambda row: number(row.a100_gpu_ms)),
        Column("products there, at least", lambda row: percent(row.a100_products_percent_at_least / 100)),
    ]
    return Table.of(rows, columns, caption=caption(summary, f"Time of {_units(summary)} by kind"), notes=_notes(rows))


def divided(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that stand for inference (a forward alone), for the phases of a step, and for a whole step."""
    if not len(summary):
        return summary
    shown = summary["range"].isin(["step", *PHASES_OF_STEP])
    return summary[shown]


def _share(row: Any, category: str) -> str:
    if row.status != "ok" or not row.total_ms:
        return MISSING
    share = row.categories.get(category, 0.0) / row.total_ms
    return MISSING if not share else percent(share)


def figure(summary: pd.DataFrame) -> Picture:
    """A bar for inference and one for a whole step of each case, and of the largest for each phase, by kind of work."""
    shown = partial(draw, bars(divided(summary)), _units(summary))
    return Picture(f"{caption(summary, 'Share of the time by kind')}; times per step beside", shown)


def bars(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the measured rows those that the figure has room for."""
    rows = rows[(rows["status"] == "ok") & (rows["total_ms"] > 0)] if len(rows) else rows
    if not len(rows):
        return rows
    step = largest(rows, "step")
    whole = rows["phase"].eq("forward") | rows["range"].eq("step")
    return rows[whole if step is None else whole | rows["case"].eq(step["case"])]


# Attention -----------------------------------------------------------------------------------------------------


def attention(summary: pd.DataFrame) -> Table:
    """Part (e): softmax beside the two products of attention, by time, FLOPs and bytes moved."""
    rows = attention_rows(summary)
    columns = [
        *identity(rows),
        Column("scores (ms)", lambda row: number(row.scores_ms)),
        Column("of it product (ms)", lambda row: number(row.scores_product_ms)),
        Column("softmax (ms)", lambda row: number(row.softmax_ms)),
        Column("value product (ms)", lambda row: number(row.value_product_ms)),
        Column("softmax / products: time", lambda row: number(row.time_ratio, 2)),
        Column("FLOPs", lambda row: number(row.softmax_flops_ratio, 2)),
        Column("bytes moved", lambda row: number(row.softmax_traffic_ratio, 2)),
        Column("attention (ms)", lambda row: number(row.attention_ms)),
        Column("floor (ms)", lambda row: number(row.attention_floor_ms)),
    ]
    note = (
        "All layers of a forward together. The time ratio is softmax over the product kernels alone; scores also "
        "divides and masks, and attention has projections, norm and rotary embedding beside."
    )
    return Table.of(rows, columns, caption=caption(summary, "Inside attention, forward"), notes=[note, *_notes(rows)])


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """The answers to (a) to (e)."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py step_profile`.")])
    if not summary["status"].isin(["ok", "missing"]).any():
        return Findings([Finding("No case has a profile; the notes of the table say why.")])
    plain = without_autocast(summary)
    forward = summary[summary["phase"] == "forward"]
    plain_forward = plain[plain["phase"] == "forward"]
    answers = [
        *Finding.from_all(forward, "How forward under the profiler compares with the stopwatch", profiling_cost),
        *Finding.from_all(plain, "Which kernel takes the most time", top_kernel),
        *Finding.from_all(plain, "What matters beside matrix products", beside_products),
        *Finding.from_all(plain, "How the share of matrix products changes with training", product_shares),
        *Finding.from_all(
            plain_forward, "How softmax compares with the products of attention", softmax_beside_products
        ),
    ]
    lacking = [phase for phase in ("forward", "step") if not summary["phase"].eq(phase).any()]
    if lacking:
        parts = {"forward": "(a), (d) and (e)", "step": "(d)"}[lacking[0]]
        answers.append(Finding(f"{parts} cannot be answered: no phase {' and no phase '.join(lacking)} was asked for."))
    return Findings([*answers, *staleness(summary)])


def profiling_cost(rows: pd.DataFrame) -> Finding | None:
    """Part (a)."""
    measured = whole_phases(rows[rows["status"] == "ok"])
    quiet = measured[measured["noise"] == ""]
    if not len(measured):
        return None
    if not len(quiet):
        return Finding("How forward under the profiler compares cannot be told: every time is noisy.")
    ratio = quiet["profiled_ms"] / quiet["stopwatch_ms"]
    span = f" ({number(ratio.min(), 3)} to {number(ratio.max(), 3)})" if len(ratio) > 1 else ""
    return Finding.checked(
        f"(a) Under the profiler forward takes {number(ratio.median(), 3)} times what the stopwatch says without it, "
        f"the median of {plural(len(quiet), 'quiet case')}{span}",
        bool(abs(ratio.median() - 1) <= 0.1),
        so=": the profile may be read for times.",
        but=": the profile is to be read for shares, and the stopwatch for times.",
    )


def top_kernel(rows: pd.DataFrame) -> Finding | None:
    """Part (b)."""
    pair = largest_pair(rows, "forward", "backward")
    forward = largest(rows, "forward") if pair is None else pair[0]
    if forward is None or not forward["kernels"]:
        return None
    first = forward["kernels"][0]
    fact = (
        f"(b) In forward of {model_in_words(forward)} the {forward['unit']} with the most time is "
        f"{verbatim(shortened(first['name']))}, with {percent(first['share'])} of it in {_count(first['instances'])} "
        "calls"
    )
    if pair is None:
        return Finding(f"{fact}.")
    then = pair[1]["kernels"][0]
    return Finding.checked(
        fact,
        then["name"] == first["name"],
        so=f"; in backward it is the same, with {percent(then['share'])} in {_count(then['instances'])} calls.",
        but=f"; in backward it is {verbatim(shortened(then['name']))}, with {percent(then['share'])}.",
    )


def beside_products(rows: pd.DataFrame) -> Finding | None:
    """Part (c)."""
    row = largest(rows, "forward")
    if row is None:
        return None
    others = [kernel for kernel in row["kernels"] if kernel["category"] not in PRODUCTS and kernel["share"] >= 0.01]
    if not others:
        return Finding(f"(c) Beside matrix products nothing takes a hundredth of forward ({model_in_words(row)}).")
    named = [f"{verbatim(shortened(kernel['name']))} {percent(kernel['share'])}" for kernel in others[:5]]
    return Finding.checked(
        f"(c) Beside matrix products forward of {model_in_words(row)} spends its time in {enumerated(named)}",
        all(kernel["category"] in ("elementwise", "copies", "softmax and other reductions") for kernel in others[:5]),
        so=": operators that do next to no arithmetic on what they move.",
        but=".",
    )


def product_shares(rows: pd.DataFrame) -> Finding | None:
    """Part (d): of one model alone and in a whole step."""
    pair = largest_pair(rows[rows["phase"].isin(["forward", "step"])], "forward", "step")
    if pair is None or pair[0]["phase"] != "forward" or pair[1]["phase"] != "step":
        return None
    inference, step = pair
    optimizer = rows[(rows["case"] == step["case"]) & (rows["range"] == "optimizer")]
    share = "".join(
        f" The optimizer, {percent(row.total_ms / step['total_ms'])} of it, has none." for row in optimizer.itertuples()
    )
    return Finding.checked(
        f"(d) Matrix products are {percent(inference['product_share'])} of inference and "
        f"{percent(step['product_share'])} of a whole training step ({model_in_words(step)})",
        bool(step["product_share"] < inference["product_share"]),
        so=f": training adds more of everything else.{share}",
        but=f": here training does not lower their share.{share}",
    )


def softmax_beside_products(rows: pd.DataFrame) -> Finding | None:
    """Part (e): whether the ratio of times is that of the bytes, and not that of the FLOPs."""
    known = attention_rows(rows[rows["status"] == "ok"])
    known = known.dropna(subset=["time_ratio"]) if len(known) else known
    if not len(known):
        return None
    row = known.sort_values(["context_length", "d_model"]).iloc[-1]
    time, of_flops, of_bytes = row["time_ratio"], row["softmax_flops_ratio"], row["softmax_traffic_ratio"]
    return Finding.checked(
        f"(e) In attention of {model_in_words(row)} softmax takes {number(time, 2)} times as long as the two products, "
        f"and does {number(of_flops, 2)} times their FLOPs; its operators move {number(of_bytes, 2)} times the bytes",
        bool(time > 3 * of_flops and abs(math.log(time / of_bytes)) < abs(math.log(time / of_flops))),
        so=": its time goes with the scores that it moves, and not with its arithmetic.",
        but=": here its time is nearer to that of its arithmetic.",
    )

"""The problems of data parallel as tables, figures and sentences."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import marks, staleness
from cs336_systems.bench.report import (
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    beginning,
    bytes_in_words,
    number,
    percent,
    plural,
    with_deviation,
)
from cs336_systems.experiments.data_parallel import BYTES_PER_MB, COMPARED_MB, MOST_OFF, WRONG
from cs336_systems.experiments.data_parallel_ranks import ALONE, variant_name
from cs336_systems.presentation.data_parallel_drawing import (
    case_name,
    cases_of,
    cost_of,
    draw_overhead,
    draw_steps,
    draw_timeline,
)
from cs336_systems.presentation.transformer_step import caption_of

AFTER, DURING = ("naive", "flat"), ("overlapped", "bucketed")
"""Ours that communicate after backward, and during it."""
PYTORCHS = variant_name("torch", COMPARED_MB)
OURS = variant_name("bucketed", COMPARED_MB)
EPS = float(np.finfo(np.float32).eps)
CLOSE = 0.1
"""Of PyTorch's step time: how far ours may be off to keep up with it."""
NOTE = (
    "Times are of the slowest rank, from a moment at which all had arrived. Alone is the step without communication, "
    "with the same share of the batch; exposed is by how much the gradients of all ranks are there later than those of "
    "a rank alone, finish the time from the end of the last rank's backward until all have them. Reductions are those "
    "of gradients: ours make one more, of a byte per parameter. Their number, where the wrapper is not ours, and the "
    "overlapped share of the communication are of one more step under the profiler; there a call begins when its last "
    "rank has begun it, since until then it waits. Off one process is the norm of the difference between the averaged "
    "gradients and those of one process on the whole batch, by the latter's and by the spacing ε of float32 at 1. The "
    "model is that of the section on bucket sizes."
)
UNMATCHED = (
    "‡ ranks made different numbers of calls, so that it is not known which belong together: each begins when its own "
    "rank has begun it, and waiting for others counts as communication."
)


def prediction(predicted: pd.DataFrame) -> Table:
    """What each step reduces, and its floor, before anything runs."""
    columns = [
        Column("size", lambda row: row.size, "left"),
        Column("blocks", lambda row: str(row.num_layers)),
        Column("context", lambda row: str(row.context_length)),
        Column("ranks", lambda row: str(row.world_size)),
        Column("batch of a rank", lambda row: str(row.batch_size // row.world_size)),
        Column("gradients (MB)", lambda row: number(row.gradient_bytes / BYTES_PER_MB, 4)),
        Column("a rank holds at least (MB)", lambda row: number(row.planned_bytes / BYTES_PER_MB, 4)),
        Column("wrappers in turn", lambda row: str(row.variants)),
        Column("floor alone (ms)", lambda row: number(row.bound_ms)),
    ]
    return Table.of(predicted, columns, caption="What a step reduces, and its floor without any communication")


def table(summary: pd.DataFrame) -> Table:
    """Step and communication by wrapper, and for buckets by their size."""
    columns = [
        *_identity(summary),
        Column("wrapper", lambda row: row.variant, "left"),
        Column("step, mean ± std (ms)", _step),
        Column("exposed (ms)", lambda row: number(row.exposed_ms)),
        Column("of the step", lambda row: percent(row.exposed_share)),
        Column("finish (ms)", lambda row: number(row.finish_ms)),
        Column("reductions", lambda row: number(row.reductions)),
        Column("overlapped", lambda row: percent(row.overlapped) + (" ‡" if not row.is_matched else "")),
        Column("off one process (ε)", lambda row: number(row.relative_error / EPS, 2)),
        Column("exposed by the model (ms)", lambda row: number(row.modelled_ms)),
        Column("floor alone (ms)", lambda row: number(row.bound_ms)),
    ]
    notes = [NOTE]
    if len(summary):
        notes += [UNMATCHED] if not summary["is_matched"].all() else []
        notes += remarks.notes_below(summary, _name, case_name)
    return Table.of(summary, columns, caption=caption(summary), notes=notes)


def _identity(rows: pd.DataFrame) -> list[Column]:
    """What tells the cases apart."""
    fields = {"size": "size", "context_length": "context", "world_size": "ranks"}
    return [
        Column(name, partial(_text, field=field), "left" if field == "size" else "right")
        for field, name in fields.items()
        if field == "size" or (len(rows) and rows[field].nunique() > 1)
    ]


def _text(row: Any, field: str) -> str:
    return str(getattr(row, field))


def _step(row: Any) -> str:
    return str(row.status) if row.status != "ok" else with_deviation(row.mean_ms, row.std_ms) + marks(row)


def _name(row: pd.Series) -> str:
    """The case, or where one of its wrappers has no room, which."""
    return f"{row['variant']} of {case_name(row)}" if row["is_left_out"] else case_name(row)


def caption(summary: pd.DataFrame) -> str:
    """What all rows share."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    parts = [caption_of(summary.assign(threads=None), "Data parallel")]
    parts += ["one thread for each rank"] if first["device"] == "cpu" else []
    parts += [plural(first["num_layers"], "block")] if summary["num_layers"].nunique() == 1 else []
    parts += [f"context {first['context_length']}"] if summary["context_length"].nunique() == 1 else []
    parts += [plural(first["world_size"], "rank")] if summary["world_size"].nunique() == 1 else []
    return ", ".join(parts)


# Figures -------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture | Finding:
    """Step time by wrapper: what a rank alone takes, and what communication adds."""
    if not len(summary):
        return Finding("No data-parallel step was measured.")
    return Picture(f"Step time by wrapper; {caption(summary)}", partial(draw_steps, summary))


def overhead_figure(summary: pd.DataFrame) -> Picture | Finding:
    """What buckets cost, by their size: measured, and by the model with its best size marked."""
    if not len(summary):
        return Finding("No data-parallel step was measured.")
    rows = summary[summary["wrapper"].isin(["bucketed", "torch"])]
    if not len(rows):
        return Finding("No wrapper with buckets was chosen.")
    return Picture(f"Overhead by size of bucket; {caption(summary)}", partial(draw_overhead, rows))


def timeline(summary: pd.DataFrame) -> Picture | Finding:
    """When each rank computed and communicated, by wrapper; a call begins when its last rank has begun it.

    Of several cases the first, of buckets those nearest to PyTorch's size; PyTorch's own only where no other is there.
    """
    if not len(summary):
        return Finding("No data-parallel step was measured.")
    cases = cases_of(summary)
    rows = cases[0]
    which = f" of {case_name(rows.iloc[0])}" if len(cases) > 1 else ""
    buckets = rows.loc[rows["wrapper"] == "bucketed", "bucket_mb"]
    is_shown = (rows["wrapper"] != ALONE) & ~rows.index.isin(buckets.index)
    if len(buckets):
        is_shown[(buckets - COMPARED_MB).abs().idxmin()] = True
    others = is_shown & (rows["wrapper"] != "torch")
    shown = rows[others if others.any() else is_shown]
    begin = "a call begins when its last rank has begun it"
    shared = caption(summary)
    return Picture(f"One step of every rank{which}, recorded; {begin}; {shared}", partial(draw_timeline, shown))


# Sentences -----------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """Everything, as the notebook tells it."""
    return Findings(
        [
            *right(summary),
            *naive(summary),
            *flat(summary),
            *overlapped(summary),
            *bucketed(summary),
            *pytorchs(summary),
            *_stale(summary),
        ]
    )


def _stale(summary: pd.DataFrame) -> list[Finding]:
    return staleness(summary) if len(summary) else []


def _of_each(summary: pd.DataFrame, subject: str, say: Any) -> Findings:
    """`say` of every case whose records are all there, given as its rows by variant."""
    if not len(summary):
        return Findings([Finding(f"{subject} is not known: run `python scripts/measure.py data_parallel`.")])
    told: list[Finding] = []
    for rows in cases_of(summary):
        told += Finding.from_all(rows, f"{subject} ({case_name(rows.iloc[0])})", partial(_said, say=say))
    return Findings(told)


def _said(rows: pd.DataFrame, say: Any) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    return say({row["variant"]: row for _, row in measured.iterrows()}) if len(measured) else None


def right(summary: pd.DataFrame) -> Findings:
    """Problem `naive_ddp` and those of the other wrappers: their gradients are those of one process."""
    return _of_each(summary, "Whether the gradients are those of one process", _right)


def _right(rows: dict[str, Any]) -> Finding | None:
    own = [row for row in rows.values() if row["wrong"] is not None]
    if not own:
        return None
    first = own[0]
    known = [row["relative_error"] for row in own if row["relative_error"] == row["relative_error"]]
    whose = "those of one process on the whole batch"
    fact = (
        f"the averaged gradients are at most {number(max(known) / EPS, 2)} times the spacing of float32 at 1 off "
        f"{whose}, relative to their norm"
        if known
        else f"no averaged gradients can be compared with {whose}"
    )
    limit = number(MOST_OFF[first["autocast"]] / EPS, 2)
    causes = {
        "ranks differ": "ranks differ with {}",
        "a gradient is missing or too many": "of {} some gradients are missing, or there where one process has none",
        "too far off": f"those of {{}} are further off than {limit} times, which is more than rounding, or no numbers",
    }
    names = {cause: ", ".join(row["variant"] for row in own if cause in row["wrong"]) for cause in WRONG}
    return Finding.checked(
        f"{beginning(case_name(first))}: {fact}",
        not any(names.values()),
        so="; all ranks have them equal to the last bit, with every wrapper.",
        but="; " + "; ".join(causes[cause].format(who) for cause, who in names.items() if who) + ".",
    )


def naive(summary: pd.DataFrame) -> Findings:
    """Problem `naive_ddp_benchmarking`: time per step, and the share that goes into communication."""
    return _of_each(summary, "The cost of one all-reduce per parameter", _naive)


def _naive(rows: dict[str, Any]) -> Finding | None:
    if "naive" not in rows:
        return None
    row, alone = rows["naive"], rows[ALONE]
    return Finding.checked(
        f"{beginning(case_name(row))}: a step with one all-reduce per parameter takes {number(row['mean_ms'])} ms, a "
        f"rank alone {number(alone['mean_ms'])} ms; {number(row['finish_ms'])} ms or "
        f"{percent(row['finish_ms'] / row['mean_ms'])} of it go into {plural(int(row['reductions']), 'reduction')} of "
        f"{bytes_in_words(row['gradient_bytes'])} of gradients",
        bool(row["mean_ms"] > alone["mean_ms"]),
        so=", after backward, while nothing is computed.",
        but="; the step is no longer than alone, so that the machine's noise is larger than what is looked for.",
    )


def flat(summary: pd.DataFrame) -> Findings:
    """Problem `minimal_ddp_flat_benchmarking`: one all-reduce against one per parameter."""
    return _of_each(summary, "What one all-reduce of all gradients saves", _flat)


def _flat(rows: dict[str, Any]) -> Finding | None:
    if not {"naive", "flat"} <= rows.keys():
        return None
    naive_row, row = rows["naive"], rows["flat"]
    return Finding.checked(
        f"All gradients as one tensor are averaged in {number(row['finish_ms'])} ms, one by one in "
        f"{number(naive_row['finish_ms'])} ms: {number(naive_row['finish_ms'] / row['finish_ms'], 2)} times as long "
        f"for {number(naive_row['reductions'] / row['reductions'], 2)} times the calls",
        bool(row["finish_ms"] < naive_row["finish_ms"]),
        so=", since each call costs something whatever its size.",
        but=": here calls are cheap, and copying all gradients into one tensor, whose memory is new in every step, and "
        "back is not."
        if row["device"] == "cpu"
        else ": here that saves nothing.",
    )


def overlapped(summary: pd.DataFrame) -> Findings:
    """Problem `ddp_overlap_individual_parameters_benchmarking`: what overlapping hides."""
    return _of_each(summary, "What overlapping hides", _overlapped)


def _overlapped(rows: dict[str, Any]) -> Finding | None:
    if not {"naive", "overlapped"} <= rows.keys():
        return None
    naive_row, row = rows["naive"], rows["overlapped"]
    return Finding.checked(
        f"With each gradient reduced as soon as it is there a step takes {number(row['mean_ms'])} ms; "
        f"{percent(row['overlapped'])} of the communication goes on while its rank computes, of the naive wrapper's "
        f"{percent(naive_row['overlapped'])}. {number(row['exposed_ms'])} ms are exposed, of the naive wrapper's "
        f"{number(naive_row['exposed_ms'])} ms",
        bool(row["exposed_ms"] < naive_row["exposed_ms"]),
        so=".",
        but=": nothing was gained, because what communicates takes the time of what computes, as ranks on the cores of "
        "one machine do."
        if row["device"] == "cpu"
        else ": nothing was gained.",
    )


def bucketed(summary: pd.DataFrame) -> Findings:
    """Problem `ddp_bucketed_benchmarking`: sizes of buckets, and the model of their overhead."""
    return _of_each(summary, "Which size of bucket is best", _bucketed)


def _bucketed(rows: dict[str, Any]) -> Finding | None:
    own = [row for row in rows.values() if row["wrapper"] == "bucketed"]
    cost = cost_of(own[0]) if own else None
    if len(own) < 2:
        return None
    best, worst = (choose(own, key=lambda row: row["exposed_ms"]) for choose in (min, max))
    fact = (
        f"Of the sizes measured, buckets of {best['bucket_mb']:g} MB leave the least exposed, "
        f"{number(best['exposed_ms'])} ms, and those of {worst['bucket_mb']:g} MB the most, "
        f"{number(worst['exposed_ms'])} ms"
    )
    if cost is None:
        return Finding(
            f"{fact}. The constants of the model do not follow: a call of one number took no less than one of all."
        )
    total = own[0]["gradient_bytes"]
    modelled = cost.best_bucket_bytes(total)
    nearest = min(own, key=lambda row: abs(math.log(row["bucket_mb"] * BYTES_PER_MB / modelled)))
    return Finding.checked(
        f"{fact}. By the model, with {number(cost.bytes_per_s / 1e9)} GB per second and "
        f"{number(1e6 * cost.seconds_per_call)} µs per call, as reductions with nothing beside them take, the best "
        f"bucket has {number(modelled / BYTES_PER_MB)} MB",
        bool(nearest["bucket_mb"] == best["bucket_mb"]),
        so=", to which the best measured is the nearest.",
        but=f", to which {nearest['bucket_mb']:g} MB is the nearest: the two do not agree here.",
    )


def pytorchs(summary: pd.DataFrame) -> Findings:
    """Ours beside PyTorch's own at the same size of bucket."""
    return _of_each(summary, "How ours compares with PyTorch's", _pytorchs)


def _pytorchs(rows: dict[str, Any]) -> Finding | None:
    if not {PYTORCHS, OURS} <= rows.keys():
        return None
    theirs, ours = rows[PYTORCHS], rows[OURS]
    times = ours["median_ms"] / theirs["median_ms"]
    return Finding.checked(
        f"At buckets of {COMPARED_MB} MB ours takes {number(times, 3)} times as long per step as PyTorch's "
        f"DistributedDataParallel (medians of the same rounds)",
        bool(times <= 1 + CLOSE),
        so=f": within {percent(CLOSE)}.",
        but=f", more than the {percent(CLOSE)} that it may.",
    )


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    return remarks.by_machine(summary, table)

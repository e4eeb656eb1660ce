"""Profiles of GPT-2 XL on an A100 that others published, beside what arithmetic says of the same work."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from cs336_systems.analysis.published import A100
from cs336_systems.analysis.published_profiles import LARGEST_ALLOCATION_BYTES, LARGEST_ALLOCATION_CONTEXT
from cs336_systems.bench.report import Column, Finding, Findings, Table, escaped, number, plural, shortened, verbatim

# Kernels -------------------------------------------------------------------------------------------------------


def kernels(rows: pd.DataFrame) -> Table:
    """The kernels that others published, in the columns of Nsight Systems."""
    columns = [
        Column("range", lambda row: row.range, "left"),
        Column("time %", lambda row: f"{row.time_percent:.1f}"),
        Column("total (ms)", lambda row: f"{row.total_ms:.3f}"),
        Column("instances", lambda row: f"{row.instances:,}"),
        Column("average (ms)", lambda row: f"{row.avg_ms:.3f}"),
        Column("median (ms)", lambda row: f"{row.median_ms:.3f}"),
        Column("std (ms)", lambda row: f"{row.std_ms:.3f}"),
        Column("category", lambda row: row.category, "left"),
        Column("kernel", lambda row: verbatim(shortened(row.kernel)), "left"),
    ]
    note = "forward_nonmatmul lists kernels of forward other than matrix products; of every range the first rows alone."
    what = f"Published: kernels of GPT-2 XL, batch 4, context 256, float32, on an {A100} under Nsight Systems"
    return Table.of(rows, columns, caption=what, notes=[escaped(note)])


def kernel_findings(shares: pd.DataFrame, softmax: Mapping[str, float]) -> Findings:
    """What the published figures say of the same questions."""
    forward, backward, step = (shares.loc[name] for name in ("forward", "backward", "train_step"))
    top = Finding.checked(
        f"(b) On an {A100} others saw {verbatim(forward['kernel'])} take {forward['percent']} % of forward in "
        f"{forward['instances']} calls",
        backward["kernel"] == forward["kernel"],
        so=", and the same lead in backward.",
        but=f"; in backward {verbatim(shortened(backward['kernel']))} leads, with {backward['percent']} %.",
    )
    products = Finding.checked(
        f"(d) There matrix products are at least {number(forward['products_percent'])} % of forward, and at least "
        f"{number(step['products_percent'])} % of a training step",
        bool(step["products_percent"] < forward["products_percent"]),
        so=".",
        but=", so that the printed rows do not show training to lower their share.",
    )
    measured, traffic = softmax["a100_softmax_us"], softmax["softmax_traffic_us"]
    moved = Finding.checked(
        f"(e) One layer's softmax takes {number(measured, 3)} µs there, of "
        f"{number(softmax['a100_attention_us'], 4)} µs of attention with its projections. It has "
        f"{number(softmax['softmax_flops_ratio'], 2)} times the FLOPs of the products; moving what its operators read "
        f"and write takes {number(traffic, 3)} µs at the datasheet's bandwidth",
        bool(0.7 <= measured / traffic <= 1.5),
        so=": its time is that of its traffic, part of which the cache keeps.",
        but=": its time is not that of its traffic alone.",
    )
    return Findings([top, products, moved])


# Memory --------------------------------------------------------------------------------------------------------


def peaks(published: pd.DataFrame) -> Table:
    """The published that others published, beside the least that they can be."""
    columns = [
        Column("phase", lambda row: row.phase, "left"),
        Column("autocast", lambda row: row.autocast, "left"),
        Column("context", lambda row: str(row.context_length)),
        Column("published peak (GB)", lambda row: f"{row.at_least_bytes / 1e9:.0f}" + (" ?" if row.remark else "")),
        Column("least peak (GB)", lambda row: f"{row.accounted_bytes / 1e9:.2f}"),
        Column("of it saved by the blocks (GB)", lambda row: f"{row.num_layers * row.saved_accounted_bytes / 1e9:.2f}"),
    ]
    doubts = [
        f"?: {row.phase}, autocast {row.autocast}, context {row.context_length}: {row.remark}."
        for row in published.itertuples()
        if row.remark
    ]
    notes = ["Decimal gigabytes, as published with the decimals cut off: 13 is anything from 13 to 14.", *doubts]
    what = f"Published: peak memory of GPT-2 XL, batch 4, on an {A100}"
    return Table.of(published, columns, caption=what, notes=notes)


def peak_findings(published: pd.DataFrame) -> Findings:
    """Whether the accounting agrees with what others published, and what their largest allocation is."""
    sound = published[published["remark"] == ""]
    fits = (sound["accounted_bytes"] < sound["below_bytes"]).sum()
    beside = Finding.checked(
        f"The least that the peak can be is below {fits} of the {plural(len(sound), 'published peak')} that are not in "
        "doubt",
        bool(fits == len(sound)),
        so=", as it must be.",
        but=": the accounting has more than there was.",
    )
    case = published[
        (published["phase"] == "forward") & (published["context_length"] == LARGEST_ALLOCATION_CONTEXT)
    ].iloc[0]
    batch, heads, length = case["batch_size"], case["num_heads"], case["context_length"]
    largest = Finding.checked(
        f"(e) The largest allocations that others found at context {length} are of {LARGEST_ALLOCATION_BYTES:,} B; one "
        f"matrix of scores is {batch} · {heads} · {length}² · 4 B = {case['score_matrix_bytes']:,} B",
        bool(case["score_matrix_bytes"] == LARGEST_ALLOCATION_BYTES),
        so=": the same.",
        but=": another size.",
    )
    return Findings([beside, largest])

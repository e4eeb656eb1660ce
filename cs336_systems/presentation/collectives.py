"""Collectives, as tables, a figure and sentences.

Problems `distributed_communication_single_node` and `alternate_ring_all_reduce`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd

from cs336_systems.analysis.communication import ALTERNATE, RING, alternate_over_ring
from cs336_systems.analysis.published import PublishedAllReduce
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    number,
    percent,
    plural,
    with_deviation,
)
from cs336_systems.presentation.collectives_drawing import LIBRARY, SERIES, draw, in_legend

GB = 1e9
TO_RUN = "run `python scripts/measure.py collectives`"


def prediction(predicted: pd.DataFrame) -> Table:
    """Bytes and steps of every operation, before anything runs."""
    columns = [
        *_identity(),
        Column("sent per rank (MB)", lambda row: number(row.sent_bytes / 1e6)),
        Column("steps", lambda row: str(row.steps)),
        Column("sent by all (MB)", lambda row: number(row.total_bytes / 1e6)),
        Column("through memory (ms)", lambda row: number(row.memory_ms)),
    ]
    ceilings = predicted["ceilings"].iloc[0] if len(predicted) else "no machine"
    notes = []
    if len(predicted) and not predicted["memory_ms"].isna().all():
        notes = [
            f"Through memory: the ranks of one machine share its memory; the time in which {ceilings} reads and writes "
            "once every byte that is sent. Arrays that stay in a cache may take less."
        ]
    return Table.of(predicted, columns, caption="What each operation sends on a ring, predicted", notes=notes)


def table(summary: pd.DataFrame) -> Table:
    """Every operation, size and number of ranks, beside the ring's bound and what was published."""
    columns = [
        *_identity(),
        Column("mean ± std (ms)", _measured),
        Column("between ranks (ms)", lambda row: number(row.std_ms, 2)),
        Column("size / time (GB/s)", lambda row: number(row.algorithm_bytes_per_s / GB)),
        Column("bus (GB/s)", lambda row: number(row.bus_bytes_per_s / GB)),
        Column("ring's bound (ms)", lambda row: number(row.bound_ms)),
        Column("reached", lambda row: percent(row.fraction)),
        Column(f"published, {PublishedAllReduce.HARDWARE} (ms)", lambda row: number(row.published_ms)),
    ]
    note = (
        "Times are of the rank that took longest in each round, mean and deviation over the rounds; between ranks is "
        "the deviation of the ranks' own means. Bus is size / time multiplied by the bytes that a rank must send at "
        "least on a ring per byte of the array. The ring's bound is those bytes at the best bandwidth of the record's "
        "own messages, chunks and whole arrays, which a rank sent while it received one. It includes the start of a "
        "message, which of small arrays is most of it; and a switch that adds up what passes (NVLink SHARP) sends less "
        "than a ring."
    )
    notes = [note, *notes_below(summary)] if len(summary) else []
    return Table.of(summary, columns, caption=caption(summary), notes=notes)


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    return remarks.by_machine(summary, table)


def links_table(summary: pd.DataFrame) -> Table:
    """What a rank sends per second to its neighbour, alone and while all others do."""
    columns = [
        *(column for column in _identity() if column.heading != "operation"),
        Column("one way (GB/s)", _one_way),
        Column("both ways (GB/s)", lambda row: number(row.link_bytes_per_s / GB)),
        Column("all ranks at once (GB/s)", lambda row: number(row.shared_bytes_per_s / GB)),
        Column("all, whole arrays (GB/s)", lambda row: number(row.shared_whole_bytes_per_s / GB)),
    ]
    rows = summary.drop_duplicates("case") if len(summary) else summary
    note = "Per rank and direction, the fastest of all rounds. Messages are chunks of the array, an N-th for N ranks."
    return Table.of(rows, columns, caption=f"Links between ranks. {caption(summary)}", notes=[note])


def _one_way(row: Any) -> str:
    return number(row.one_way_bytes_per_s / GB) if row.status == "ok" else str(row.status)


def rings_table(summary: pd.DataFrame) -> Table:
    """The alternate ring beside the ring: bytes, time, and what the messages alone would take."""
    columns = [
        *(column for column in _identity() if column.heading != "operation"),
        Column("ring (ms)", lambda row: _status_or(row, row.ring_ms)),
        Column("alternate ring (ms)", lambda row: _status_or(row, row.alternate_ms)),
        Column("alternate / ring", lambda row: number(row.ratio)),
        Column("bytes, N/2", lambda row: number(row.bytes_ratio)),
        Column("messages alone", lambda row: number(row.messages_ratio)),
    ]
    note = (
        "Messages alone: N−1 messages of the whole array over 2(N−1) chunks, each passed on by all ranks at once, at "
        "the fastest that they were seen."
    )
    pairs = rings(summary)
    notes = [note, *notes_below(summary)] if len(summary) else []
    return Table.of(pairs, columns, caption=f"Alternate ring beside ring. {caption(summary)}", notes=notes)


RATIOS = ("ratio", "bytes_ratio", "messages_ratio")


def rings(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per case that has both rings."""
    if not len(summary):
        return summary.assign(**{name: [] for name in ("ring_ms", "alternate_ms", *RATIOS)})
    first, second = (summary[summary["operation"] == name] for name in (RING, ALTERNATE))
    pairs = first.merge(second[["case", "slowest_ms"]], on="case", suffixes=("", "_alternate"))
    pairs = pairs.rename(columns={"slowest_ms": "ring_ms", "slowest_ms_alternate": "alternate_ms"})
    # A step of s bytes over two of s/N: N/2 where either goes at the same bandwidth.
    bytes_ratio = pairs["world_size"].map(alternate_over_ring)
    return pairs.assign(
        ratio=pairs["alternate_ms"] / pairs["ring_ms"],
        bytes_ratio=bytes_ratio,
        messages_ratio=bytes_ratio * pairs["shared_bytes_per_s"] / pairs["shared_whole_bytes_per_s"],
    )


def _status_or(row: Any, value: float) -> str:
    return number(value) + marks(row) if row.status == "ok" else str(row.status)


def _identity() -> list[Column]:
    return [
        Column("operation", lambda row: row.operation, "left"),
        Column("ranks", lambda row: str(row.world_size)),
        Column("MB", lambda row: f"{row.size_mb:g}"),
    ]


def _measured(row: Any) -> str:
    if row.status != "ok":
        return str(row.status)
    return with_deviation(row.slowest_ms, row.slowest_std_ms) + marks(row)


def caption(summary: pd.DataFrame) -> str:
    """What all rows share."""
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    most, least = summary["rounds"].max(), summary["rounds"].min()
    rounds = f"{most} rounds" if most == least else f"{least} to {most} rounds"
    ranks = "a GPU for each rank" if first["device"] == "cuda" else "one thread for each rank"
    where = circumstances(summary.drop(columns="threads").assign(threads=math.nan))  # those of the parent, which waits
    return f"Collectives over {first['backend']}: {where}, {ranks}, float32; {rounds} after {first['warmup']} warm-ups"


def notes_below(summary: pd.DataFrame) -> list[str]:
    """What the marks mean, why a row has no time, and where ranks shared cores."""
    if not len(summary):
        return []
    notes = remarks.notes_below(summary, _name, _case_name)
    crowded = summary[(summary["world_size"] > summary["cores"]) & (summary["device"] == "cpu")]
    if len(crowded):
        counts = sorted({int(count) for count in crowded["world_size"]})
        cores = plural(int(crowded["cores"].iloc[0]), "core")
        notes.append(f"More ranks than cores: {' and '.join(map(str, counts))} ranks share {cores}, and take turns.")
    return notes


def _name(row: pd.Series) -> str:
    return f"{row['operation']} of {_case_name(row)}"


def _case_name(row: pd.Series) -> str:
    return f"{row['size_mb']:g} MB, {row['world_size']} ranks"


# Figure --------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture | Finding:
    """Time of the all-reduces over the size of the array, a panel for each number of ranks."""
    if not len(summary):
        return Finding(f"Nothing was measured: {TO_RUN}.")
    return Picture(f"All-reduce by size. {caption(summary)}", partial(draw, summary))


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """How time depends on size and ranks, and how near it comes to the bound."""
    if not len(summary):
        return Findings([Finding(f"No case was measured: {TO_RUN}.")])
    asked = summary[summary["status"] != "skipped"]
    if not len(asked):
        return Findings([Finding("No case can be measured on this machine; the notes of the table say why.")])
    library, all_reduces = asked[asked["operation"] == LIBRARY], asked[asked["operation"].isin(SERIES)]
    return Findings(
        [
            *Finding.from_all(library, "How all-reduce's time grows with the size", by_size),
            *Finding.from_all(library, "How all-reduce's time grows with the number of ranks", by_ranks),
            *Finding.from_all(all_reduces, "How near all-reduce comes to the ring's bound", by_bound),
            *Finding.from_all(library, "What sharing does to the links", sharing),
            *Finding.from_all(library, "How far apart the ranks are", apart),
            *Finding.from_all(library, "How all-reduce compares with what was published", beside_published),
            *staleness(summary),
        ]
    )


def ring_findings(summary: pd.DataFrame) -> Findings:
    """Of the two rings: problem `alternate_ring_all_reduce`."""
    if not len(summary):
        return Findings([Finding(f"No case was measured: {TO_RUN}.")])
    asked = summary[(summary["status"] != "skipped") & summary["operation"].isin([RING, ALTERNATE])]
    if not len(asked):
        return Findings([Finding("No case can be measured on this machine; the notes of the table say why.")])
    subject = "How many times the ring's time the alternate ring takes"
    small = "Whether the steps count for small arrays"
    found = [*Finding.from_all(asked, subject, alternate), *Finding.from_all(asked, small, steps)]
    return Findings([*found, *staleness(asked)])


def by_size(rows: pd.DataFrame) -> Finding | None:
    """Between the two largest sizes of each number of ranks, and what the smallest costs."""
    texts, exponents = [], []
    for world, group in _timed(rows).groupby("world_size", sort=False):
        ordered = group.sort_values("size_bytes")
        if len(ordered) < 2:
            continue
        small, large = ordered.iloc[-2], ordered.iloc[-1]
        times, more = large["slowest_ms"] / small["slowest_ms"], large["size_bytes"] / small["size_bytes"]
        exponents.append(math.log(times) / math.log(more))
        first = ordered.iloc[0]
        per_byte = (first["slowest_ms"] / first["size_bytes"]) / (large["slowest_ms"] / large["size_bytes"])
        texts.append(
            f"of {world} ranks {number(times, 2)} times from {small['size_mb']:g} to {large['size_mb']:g} MB, and a "
            f"byte of {first['size_mb']:g} MB costs {number(per_byte, 2)} times as much as one of "
            f"{large['size_mb']:g} MB"
        )
    if not texts:
        return None
    return Finding.checked(
        f"The library's all-reduce grows with the size: {'; '.join(texts)}",
        all(0.85 <= exponent <= 1.15 for exponent in exponents),
        so=". Between the two largest sizes that is about linear: time is bytes at a bandwidth.",
        but=". Between the two largest sizes that is not linear: the bandwidth is not the same for both.",
    )


def by_ranks(rows: pd.DataFrame) -> Finding | None:
    """At the largest size that the fewest and the most ranks have, beside links of their own and one that is shared."""
    timed = _timed(rows)
    few, many = timed["world_size"].min(), timed["world_size"].max()
    if not len(timed) or few == many:
        return None
    sizes = set(timed[timed["world_size"] == few]["size_bytes"]) & set(timed[timed["world_size"] == many]["size_bytes"])
    if not sizes:
        return None
    first, last = (
        timed[(timed["world_size"] == world) & (timed["size_bytes"] == max(sizes))].iloc[0] for world in (few, many)
    )
    times = last["slowest_ms"] / first["slowest_ms"]
    own, shared = last["sent_bytes"] / first["sent_bytes"], last["total_bytes"] / first["total_bytes"]
    return Finding.checked(
        f"All-reduce of {first['size_mb']:g} MB takes {number(times, 2)} times as long with {many} ranks as with "
        f"{few}; what one rank sends grows {number(own, 2)} times, what all send together {number(shared, 2)} times",
        bool(abs(math.log(times / own)) <= abs(math.log(times / shared))),
        so=": nearer to the first, as if each rank had a link of its own.",
        but=": nearer to the second, as if all ranks had one link, which is what one machine's cores and memory are.",
    )


def by_bound(rows: pd.DataFrame) -> Finding | None:
    """The shares reached at the largest size."""
    timed = _timed(rows).dropna(subset=["fraction"])
    if not len(timed):
        return None
    largest = timed[timed["size_bytes"] == timed["size_bytes"].max()]
    texts = [
        f"{in_legend(str(row['operation']))} {percent(row['fraction'])} with {row['world_size']} ranks"
        for _, row in largest.iterrows()
    ]
    return Finding.checked(
        f"Of a ring's bound at the best speed of any of its messages, all-reduce of {largest.iloc[0]['size_mb']:g} MB "
        f"reaches: {', '.join(texts)}",
        bool(largest["fraction"].max() <= 1.05),
        so=". None beats the bound.",
        but=(
            ". What beats it is no ring of such messages: it sends fewer bytes, as where a switch adds up what passes "
            "(NVLink SHARP), or sends them faster than any message that was timed alone."
        ),
    )


def sharing(rows: pd.DataFrame) -> Finding | None:
    """What is left of a link when all ranks send at once, at the largest size of the most ranks."""
    timed = _timed(rows).dropna(subset=["link_bytes_per_s", "shared_bytes_per_s"])
    if not len(timed):
        return None
    row = timed.sort_values(["world_size", "size_bytes"]).iloc[-1]
    left = row["shared_bytes_per_s"] / row["link_bytes_per_s"]
    crowded = ", more ranks than cores" if row["world_size"] > row["cores"] and row["device"] == "cpu" else ""
    return Finding.checked(
        f"When all {row['world_size']} ranks pass on chunks of an array of {row['size_mb']:g} MB at once, each sends "
        f"{number(row['shared_bytes_per_s'] / GB)} GB/s, {percent(left)} of what two have alone",
        bool(left < 0.8),
        so=(
            f": they share what carries the messages{crowded}. At that speed a ring's bytes "
            f"take {number(1e3 * row['sent_bytes'] / row['shared_bytes_per_s'])} ms, and the library's all-reduce took "
            f"{number(row['slowest_ms'])} ms."
        ),
        but=": the links do not get in each other's way.",
    )


def apart(rows: pd.DataFrame) -> Finding | None:
    """The widest deviation between ranks' means."""
    timed = _timed(rows)
    if not len(timed):
        return None
    share = timed["std_ms"] / timed["mean_ms"]
    widest = timed.loc[share.idxmax()]
    return Finding.checked(
        f"The ranks' means are apart by a deviation of {percent(share.max())} at most ({_case_name(widest)})",
        bool(share.max() < 0.1),
        so=": an all-reduce ends for all at about the same time.",
        but=": some ranks are done well before others.",
    )


def beside_published(rows: pd.DataFrame) -> Finding | None:
    """How many times faster or slower."""
    known = _timed(rows).dropna(subset=["published_ms"])
    if not len(known):
        return None
    ratio = known["published_ms"] / known["slowest_ms"]
    least, most = known.loc[ratio.idxmin()], known.loc[ratio.idxmax()]
    return Finding.checked(
        f"What was published of {PublishedAllReduce.HARDWARE} is {number(ratio.min(), 2)} ({_case_name(least)}) to "
        f"{number(ratio.max(), 2)} ({_case_name(most)}) times what is measured here",
        bool(ratio.min() > 1),
        so=": slower everywhere, as far as it goes.",
        but=": not slower everywhere.",
    )


def alternate(rows: pd.DataFrame) -> Finding | None:
    """The ratio at every number of ranks' largest size, beside N/2 and beside what the messages alone take."""
    pairs = rings(rows[rows["status"] == "ok"]).dropna(subset=["ratio"])
    if not len(pairs):
        return None
    largest = pairs.sort_values("size_bytes").groupby("world_size", sort=True).tail(1).sort_values("world_size")
    texts = [
        f"{number(row['ratio'], 2)} at {_case_name(row)} (N/2 is {number(row['bytes_ratio'], 2)}, and the messages "
        f"alone make it {number(row['messages_ratio'], 2)})"
        for _, row in largest.iterrows()
    ]
    off = (largest["ratio"] / largest["bytes_ratio"] - 1).abs()
    return Finding.checked(
        f"Of the largest arrays the alternate ring takes so many times the ring's time: {', '.join(texts)}",
        bool(off.max() <= 0.25),
        so=". It is about N/2, as the bytes have it.",
        but=(
            ". It is not N/2 everywhere: whole arrays and chunks do not pass at the same speed, and what the messages "
            "do not explain is additions and waiting for a core."
        ),
    )


def steps(rows: pd.DataFrame) -> Finding | None:
    """The ratio at the smallest size of the most ranks: steps count where they cost more than their bytes."""
    pairs = rings(rows[rows["status"] == "ok"]).dropna(subset=["ratio"])
    pairs = pairs[pairs["world_size"] == pairs["world_size"].max()].sort_values("size_bytes")
    if len(pairs) < 2:
        return None
    small, large = pairs.iloc[0], pairs.iloc[-1]
    return Finding.checked(
        f"At {_case_name(small)} it takes {number(small['ratio'], 2)} times as long as the ring, at "
        f"{_case_name(large)} {number(large['ratio'], 2)} times",
        bool(small["ratio"] < large["ratio"]),
        so=": the smaller the messages, the more it is worth that it has half as many steps.",
        but=": that it has half as many steps does not show at this size.",
    )


def _timed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["status"] == "ok") & rows["slowest_ms"].notna()]

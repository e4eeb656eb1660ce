"""Problem `flash_benchmarking`: what tiling changes in FLOPs per byte, beside what the machine and GPUs can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from cs336_systems.analysis.attention import AttentionShape
from cs336_systems.analysis.attention import intensity as flops_per_byte
from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.bench.report import Finding, Findings, number
from cs336_systems.presentation.flash_benchmarking import REFERENCE, beside


def roofline_findings(summary: pd.DataFrame) -> Findings:
    """What tiling changes, in FLOPs per byte, beside what the machine can do, and beside GPUs by their datasheets."""
    return Findings([*roofline(summary), on_gpus()])


def roofline(summary: pd.DataFrame) -> Findings:
    """The same for the machine alone."""
    return Findings(
        Finding.from_all(summary, "What tiling does to the traffic here", intensity) if len(summary) else ()
    )


def intensity(rows: pd.DataFrame) -> Finding | None:
    pairs = beside(rows, REFERENCE).dropna(subset=["ridge"])
    if not len(pairs):
        return None
    row = pairs.sort_values(["seq_len", "head_dim"]).iloc[-1]
    shape = f"length {row['seq_len']:,}, d {row['head_dim']}, {row['dtype']}"
    return _sides(shape, row["intensity_other"], row["intensity"], {row["machine"]: row["ridge"]})


def on_gpus(names: Sequence[str] = ("a100-40gb", "h100-sxm", "h200"), seq_len: int = 16_384) -> Finding:
    """The same of GPUs that need not be there, by their datasheets, at d 64 in bfloat16."""
    shape = AttentionShape(1, 1, seq_len, 64, is_causal=False, itemsize=2)
    stored, tiled = (flops_per_byte(shape, "forward", materialised=stored) for stored in (True, False))
    peaks = {name: gpu_peaks(name) for name in names}
    ridges = {name: each.rate("bfloat16") / each.bandwidth_bytes_per_s for name, each in peaks.items()}
    return _sides(f"length {seq_len:,}, d 64, bfloat16", stored, tiled, ridges)


def _sides(shape: str, stored: float, tiled: float, ridges: Mapping[str, float]) -> Finding:
    """On which side of the ridge of every machine the two forms lie."""
    known = ", ".join(f"{number(ridge)} on {name}" for name, ridge in ridges.items())
    return Finding.checked(
        f"At {shape} the materialised form does {number(stored)} FLOPs for each byte that its operators move; a tiled "
        f"one up to {number(tiled)}, if Q, K, V and O pass once between memory and chip. Products and memory are "
        f"equally busy at {known}",
        all(stored < ridge < tiled for ridge in ridges.values()),
        so=": tiling takes attention from the side of bandwidth to that of arithmetic.",
        but=": there both lie on one side, so that tiling changes memory more than time.",
    )

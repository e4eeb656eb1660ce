"""Records of attention that was never measured, of both experiments that compare implementations of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cs336_systems.analysis.attention import kept_by_flash, kept_for_backward, materialised_peak
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.records import Measurement, Record, Status, missing_record
from cs336_systems.experiments import flash_benchmarking, pytorch_attention
from cs336_systems.experiments.pytorch_attention import AttentionCase

PEAKS = Peaks("toy-1c", {"float32": 1e11, "tf32": 8e11, "bfloat16": 2e11}, 1e10, 0, 2**33, "made up for a test")
"""100 GFLOP/s and 10 GB/s, no cache: floors can be counted in the head."""
FINGERPRINT = {"torch": "2.13.0", "triton": "3.7.1", "threads": 2, "source": {"measure": "then"}}
NOTHING: Mapping[str, Any] = MappingProxyType({})
TO_RUN = "run `what measures it`"
PARTS = {"forward": 1.0, "backward": 2.0, "forward-backward": 3.0}
"""How the milliseconds of an implementation are divided among the parts that its experiment times."""


def attention_case(**changes: Any) -> pytorch_attention.Case:
    sizes = {"head_dim": 16, "seq_len": 256, "passes": 3}
    pair = ("reference", "reference+compile")
    content: dict[str, Any] = {**sizes, "device": "cpu", "implementations": pair}
    return pytorch_attention.Case(**(content | changes))


def flash_case(**changes: Any) -> flash_benchmarking.Case:
    sizes = {"head_dim": 16, "seq_len": 256, "rounds": 3}
    content: dict[str, Any] = {**sizes, "device": "cpu", "implementations": ("reference", "flash")}
    return flash_benchmarking.Case(**(content | changes))


def as_json(content: Any) -> Any:
    """As it comes back from a file: lists where there were tuples."""
    return json.loads(json.dumps(content))


def record_of(
    case: AttentionCase,
    ms: Mapping[str, float] = {},
    *,
    fell_out: Mapping[str, tuple[Status, str]] = {},
    values: Mapping[str, Mapping[str, Any]] = {},
    **changes: Any,
) -> Record:
    """A record in which forward of an implementation took `ms` (by default 2), and the other parts their multiples.

    Samples lie a tenth below, at and above that. `fell_out` has the status and reason of those without a time,
    `values` more of what was noted of one.
    """
    samples: dict[str, list[float]] = {}
    noted: dict[str, Any] = {}
    parts = [part for part in PARTS if isinstance(case, flash_benchmarking.Case) or part != "forward-backward"]
    for name in case.implementations:
        if name in fell_out:
            status, reason = fell_out[name]
            noted[name] = {"status": status, "reason": reason}
            continue
        kept = kept_by_flash(case.shape) if name.startswith("flash") else kept_for_backward(case.shape)
        noted[name] = {
            "status": "ok",
            "reason": None,
            "kept_bytes": sum(kept.values()),
            "forward_peak_bytes": case.shape.tensor_bytes,
            "peak_bytes": 9 * case.shape.tensor_bytes
            if name.startswith("flash")
            else materialised_peak(case.shape, "forward-backward"),
        }
        if isinstance(case, flash_benchmarking.Case):
            noted[name] |= {"output_error": 1e-7, "gradient_error": 2e-7}
        noted[name] |= values.get(name, {})
        for part in parts:
            middle = ms.get(name, 2.0) * PARTS[part]
            samples[f"{name} {part}_ms"] = [0.9 * middle, middle, 1.1 * middle]
    content: dict[str, Any] = {
        "experiment": type(case).__module__.rpartition(".")[2],
        "machine": "toy-1c",
        "run": "run",
        "case": as_json(dataclasses.asdict(case)),
        "status": "ok",
        "reason": None,
        "measurement": Measurement(samples, as_json(noted)),
        "noise": {"flags": []},
        "fingerprint": FINGERPRINT,
        "finished_utc": "2026-01-01",
        "seconds": 1.0,
    }
    return Record(**(content | changes))


def nothing_of(case: AttentionCase) -> Record:
    """What stands for a record that is not there."""
    experiment = type(case).__module__.rpartition(".")[2]
    return missing_record(experiment, "toy-1c", as_json(dataclasses.asdict(case)), TO_RUN)

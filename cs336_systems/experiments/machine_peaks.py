"""What this machine reaches at best: the rate of matrix products and the bandwidth of memory.

The ceilings that bounds are computed with. For a GPU the datasheet has them (`analysis/hardware.py`) and these
measurements stand beside it; for a CPU they are the only source. A large product of random matrices (never zeros, on
which hardware can be faster), a large copy and a large sum; the fastest sample counts, because a ceiling is asked for.

Source: the STREAM convention of counting a copy as bytes read plus bytes written (McCalpin 1995).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pandas as pd
import psutil
import torch

from cs336_systems.analysis.hardware import GPUS, Peaks, identify_gpu
from cs336_systems.bench import grid as grids
from cs336_systems.bench import sweep
from cs336_systems.bench.fingerprint import fingerprint as fingerprint_of
from cs336_systems.bench.machine import Machine, resolve_device, this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.bench.timing import float32_matmul_precision, time_steps
from cs336_systems.errors import UserError

# Sides of the square products and sizes of the streamed arrays: long against a launch, and several caches large.
_SIDES = {"cpu": (1024, 2048), "cuda": (8192, 16384)}
_STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}
_WARMUP, _REPEATS = 2, 12
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One ceiling: products in a precision, or a stream through memory."""

    operation: str
    """"matmul", "copy" or "sum"."""
    precision: str
    side: int
    """Rows of the square matrices; for a stream, its bytes."""
    device: str

    def __str__(self) -> str:
        return f"{self.operation} {self.precision}"


def grid(*, device: str = "auto", instruction_sets: Sequence[str] | None = None) -> list[grids.Cell[Case]]:
    """Products in every precision and both streams, on `device`.

    `instruction_sets`: a CPU's; by default this machine's.
    """
    device = resolve_device(device)
    if device == "cpu" and instruction_sets is None:
        instruction_sets = this_machine("cpu").description["instruction_sets"]
    precisions = ["float32", "bfloat16", "float16", *(["tf32"] if device == "cuda" else [])]
    products = grids.product(
        Case,
        operation="matmul",
        precision=precisions,
        side=_SIDES[device],
        device=device,
        skip=partial(_no_instruction, instruction_sets=frozenset(instruction_sets or ())),
    )
    streams = grids.product(
        Case, operation=["copy", "sum"], precision="float32", side=_STREAM_BYTES[device], device=device
    )
    return products + streams


def _no_instruction(case: Case, instruction_sets: frozenset[str]) -> str | None:
    """Half-precision products are emulated, a thousand times slower, on a CPU without instructions for them."""
    needed = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}.get(case.precision)
    if case.device != "cpu" or needed is None or needed & instruction_sets:
        return None
    return f"this CPU has no instructions for {case.precision} products"


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Milliseconds per operation, and what one operation does: FLOPs or bytes."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = torch.float32 if case.precision == "tf32" else getattr(torch, case.precision)
    operation: Callable[[], object]
    if case.operation == "matmul":
        a, b = (torch.randn(case.side, case.side, device=case.device, generator=generator).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        operation, work = lambda: torch.mm(a, b, out=out), {"flops": 2 * case.side**3}
    else:
        source = torch.randn(case.side // dtype.itemsize, device=case.device, generator=generator, dtype=dtype)
        if case.operation == "copy":
            target = torch.empty_like(source)
            operation, work = lambda: target.copy_(source), {"bytes": 2 * case.side}
        else:
            operation, work = source.sum, {"bytes": case.side}
    with float32_matmul_precision("high" if case.precision == "tf32" else "highest"):
        timing = time_steps(operation, warmup=_WARMUP, steps=_REPEATS, device=case.device)
    on_part(1.0)
    # A GPU's own clock: a wall clock would count the launch against the ceiling.
    samples = timing.device_ms or timing.samples_ms
    return Measurement(samples={"operation_ms": list(samples), "warmup_ms": list(timing.warmup_ms)}, values=work)


def summarise(
    records: Sequence[Record],
    peaks: Peaks | None = None,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per ceiling: the best rate over sizes, and the datasheet's where there is one.

    A ceiling that lacks the record of a size is not known: its rate is NaN. `peaks` and `store` are arguments of every
    experiment's `summarise`; a ceiling has no use for them.
    """
    del peaks, store
    rows = []
    for record in records:
        if record.status == "skipped":
            continue
        is_product = record.case["operation"] == "matmul"
        rows.append(
            {
                "what": f"{record.case['precision']} products" if is_product else "memory",
                "unit": "FLOP/s" if is_product else "B/s",
                "how": record.case["operation"],
                "rate": _best_rate(record) if record.status == "ok" else math.inf,
                "lacks": "" if record.status == "ok" else record.reason or f"it ended as {record.status}",
                "stale": "; ".join(record.stale_reasons(fingerprint)) if fingerprint and record.status == "ok" else "",
                "machine": record.machine,
                "device_name": record.fingerprint.get("device"),
            }
        )
    if not rows:
        columns = ["what", "unit", "how", "rate", "lacks", "stale", "machine", "device_name", "published"]
        return pd.DataFrame(columns=columns)
    best = pd.DataFrame(rows).sort_values("rate", ascending=False).drop_duplicates(["what", "how"])
    best = best.sort_values(["unit", "what", "how"], ascending=[False, True, True]).reset_index(drop=True)
    best["rate"] = best["rate"].replace(math.inf, math.nan)  # infinite so far, to win over the sizes that are there
    best["device_name"] = next((name for name in best["device_name"] if isinstance(name, str)), "")
    best["published"] = [_published(row.what, row.device_name) for row in best.itertuples()]
    return best


def _best_rate(record: Record) -> float:
    """FLOP/s or B/s of the fastest sample."""
    values = record.measurement.values
    work = values["flops"] if "flops" in values else values["bytes"]
    return work / (min(record.measurement.samples["operation_ms"]) / 1e3)


def _published(what: str, device_name: str) -> float:
    key = identify_gpu(device_name)
    if key is None:
        return float("nan")
    peaks = GPUS[key]
    return peaks.bandwidth_bytes_per_s if what == "memory" else peaks.rate(what.split()[0])


def measured_peaks(records: list[Record], machine: Machine) -> Peaks:
    """The ceilings of `machine` from its records; one that lacks a record is left out, or NaN for the bandwidth.

    Raises:
        UserError: there are none of products in float32 or of memory.
    """
    summary = summarise(records)
    rates = {row.what.split()[0]: row.rate for row in summary.itertuples() if row.unit == "FLOP/s"}
    streams = [row.rate for row in summary.itertuples() if row.unit == "B/s"]
    if "float32" not in rates or not streams:
        raise UserError(f"the ceilings of {machine.name} are not measured: run scripts/measure.py machine_peaks")
    return Peaks(
        name=machine.name,
        matmul_flops_per_s=MappingProxyType({name: rate for name, rate in rates.items() if not math.isnan(rate)}),
        bandwidth_bytes_per_s=math.nan if any(map(math.isnan, streams)) else max(streams),
        cache_bytes=int(machine.description.get("cache_bytes", machine.description.get("l2_cache_bytes", 0))),
        memory_bytes=psutil.virtual_memory().total,
        source="measured here, fastest of repeated products, copies and sums (experiment machine_peaks)",
        lacks="; ".join(dict.fromkeys(summary["lacks"][summary["lacks"] != ""])),
    )


def peaks_of(machine: Machine, store: Store | None = None) -> Peaks:
    """The ceilings to bound `machine`'s times with: the datasheet's for a known GPU, else its own records'."""
    key = identify_gpu(machine.device_name)
    if key is not None:
        return GPUS[key]
    return measured_peaks(_fresh_records(machine, store or Store.default()), machine)


def _fresh_records(machine: Machine, store: Store) -> list[Record]:
    """Every record of this machine's ceilings that still speaks of it: a further run can only raise a ceiling."""
    now = fingerprint_of(sys.modules[__name__], machine)
    records = store.all_local_records(machine.name, "machine_peaks")
    return [record for record in records if record.status == "ok" and not record.stale_reasons(now)]


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """About how long measuring a ceiling takes: its operations at that ceiling, and as long again to set up."""
    work = 2 * case.side**3 / peaks.matmul_flops_per_s.get(case.precision, 1e12)
    seconds = work if case.operation == "matmul" else 2 * case.side / peaks.bandwidth_bytes_per_s
    return 2 * slowdown * (_WARMUP + _REPEATS) * seconds


def ensure_peaks(device: str = "auto", store: Store | None = None) -> Peaks:
    """The ceilings of `device`'s machine, measured first (a few seconds) where they are neither known nor recorded.

    A ceiling that was disturbed is measured up to three times, and the best of all runs counts.
    """
    store = store or Store.default()
    machine = this_machine(device)
    if identify_gpu(machine.device_name) is None:
        this_module, cells = sys.modules[__name__], grid(device=device)
        sweep.run(this_module, cells, store=store)
        fresh = _fresh_records(machine, store)
        sweep.run(this_module, [cell for cell in cells if _deserves_another(cell, fresh)], store=store, remeasure=True)
    return peaks_of(machine, store)


def _deserves_another(cell: grids.Cell[Case], fresh: Sequence[Record]) -> bool:
    """Whether every record of a ceiling was disturbed, and there are few."""
    records = [record for record in fresh if record.case == dataclasses.asdict(cell.case)]
    return 0 < len(records) < _TRIES and all(record.noise.get("flags") for record in records)

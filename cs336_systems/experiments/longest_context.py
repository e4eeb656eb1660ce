"""The longest context that fits on each GPU, for each size: planned to the token, on whatever machine this runs.

Problem `memory_profiling`, asked the other way round. Nothing is timed and no GPU is needed: a step is followed on
tensors without data, and its allocations are replayed for each GPU (`analysis/longest.py`).

Source: CS336 assignment 2, section 1.1.6; the sizes of the handouts of 2025 and 2026.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cs336_systems.analysis.hardware import GPUS, Peaks, gpu_peaks
from cs336_systems.analysis.longest import NothingFits, longest_context
from cs336_systems.bench import grid as grids
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.model import model_size
from cs336_systems.step import StepConfig

MEASURED_TOO = (
    "cs336_systems.analysis.allocations",
    "cs336_systems.analysis.caching_allocator",
    "cs336_systems.analysis.cuda_autocast",
    "cs336_systems.analysis.footprint",
    "cs336_systems.analysis.hardware",
    "cs336_systems.analysis.longest",
)
"""What is the measured thing here, and only predicts elsewhere."""


@dataclasses.dataclass(frozen=True)
class Case(StepConfig):
    """One step whose longest context is asked for; its own context length says nothing, and is 1."""

    gpus: tuple[str, ...] = tuple(GPUS)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gpus", tuple(self.gpus))
        for gpu in self.gpus:
            gpu_peaks(gpu)

    def __str__(self) -> str:
        return f"{self.size}, {self.phase}"


def grid(
    *,
    planned_sizes: Sequence[str] = ("small",),
    planned_phases: Sequence[str] = ("step",),
    planned_autocast: str | Sequence[str] = "none",
    gpus: Sequence[str] = tuple(GPUS),
    batch_size: int = 4,
    formulation: str | Sequence[str] = "reference",
    rope: str = "2025",
    model: str | None = None,
    device: str = "auto",
) -> list[grids.Cell[Case]]:
    """Sizes × phases × autocast; a case plans all of the GPUs.

    Args:
        device: as which machine this one keeps the record; the plan is the same from all.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    where = resolve_device(device)
    cells: list[grids.Cell[Case]] = []
    for name in planned_sizes:
        cells += grids.product(
            Case,
            **dataclasses.asdict(model_size(name, context_length=1)),
            phase=planned_phases,
            autocast=planned_autocast,
            gpus=[tuple(gpus)],
            batch_size=batch_size,
            formulation=formulation,
            rope=rope,
            model=model,
            device=where,
        )
    return cells


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Values: by GPU `context`, 0 where not one token fits, and of its plan the peaks in bytes.

    Raises:
        UserError: a model that cannot be followed.
    """
    values: dict[str, Any] = {}
    for index, gpu in enumerate(case.gpus):
        try:
            found = longest_context(case, gpu)
        except NothingFits:
            values[gpu] = {"context": 0}
        else:
            values[gpu] = {
                "context": found.value,
                "peak_allocated_bytes": found.plan.peak_allocated_bytes,
                "peak_reserved_bytes": found.plan.peak_reserved_bytes,
            }
        on_part((index + 1) / len(case.gpus))
    return Measurement(values=values)


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and GPU."""
    del peaks, store
    rows = []
    for record in records:
        case = Case(**record.case)
        fields = {name: value for name, value in record.case.items() if name != "gpus"}
        for gpu in case.gpus:
            found = record.measurement.values.get(gpu, {})
            rows.append(
                {
                    "size": case.size,
                    **fields,
                    "case": record.key,
                    "gpu": gpu,
                    **record.circumstances(fingerprint),
                    "noise": "",  # a busy machine changes no byte
                    "longest": found.get("context"),
                    "peak_bytes": found.get("peak_allocated_bytes"),
                    "reserved_bytes": found.get("peak_reserved_bytes"),
                    "usable_bytes": gpu_peaks(gpu).usable_bytes,
                }
            )
    return pd.DataFrame(rows)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """Three steps are followed, operator by operator, and each search replays some twenty of them."""
    del peaks, slowdown
    per_block = {"inference": 0.15, "forward": 0.2}.get(case.phase, 0.8)
    return case.num_layers * per_block * (1 + 0.3 * len(case.gpus))

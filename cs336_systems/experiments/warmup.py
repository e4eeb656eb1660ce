"""The same steps after 0, 1, 2 and 5 warm-ups, each in a fresh process.

Problem `benchmarking_script`, part (c). The first step of a process pays once for what every later step finds done:
loading kernels, creating library handles, the allocator's first blocks, pages touched for the first time. In a process
that has already measured something all of that is hidden, so each case gets a process of its own.

Source: CS336 assignment 2, section 1.1.3 (c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published import PUBLISHED_WARMUPS, PublishedSteps
from cs336_systems.bench import grid as grids
from cs336_systems.bench.isolation import measure_in_fresh_process
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.model import TransformerConfig
from cs336_systems.step import size_name

LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"mini": [128]}


def grid(
    *,
    warmup_contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    warmup_counts: int | Sequence[int] = (0, 1, 2, 5),
    warmup_phases: Sequence[str] = ("forward",),
    warmup_steps: int = 10,
    batch_size: int = 4,
    device: str = "auto",
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Every number of warm-ups for every size and context.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    cells = []
    for count in [warmup_counts] if isinstance(warmup_counts, int) else warmup_counts:
        cells += transformer_step.grid(
            contexts=warmup_contexts,
            phases=warmup_phases,
            batch_size=batch_size,
            device=device,
            warmup=count,
            steps=warmup_steps,
            seed=seed,
        )
    return cells


def measure(case: Case, on_part: OnPart) -> Measurement:
    """What `transformer_step` measures, in a process that has measured nothing before."""
    measurement = measure_in_fresh_process(transformer_step, case)
    on_part(1.0)
    return measurement


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per case, as `transformer_step.summarise`, with every step's time in `steps_ms`, warm-ups included."""
    summary = transformer_step.summarise(records, peaks, store=store, fingerprint=fingerprint)
    if len(summary):
        # Here the number of warm-ups is the question, so only figures with this very number stand beside it.
        not_published = ~summary["warmup"].isin(PUBLISHED_WARMUPS)
        summary.loc[not_published, ["a100_ms", "a100_std_ms"]] = float("nan")
        summary["steps_ms"] = [
            [*record.measurement.samples.get("warmup_ms", []), *record.measurement.samples.get("step_ms", [])]
            for record in records
        ]
    return summary


PROCESS_START_S = 3.0
"""About what starting Python and importing torch takes, for predictions."""


def published_deviations(store: Store | None = None) -> pd.DataFrame:
    """What others published of the question, with the name of each size."""
    rows = PublishedSteps((store or Store.default()).reference).by_warmups()
    dimensions = rows[["d_model", "d_ff", "num_layers", "num_heads"]].astype(int).to_dict("records")
    return rows.assign(size=[size_name(TransformerConfig(**each)) for each in dimensions])


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """As `transformer_step`'s, plus the process."""
    return PROCESS_START_S + transformer_step.predicted_seconds(case, peaks, slowdown)

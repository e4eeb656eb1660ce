"""Records of checkpointed steps that were never measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from profile_records import record_of

from cs336_systems.bench.records import Measurement, Record
from cs336_systems.experiments.checkpointing import NARROW, NARROW_BATCH, Case, counted_of
from cs336_systems.model import model_size


def case_of(policy: str = "none", **changes: Any) -> Case:
    """A policy on four blocks of a small size at a short context."""
    dimensions = dataclasses.asdict(model_size("tiny", context_length=32, num_layers=4))
    chosen = {"device": "cpu", "phase": "forward-backward", "batch_size": 1, "warmup": 1, "steps": 2}
    return Case(**{**dimensions, **chosen, "checkpointing": policy, **changes})


def narrow_case(policy: str, depth: int) -> Case:
    """A policy on the narrow model, so many blocks deep."""
    dimensions = dataclasses.asdict(dataclasses.replace(NARROW, num_layers=depth))
    return case_of(policy, **dimensions, batch_size=NARROW_BATCH)


def record_for(case: Case, *, ms: float | None = None, over: float = 1.1, **changes: Any) -> Record:
    """A record with a peak `over` times the least, and the work that is counted, in a time of its own or as it says."""
    found = counted_of(case)
    assert found is not None
    time = 10 * found.work if ms is None else ms
    values = {
        "peak_bytes": int(over * found.step_bytes),
        "before_bytes": 1000,
        "flops": found.flops,
        "block_runs": [found.block_runs] * case.num_layers,
    }
    measurement = Measurement({"step_ms": [time, time], "warmup_ms": [2 * time]}, values)
    return record_of("checkpointing", case, measurement, **changes)

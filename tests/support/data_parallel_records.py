"""Records of steps on several ranks that were never measured."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from profile_records import record_of

from cs336_systems.analysis.bucketing import CallCost
from cs336_systems.bench.records import Measurement, Record
from cs336_systems.experiments.data_parallel import BYTES_PER_MB, Case
from cs336_systems.experiments.data_parallel_ranks import ALONE, AT_ONCE, ONE_NUMBER, STEP, variant_name
from cs336_systems.model import TransformerConfig, model_size

NARROW = TransformerConfig(d_model=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, context_length=8)
"""A model whose steps take milliseconds."""
GRADIENTS, GRADIENT_BYTES = 50, 100 * BYTES_PER_MB
COST = CallCost(1e9, 1e-3)
"""By which buckets of 10 MB are best."""
ALONE_MS, OPTIMIZER_MS = 100.0, 20.0


def case_of(size: str = "small", **changes: Any) -> Case:
    dimensions = dataclasses.asdict(model_size(size, context_length=64, num_layers=4))
    return Case(**{**dimensions, "device": "cpu", "batch_size": 4, **changes})


def narrow_case(**changes: Any) -> Case:
    chosen = {"device": "cpu", "batch_size": 2, "warmup": 0, "rounds": 1}
    return Case(**{**dataclasses.asdict(NARROW), **chosen, **changes})


def reductions_of(wrapper: str, bucket_mb: float | None) -> int:
    """Reductions of gradients of the made-up model."""
    if bucket_mb is not None:
        return math.ceil(GRADIENT_BYTES / (bucket_mb * BYTES_PER_MB))
    return 1 if wrapper == "flat" else GRADIENTS


def record_for(
    case: Case, *, exposed_ms: Mapping[str, float] = {}, cost: CallCost | None = COST, **changes: Any
) -> Record:
    """A record in which each variant takes longer than a rank alone by what it says, or by what the model does.

    Without a cost, a call of one number takes as long as one of all gradients.
    """
    samples = _times(ALONE, 0.0)
    recorded: dict[str, Any] = {}
    for wrapper, bucket_mb in case.variants:
        name, calls = variant_name(wrapper, bucket_mb), reductions_of(wrapper, bucket_mb)
        after = wrapper in ("naive", "flat")
        modelled_s = (COST.in_turn_s if after else COST.overlapped_s)(GRADIENT_BYTES, calls)
        samples |= _times(name, exposed_ms.get(name, 1e3 * modelled_s))
        communication_ms = 1e3 * COST.in_turn_s(GRADIENT_BYTES, calls)
        recorded[name] = {
            "calls": calls + 1,  # that which tells which gradients there are
            "reductions": calls,
            "is_matched": True,
            "communication_ms": communication_ms,
            "overlapped_ms": 0.0 if after else 0.5 * communication_ms,
            "compute_spans_ms": [[0.0, ALONE_MS], [ALONE_MS + communication_ms, ALONE_MS + communication_ms + 1]],
            "communication_spans_ms": [[ALONE_MS, ALONE_MS + communication_ms]],
        }
    few_s, many_s = (1e-3, 1e-3) if cost is None else (cost.in_turn_s(4, 1), cost.in_turn_s(GRADIENT_BYTES, 1))
    samples |= {f"{ONE_NUMBER} ms": [1e3 * few_s], f"{AT_ONCE} ms": [1e3 * many_s]}
    steps = {name: taken for name, taken in samples.items() if name.endswith(STEP)}
    right = {"relative_error": 1e-7, "same_parameters": True, "ranks_equal": True}
    values = {
        "parts_ms": {name: taken for name, taken in samples.items() if name not in steps},
        "checked": {name: dict(right) for name in recorded},
        "gradient_bytes": GRADIENT_BYTES,
        "gradients": GRADIENTS,
        "ranks": [{"times": {}, "recorded": copy.deepcopy(recorded)} for _ in range(case.world_size)],
    }
    return record_of("data_parallel", case, Measurement(steps, values), **changes)


def _times(name: str, exposed_ms: float) -> dict[str, list[float]]:
    """Of three rounds, a millisecond apart."""
    middles = {"gradients_ms": ALONE_MS + exposed_ms, "finish_ms": exposed_ms}
    middles["step_ms"] = middles["gradients_ms"] + OPTIMIZER_MS
    return {f"{name} {time}": [middle - 1, middle, middle + 1] for time, middle in middles.items()}

"""Records of profiles and of memory that were never measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.records import Measurement, Record
from cs336_systems.experiments.memory_profile import accounted
from cs336_systems.experiments.step_profile import RANGES
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.model import model_size
from cs336_systems.profiling.categories import category_of
from cs336_systems.profiling.outline import outline
from cs336_systems.profiling.timeline import Change, Phase, timeline_of_changes

PEAKS = Peaks("toy-1c", {"float32": 1e11, "bfloat16": 2e11}, 1e10, 0, 2**33, "made up for a test")
"""100 GFLOP/s and 10 GB/s, no cache: floors can be counted in the head."""
FINGERPRINT = {"torch": "2.13.0", "threads": 2, "source": {"measure": "then"}}


def case_of(size: str = "small", context: int = 128, phase: str = "forward", **changes: Any) -> Case:
    dimensions = dataclasses.asdict(model_size(size, context_length=context))
    return Case(**{**dimensions, "device": "cpu", "phase": phase, "warmup": 1, "steps": 2, **changes})


def record_of(experiment: str, case: Any, measurement: Measurement, **changes: Any) -> Record:
    """With the measurement as it comes back from a file: lists where there were tuples."""
    content: dict[str, Any] = {
        "experiment": experiment,
        "machine": "toy-1c",
        "run": "run",
        "case": dataclasses.asdict(case),
        "status": "ok",
        "reason": None,
        "measurement": Measurement(**json.loads(json.dumps(dataclasses.asdict(measurement)))),
        "noise": {"flags": []},
        "fingerprint": FINGERPRINT,
        "finished_utc": "2026-01-01",
        "seconds": 1.0,
    }
    return Record(**(content | changes))


def profile_record(
    case: Case, *, kernels: Mapping[str, Mapping[str, tuple[int, float]]], slowdown: float = 1.05, **changes: Any
) -> Record:
    """A profile in which each range has these kernels, by name with their instances and milliseconds per step.

    Steps take as long as the kernels of their phase, and `slowdown` times that under the profiler.
    """
    names = list(dict.fromkeys(name for found in kernels.values() for name in found))
    ranges: dict[str, Any] = {}
    for name, found in kernels.items():
        total = sum(milliseconds for _, milliseconds in found.values())
        ranges[name] = {
            "occurrences": case.steps,
            "open_ns": _ns(total, case),
            "busy_ns": _ns(total, case),
            "total_ns": _ns(total, case),
            "instances": case.steps * sum(instances for instances, _ in found.values()),
            "kernels": [
                [
                    names.index(kernel),
                    case.steps * instances,
                    _ns(ms, case),
                    *[_ns(ms / instances) for _ in range(3)],
                    0,
                ]
                for kernel, (instances, ms) in sorted(found.items(), key=lambda item: -item[1][1])
            ],
            "categories": _by_category(found, case),
        }
    whole = "forward" if case.phase == "forward" else "step"
    step_ms = ranges[whole]["total_ns"] / 1e6 / case.steps
    samples = {
        "stopwatch_ms": [step_ms, step_ms * 1.01],
        "profiled_ms": [step_ms * slowdown, step_ms * slowdown * 1.01],
    }
    values = {"unit": "operator", "names": names, "ranges": ranges}
    return record_of("step_profile", case, Measurement(samples, values), **changes)


def _by_category(found: Mapping[str, tuple[int, float]], case: Case) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for kernel, (instances, ms) in found.items():
        known = sums.setdefault(category_of(kernel), [0, 0])
        known[0] += case.steps * instances
        known[1] += _ns(ms, case)
    return sums


def _ns(milliseconds: float, case: Case | None = None) -> int:
    return round(milliseconds * 1e6 * (case.steps if case else 1))


def usual_kernels(phase: str, products_ms: float = 60.0) -> dict[str, dict[str, tuple[int, float]]]:
    """What every range of our model's phase does: products lead, and are a smaller part of a step than of a forward."""
    product, exponential, maximum, addition = "aten::bmm", "aten::exp", "aten::max", "aten::add_"
    per_range = {
        "forward": {product: (10, products_ms), "aten::mul": (6, 20.0), exponential: (2, 10.0), maximum: (2, 10.0)},
        "block": {product: (8, products_ms / 2), "aten::mul": (6, 20.0)},
        "attention": {product: (6, products_ms / 3), exponential: (2, 10.0), maximum: (2, 10.0)},
        "scores": {product: (2, 4.0), "aten::where": (2, 4.0)},
        "softmax": {exponential: (2, 10.0), maximum: (2, 10.0)},
        "value product": {product: (2, 4.0)},
        "feed-forward": {product: (3, products_ms / 3)},
        "logits": {product: (1, 10.0)},
        "loss": {"aten::logsumexp": (1, 5.0)},
        "backward": {product: (20, 2 * products_ms), "aten::mul": (40, 80.0)},
        "optimizer": {addition: (30, 90.0)},
        "step": {product: (30, 3 * products_ms), "aten::mul": (46, 100.0), addition: (30, 90.0)},
    }
    return {name: per_range[name] for name in RANGES[phase]}


def memory_record(case: Case, *, over: float = 1.1, seconds: float = 0.1, **changes: Any) -> Record:
    """A record whose peak is `over` times the least that is accounted, reached after `seconds`.

    What a block saves, its gradients and the size of activations are as accounted.
    """
    known = accounted(case)
    before = known["weights_bytes"] + known["moments_bytes"]
    peak = int(max(over * known["accounted_bytes"], before + 1))
    scores, rest = known["score_matrix_bytes"], peak - before - known["score_matrix_bytes"]
    changes_of_memory = [
        Change(0.0, scores, "reference.py:31 softmax"),
        Change(1e6 * seconds, rest, "model.py:130 forward"),
        Change(2e6 * seconds, -rest, "model.py:130 forward"),
    ]
    timeline = timeline_of_changes(
        changes_of_memory, start_bytes=before, phases=[Phase("forward", 0.0, 1.5e6 * seconds, 0)]
    )
    groups = [
        {
            "count": 1,
            "total_bytes": size,
            "bytes": size,
            "place": place,
            "other_places": 0,
            "trace": [place, "model.py:300 forward"],
        }
        for size, place in ((rest, "model.py:130 forward"), (scores, "reference.py:31 softmax"))
    ]
    values: dict[str, Any] = {
        "peak_bytes": peak,
        "before_bytes": before,
        "peak_ms": timeline.peak_ms,
        "peak_phases": ["forward"],
        "peak_place": "model.py:130 forward",
        "unit": "function",
        "outline": outline(timeline).to_json(),
        "residual_count": 10 * case.num_layers,
        **dict.fromkeys(("by_size", "by_place", "largest"), groups),
    }
    if case.phase == "forward":
        values["saved"] = {
            "total_bytes": sum(known["saved_accounted"].values()),
            "cast_parameters_bytes": 0,
            "items": [
                {"bytes": size, "shape": [size], "dtype": "float32", "place": "model.py:1 forward"}
                for size in known["saved_accounted"].values()
            ],
        }
    else:
        values |= {
            "gradient_bytes": known["weights_bytes"],
            "block_gradient_bytes": known["accounted_gradient_bytes"],
        }
    return record_of("memory_profile", case, Measurement(values=values), **changes)

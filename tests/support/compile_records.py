"""Records of models eager and compiled that were never measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.records import Measurement, Record, Status, missing_record
from cs336_systems.experiments.model_compile import EXACT, TRAFFIC, Case
from cs336_systems.experiments.model_compile_forms import EAGER, name_of
from cs336_systems.model import model_size
from cs336_systems.step import PHASES_OF_TRAINING

PEAKS = Peaks("toy-1c", {"float32": 1e11, "tf32": 8e11}, 1e10, 0, 2**33, "made up for a test")
"""100 GFLOP/s and 10 GB/s, no cache: floors can be counted in the head."""
FINGERPRINT = {"torch": "2.13.0", "triton": None, "threads": 2, "source": {"measure": "then"}}
TO_RUN = "run `what measures it`"
EAGER_MS = {"inference": 90.0, "forward": 100.0, "forward-backward": 300.0, "step": 360.0}
COMPILE_S = {"inference": 4.0, "forward": 6.0, "forward-backward": 5.0, "step": 0.0}
TIMES = {EAGER: 1.0, "model": 0.5, "blocks": 0.8}
"""What part of eager's time each form takes."""


def compile_case(size: str = "small", context: int = 128, **changes: Any) -> Case:
    dimensions = dataclasses.asdict(model_size(size, context_length=context))
    return Case(**{**dimensions, "device": "cpu", "phases": PHASES_OF_TRAINING, **changes})


def compile_record(
    case: Case,
    *,
    times: Mapping[str, float] = TIMES,
    fell_out: Mapping[str, tuple[Status, str]] = {},
    values: Mapping[str, Mapping[str, Any]] = {},
    traffic_bytes: int = 10**9,
    compiled_while_timed: int = 0,
    **changes: Any,
) -> Record:
    """A record in which compiling the whole takes as many times the seconds of a block as there are blocks.

    Samples lie a tenth below, at and above the middle. `fell_out` has the status and reason of the forms (by
    `name_of`) without a time, `values` more of what was noted of one.
    """
    samples: dict[str, list[float]] = {}
    noted: dict[str, Any] = {EXACT: {"status": "ok", "reason": None}}
    for mode in case.modes:
        for phase in case.phases:
            name = name_of(phase, mode)
            if name in fell_out:
                status, reason = fell_out[name]
                noted[name] = {"status": status, "reason": reason}
                continue
            middle = EAGER_MS[phase] * times[mode]
            samples[f"{name} ms"] = [0.9 * middle, middle, 1.1 * middle]
            noted[name] = {"status": "ok", "reason": None, "peak_bytes": 2**30 if mode == EAGER else 2**29}
            if phase in ("inference", "forward"):
                noted[name] |= {"logits_error": 3e-7, "loss_error": 1e-9}
            if mode != EAGER:
                noted[name] |= _compiled(phase, case.num_layers if mode == "model" else 1)
            noted[name] |= values.get(name, {})
    traffic = {"product_bytes": 10**9, "other_bytes": traffic_bytes, "other_operators": 500}
    noted[TRAFFIC] = {"status": "ok", "reason": None} | dict.fromkeys(case.phases, traffic)
    noted["compiled_while_timed"] = compiled_while_timed
    content: dict[str, Any] = {
        "experiment": "model_compile",
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


def _compiled(phase: str, blocks: int) -> dict[str, Any]:
    seconds = COMPILE_S[phase] * blocks
    way, other = ("backward", "forward") if phase == "forward-backward" else ("forward", "backward")
    nothing = {"dynamo": 0.0, "aot_autograd": 0.0, "inductor": 0.0}
    return {
        "compile_s": seconds,
        "graphs": int(phase in ("inference", "forward")),
        "breaks": [],
        "left": [],
        f"{way}_stages_s": nothing | {"inductor": 0.5 * seconds, "dynamo": 0.25 * seconds},
        f"{other}_stages_s": nothing,
    }


def no_record_of(case: Case) -> Record:
    """What stands for a record that is not there."""
    return missing_record("model_compile", "toy-1c", as_json(dataclasses.asdict(case)), TO_RUN)


def as_json(content: Any) -> Any:
    """As it comes back from a file: lists where there were tuples."""
    return json.loads(json.dumps(content))

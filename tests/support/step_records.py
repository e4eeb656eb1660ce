"""Records of transformer steps that were never measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from cs336_systems.bench.records import Measurement, Record
from cs336_systems.experiments.transformer_step import Case


def record_of(case: Case, **changes: Any) -> Record:
    content: dict[str, Any] = {
        "experiment": "transformer_step",
        "machine": "toy-1c",
        "run": "run",
        "case": dataclasses.asdict(case),
        "status": "ok",
        "reason": None,
        "measurement": Measurement({"step_ms": [2.0, 4.0, 3.0], "warmup_ms": [9.0]}, {"growth_resident_bytes": 2**20}),
        "noise": {"flags": []},
        "fingerprint": {},
        "finished_utc": "2026-01-01",
        "seconds": 1.0,
    }
    return Record(**(content | changes))

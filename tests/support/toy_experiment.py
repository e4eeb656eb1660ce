"""An experiment that measures nothing much, quickly, and misbehaves where a case says so."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from cs336_systems.bench import grid as grids
from cs336_systems.bench.records import Measurement
from cs336_systems.bench.sweep import OnPart


@dataclasses.dataclass(frozen=True)
class Case:
    number: int
    behaviour: str = "ok"
    device: str = "cpu"
    seconds: float = 0.0


def grid(*, numbers: Sequence[int] = (1, 2, 3), **axes: Any) -> list[grids.Cell[Case]]:
    return grids.product(Case, number=list(numbers), **axes)


def measure(case: Case, on_part: OnPart) -> Measurement:
    time.sleep(case.seconds)
    on_part(0.5)
    if case.behaviour == "raise":
        raise RuntimeError("this case\nhas two lines")
    if case.behaviour == "out of memory":
        torch.empty(2**50, dtype=torch.uint8)
    if case.behaviour == "allocate":
        torch.zeros(2**29, dtype=torch.uint8)
    if case.behaviour == "interrupt":
        signal.raise_signal(signal.SIGINT)
    if case.behaviour == "not a number":
        return Measurement(samples={"toy_ms": [float("nan")]})
    if case.behaviour == "killed":
        signal.raise_signal(signal.SIGKILL)
    if case.behaviour == "hang":
        time.sleep(3600)
    return Measurement(
        samples={"toy_ms": [float(case.number)] * 3, "warmup_ms": [9.0]}, values={"square": case.number**2}
    )

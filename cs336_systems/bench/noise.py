"""How disturbed the machine was while a case was measured.

A shared machine cannot be made quiet, but a record can say that it was not.
"""

from __future__ import annotations

import os
import statistics
from datetime import UTC, datetime
from typing import Any

import psutil

from cs336_systems.bench.context import nvidia_smi


class NoiseMonitor:
    """Watches for disturbance while a case is measured.

    `with NoiseMonitor(device) as noise: …`, then `noise.report(samples)`.
    """

    SWITCHES_PER_S = 50.0
    """Involuntary context switches per second and core beyond which a CPU measurement shared its cores."""
    STEAL = 0.02
    """Share of processor time taken by other virtual machines."""
    SPREAD = 0.10
    """Interquartile range over median."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> NoiseMonitor:
        self._started = self._counters()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = self._counters()

    def report(self, samples: dict[str, list[float]]) -> dict[str, Any]:
        """What was seen, and under "flags" why the case counts as noisy (empty: quiet)."""
        seconds = self._ended["time"] - self._started["time"]
        switches = self._ended["switches"] - self._started["switches"]
        steal = (self._ended["steal"] - self._started["steal"]) / max(seconds * (os.cpu_count() or 1), 1e-9)
        spread = max((relative_spread(values) for values in samples.values()), default=0.0)
        throttled = _throttle_reasons() if self.device == "cuda" else None
        flags = []
        if switches / max(seconds, 1.0) > self.SWITCHES_PER_S * (os.cpu_count() or 1):
            flags.append(f"{switches / seconds:.0f} involuntary context switches per second")
        if steal > self.STEAL:
            flags.append(f"{steal:.0%} of the processors' time was stolen")
        if spread > self.SPREAD:
            flags.append(f"spread of {spread:.0%} of the median")
        if throttled:
            flags.append(f"GPU clocks throttled: {throttled}")
        return {"flags": flags, "involuntary_switches": switches, "steal": steal, "spread": spread}

    @staticmethod
    def _counters() -> dict[str, Any]:
        process, times = psutil.Process(), psutil.cpu_times()
        return {
            "time": datetime.now(UTC).timestamp(),
            "switches": process.num_ctx_switches().involuntary,
            "steal": getattr(times, "steal", 0.0),
        }


def relative_spread(samples: list[float]) -> float:
    """Interquartile range over median; 0 for fewer than three samples, which show no spread."""
    if len(samples) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def _throttle_reasons() -> str | None:
    """The clock event reasons that slow a busy GPU, by name; None where the driver does not tell."""
    active = nvidia_smi("clocks_event_reasons.active")
    if active is None or not active.startswith("0x"):
        return None
    bits = int(active, 16)
    names = {
        0x4: "power cap",
        0x8: "hardware slowdown",
        0x20: "thermal (software)",
        0x40: "thermal (hardware)",
    }
    return ", ".join(name for bit, name in names.items() if bits & bit) or None

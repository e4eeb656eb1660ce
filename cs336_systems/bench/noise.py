"""How disturbed the machine was while a case was measured.

A shared machine cannot be made quiet, but a record can say that it was not.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import psutil

from cs336_systems.bench.context import nvidia_smi
from cs336_systems.bench.machine import usable_cores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class NoiseMonitor:
    """Watches for disturbance while a case is measured.

    `with NoiseMonitor(device) as noise: …`, then `noise.report(samples)`.
    """

    SWITCHES_PER_S = 50.0
    """Involuntary context switches per second and core beyond which a CPU measurement shared its cores."""
    STEAL = 0.02
    """Share of processor time taken by other virtual machines."""
    OTHERS = 0.05
    """Share of this process's cores that other processes used."""
    TICKS_S = 0.05
    """Less than this many seconds of other processes is below what the system counts in."""
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
        others = max(0.0, self._ended["busy"] - self._started["busy"] - (self._ended["own"] - self._started["own"]))
        share = others / max(seconds * usable_cores(), 1e-9)
        flags = []
        if share > self.OTHERS and others > self.TICKS_S:
            flags.append(f"other processes used {share:.0%} of the cores")
        if switches / max(seconds, 1.0) > self.SWITCHES_PER_S * (os.cpu_count() or 1):
            flags.append(f"{switches / seconds:.0f} involuntary context switches per second")
        if steal > self.STEAL:
            flags.append(f"{steal:.0%} of the processors' time was stolen")
        if spread > self.SPREAD:
            flags.append(f"spread of {spread:.0%} of the median")
        if throttled:
            flags.append(f"GPU clocks throttled: {throttled}")
        return {
            "flags": flags,
            "involuntary_switches": switches,
            "steal": steal,
            "others": share,
            "spread": spread,
        }

    @staticmethod
    def _counters() -> dict[str, Any]:
        own = psutil.Process().cpu_times()
        return {
            "time": time.monotonic(),
            "switches": _involuntary_switches(),
            "steal": getattr(psutil.cpu_times(), "steal", 0.0),
            "busy": _busy_seconds(),
            "own": own.user + own.system + getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0),
        }


def _involuntary_switches() -> int:
    """Of all threads, where the system counts them together."""
    if resource is None:
        return int(psutil.Process().num_ctx_switches().involuntary)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _busy_seconds() -> float:
    """Processor time that anything spent on the cores this process may use."""
    per_core = psutil.cpu_times(percpu=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(per_core))
    kinds = ("user", "nice", "system", "irq", "softirq")
    return sum(getattr(per_core[core], kind, 0.0) for core in cores if core < len(per_core) for kind in kinds)


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

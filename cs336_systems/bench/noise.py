"""How disturbed the machine was while a case was measured.

A shared machine cannot be made quiet, but a record can say that it was not.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import Any

import psutil

from cs336_systems.bench.context import nvidia_smi
from cs336_systems.bench.machine import usable_cores


class NoiseMonitor:
    """Watches for disturbance while a case is measured.

    `with NoiseMonitor(device) as noise: …`, then `noise.report(samples)`.
    """

    SWITCHES_PER_S = 50.0
    """Involuntary context switches per second and core beyond which a CPU measurement shared its cores."""
    STEAL = 0.02
    """Share of processor time taken by other virtual machines."""
    OTHERS = 0.05
    """Share of this process's cores that processes used which it did not start."""
    TICKS_S = 0.05
    """Less than this many seconds of other processes is below what the system counts in."""
    THROTTLED = 0.05
    """Share of the time in which a GPU's clocks were held down."""
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
        throttled = {
            reason: after - self._started["throttled"].get(reason, after)
            for reason, after in self._ended["throttled"].items()
        }
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
        flags += [
            f"GPU clocks held down for {held / seconds:.0%} of the time ({reason})"
            for reason, held in throttled.items()
            if held > self.THROTTLED * seconds
        ]
        return {
            "flags": flags,
            "involuntary_switches": switches,
            "steal": steal,
            "others": share,
            "spread": spread,
        }

    def _counters(self) -> dict[str, Any]:
        return {
            "time": time.monotonic(),
            "switches": _involuntary_switches(),
            "steal": getattr(psutil.cpu_times(), "steal", 0.0),
            "busy": _busy_seconds(),
            "throttled": _throttled_seconds() if self.device == "cuda" else {},
            "own": _own_seconds(),
        }


def _involuntary_switches() -> int:
    """Of all threads, where the system counts them together."""
    if os.name == "nt":
        return int(psutil.Process().num_ctx_switches().involuntary)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _own_seconds() -> float:
    """Processor time of this process and of all it has started, the ranks of a job among them, ended ones too."""
    own = psutil.Process()
    seconds = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # one may end meanwhile: then its parent has its time
            times = process.cpu_times()
            seconds += sum(getattr(times, kind, 0.0) for kind in ("user", "system", "children_user", "children_system"))
    return seconds


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


_THROTTLING = ("sw_power_cap", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


def _throttled_seconds() -> dict[str, float]:
    """How long the GPU's clocks have been held down, by reason; empty where the driver does not count it."""
    text = nvidia_smi(",".join(f"clocks_event_reasons_counters.{reason}" for reason in _THROTTLING))
    counted = [value.strip() for value in text.split(",")] if text is not None else []
    if len(counted) != len(_THROTTLING):
        return {}
    return {
        reason: int(microseconds) / 1e6
        for reason, microseconds in zip(_THROTTLING, counted, strict=True)
        if microseconds.isdigit()
    }

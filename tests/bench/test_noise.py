"""How disturbed a measurement was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cs336_systems.bench import noise
from cs336_systems.bench.machine import usable_cores


def test_the_spread_is_the_interquartile_range_over_the_median() -> None:
    assert noise.relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.0 / 3.0)
    assert noise.relative_spread([1.0, 5.0]) == 0.0
    # one slow first step is no noise
    assert noise.relative_spread([90.0, *[1.0] * 9]) == 0.0


def test_a_wide_spread_is_flagged_and_a_narrow_one_is_not() -> None:
    with noise.NoiseMonitor("cpu") as monitor:
        pass
    assert monitor.report({"step_ms": [1.0, 1.0, 1.0, 1.0]})["flags"] == []
    (flag,) = monitor.report({"step_ms": [1.0, 2.0, 3.0, 4.0]})["flags"]
    assert flag == "spread of 60% of the median"


def test_a_gpu_whose_clocks_were_held_down_is_flagged_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(["0, 5, [N/A], 7", "9000000, 5, [N/A], 7"])
    monkeypatch.setattr(noise, "nvidia_smi", lambda _: next(readings))
    with noise.NoiseMonitor("cuda") as monitor:
        pass
    (flag,) = [flag for flag in monitor.report({})["flags"] if "clocks" in flag]
    assert "sw_power_cap" in flag


@pytest.mark.parametrize("answer", [None, "", "1, 2"])
def test_a_driver_that_does_not_count_is_no_noise(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    monkeypatch.setattr(noise, "nvidia_smi", lambda _: answer)
    with noise.NoiseMonitor("cuda") as monitor:
        pass
    assert not any("clocks" in flag for flag in monitor.report({})["flags"])


COUNTING = "while True: pass"


@pytest.mark.skipif(os.name == "nt", reason="a process whose parent has ended keeps it there")
def test_another_process_on_the_same_cores_is_seen() -> None:
    """As many processes that do nothing but count as there are cores, whose parents have ended; this one asleep."""
    start = (
        f"from subprocess import *; import sys; print(Popen([sys.executable, '-c', {COUNTING!r}], stdout=DEVNULL).pid)"
    )
    told = [
        subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, check=True) for _ in range(usable_cores())
    ]
    try:
        with noise.NoiseMonitor("cpu") as monitor:
            time.sleep(1.0)
    finally:
        for each in told:
            os.kill(int(each.stdout), signal.SIGKILL)
    report = monitor.report({})
    assert report["others"] > noise.NoiseMonitor.OTHERS
    assert any("other processes used" in flag for flag in report["flags"])


def test_what_a_process_it_started_uses_is_counted_as_its_own() -> None:
    before = noise._own_seconds()
    with subprocess.Popen([sys.executable, "-c", COUNTING]) as counting:
        while noise._own_seconds() < before + 0.2:
            time.sleep(0.05)
        counting.kill()
    assert noise._own_seconds() >= before + 0.2

"""How disturbed a measurement was."""

from __future__ import annotations

import pytest

from cs336_systems.bench import noise


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

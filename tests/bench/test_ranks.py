"""A rank that lacks memory is an answer, and not a failure; anything else is what it is."""

from __future__ import annotations

import pytest
import rank_workers as workers

from cs336_systems.bench.ranks import launch_measured
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.distributed.launch import RankFailed

pytestmark = pytest.mark.distributed


def test_results_and_reports_are_those_of_a_launch() -> None:
    got: list[tuple[int, int]] = []
    assert launch_measured(workers.reporting_once, world_size=2, on_report=lambda rank, _: got.append((rank, 1))) == [
        0,
        1,
    ]
    assert sorted(got) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("way", ["a kill", "no memory"])
def test_a_rank_that_is_killed_or_finds_no_memory_is_out_of_memory(way: str) -> None:
    with pytest.raises(OutOfMemory, match="rank 1 of 2"):
        launch_measured(workers.failing, 1, way, world_size=2)


def test_a_rank_that_fails_otherwise_is_a_failure() -> None:
    with pytest.raises(RankFailed, match="ArithmeticError"):
        launch_measured(workers.failing, 1, "raising", world_size=2)

"""A rank that lacks memory is an answer, and not a failure; anything else is what it is."""

from __future__ import annotations

import pytest
import rank_workers as workers

from cs336_systems.bench.ranks import lack_of_memory_told
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.distributed.launch import RankFailed, launch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("way", ["a kill", "no memory"])
def test_a_rank_that_is_killed_or_finds_no_memory_is_out_of_memory(way: str) -> None:
    with pytest.raises(OutOfMemory, match="rank 1 of 2"), lack_of_memory_told():
        launch(workers.failing, 1, way, world_size=2)


def test_a_rank_that_fails_otherwise_is_a_failure() -> None:
    with pytest.raises(RankFailed, match="ArithmeticError"), lack_of_memory_told():
        launch(workers.failing, 1, "raising", world_size=2)

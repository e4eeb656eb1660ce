"""What collectives cost follows from their parts, and from one another."""

from __future__ import annotations

import pytest

from cs336_systems.analysis.communication import (
    ALL_REDUCES,
    ALTERNATE,
    RING,
    Cost,
    algorithm_bandwidth,
    alternate_over_ring,
    bus_bandwidth,
    chunk_lengths,
    ring_cost,
    ring_sent_elements,
)
from cs336_systems.errors import UserError

pytestmark = [
    pytest.mark.problem("distributed_communication_single_node"),
    pytest.mark.problem("alternate_ring_all_reduce"),
]

SIZE = 1_000_000
OPERATIONS = (*ALL_REDUCES, "reduce_scatter", "all_gather", "broadcast")
several = pytest.mark.parametrize("world_size", [2, 3, 4, 6, 64])


@several
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(world_size: int) -> None:
    parts = [ring_cost(name, SIZE, world_size) for name in ("reduce_scatter", "all_gather")]
    whole = ring_cost("all_reduce", SIZE, world_size)
    assert whole.sent_bytes == pytest.approx(sum(part.sent_bytes for part in parts))
    assert whole.steps == sum(part.steps for part in parts)


@several
def test_the_alternate_ring_sends_n_halves_as_much_in_half_as_many_steps(world_size: int) -> None:
    ring, alternate = (ring_cost(name, SIZE, world_size) for name in (RING, ALTERNATE))
    assert alternate.sent_bytes / ring.sent_bytes == pytest.approx(alternate_over_ring(world_size))
    assert alternate.sent_bytes / alternate.steps == SIZE
    assert ring.sent_bytes / ring.steps == pytest.approx(SIZE / world_size)
    assert 2 * alternate.steps == ring.steps


@pytest.mark.parametrize("world_size", [3, 4, 6, 64])
def test_the_alternate_ring_is_faster_only_where_latency_outweighs(world_size: int) -> None:
    bandwidth = 1e9
    ring, alternate = (ring_cost(name, SIZE, world_size) for name in (RING, ALTERNATE))
    break_even = SIZE / bandwidth * (1 - 2 / world_size)
    for share in (0.5, 2.0):
        is_faster = alternate.seconds(bandwidth, share * break_even) < ring.seconds(bandwidth, share * break_even)
        assert is_faster == (share > 1)


@several
def test_the_ring_hardly_depends_on_the_number_of_ranks(world_size: int) -> None:
    assert SIZE <= ring_cost(RING, SIZE, world_size).sent_bytes < 2 * SIZE


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_sends_nothing(operation: str) -> None:
    assert ring_cost(operation, SIZE, 1) == Cost(0, 0, 0)


@several
@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_ranks_together_send_what_every_rank_lacks(operation: str, world_size: int) -> None:
    """An array that all are to have must reach each but one; a sum needs every rank's array but one to come in."""
    halves = {"all_reduce": 2, RING: 2, ALTERNATE: world_size}.get(operation, 1)
    assert ring_cost(operation, SIZE, world_size).total_bytes == pytest.approx(halves * (world_size - 1) * SIZE)


@several
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_runs_at_the_links_bandwidth_has_it_as_bus_bandwidth(operation: str, world_size: int) -> None:
    bandwidth = 3e9
    seconds = ring_cost(operation, SIZE, world_size).seconds(bandwidth)
    found = bus_bandwidth(operation, SIZE, world_size, seconds)
    wasted = alternate_over_ring(world_size) if operation == ALTERNATE else 1
    assert found == pytest.approx(bandwidth / wasted)
    assert algorithm_bandwidth(SIZE, seconds) == pytest.approx(SIZE / seconds)


@pytest.mark.parametrize("length", [0, 1, 5, 12, 97])
@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_chunks_are_the_whole_and_as_equal_as_can_be(length: int, world_size: int) -> None:
    lengths = chunk_lengths(length, world_size)
    assert sum(lengths) == length
    assert len(lengths) == world_size
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("length", [0, 1, 12, 97])
@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_to_the_element_the_ranks_send_together_what_the_formula_says(length: int, world_size: int) -> None:
    sent = [ring_sent_elements(length, world_size, rank) for rank in range(world_size)]
    assert sum(sent) == pytest.approx(world_size * ring_cost(RING, length, world_size).sent_bytes)


def test_an_unknown_operation_and_too_few_ranks_are_errors() -> None:
    with pytest.raises(UserError, match=r"unknown operation 'gather'.*all_gather"):
        ring_cost("gather", SIZE, 2)
    with pytest.raises(UserError, match="at least 1 rank, found 0"):
        ring_cost(RING, SIZE, 0)

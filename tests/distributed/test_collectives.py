"""The rings give what the library gives, on every rank, and send what the model says."""

from __future__ import annotations

import collective_ranks as ranks
import pytest
import torch

from cs336_systems.analysis.communication import ALTERNATE, RING, ring_cost, ring_sent_elements
from cs336_systems.distributed.collectives import COLLECTIVES, Buffers
from cs336_systems.distributed.launch import launch
from cs336_systems.errors import UserError

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.problem("distributed_communication_single_node"),
    pytest.mark.problem("alternate_ring_all_reduce"),
]

LENGTHS = [0, 1, 2, 3, 5, 8, 97, 1000]
FLOAT32_BYTES = 4
any_ring = pytest.mark.parametrize("operation", [RING, ALTERNATE])
any_size = pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])


@any_ring
@any_size
def test_whole_numbers_are_summed_exactly_whatever_the_length(operation: str, world_size: int) -> None:
    found = launch(ranks.reduce_lengths, operation, LENGTHS, True, world_size=world_size)
    for place, length in enumerate(LENGTHS):
        summed = sum(ranks.drawn(rank, length, whole=True) for rank in range(world_size))
        for of_rank in found:
            ours, library, _ = of_rank[place]
            assert ours == library == summed.tolist()  # type: ignore[union-attr]


@any_ring
@any_size
def test_what_is_sent_is_what_the_model_says(operation: str, world_size: int) -> None:
    found = launch(ranks.reduce_lengths, operation, LENGTHS, True, world_size=world_size)
    for place, length in enumerate(LENGTHS):
        for rank in range(world_size):
            sent = found[rank][place][2]
            if operation == RING:
                assert sent == FLOAT32_BYTES * ring_sent_elements(length, world_size, rank)
            if operation == ALTERNATE or length % world_size == 0:
                assert sent == ring_cost(operation, FLOAT32_BYTES * length, world_size).sent_bytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rounding_of_either_ring_is_bounded_and_the_ring_has_the_same_bits_on_every_rank(world_size: int) -> None:
    lengths = [1001]
    inputs = [ranks.drawn(rank, lengths[0], whole=False).double() for rank in range(world_size)]
    exact = torch.stack(inputs).sum(0)
    # Every order of N − 1 additions is off by no more than this (Higham, 2002, section 4.2).
    bound = (world_size - 1) * torch.finfo(torch.float32).eps * torch.stack(inputs).abs().sum(0)
    for operation in (RING, ALTERNATE):
        found = [
            of_rank[0][0] for of_rank in launch(ranks.reduce_lengths, operation, lengths, False, world_size=world_size)
        ]
        for ours in found:
            assert ((torch.tensor(ours).double() - exact).abs() <= bound).all()
        # Two numbers have one order of being added.
        assert all(ours == found[0] for ours in found) == (operation == RING or world_size == 2)


@any_ring
def test_a_tensor_that_does_not_lie_in_a_row_is_replaced_where_it_is(operation: str) -> None:
    summed = 3 * torch.arange(12.0).view(3, 4)
    for transposed, matrix in launch(ranks.reduce_transposed, operation, world_size=2):
        assert transposed == summed.t().tolist()
        assert matrix == summed.tolist()


@any_ring
def test_a_scratch_that_is_too_short_is_told(operation: str) -> None:
    with pytest.raises(UserError, match=r"expected a scratch of at least \d+ elements in a row.*found \(1,\)"):
        launch(ranks.reduce_with_short_scratch, operation, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_collective_by_name_does_what_its_name_says(world_size: int) -> None:
    length = 8
    inputs = [torch.arange(length) + 100.0 * rank for rank in range(world_size)]
    summed = torch.stack(inputs).sum(0)
    found = launch(ranks.run_named, list(COLLECTIVES), length, world_size=world_size)
    for rank, results in enumerate(found):
        assert set(results) == set(COLLECTIVES)
        for name in ("all_reduce", RING, ALTERNATE):
            assert results[name][0] == summed.tolist()
        assert results["reduce_scatter"][1] == summed.chunk(world_size)[rank].tolist()
        each = torch.arange(1.0, world_size + 1).repeat_interleave(length // world_size)
        assert results["all_gather"][0] == each.tolist()
        assert results["broadcast"][0] == inputs[0].tolist()


def test_a_library_without_reduce_scatter_says_what_to_do() -> None:
    for told in launch(ranks.run_without_reduce_scatter, world_size=2):
        assert "gloo of PyTorch" in told
        assert "leave reduce_scatter out" in told


def test_an_array_that_the_ranks_cannot_share_evenly_is_an_error() -> None:
    with pytest.raises(UserError, match="3 ranks can share evenly, found 8"):
        Buffers.of(8, 3, torch.device("cpu"), scratch=0)

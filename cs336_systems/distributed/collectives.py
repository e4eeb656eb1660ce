"""All-reduce by hand, as a ring and as the alternate ring, and the library's collectives by name.

    ring_all_reduce(tensor)                         # in place, the sum over all ranks, on each of them
    alternate_ring_all_reduce(tensor)               # the same with N/2 times the bytes
    COLLECTIVES["all_gather"](buffers)              # whatever there is to time

Rank r of N sends to rank r + 1 and receives from r − 1, both at once, so that no order of sending and receiving can
lock. What they cost is in `analysis/communication.py`:

    ring             reduce-scatter, then all-gather, of N chunks: 2(N−1) messages of s/N
    alternate ring   whole tensors N−1 times: (N−1) messages of s

The ring adds up each chunk on its way round and copies the sum to all, so every rank has the same bits. The alternate
ring adds on every rank in another order: of more than two ranks its results differ by rounding.

Source: CS336 assignment 2 (2025, section 2.1; 2026, `alternate_ring_all_reduce`); P. Patarasuk, X. Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.errors import UserError


@torch.no_grad()
def ring_all_reduce(tensor: Tensor, scratch: Tensor | None = None) -> None:
    """Replace `tensor` by its sum over all ranks: reduce-scatter, then all-gather, each in N−1 steps.

    Args:
        scratch: memory to receive into, of at least ⌈length/N⌉ elements; by default it is allocated.

    Raises:
        UserError: `scratch` is too short or of another kind.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    flat = _flat(tensor)
    chunks = flat.tensor_split(world_size)
    received = _room(scratch, flat, chunks[0].numel())
    for step in range(world_size - 1):
        mine, coming = chunks[(rank - step) % world_size], chunks[(rank - step - 1) % world_size]
        exchange(mine, received[: coming.numel()])
        coming += received[: coming.numel()]
    for step in range(world_size - 1):
        exchange(chunks[(rank + 1 - step) % world_size], chunks[(rank - step) % world_size])
    _write_back(flat, tensor)


@torch.no_grad()
def alternate_ring_all_reduce(tensor: Tensor, scratch: Tensor | None = None) -> None:
    """Replace `tensor` by its sum over all ranks: pass whole tensors on N−1 times, and add each that comes.

    Args:
        scratch: memory to receive into, of at least twice the tensor's length; by default it is allocated.

    Raises:
        UserError: `scratch` is too short or of another kind.
    """
    flat = _flat(tensor)
    length = flat.numel()
    room = _room(scratch, flat, 2 * length)
    passed, coming = room[:length], room[length:]
    passed.copy_(flat)
    for _ in range(dist.get_world_size() - 1):
        exchange(passed, coming)
        flat += coming
        passed, coming = coming, passed
    _write_back(flat, tensor)


def exchange(sent: Tensor, received: Tensor) -> None:
    """One step of a ring: `sent` to the right while `received` comes from the left; nothing is sent of no elements."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pairs = ((dist.isend, sent, rank + 1), (dist.irecv, received, rank - 1))
    messages = [dist.P2POp(how, what, peer % world_size) for how, what, peer in pairs if what.numel()]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's elements in a row: itself where they are, else a copy."""
    return tensor.contiguous().view(-1)


def _write_back(flat: Tensor, tensor: Tensor) -> None:
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def _room(scratch: Tensor | None, like: Tensor, length: int) -> Tensor:
    if scratch is None:
        return like.new_empty(length)
    if (scratch.dtype, scratch.device) != (like.dtype, like.device) or scratch.ndim != 1 or scratch.numel() < length:
        raise UserError(
            f"expected a scratch of at least {length} elements in a row, {like.dtype} on {like.device}; "
            f"found {tuple(scratch.shape)}, {scratch.dtype} on {scratch.device}"
        )
    return scratch[:length]


# By name -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Buffers:
    """What a collective works on, allocated once."""

    whole: Tensor
    """The array; of an all-gather its result."""
    part: Tensor
    """An N-th of it: what a rank gives to an all-gather, or keeps of a reduce-scatter."""
    scratch: Tensor

    @classmethod
    def of(cls, length: int, world_size: int, device: torch.device, *, scratch: int) -> Buffers:
        """Float32 zeros; `length` must be a multiple of the number of ranks."""
        if length % world_size:
            raise UserError(f"expected a length that {world_size} ranks can share evenly, found {length}")
        sizes = (length, length // world_size, scratch)
        return cls(*(torch.zeros(size, dtype=torch.float32, device=device) for size in sizes))


def scratch_elements(operation: str, length: int, world_size: int) -> int:
    """How much of `Buffers.scratch` an operation uses."""
    return {"ring": -(-length // world_size), "alternate ring": 2 * length}.get(operation, 0)


def _all_reduce(buffers: Buffers) -> None:
    dist.all_reduce(buffers.whole)


def _reduce_scatter(buffers: Buffers) -> None:
    try:
        dist.reduce_scatter_tensor(buffers.part, buffers.whole)
    except (RuntimeError, NotImplementedError) as error:
        if "support" not in str(error):
            raise
        raise UserError(
            f"{dist.get_backend()} of PyTorch {torch.__version__} has no reduce-scatter: use a newer PyTorch, or leave "
            "reduce_scatter out"
        ) from error


def _all_gather(buffers: Buffers) -> None:
    dist.all_gather_into_tensor(buffers.whole, buffers.part)


def _broadcast(buffers: Buffers) -> None:
    dist.broadcast(buffers.whole, src=0)


def _ring(buffers: Buffers) -> None:
    ring_all_reduce(buffers.whole, buffers.scratch)


def _alternate_ring(buffers: Buffers) -> None:
    alternate_ring_all_reduce(buffers.whole, buffers.scratch)


COLLECTIVES: Mapping[str, Callable[[Buffers], None]] = MappingProxyType(
    {
        "all_reduce": _all_reduce,
        "ring": _ring,
        "alternate ring": _alternate_ring,
        "reduce_scatter": _reduce_scatter,
        "all_gather": _all_gather,
        "broadcast": _broadcast,
    }
)
"""What can be timed: the library's, and the two rings above. Each works in place on the buffers it is given."""

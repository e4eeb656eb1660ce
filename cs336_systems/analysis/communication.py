"""What collective operations cost on a ring: bytes that each rank sends, steps, and the time these take.

N ranks stand in a ring; in one step each sends a message to its right and receives one from its left, both at once.
Of an array of s bytes, with W the bytes per second that a rank sends, and l the latency of a step:

| operation            | bytes sent per rank | steps    |
|:---------------------|:--------------------|:---------|
| reduce-scatter       | (N−1)/N · s         | N−1      |
| all-gather           | (N−1)/N · s         | N−1      |
| all-reduce           | 2(N−1)/N · s        | 2(N−1)   |
| broadcast            | s                   | N−1      |
| all-reduce, alternate| (N−1) · s           | N−1      |

**The ring.** The array is cut into N chunks. In step i of reduce-scatter a rank sends the sum so far of one chunk, adds
what it receives of another to its own, and sends that next: after N−1 steps each rank has the whole sum of one chunk.
All-gather passes these N chunks around in N−1 further steps. All-reduce is one after the other: 2(N−1) steps of s/N
bytes, so t = 2(N−1)/N · s/W + 2(N−1) · l, which for large N is 2s/W however many ranks there are.

**The alternate ring** (problem `alternate_ring_all_reduce`). Each rank sends its whole array to its right, adds what it
receives from its left, and passes that on, until it has seen every other's: N−1 steps of s bytes, all links busy in
each, so t = (N−1) · (s/W + l). It takes half as many steps, and N/2 times the bytes:
(N−1)·s / (2(N−1)/N · s) = N/2. So it is as fast for two ranks, linear in N where the ring is nearly constant, and
better only where latency outweighs: where s/W · (1 − 2/N) < l.

**Broadcast** leaves the root whole, and passes along a chain in pieces so small that all links are busy at once.

s is the size of the whole array, which all ranks together have before an all-gather or after a reduce-scatter.
Algorithm bandwidth is s/t; bus bandwidth multiplies it by the bytes that each rank must send per byte of the array,
whatever algorithm is used, so that it compares with a link's whatever the number of ranks.

Source: CS336 assignment 2 (2025, section 2.1; 2026, `alternate_ring_all_reduce`); P. Patarasuk, X. Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009); the bandwidths: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from cs336_systems.errors import UserError, unknown_name

RING, ALTERNATE = "ring", "alternate ring"
ALL_REDUCES = ("all_reduce", RING, ALTERNATE)
"""The library's, and ours. All give the same; what any of them must send at least is what the ring sends."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one rank does."""

    sent_bytes: float
    """Of the rank that sends most."""
    steps: int
    total_bytes: float
    """Of all ranks together."""

    def seconds(self, bandwidth_bytes_per_s: float, latency_s: float = 0.0) -> float:
        """The time it takes where a rank sends that many bytes per second, and each step begins that much later."""
        return self.sent_bytes / bandwidth_bytes_per_s + self.steps * latency_s


def ring_cost(operation: str, size_bytes: float, world_size: int) -> Cost:
    """Bytes and steps of an operation on an array of `size_bytes` in all.

    Raises:
        UserError: an unknown operation, or fewer ranks than one.
    """
    if world_size < 1:
        raise UserError(f"expected at least 1 rank, found {world_size}")
    sent = sent_share(operation, world_size) * size_bytes
    senders = world_size - 1 if operation == "broadcast" else world_size  # the last of the chain only receives
    return Cost(sent, _steps(world_size)[operation], senders * sent)


def sent_share(operation: str, world_size: int) -> float:
    """Bytes that a rank sends per byte of the array; an unknown operation is an error that lists the known."""
    others = world_size - 1
    shares: Mapping[str, float] = {
        "all_reduce": 2 * others / world_size,
        "reduce_scatter": others / world_size,
        "all_gather": others / world_size,
        "broadcast": 1.0 if others else 0.0,
        RING: 2 * others / world_size,
        ALTERNATE: float(others),
    }
    if operation not in shares:
        raise unknown_name("operation", operation, shares)
    return shares[operation]


def _steps(world_size: int) -> Mapping[str, int]:
    others = world_size - 1
    both = {"all_reduce": 2 * others, RING: 2 * others}
    return MappingProxyType({**both, **dict.fromkeys(("reduce_scatter", "all_gather", "broadcast", ALTERNATE), others)})


def algorithm_bandwidth(size_bytes: float, seconds: float) -> float:
    """Bytes of the array per second."""
    return size_bytes / seconds


def bus_bandwidth(operation: str, size_bytes: float, world_size: int, seconds: float) -> float:
    """Bytes per second that each rank must have sent at least; of any all-reduce, what the ring sends."""
    least = "all_reduce" if operation in ALL_REDUCES else operation
    return sent_share(least, world_size) * algorithm_bandwidth(size_bytes, seconds)


def alternate_over_ring(world_size: int) -> float:
    """How many times the ring's bytes the alternate ring sends: N/2; of one rank neither sends any."""
    return world_size / 2 if world_size > 1 else 1.0


def chunk_lengths(length: int, world_size: int) -> list[int]:
    """How many elements each of N chunks has: as equal as can be, the longer ones first."""
    whole, longer = divmod(length, world_size)
    return [whole + (place < longer) for place in range(world_size)]


def ring_sent_elements(length: int, world_size: int, rank: int) -> int:
    """What one rank sends in a ring all-reduce, to the element: of each half all chunks but one.

    Reduce-scatter ends on the rank with the chunk of its right neighbour's number, which it never sent; all-gather
    with the chunk after that.
    """
    lengths = chunk_lengths(length, world_size)
    return 2 * length - lengths[(rank + 1) % world_size] - lengths[(rank + 2) % world_size]

"""What gradients of data parallel cost beyond their computation, by the number of buckets in which they are reduced.

Of a model with s bytes of gradients, w the bytes per second that an all-reduce gets through, o the seconds that each
call costs whatever its size, and n equal buckets:

    one after the other, after backward      s/w + n·o
    overlapped with backward                 s/(n·w) + n·o

The second, as the handout asks it, assumes that computing the gradients of a bucket takes as long as reducing it: then
all reductions hide behind backward but the last bucket's, and what each call costs is nobody else's to hide. Small
buckets pay for calls and large ones for the last; the least lies where both pay the same:

    n* = √(s / (w·o)),   a bucket of s/n* = √(s·w·o) bytes,   and an overhead of 2·√(s·o/w)

Both constants follow from two reductions with nothing beside them: of a single number, and of all gradients at once.

Source: CS336 assignment 2 (2025), ddp_bucketed_benchmarking (b).
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class CallCost:
    """What a collective call costs: a bandwidth and a price of its own."""

    bytes_per_s: float
    seconds_per_call: float

    def in_turn_s(self, gradient_bytes: float, calls: float) -> float:
        """All reductions after backward, one after the other."""
        return gradient_bytes / self.bytes_per_s + calls * self.seconds_per_call

    def overlapped_s(self, gradient_bytes: float, buckets: float) -> float:
        """What is left after backward where all but the last bucket hide behind it, and the price of all calls."""
        return gradient_bytes / (buckets * self.bytes_per_s) + buckets * self.seconds_per_call

    def best_bucket_bytes(self, gradient_bytes: float) -> float:
        """The size of a bucket with the least overhead, at most that of all: 0 where a call costs nothing."""
        return min(gradient_bytes, math.sqrt(gradient_bytes * self.bytes_per_s * self.seconds_per_call))


def call_cost(few_bytes: float, few_s: float, many_bytes: float, many_s: float) -> CallCost | None:
    """The constants from one call of next to nothing and one of many bytes; None where the first took no less."""
    if not (0 <= few_bytes < many_bytes and 0 < few_s < many_s):
        return None
    bytes_per_s = (many_bytes - few_bytes) / (many_s - few_s)
    seconds_per_call = few_s - few_bytes / bytes_per_s
    return CallCost(bytes_per_s, seconds_per_call) if seconds_per_call > 0 else None

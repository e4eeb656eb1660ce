"""What gradients of data parallel cost beyond their computation, by the number of buckets in which they are reduced.

Of a model with s bytes of gradients, w the bytes per second that an all-reduce gets through, o the seconds that each
call costs whatever its size, and n equal buckets:

    one after the other, after backward      s/w + n·o
    overlapped with backward                 s/(n·w) + n·o

The second, as the handout asks it, assumes that computing the gradients of a bucket takes as long as reducing it: then
all reductions hide behind backward but the last bucket's, and what each call costs is nobody else's to hide. Small
buckets pay for calls and large ones for the last; the least lies where both pay the same:

    n* = √(s / (w·o)),   a bucket of s/n* = √(s·w·o) bytes,   and an overhead of 2·√(s·o/w)

Both constants follow from two reductions of the same gradients that nothing overlaps: one call of all, and one per
parameter.

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
        """The size of a bucket with the least overhead: no more than all, and all where a call costs nothing less."""
        return min(gradient_bytes, math.sqrt(gradient_bytes * self.bytes_per_s * self.seconds_per_call))


def call_cost(gradient_bytes: float, few: tuple[float, float], many: tuple[float, float]) -> CallCost | None:
    """The constants from two reductions of the same bytes, each given as its number of calls and its seconds.

    None where they do not follow: many calls took no longer than few, or few no longer than what their calls cost.
    """
    (few_calls, few_s), (many_calls, many_s) = few, many
    if not (0 < few_calls < many_calls and 0 < few_s < many_s):
        return None
    seconds_per_call = (many_s - few_s) / (many_calls - few_calls)
    moving_s = few_s - few_calls * seconds_per_call
    return CallCost(gradient_bytes / moving_s, seconds_per_call) if moving_s > 0 else None

"""When a rank computed and when it communicated, read from a trace of one step, and how much was both at once.

    found = read_overlap(path, "step")
    found.overlapped_ms / found.communication_ms        # 0: all communication stood alone; 1: none did

On a GPU communication is NCCL's kernels and computation all others. On a CPU Gloo's worker threads say what they reduce
(`gloo:all_reduce`), and computation is the operators, less those that only hand work to the process group.

Times are from the beginning of the range; where every rank waited for all others before it, they are comparable between
ranks. That is needed: a rank's call begins in its trace when this rank enters it, and a collective can do nothing
before the last rank has. `without_waiting` begins each call of several ranks' traces there.

Source: PyTorch, torch/csrc/distributed/c10d (names of the ranges of Gloo, `c10d::` operators, NCCL's kernels).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cs336_systems.errors import UserError
from cs336_systems.profiling.trace import nanoseconds, trace_events, without_collecting

Span = tuple[float, float]
"""Begin and end in milliseconds."""
_US_PER_MS = 1e3
_LIBRARIES = ("gloo:", "nccl")
"""How the names begin of what communicates: ranges of Gloo's threads, kernels of NCCL."""
_HANDS_OVER = "c10d::"
_OF_THE_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What one rank did."""

    compute: tuple[Span, ...]
    """Disjoint and in order."""
    calls: tuple[Span, ...]
    """Of each collective, in the order in which they began; several may go on at once."""
    all_reduces: int
    """How many of the calls are such: what PyTorch's wrapper broadcasts is none."""

    @property
    def communication(self) -> tuple[Span, ...]:
        """Disjoint and in order."""
        return merged(self.calls)

    @property
    def communication_ms(self) -> float:
        return length_of(self.communication)

    @property
    def overlapped_ms(self) -> float:
        """For how long communication and computation went on at once."""
        return length_of(common(self.compute, self.communication))


def read_overlap(path: Path, within: str) -> Overlap:
    """The spans of the first range called `within` in a trace; events without a name or a time are left out.

    Raises:
        UserError: the file is no trace, or has no such range.
    """
    with without_collecting():
        events = [each for each in trace_events(path) if _is_complete(each)]
    ranges = [each for each in events if each.get("cat") == "user_annotation" and each["name"] == within]
    if not ranges:
        raise UserError(f"{path} has no range called {within!r}: record the step inside record_function({within!r})")
    first = min(ranges, key=lambda each: float(each["ts"]))
    begin, end = first["ts"], first["ts"] + first["dur"]
    inside = [each for each in events if each["ts"] < end and each["ts"] + each["dur"] > begin]
    of_device = [each for each in inside if each.get("cat") in _OF_THE_DEVICE]
    operators = [each for each in inside if each.get("cat") == "cpu_op" and not each["name"].startswith(_HANDS_OVER)]
    ours = [each for each in inside if each.get("cat") in {"user_annotation", *_OF_THE_DEVICE}]
    communicating = [each for each in ours if each["name"].startswith(_LIBRARIES)]
    if of_device:  # what a trace of a GPU also has of the host is only the launching
        communicating = [each for each in communicating if each["cat"] in _OF_THE_DEVICE]
    computing = [each for each in of_device or operators if not each["name"].startswith(_LIBRARIES)]

    def spans(chosen: Iterable[dict[str, Any]]) -> list[Span]:
        clipped = ((max(each["ts"], begin), min(each["ts"] + each["dur"], end)) for each in chosen)
        return sorted(((start - begin) / _US_PER_MS, (stop - begin) / _US_PER_MS) for start, stop in clipped)

    all_reduces = sum(_is_all_reduce(each["name"]) for each in communicating)
    return Overlap(merged(spans(computing)), tuple(spans(communicating)), all_reduces)


def _is_all_reduce(name: str) -> bool:
    """`gloo:all_reduce`, or a kernel such as `ncclDevKernel_AllReduce_Sum_f32_RING_LL`."""
    return "allreduce" in name.replace("_", "").lower()


def without_waiting(ranks: Sequence[Overlap]) -> list[Overlap] | None:
    """The same step on all ranks, with each call begun where the last rank began it.

    Calls are matched by their order, which is the same on all ranks. None where their numbers differ: then it is not
    known which belong together.
    """
    if len({len(rank.calls) for rank in ranks}) != 1:
        return None
    begins = [max(begin for begin, _ in call) for call in zip(*(rank.calls for rank in ranks), strict=True)]
    return [
        dataclasses.replace(
            rank,
            # A broadcast's root may be done before another has come.
            calls=tuple((min(begin, end), end) for begin, (_, end) in zip(begins, rank.calls, strict=True)),
        )
        for rank in ranks
    ]


def _is_complete(event: Any) -> bool:
    """Whether an event has a name, a category, a begin and a duration."""
    if not isinstance(event, dict) or not all(isinstance(event.get(name), str) for name in ("name", "cat")):
        return False
    begin, duration = (nanoseconds(event.get(name)) for name in ("ts", "dur"))
    return begin is not None and duration is not None and duration >= 0


def merged(spans: Sequence[Span], gap_ms: float = 0.0) -> tuple[Span, ...]:
    """The union of spans, those not further apart than `gap_ms` made one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1] + gap_ms:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return tuple(found)


def common(some: Sequence[Span], others: Sequence[Span]) -> tuple[Span, ...]:
    """What lies in a span of both; each is disjoint and in order."""
    found: list[Span] = []
    first = second = 0
    while first < len(some) and second < len(others):
        begin, end = max(some[first][0], others[second][0]), min(some[first][1], others[second][1])
        if begin < end:
            found.append((begin, end))
        if some[first][1] <= others[second][1]:
            first += 1
        else:
            second += 1
    return tuple(found)


def length_of(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)

"""The memory of a step, predicted without the device it is meant for.

    plan = plan_step(StepConfig(...), "h200")
    plan.peak_allocated_bytes, plan.peak_reserved_bytes, plan.fits

A step is followed on fake tensors (`analysis/allocations.py`), and its allocations are replayed in the caching
allocator (`analysis/caching_allocator.py`). Nothing is fitted: the only figures besides the model's are the
allocator's own, and the workspace that PyTorch gives the matrix library on a GPU.

Peaks are those of the second step. The first makes gradients, the optimizer's moments and workspaces, so its own is
another; every step that follows is like the second.

On a CPU there is no caching allocator: what is allocated is what is asked for, and nothing is reserved.

Source: CS336 assignment 2, memory_profiling, asks for the peaks that are predicted here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping

from cs336_systems.analysis.allocations import WORKSPACE, Allocation, Event, record_step
from cs336_systems.analysis.caching_allocator import Block, CachingAllocator, OutOfSegments
from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.step import StepConfig

CPU = "cpu"
THERE_BEFORE = ("parameters", "buffers", "tokens", "optimizer state", WORKSPACE)
MOST_GROUPS = 10
"""How many groups of like allocations a plan names."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Allocations of one size, made by one operator, that are live at the peak."""

    kind: str
    operator: str
    bytes_each: int
    count: int

    @property
    def total_bytes(self) -> int:
        return self.bytes_each * self.count


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The memory of a step on a device, in bytes."""

    device: str
    """A GPU by its key in `analysis.hardware.GPUS`, or "cpu"."""
    peak_allocated_bytes: int
    """What torch.cuda.max_memory_allocated would say of the second step."""
    peak_reserved_bytes: int
    before_bytes: int
    """Allocated when the second step begins."""
    snapshot_peak_bytes: int
    """What the timeline of a memory snapshot of that step says, in which all that is allocated during the step counts
    as requested, not as rounded."""
    by_kind: Mapping[str, int]
    """What is allocated at the peak: parameters, gradients, activations and so on."""
    largest: tuple[Group, ...]
    """Of what is live at the peak, in sizes as requested, the most bytes first."""
    peak_operator: str
    """The operator that reaches the peak."""
    peak_ranges: tuple[str, ...]
    """The named ranges that it runs in, the outermost first."""
    usable_bytes: int | None
    """What the device can give; None where that is not known."""
    fits: bool | None
    """Whether both steps run within that; None where that is not known."""
    fails_at: str = ""
    """Where the replay ran out of memory, if it did."""

    @property
    def on_top_bytes(self) -> int:
        """Of the peak what the step itself has made: all but parameters, buffers, tokens, moments and workspaces."""
        return self.peak_allocated_bytes - sum(self.by_kind.get(kind, 0) for kind in THERE_BEFORE)

    @property
    def place(self) -> str:
        """Where the peak is, for a sentence."""
        return " › ".join([*self.peak_ranges, self.peak_operator.removeprefix("aten::")])


def plan_step(chosen: StepConfig, gpu: str) -> Footprint:
    """The footprint of a step on a GPU by its key, or on "cpu"; the device of `chosen` itself is not looked at.

    Takes seconds: a training step of gpt2-xl about twenty on a laptop, a forward pass about five. What was planned once
    in a process is not planned again.

    Raises:
        UserError: an unknown GPU; a choice that cannot be followed (see `allocations.record_step`).
    """
    if gpu != CPU:
        gpu_peaks(gpu)
    # Of a case that says more only the step counts, so that what differs in the rest alone is not followed again.
    return _planned(chosen.as_step(device="cpu"), gpu)


@functools.lru_cache(maxsize=1024)
def _planned(chosen: StepConfig, gpu: str) -> Footprint:
    return replay(_events_of(chosen, gpu == CPU), gpu)


@functools.lru_cache(maxsize=4)
def _events_of(chosen: StepConfig, is_cpu: bool) -> tuple[Event, ...]:
    return tuple(record_step(chosen, "cpu" if is_cpu else "cuda").events)


def replay(events: Iterable[Event], gpu: str) -> Footprint:
    """The footprint of recorded allocations: its peaks since the last step began.

    Where they do not fit, the peaks are those that a device without end would have.

    Raises:
        UserError: an unknown GPU.
    """
    events = tuple(events)
    if gpu == CPU:
        return _measured(events, gpu, _Exact(), 0, None, None, "")
    usable, workspace = gpu_peaks(gpu).usable_bytes, gpu_peaks(gpu).cublas_workspace_bytes
    fails_at = first_failure(events, usable, workspace)
    # Where memory is short, segments that are free are given back, and less is reserved than on a device without end.
    allocator = CachingAllocator(usable if fails_at is None else None)
    return _measured(events, gpu, allocator, workspace, usable, fails_at is None, fails_at or "")


class _Exact(CachingAllocator):
    """An allocator that gives what is asked for."""

    def allocate(self, requested_bytes: int) -> Block:
        self.allocated_bytes += requested_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return Block(0, requested_bytes, is_small=False, is_free=False)

    def free(self, block: Block | None) -> None:
        assert block is not None
        self.allocated_bytes -= block.size


def first_failure(events: Iterable[Event], limit_bytes: int, workspace_bytes: int) -> str | None:
    """The place of the first allocation that a device cannot give, as a sentence names it; None where all fits."""
    allocator = CachingAllocator(limit_bytes)
    blocks: dict[int, Block | None] = {}
    for event in events:
        if event.allocation is None:
            continue
        if not event.is_birth:
            allocator.free(blocks.pop(id(event.allocation)))
            continue
        try:
            blocks[id(event.allocation)] = allocator.allocate(_requested(event.allocation, workspace_bytes))
        except OutOfSegments:
            return " › ".join([*event.allocation.ranges, event.allocation.operator.removeprefix("aten::")])
    return None


def _requested(allocation: Allocation, workspace_bytes: int) -> int:
    return workspace_bytes if allocation.is_workspace else allocation.requested_bytes


def _measured(
    events: tuple[Event, ...],
    device: str,
    allocator: CachingAllocator,
    workspace_bytes: int,
    usable_bytes: int | None,
    fits: bool | None,
    fails_at: str,
) -> Footprint:
    """Run the allocator over the events; of its peak what is live and where it is."""
    blocks: dict[int, Block | None] = {}
    by_kind: Counter[str] = Counter()
    before = growth = highest_growth = 0
    kinds: dict[str, int] = {}
    last: Allocation | None = None  # what was allocated when the peak was reached
    peak_so_far = -1
    for event in events:
        allocation = event.allocation
        if allocation is None:
            if event.mark == "end":
                break
            before, peak_so_far = allocator.allocated_bytes, -1
            growth = highest_growth = 0
            allocator.reset_peaks()
        elif event.is_birth:
            block = allocator.allocate(_requested(allocation, workspace_bytes))
            blocks[id(allocation)] = block
            growth += _requested(allocation, workspace_bytes)
            highest_growth = max(highest_growth, growth)
            by_kind[allocation.kind] += block.size if block is not None else 0
            if allocator.allocated_bytes > peak_so_far:
                peak_so_far = allocator.allocated_bytes
                kinds, last = dict(by_kind), allocation
        else:
            block = blocks.pop(id(allocation))
            growth -= _requested(allocation, workspace_bytes)
            by_kind[allocation.kind] -= block.size if block is not None else 0
            allocator.free(block)
    return Footprint(
        device=device,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        before_bytes=before,
        snapshot_peak_bytes=before + highest_growth,
        by_kind={kind: size for kind, size in sorted(kinds.items(), key=lambda item: -item[1]) if size},
        largest=_groups(_live_at(events, last), workspace_bytes),
        peak_operator=last.operator if last is not None else "",
        peak_ranges=last.ranges if last is not None else (),
        usable_bytes=usable_bytes,
        fits=fits,
        fails_at=fails_at,
    )


def _live_at(events: Iterable[Event], last: Allocation | None) -> list[Allocation]:
    """What is live once `last` has been allocated."""
    live: dict[int, Allocation] = {}
    for event in events:
        if event.allocation is None:
            continue
        if not event.is_birth:
            live.pop(id(event.allocation))
            continue
        live[id(event.allocation)] = event.allocation
        if event.allocation is last:
            break
    return list(live.values())


def _groups(live: Iterable[Allocation], workspace_bytes: int) -> tuple[Group, ...]:
    counted = Counter((each.kind, each.operator, _requested(each, workspace_bytes)) for each in live)
    groups = [Group(kind, operator, size, count) for (kind, operator, size), count in counted.items()]
    return tuple(sorted(groups, key=lambda group: -group.total_bytes)[:MOST_GROUPS])

"""Timing steps: every sample kept, warm-ups kept apart.

Work on a GPU is asynchronous: a clock that is read before the device is done times the launch. So every step ends with
a synchronisation, inside the timed region (wall clock), and on a GPU a pair of CUDA events around the step tells the
device's own time beside it. Python's garbage collector is off meanwhile, as in `timeit`.

What is to be compared runs interleaved, one round after the other, so that whatever disturbs a machine for a while
disturbs all alike.

Source: CS336 assignment 2, section 1.1.3; the samples and warm-ups as in pyperf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from cs336_systems.errors import UserError
from cs336_systems.profiling.ranges import named_range


@dataclasses.dataclass(frozen=True)
class Timing:
    """The times of repeated steps in milliseconds, in the order they ran."""

    warmup_ms: tuple[float, ...]
    samples_ms: tuple[float, ...]
    device_ms: tuple[float, ...] = ()
    """The measured steps by CUDA events; empty on a CPU."""


def synchronize(device: str) -> None:
    """Wait until the device has finished everything it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_steps(
    step: Callable[[], object],
    *,
    warmup: int,
    steps: int,
    device: str,
    on_step: Callable[[], object] = lambda: None,
) -> Timing:
    """Run `step` `warmup` + `steps` times, timing each; `on_step` is called after each, outside the timed region.

    Raises:
        UserError: fewer than one measured step, or a negative number of warm-ups.
    """
    if steps < 1 or warmup < 0:
        raise UserError(f"expected at least 1 measured step and 0 warm-ups, found {steps} and {warmup}")
    return time_rounds({"step": step}, warmup=warmup, rounds=steps, device=device, on_round=on_step)["step"]


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    rounds: int,
    device: str,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Run all `calls` in their order, once per round, timing each; a call may use what one before it left.

    To a profiler all warm-ups are one range, all measured rounds another, and each call is one by its name within.

    `on_round` is called after each round, outside the timed region.

    Raises:
        UserError: fewer than one measured round, or a negative number of warm-ups.
    """
    if rounds < 1 or warmup < 0:
        raise UserError(f"expected at least 1 measured round and 0 warm-ups, found {rounds} and {warmup}")
    wall_ms: dict[str, list[float]] = {name: [] for name in calls}
    device_ms: dict[str, list[float]] = {name: [] for name in calls}
    with no_garbage_collection():
        synchronize(device)
        for part, count in (("warm-up", warmup), ("measured", rounds)):
            with named_range(part):
                for _ in range(count):
                    for name, call in calls.items():
                        with named_range(name):
                            elapsed = _time_on_gpu(call) if device == "cuda" else (_time_on_cpu(call), None)
                        wall_ms[name].append(elapsed[0])
                        if elapsed[1] is not None:
                            device_ms[name].append(elapsed[1])
                    on_round()
    return {
        name: Timing(tuple(wall[:warmup]), tuple(wall[warmup:]), tuple(device_ms[name][warmup:]))
        for name, wall in wall_ms.items()
    }


def _time_on_cpu(step: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - start) / 1e6


def _time_on_gpu(step: Callable[[], object]) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start = time.perf_counter_ns()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6, begin.elapsed_time(end)


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set PyTorch's float32 matmul precision, and set it back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect once, then not again until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def benched_ms(
    call: Callable[[], object], prepare: Callable[[], object] | None = None, *, rep_ms: float = 20.0
) -> float:
    """The median of a call on a GPU by `triton.testing.do_bench`, which empties the L2 cache before each.

    Launches are hidden behind the emptying as long as it lasts, some tens of microseconds; beyond that they count.

    Args:
        prepare: run before each call, outside the timed region: the same is then done by hand.
    """
    from triton.runtime import driver  # not on every system
    from triton.testing import do_bench

    if prepare is None:
        median: float = do_bench(call, warmup=max(1, int(rep_ms / 4)), rep=int(rep_ms), return_mode="median")
        return median
    cache = driver.active.get_empty_cache_for_benchmark()

    def once() -> float:
        prepare()
        driver.active.clear_cache(cache)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    first_ms = once()  # the warm-up tells how many fit
    return statistics.median(once() for _ in range(max(3, min(100, int(rep_ms / max(first_ms, 1e-3))))))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a table says of a list of samples; the handout asks for mean and standard deviation."""

    mean: float
    std: float
    """Sample standard deviation (n − 1); NaN for a single sample."""
    median: float


def describe(samples: Sequence[float]) -> Statistics:
    """Mean, standard deviation and median of at least one sample."""
    return Statistics(
        mean=statistics.fmean(samples),
        std=statistics.stdev(samples) if len(samples) > 1 else float("nan"),
        median=statistics.median(samples),
    )

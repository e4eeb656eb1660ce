"""Peak memory of a region: PyTorch's caching allocator on a GPU, the resident set on a CPU.

The two are not the same quantity. The allocator's peak is exact and counts tensors; the resident set counts pages of
the process, the interpreter and libraries included, so its growth over the region is reported beside it, and it is only
as good as the C library's habit of giving memory back (which is asked for before the region begins).

`allocated_bytes` counts tensors on both, for one untimed call.

`memory_cap` turns running out of memory on a CPU into an error of the allocation that asked too much: Linux would
otherwise grant every request and kill the process, with all its unsaved work, when the pages are touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from cs336_systems.bench.machine import available_memory_bytes

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as memory: …`, then `memory.values` in bytes.

    CUDA: `peak_allocated_bytes` and `peak_reserved_bytes`. CPU: `peak_resident_bytes` and `growth_resident_bytes`
    over the start.
    """

    values: dict[str, int]

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        release_free_memory(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return self
        self._baseline = psutil.Process().memory_info().rss
        self._watch = _ResidentPeak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.values = {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
            return
        peak = max(self._watch.stop(), self._baseline)
        self.values = {"peak_resident_bytes": peak, "growth_resident_bytes": peak - self._baseline}


def allocated_bytes(call: Callable[[], object], device: str) -> tuple[int, int]:
    """What running `call` once allocates: at most at any time, and what of it is left at its end, in bytes.

    Exact for tensors on either device, compiled code's too. On a CPU PyTorch's profiler reports every allocation, which
    slows the call down; so it is never run for its time.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would tell stderr when it begins and ends
    activities = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        warnings.simplefilter("ignore")
        call()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    running = list(itertools.accumulate(change for _, change in changes))
    return max(running, default=0), running[-1] if running else 0


class _ResidentPeak:
    """The largest resident set since its creation: the kernel's own mark on Linux, samples elsewhere."""

    INTERVAL_S = 0.005

    def __init__(self) -> None:
        self._sampler: threading.Thread | None = None
        try:
            _CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            self._peak = 0
            self._done = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(self.INTERVAL_S):
            self._peak = max(self._peak, process.memory_info().rss)

    def stop(self) -> int:
        """The peak in bytes."""
        if self._sampler is not None:
            self._done.set()
            self._sampler.join()
            return max(self._peak, psutil.Process().memory_info().rss)
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return psutil.Process().memory_info().rss


def release_free_memory(device: str) -> None:
    """Give what is no longer used back to the device or the system, so that it neither hides growth nor seems taken."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def heap_set_aside() -> Iterator[None]:
    """Meanwhile no collection of garbage goes through what is in memory now.

    With PyTorch's compiler and a notebook's libraries that is half a million objects and more: 0.2 s a collection in a
    fresh process, over a second in one that has run for long, and a case needs several.
    """
    import_what_is_imported_late()
    was_set_aside = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_set_aside:  # else whoever did it first ends it
            gc.unfreeze()


@contextlib.contextmanager
def memory_cap(device: str, headroom_bytes: int | None = None) -> Iterator[None]:
    """While inside, an allocation beyond the memory that is available raises instead of waking the OOM killer.

    Sets the soft limit on the process's data size (setrlimit(2), RLIMIT_DATA) to what it has now plus
    `headroom_bytes` (default: what is available). Nothing is limited off Linux, nor with CUDA, whose driver maps far
    more address space than it uses.
    """
    if sys.platform != "linux" or device == "cuda":
        yield
        return
    import resource  # not on Windows

    import_what_is_imported_late()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    headroom = available_memory_bytes() if headroom_bytes is None else headroom_bytes
    limit = _data_bytes() + headroom
    limits = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@functools.cache
def import_what_is_imported_late() -> None:
    """PyTorch imports its compiler with the first optimizer; cut short by the cap, it would stay half imported."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    optimizer.zero_grad()


def _data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA counts."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def available_bytes(device: str) -> int:
    """Memory that can still be allocated on `device`, the caching allocator's unused blocks not counted."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else available_memory_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on either device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # What has no exception type of its own: PyTorch's CPU allocator, cuBLAS, and Triton's launcher.
    signs = (
        *("can't allocate memory", "not enough memory", "std::bad_alloc"),
        *("CUDA out of memory", "[CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def describe_memory(values: dict[str, Any]) -> int | None:
    """The one peak to show for `PeakMemory.values`: allocated on a GPU, growth of the resident set on a CPU."""
    return values.get("peak_allocated_bytes", values.get("growth_resident_bytes"))

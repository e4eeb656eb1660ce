"""Named ranges for profilers, inside the code that is measured, free while nobody records them.

    with record_ranges():
        model(tokens)   # shows as block 0, attention, scores, softmax, value product, feed-forward, block 1, …

A range is one of NVTX, which Nsight Systems shows, and one of PyTorch's profiler. While ranges are off, and always
under `torch.compile`, which would break its graph at them, `named_range` gives one object that does nothing.

NVTX is the package of that name: without a tool attached its ranges cost a call each, and no CUDA is needed for them.
It has no wheel for macOS, where no tool could listen; there PyTorch's profiler alone sees the ranges.

Source: NVTX 3; CS336 assignment 2, section 1.1.4.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

_NOTHING = contextlib.nullcontext()
_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextlib.contextmanager
def record_ranges(recording: bool = True) -> Iterator[None]:
    """Turn named ranges on, or off, for the calls within; other threads keep their own setting."""
    token = _recording.set(recording)
    try:
        yield
    finally:
        _recording.reset(token)


def named_range(name: str, index: int | None = None) -> contextlib.AbstractContextManager[None]:
    """A range called `name`, or `name index`, if ranges are recorded."""
    if torch.compiler.is_compiling() or not _recording.get():
        return _NOTHING
    return recorded_range(name if index is None else f"{name} {index}")


@contextlib.contextmanager
def recorded_range(name: str) -> Iterator[None]:
    """A range called `name`, whether ranges are recorded or not; for who knows that they are, on whatever thread."""
    nvtx = _nvtx()
    with torch.profiler.record_function(name):
        if nvtx is None:
            yield
            return
        nvtx.push_range(name)
        try:
            yield
        finally:
            nvtx.pop_range()


@functools.cache
def _nvtx() -> ModuleType | None:
    try:
        import nvtx
    except ImportError:
        return None
    module: ModuleType = nvtx
    return module

"""Named ranges for profilers, inside the code that is measured, free while nobody records them.

    with record_ranges():
        model(tokens)   # shows as block 0, attention, scores, softmax, value product, feed-forward, block 1, …

A range is one of NVTX, which Nsight Systems shows, and one of PyTorch's profiler. While ranges are off, and always
under `torch.compile`, which would break its graph at them, `named_range` gives one object that does nothing.

A PyTorch with CUDA has NVTX built in. Else it is the package of that name, which needs no CUDA; without a tool attached
its ranges cost a call each. It comes second because from version 0.2.12 on it makes no range for a tool that does not
say that it listens, and no Nsight Systems up to 2024.2 was seen to say so. It has no wheel for macOS, where no tool
could listen; there PyTorch's profiler alone sees the ranges.

Source: NVTX 3 (nvtxDomainIsEnabled); CS336 assignment 2, section 1.1.4.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

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


class _Nvtx(Protocol):
    def push_range(self, name: str, /) -> object: ...

    def pop_range(self) -> object: ...


@functools.cache
def _nvtx() -> _Nvtx | None:
    if torch.version.cuda is not None:
        return _Torch()
    try:
        import nvtx
    except ImportError:
        return None
    package: _Nvtx = nvtx
    return package


class _Torch:
    """PyTorch's own binding by the names of the package."""

    def push_range(self, name: str, /) -> object:
        return torch.cuda.nvtx.range_push(name)

    def pop_range(self) -> object:
        return torch.cuda.nvtx.range_pop()

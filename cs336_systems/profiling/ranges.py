"""Named ranges for profilers, inside the code that is measured, free while nobody records them.

    with record_ranges():
        attention(query, key, value, is_causal=True)   # scores, softmax and value product show by name

A range is one of NVTX, which Nsight Systems shows, where CUDA is, and one of PyTorch's profiler. While ranges are off,
and always under `torch.compile`, which would break its graph at them, `named_range` gives one object that does
nothing.

Source: NVTX 3; CS336 assignment 2, section 1.1.4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

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


def named_range(name: str) -> contextlib.AbstractContextManager[None]:
    """A range called `name`, if ranges are recorded."""
    if torch.compiler.is_compiling() or not _recording.get():
        return _NOTHING
    return _recorded_range(name)


@contextlib.contextmanager
def _recorded_range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

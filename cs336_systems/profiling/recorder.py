"""Records what runs inside, by PyTorch's own means, in files that the readers of this room read.

    with record_trace(path, "cpu"):
        step()
    summarise(read_recording(path))

A trace has the named ranges of `ranges.py`; on a GPU its kernels and the calls that launched them, on a CPU its
operators. It opens in ui.perfetto.dev too, which reads it in the browser. Recording costs time per operator, and with
stacks several times as much: what is timed is timed without.

Source: PyTorch, torch/profiler/profiler.py and torch/cuda/memory.py.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from cs336_systems.errors import UserError
from cs336_systems.profiling.ranges import record_ranges


@contextlib.contextmanager
def record_trace(path: Path, device: str, *, memory: bool = False, stacks: bool = False) -> Iterator[None]:
    """Write a trace of what runs inside to `path` (.json, or .json.gz) when it ends without an exception.

    Args:
        device: "cuda" records the GPU's kernels too.
        memory: with every allocation and release.
        stacks: with the Python functions that are open.

    Raises:
        UserError: the file cannot be written, or another profiler is at work.
    """
    # The profiler would tell stderr when it begins and ends, and CUPTI would stay attached and slow down what follows.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TEARDOWN_CUPTI", "1")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _file_for(path, "trace"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a profiler that ends the process's first cycle
        profiler = torch.profiler.profile(activities=activities, profile_memory=memory, with_stack=stacks)
        with profiler, record_ranges():
            yield
            if device == "cuda":
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))


@contextlib.contextmanager
def _file_for(path: Path, what: str) -> Iterator[None]:
    """See before anything runs that a file can be written; and leave none behind where it was not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"cannot write the {what} {path}: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if not path.stat().st_size:
        path.unlink()
        raise UserError(f"cannot write the {what} {path}: it came out empty; is the disk full?")


@contextlib.contextmanager
def record_memory(path: Path, device: str) -> Iterator[None]:
    """Write what runs inside allocates and frees, with the lines of code it comes from, to `path`.

    On a GPU that is a memory snapshot (.pickle), which knows what was there before; on a CPU a trace (.json), which
    does not, nor that any of it is freed. A GPU's backward runs on a thread without Python's frames, so C++'s are
    recorded too.

    Raises:
        UserError: the file cannot be written.
    """
    if device != "cuda":
        with record_trace(path, device, memory=True, stacks=True):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(
        max_entries=MOST_EVENTS, context="all", stacks="all", global_record_annotations=True
    )
    try:
        with _file_for(path, "snapshot"):
            with record_ranges():
                yield
                torch.cuda.synchronize()
            torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


MOST_EVENTS = 10_000_000
"""Of a snapshot's trace, far beyond any step here: one that is full forgets its beginning."""

"""What is measured on several ranks: as long as its slowest one, and a lack of memory is an answer, not a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from cs336_systems.bench.allocator import is_out_of_memory
from cs336_systems.bench.sweep import OutOfMemory


@contextlib.contextmanager
def lack_of_memory_told() -> Iterator[None]:
    """Around a launch of ranks, whose error says of which signal a rank died and what it raised.

    Raises:
        OutOfMemory: a rank ran out of memory, or the system killed it, which is what running out of memory does.
    """
    try:
        yield
    except RuntimeError as error:
        cause = error.__cause__
        if getattr(error, "signal_name", None) == "SIGKILL" or (cause is not None and is_out_of_memory(cause)):
            raise OutOfMemory(str(error)) from error
        raise


def slowest_of(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Of each round the slowest rank's time."""
    return [max(times) for times in zip(*ranks, strict=True)]

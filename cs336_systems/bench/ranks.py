"""Launch what is measured on several ranks, so that a lack of memory is an answer there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cs336_systems.bench.allocator import is_out_of_memory
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.distributed.launch import RankFailed, launch


def launch_measured(worker: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """As `launch`, whose arguments and options these are.

    Raises:
        OutOfMemory: a rank ran out of memory, or the system killed it, which is what running out of memory does.
        UserError, RankFailed: see `launch`.
    """
    try:
        return launch(worker, *arguments, **options)
    except RankFailed as error:
        cause = error.__cause__
        if error.signal_name == "SIGKILL" or (cause is not None and is_out_of_memory(cause)):
            raise OutOfMemory(str(error)) from error
        raise

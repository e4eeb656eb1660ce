"""Which of a few tiles a kernel is fastest with, found once per GPU and kept on the disk.

The candidates are named in `flash_tiles.py`, a handful per kernel, so that tuning has a bound. What wins depends on the
head dimension, the precision, the mask, and on how much work there is, in classes: the longer of queries and keys, and
whether there are heads enough to fill a GPU. Nothing is tuned unless it is asked for (`tune`, scripts/tune_kernels.py):
without a winner a kernel takes the first candidate, chosen with the compiler's report.

Winners lie in `.cache/flash_tiles/` of the checkout, one file per kind of GPU and version of Triton. A file that speaks
of other kernels than today's, cannot be read, or names tiles that are no candidates is as good as none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from cs336_systems.attention import flash_kernels
from cs336_systems.attention.flash_launch import (
    Problem,
    dense_rows,
    launch_delta,
    launch_forward,
    launch_grad_key_value,
    launch_grad_query,
)
from cs336_systems.attention.flash_tiles import KERNELS, Kernel, Tiles, candidates
from cs336_systems.errors import UserError, first_line
from cs336_systems.files import write_atomically
from cs336_systems.repository import cache_folder

LENGTHS = (512, 4096)
"""Where one class of lengths ends and the next begins."""
MANY_HEADS = 8
"""Heads over the whole batch from which on even short sequences occupy a GPU."""
Timer = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The tiles a kernel takes, and whether they won."""

    tiles: Tiles
    tuned: bool

    def described(self) -> dict[str, Any]:
        return dataclasses.asdict(self.tiles) | {"tuned": self.tuned}


def key_of(kernel: Kernel, problem: Problem) -> str:
    """The class of problems that share a winner: `forward, 64, bfloat16, causal, up to 4096, many heads`."""
    longest = max(problem.queries, problem.keys)
    length = next((f"up to {most}" for most in LENGTHS if longest <= most), f"over {LENGTHS[-1]}")
    precision = problem.precision if problem.dtype == torch.float32 else str(problem.dtype).removeprefix("torch.")
    heads = "many heads" if problem.batch * problem.heads >= MANY_HEADS else "few heads"
    mask = "causal" if problem.offset is not None else "no mask"
    return ", ".join([kernel, str(problem.head_dim), precision, mask, length, heads])


def chosen(kernel: Kernel, problem: Problem) -> Choice:
    """The winner among a kernel's candidates for problems like this one, or the first of them."""
    known = known_tiles(kernel, problem)
    winner = winners(problem.device).get(key_of(kernel, problem)) if problem.device.type == "cuda" else None
    return Choice(winner, tuned=True) if winner in known else Choice(known[0], tuned=False)


def known_tiles(kernel: Kernel, problem: Problem) -> tuple[Tiles, ...]:
    """The candidates for a problem, the best by the compiler's report first."""
    return candidates(kernel, problem.head_dim, problem.dtype.itemsize, problem.capability)


# Winners on the disk -------------------------------------------------------------------------------------------


def winners(device: torch.device) -> Mapping[str, Tiles]:
    """What is known of this kind of GPU, by `key_of`."""
    return _read(winners_file(device))


def winners_file(device: torch.device) -> Path:
    return cache_folder() / "flash_tiles" / _file_name(torch.cuda.get_device_name(device))


@functools.cache
def _file_name(device_name: str) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{gpu}-triton-{importlib.metadata.version('triton')}.json"


@functools.cache
def kernels_hash() -> str:
    """Of the kernels' source: what won for other kernels says nothing of these."""
    return hashlib.sha256(Path(flash_kernels.__file__).read_bytes()).hexdigest()[:16]


@functools.cache
def _read(path: Path) -> Mapping[str, Tiles]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kernels"] != kernels_hash():
            return {}
        return {str(key): Tiles(**tiles) for key, tiles in content["winners"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _keep(device: torch.device, found: Mapping[str, Tiles]) -> None:
    """Add winners to the file; of two processes that tune at once the later keeps what it has read, and its own."""
    path = winners_file(device)
    _read.cache_clear()
    known = {**_read(path), **found}
    content = {
        "kernels": kernels_hash(),
        "winners": {key: dataclasses.asdict(tiles) for key, tiles in sorted(known.items())},
    }
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
    _read.cache_clear()


# Tuning --------------------------------------------------------------------------------------------------------


def tune(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int | None,
    precision: str,
    *,
    timer: Timer | None = None,
) -> dict[str, Tiles]:
    """Time every candidate of every kernel on these inputs and keep the winners; what has one is left alone.

    Args:
        timer: milliseconds of a call; by default the median of `triton.testing.do_bench`.

    Returns:
        What was found, by `key_of`.

    Raises:
        UserError: no candidate of a kernel runs on this GPU, or the winners cannot be written.
    """
    query, key, value = (dense_rows(x.detach()) for x in (query, key, value))
    problem = Problem.of(query, key, offset, precision)
    known = winners(problem.device)
    waiting: list[Kernel] = [
        kernel for kernel in KERNELS if known.get(key_of(kernel, problem)) not in known_tiles(kernel, problem)
    ]
    if not waiting:
        return {}
    output, logsumexp = launch_forward(query, key, value, problem, chosen("forward", problem).tiles)
    grad_output = torch.randn_like(output)
    saved = (query, key, value, grad_output, logsumexp, launch_delta(output, grad_output))
    launchers: dict[Kernel, Callable[[Tiles], object]] = {
        "forward": lambda tiles: launch_forward(query, key, value, problem, tiles),
        "grad_key_value": lambda tiles: launch_grad_key_value(*saved, problem, tiles),
        "grad_query": lambda tiles: launch_grad_query(*saved, problem, tiles),
    }
    found = {
        key_of(kernel, problem): fastest(launchers[kernel], known_tiles(kernel, problem), timer or _milliseconds)
        for kernel in waiting
    }
    _keep(problem.device, found)
    return found


def fastest(launch: Callable[[Tiles], object], tiles: tuple[Tiles, ...], timer: Timer) -> Tiles:
    """The candidate with the least time; one that the GPU or the compiler refuses is out.

    Raises:
        UserError: all were refused.
    """
    times: dict[Tiles, float] = {}
    refused = []
    for candidate in tiles:
        try:
            times[candidate] = timer(functools.partial(launch, candidate))
        except (TritonError, RuntimeError) as error:
            refused.append(f"{candidate}: {first_line(error)}")
    if not times:
        raise UserError(f"none of the kernel's tiles runs on this GPU: {'; '.join(refused)}")
    return min(times, key=times.__getitem__)


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(call, warmup=5, rep=20, return_mode="median")
    return median

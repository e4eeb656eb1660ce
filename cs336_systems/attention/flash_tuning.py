"""Which of a few tiles a kernel is fastest with, found once per GPU and kept on the disk.

The candidates are named in `flash_tiles.py`, a handful per kernel, so that tuning has a bound. What wins depends on the
head dimension, the precision, the mask, and on how much work there is, in classes: the longer of queries and keys, and
whether there are heads enough to fill a GPU. Nothing is tuned unless it is asked for (`tune`, scripts/tune_kernels.py):
without a winner a kernel takes the first candidate, chosen with the compiler's report.

Winners lie in `.cache/flash_tiles/` of the checkout, one file per kind of GPU and version of Triton. A file that speaks
of other kernels or candidates than today's, cannot be read, or names tiles that are no candidates is as good as none. A
process reads it once, and again before it tunes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from cs336_systems.attention import flash_kernels, flash_tiles
from cs336_systems.attention.flash_launch import (
    Problem,
    launch_delta,
    launch_forward,
    launch_grad_key_value,
    launch_grad_query,
)
from cs336_systems.attention.flash_tiles import KERNELS, Kernel, Precision, Tiles, candidates
from cs336_systems.errors import UserError, first_line
from cs336_systems.files import write_atomically
from cs336_systems.repository import cache_folder

LENGTHS = (512, 4096)
"""Where one class of lengths ends and the next begins."""
MANY_HEADS = 8
"""Heads over the whole batch from which on even short sequences occupy a GPU."""
Timer = Callable[[Callable[[], object]], float]
Launch = Callable[[Tiles], object]
"""Runs a kernel on inputs of its own, cut as it is told."""


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
    precision: Precision = "half"
    if problem.dtype == torch.float32:
        precision = "ieee" if problem.precision == "ieee" else "tf32"
    return candidates(kernel, problem.head_dim, precision, problem.capability)


# Winners on the disk -------------------------------------------------------------------------------------------


@functools.cache
def winners(device: torch.device) -> Mapping[str, Tiles]:
    """What is known of this kind of GPU, by `key_of`; outside a checkout nothing is."""
    try:
        return _read(winners_file(device))
    except UserError:
        return {}


def winners_file(device: torch.device) -> Path:
    """Raises a UserError outside a checkout."""
    return cache_folder() / "flash_tiles" / _file_name(torch.cuda.get_device_name(device))


def _file_name(device_name: str) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{gpu}-triton-{importlib.metadata.version('triton')}.json"


@functools.cache
def kernels_hash() -> str:
    """Of the source of kernels and candidates: what won for others, or among others, says nothing of these."""
    source = inspect.getsource(flash_kernels) + inspect.getsource(flash_tiles)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


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
    known = {**_read(path), **found}
    content = {
        "kernels": kernels_hash(),
        "winners": {key: dataclasses.asdict(tiles) for key, tiles in sorted(known.items())},
    }
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
    winners.cache_clear()


# Tuning --------------------------------------------------------------------------------------------------------


def tune(asked: Problem, *, timer: Timer | None = None) -> dict[str, Tiles]:
    """Time every candidate of every kernel and keep the winners; what has one is left alone.

    What is timed is a problem that stands for all of its class (`representative`), so that it does not matter which of
    them was met first.

    Args:
        timer: milliseconds of a call; by default the median of `triton.testing.do_bench`.

    Returns:
        What was found, by `key_of`.

    Raises:
        UserError: the problem is not on a GPU, no candidate of a kernel runs on it, or the winners cannot be written.
    """
    problem = representative(asked)
    if problem.device.type != "cuda":
        raise UserError(f"tiles are timed on a CUDA device, found inputs on {problem.device}")

    @functools.cache
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator(problem.device).manual_seed(0)  # what others draw stays as it is
        shape = (4, problem.batch, problem.heads, problem.queries, problem.head_dim)
        query, key, value, grad_output = torch.randn(shape, device=problem.device, generator=generator).to(
            problem.dtype
        )
        return query, key, value, grad_output

    @functools.cache
    def saved() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What backward has, by the forward's winner."""
        query, key, value, grad_output = inputs()
        output, logsumexp = launch_forward(query, key, value, problem, chosen("forward", problem).tiles)
        return query, key, value, grad_output, logsumexp, launch_delta(output, grad_output)

    launches: dict[Kernel, Launch] = {
        "forward": lambda tiles: launch_forward(*inputs()[:3], problem, tiles),
        "grad_key_value": lambda tiles: launch_grad_key_value(*saved(), problem, tiles),
        "grad_query": lambda tiles: launch_grad_query(*saved(), problem, tiles),
    }
    with torch.cuda.device(problem.device):
        return find(problem, launches, timer or _milliseconds)


def representative(problem: Problem) -> Problem:
    """The longest problem of the class, of the longest class one four times the end of the one before."""
    longest = max(problem.queries, problem.keys)
    length = next((most for most in LENGTHS if longest <= most), 4 * LENGTHS[-1])
    heads = 2 * MANY_HEADS if problem.batch * problem.heads >= MANY_HEADS else 1
    return dataclasses.replace(
        problem,
        batch=1,
        heads=heads,
        key_heads=heads,
        queries=length,
        keys=length,
        offset=None if problem.offset is None else 0,
    )


def find(problem: Problem, launches: Mapping[Kernel, Launch], timer: Timer) -> dict[str, Tiles]:
    """The winner of every kernel that has none for problems like this one, each kept as soon as it is found.

    Raises:
        UserError: no candidate of a kernel runs on this GPU, or the winners cannot be written.
    """
    winners.cache_clear()  # another process may have tuned meanwhile
    found: dict[str, Tiles] = {}
    for kernel in KERNELS:
        if not chosen(kernel, problem).tuned:
            winner = {key_of(kernel, problem): fastest(kernel, launches[kernel], known_tiles(kernel, problem), timer)}
            _keep(problem.device, winner)
            found |= winner
    return found


def fastest(kernel: Kernel, launch: Launch, tiles: tuple[Tiles, ...], timer: Timer) -> Tiles:
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
            if not is_refusal(error):
                raise  # the inputs are too large, or a kernel is at fault: nothing that other tiles would mend
            refused.append(f"{candidate} ({first_line(error)})")
    if not times:
        raise UserError(f"none of the tiles of {kernel} runs on this GPU: {'; '.join(refused)}")
    return min(times, key=times.__getitem__)


def is_refusal(error: Exception) -> bool:
    """Whether the compiler or the launch refused a candidate, as opposed to running it into a fault."""
    signs = ("PassManager::run failed", "invalid argument", "too many resources requested")
    return isinstance(error, TritonError) or any(sign in str(error) for sign in signs)


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(call, warmup=5, rep=20, return_mode="median")
    return median

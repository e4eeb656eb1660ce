"""How the FlashAttention kernels are cut: tiles, warps and pipeline stages per kernel, head dimension and precision.

An accumulator of BLOCK_Q × head_dim (two of BLOCK_K × head_dim for dK and dV) must stay in registers beside a tile of
scores, 255 registers a thread at most; what does not fit is spilled to memory and costs more than any tile gains. And
`stages` tiles of what the loop reads must fit into shared memory, of which a GPU before Hopper has less. Moreover the
matrix units differ: registers in and out before Hopper, operands from shared memory on Hopper, results in a memory of
their own on Blackwell; so each has its column. A consumer Blackwell (12.x) has the units and the shared memory of those
before Hopper, and their tiles.

Each choice was searched for among 16 to 128 queries and keys, 4 or 8 warps and 1 to 3 stages, by compiling with Triton
3.7.1 for 8.0, 8.6, 8.9, 9.0 and 10.0. In 16-bit precisions up to head dimension 128 it is the largest tile (queries ×
keys) that the compiler reports no spill for, then the one with the most stages. Beyond, and in float32, it is the best
of fewer candidates. What spills nevertheless is listed in STACK_CEILING. Nothing here was chosen by its speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

Kernel = Literal["forward", "grad_key_value", "grad_query"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
Precision = Literal["half", "ieee", "tf32"]
"""16-bit inputs, or float32 inputs whose products run in this precision."""
SHARED_BYTES = MappingProxyType({80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448})
"""The most shared memory a block may have, by compute capability; CUDA C++ Programming Guide, compute capabilities."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, warps per program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class _Row(NamedTuple):
    """The tiles for head dimensions up to `head_dim`, by class of GPU."""

    head_dim: int
    before_hopper: Tiles
    hopper: Tiles
    blackwell: Tiles


_HALF: Mapping[Kernel, tuple[_Row, ...]] = MappingProxyType(
    {
        "forward": (
            _Row(32, Tiles(128, 128, 8, 3), Tiles(128, 128, 4, 3), Tiles(128, 128, 8, 3)),
            _Row(64, Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 1)),
            _Row(128, Tiles(64, 128, 4, 2), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 1)),
            _Row(256, Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2)),
        ),
        "grad_key_value": (
            _Row(32, Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 1)),
            _Row(64, Tiles(32, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 3)),
            _Row(128, Tiles(64, 64, 8, 1), Tiles(32, 128, 8, 3), Tiles(128, 32, 8, 1)),
            _Row(256, Tiles(32, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 2)),
        ),
        "grad_query": (
            _Row(32, Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3)),
            _Row(64, Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3)),
            _Row(128, Tiles(64, 128, 8, 1), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2)),
            _Row(256, Tiles(32, 64, 8, 1), Tiles(32, 128, 8, 2), Tiles(64, 64, 4, 2)),
        ),
    }
)
_SINGLE: Mapping[Kernel, tuple[_Row, ...]] = MappingProxyType(
    {
        "forward": (
            _Row(32, Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
            _Row(64, Tiles(64, 64, 8, 1), Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
            _Row(128, Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
            _Row(256, Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1)),
        ),
        "grad_key_value": (
            _Row(32, Tiles(32, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 2)),
            _Row(64, Tiles(32, 32, 8, 2), Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 2)),
            _Row(128, Tiles(16, 64, 8, 1), Tiles(16, 32, 4, 1), Tiles(16, 64, 8, 1)),
            _Row(256, Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
        ),
        "grad_query": (
            _Row(32, Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
            _Row(64, Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
            _Row(128, Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
            _Row(256, Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
        ),
    }
)
STACK_CEILING: Mapping[tuple[Kernel, int, Precision], int] = MappingProxyType(
    {
        ("forward", 32, "ieee"): 16,
        ("forward", 64, "ieee"): 256,
        ("grad_key_value", 32, "ieee"): 32,
        ("grad_key_value", 128, "ieee"): 48,
        ("grad_key_value", 256, "ieee"): 16,
        ("grad_query", 32, "ieee"): 8,
        ("grad_query", 128, "ieee"): 16,
    }
)
"""Bytes of stack a thread spills to at most, by kernel, head dimension of the row and precision; 0 where not named.

As scripts/check_kernels.py found it with Triton 3.7.1 over head dimensions 16, 32, 64, 80, 128 and 256, causal and not,
on every GPU of SHARED_BYTES. Float32 in TF32 was not looked at.
"""
ROWS = tuple(row.head_dim for row in _HALF["forward"])
"""The head dimensions of the rows: a kernel takes the tiles of the first that is no smaller than its own."""


_ALTERNATIVES: Mapping[tuple[Kernel, int, Precision], tuple[Tiles, ...]] = MappingProxyType({})
"""What else may win, by kernel, head dimension of the row and precision."""


def candidates(kernel: Kernel, head_dim: int, itemsize: int, capability: int) -> tuple[Tiles, ...]:
    """The tiles worth timing, the first being those to take untimed."""
    first = tiles_for(kernel, head_dim, itemsize, capability)
    return (first,)


def tiles_for(kernel: Kernel, head_dim: int, itemsize: int, capability: int) -> Tiles:
    """The tiles of `kernel` for inputs of `itemsize` bytes on a GPU of `capability` (90 for 9.0), head_dim ≤ 256."""
    for row in (_SINGLE if itemsize == 4 else _HALF)[kernel]:
        if head_dim <= row.head_dim:
            return {9: row.hopper, 10: row.blackwell}.get(capability // 10, row.before_hopper)
    raise ValueError(f"no tiles for head dimension {head_dim}")

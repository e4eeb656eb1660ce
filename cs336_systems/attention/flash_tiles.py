"""How the FlashAttention kernels may be cut: tiles, warps and pipeline stages per kernel, head dimension and precision.

An accumulator of BLOCK_Q × head_dim (two of BLOCK_K × head_dim for dK and dV) must stay in registers beside a tile of
scores, 255 registers a thread at most; what does not fit is spilled to memory and costs more than any tile gains. And
`stages` tiles of what the loop reads must fit into shared memory, of which a GPU before Hopper has less. Moreover the
matrix units differ: registers in and out before Hopper, operands from shared memory on Hopper, results in a memory of
their own on Blackwell; so each has its column. A consumer Blackwell (12.x) has the units and the shared memory of those
before Hopper, and their tiles. Before Hopper what 8.6 and 8.9 have must do.

Each column names a few candidates, found by compiling with Triton 3.7.1 for 8.0, 8.6, 8.9, 9.0 and 10.0. The first is
taken untimed: the largest tile (queries × keys) of those tried that does not spill, or hardly, then the one with the
most stages. The others are mostly smaller, so that a short sequence has programs for the whole GPU, or have fewer warps
or stages, so that more programs share a processor. Which is the fastest only a GPU can tell: `flash_tuning.py` times
them.

With 16-bit inputs no candidate spills; what one does in float32 is listed in STACK_CEILING.
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

    def __str__(self) -> str:
        return f"{self.queries}×{self.keys}, {self.warps} warps, {self.stages} stages"


class _Row(NamedTuple):
    """The candidates for head dimensions up to `head_dim`, by class of GPU; the first is the one to take untimed."""

    head_dim: int
    before_hopper: tuple[Tiles, ...]
    hopper: tuple[Tiles, ...]
    blackwell: tuple[Tiles, ...]


_HALF: Mapping[Kernel, tuple[_Row, ...]] = MappingProxyType(
    {
        "forward": (
            _Row(
                32,
                before_hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)),
                hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)),
                hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3)),
                hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 3)),
                hopper=(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 3)),
                blackwell=(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)),
            ),
        ),
        "grad_key_value": (
            _Row(
                32,
                before_hopper=(Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
                hopper=(Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3)),
                blackwell=(Tiles(64, 128, 8, 1), Tiles(32, 128, 8, 2), Tiles(32, 64, 4, 3)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(32, 128, 8, 3), Tiles(32, 64, 4, 2), Tiles(32, 32, 4, 3)),
                hopper=(Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 2)),
                blackwell=(Tiles(32, 128, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 1)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(64, 64, 8, 1), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 2)),
                hopper=(Tiles(32, 128, 8, 3), Tiles(32, 128, 8, 2), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 2)),
                blackwell=(Tiles(128, 32, 8, 1), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(32, 32, 8, 2), Tiles(16, 32, 4, 1)),
                hopper=(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 2)),
                blackwell=(Tiles(32, 32, 8, 2), Tiles(64, 32, 8, 1)),
            ),
        ),
        "grad_query": (
            _Row(
                32,
                before_hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
                hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)),
                hopper=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(64, 128, 8, 1), Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 2)),
                hopper=(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 3)),
                blackwell=(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 2)),
                hopper=(Tiles(32, 128, 8, 2), Tiles(32, 32, 4, 2)),
                blackwell=(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3)),
            ),
        ),
    }
)
_IEEE: Mapping[Kernel, tuple[_Row, ...]] = MappingProxyType(
    {
        "forward": (
            _Row(
                32,
                before_hopper=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
                hopper=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
                blackwell=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
                hopper=(Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
                blackwell=(Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 1)),
                hopper=(Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 1)),
                blackwell=(Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 1)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
                hopper=(Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
                blackwell=(Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
            ),
        ),
        "grad_key_value": (
            _Row(
                32,
                before_hopper=(Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
                hopper=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
                blackwell=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
                hopper=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
                blackwell=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
                hopper=(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
                blackwell=(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
                hopper=(Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
                blackwell=(Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
            ),
        ),
        "grad_query": (
            _Row(
                32,
                before_hopper=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
                hopper=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
                blackwell=(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
                hopper=(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
                blackwell=(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(32, 64, 8, 1), Tiles(32, 16, 8, 1)),
                hopper=(Tiles(32, 64, 8, 2), Tiles(32, 16, 8, 1)),
                blackwell=(Tiles(32, 64, 8, 2), Tiles(32, 16, 8, 1)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
                hopper=(Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
                blackwell=(Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
            ),
        ),
    }
)
_TF32: Mapping[Kernel, tuple[_Row, ...]] = MappingProxyType(
    {
        "forward": (
            _Row(
                32,
                before_hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
                blackwell=(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                blackwell=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
                hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                blackwell=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
                hopper=(Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
                blackwell=(Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
            ),
        ),
        "grad_key_value": (
            _Row(
                32,
                before_hopper=(Tiles(32, 64, 8, 2), Tiles(32, 32, 4, 2)),
                hopper=(Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)),
                blackwell=(Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(32, 32, 8, 2), Tiles(16, 64, 8, 1)),
                hopper=(Tiles(32, 64, 8, 2), Tiles(32, 32, 4, 1)),
                blackwell=(Tiles(32, 64, 8, 2), Tiles(32, 32, 4, 1)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(16, 64, 8, 1), Tiles(16, 32, 4, 1)),
                hopper=(Tiles(32, 32, 8, 2), Tiles(16, 32, 4, 1)),
                blackwell=(Tiles(32, 32, 8, 2), Tiles(16, 32, 4, 1)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),
                hopper=(Tiles(32, 32, 8, 2), Tiles(16, 16, 8, 1)),
                blackwell=(Tiles(32, 32, 8, 2), Tiles(16, 16, 8, 1)),
            ),
        ),
        "grad_query": (
            _Row(
                32,
                before_hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
                blackwell=(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
            ),
            _Row(
                64,
                before_hopper=(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
                hopper=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
                blackwell=(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
            ),
            _Row(
                128,
                before_hopper=(Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 2)),
                hopper=(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
                blackwell=(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
            ),
            _Row(
                256,
                before_hopper=(Tiles(32, 16, 8, 1), Tiles(16, 16, 4, 1)),
                hopper=(Tiles(32, 32, 8, 2), Tiles(32, 16, 8, 1)),
                blackwell=(Tiles(32, 32, 8, 2), Tiles(32, 16, 8, 1)),
            ),
        ),
    }
)
_TABLES: Mapping[Precision, Mapping[Kernel, tuple[_Row, ...]]] = MappingProxyType(
    {"half": _HALF, "ieee": _IEEE, "tf32": _TF32}
)
STACK_CEILING: Mapping[tuple[Kernel, int, Precision], int] = MappingProxyType(
    {
        ("forward", 32, "ieee"): 24,
        ("forward", 64, "tf32"): 24,
        ("forward", 128, "tf32"): 32,
        ("grad_key_value", 32, "ieee"): 8,
        ("grad_key_value", 32, "tf32"): 8,
        ("grad_key_value", 128, "ieee"): 32,
        ("grad_key_value", 128, "tf32"): 8,
        ("grad_key_value", 256, "ieee"): 64,
        ("grad_query", 32, "ieee"): 8,
        ("grad_query", 128, "ieee"): 32,
        ("grad_query", 128, "tf32"): 24,
    }
)
"""Bytes of stack a thread of any candidate spills to at most, by kernel, head dimension of the row and precision; 0
where not named.

As scripts/check_kernels.py found it with Triton 3.7.1 over head dimensions 16, 32, 64, 80, 128 and 256, causal and not,
on every GPU of SHARED_BYTES.
"""
ROWS = tuple(row.head_dim for row in _HALF["forward"])
"""The head dimensions of the rows: a kernel takes the tiles of the first that is no smaller than its own."""


def candidates(kernel: Kernel, head_dim: int, precision: Precision, capability: int) -> tuple[Tiles, ...]:
    """The tiles of `kernel` worth timing on a GPU of `capability` (90 for 9.0); head_dim ≤ 256."""
    for row in _TABLES[precision][kernel]:
        if head_dim <= row.head_dim:
            return {9: row.hopper, 10: row.blackwell}.get(capability // 10, row.before_hopper)
    raise ValueError(f"no tiles for head dimension {head_dim}")


def tiles_for(kernel: Kernel, head_dim: int, precision: Precision, capability: int) -> Tiles:
    """The tiles to take untimed: the first candidate."""
    return candidates(kernel, head_dim, precision, capability)[0]

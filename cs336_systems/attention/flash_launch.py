"""Starting the FlashAttention kernels: grids, strides and compile-time arguments.

All tensors are (batch, heads, length, dim) with a contiguous last dimension; the other strides may be any.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
from torch import Tensor

from cs336_systems.attention.flash_kernels import delta_kernel, forward_kernel, grad_key_value_kernel, grad_query_kernel
from cs336_systems.attention.flash_tiles import Tiles

DELTA_ROWS = 64
"""Rows per program of the kernel that sums dO · O; it streams, so any number does."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel must know of its inputs beside the tensors themselves."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    offset: int | None
    """Query i sees keys up to i + offset; None: all of them."""
    precision: str
    """Of products of float32 inputs: "ieee" or "tf32"."""
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, key: Tensor, offset: int | None, precision: str) -> Problem:
        batch, heads, queries, head_dim = query.shape
        key_heads, keys = key.shape[1], key.shape[2]
        return cls(batch, heads, key_heads, queries, keys, head_dim, query.dtype, offset, precision, query.device)

    @property
    def capability(self) -> int:
        """90 for compute capability 9.0; what the interpreter runs is cut as for the smallest GPU."""
        if self.device.type != "cuda":
            return 80
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def sizes(self) -> tuple[int, int, int, int, int, float]:
        """The kernels' arguments after the strides."""
        group, scale = self.heads // self.key_heads, 1 / math.sqrt(self.head_dim)
        return self.heads, group, self.queries, self.keys, self.offset or 0, scale

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        """The compile-time arguments of a kernel, and how it is cut."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_of(self.head_dim),
            "BLOCK_Q": tiles.queries,
            "BLOCK_K": tiles.keys,
            "IS_CAUSAL": self.offset is not None,
            "PRECISION": self.precision,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


MOST_ITEMS = 65_535
"""Programs along the second axis of a grid, one per item of the batch and head."""


def parts_of_batch(query: Tensor) -> list[slice]:
    """The batch in parts that a grid has room for; more heads than that are refused where inputs are checked."""
    batch, heads = query.shape[:2]
    step = max(1, MOST_ITEMS // heads)
    return [slice(start, start + step) for start in range(0, batch, step)]


def block_of(head_dim: int) -> int:
    """The power of two in which a head dimension is computed; matrix units want 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


def dense_rows(x: Tensor) -> Tensor:
    """With its last dimension contiguous, and from a head's first row to its last less than 2³¹ elements.

    The kernels count on both, and on nothing else of the strides; other tensors are copied.
    """
    spans = (x.shape[-2] - 1) * x.stride(-2)
    return x if x.stride(-1) == 1 and spans < 2**31 - 2**16 else x.contiguous()


def launch_forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Output and logsumexp."""
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    forward_kernel[(triton.cdiv(problem.queries, tiles.queries), problem.batch * problem.heads)](
        *(query, key, value, output, logsumexp),
        *_strides(query, key, value, output),
        *problem.sizes(),
        **problem.constants(tiles),
    )
    return output, logsumexp


def launch_delta(output: Tensor, grad_output: Tensor) -> Tensor:
    """D = rowsum(dO · O), which both kernels of the backward need."""
    batch, heads, queries, head_dim = output.shape
    delta = output.new_empty(output.shape[:-1], dtype=torch.float32)
    delta_kernel[(triton.cdiv(queries, DELTA_ROWS), batch * heads)](
        *(output, grad_output, delta),
        *_strides(output, grad_output),
        *(heads, queries),
        HEAD_DIM=head_dim,
        BLOCK_D=block_of(head_dim),
        BLOCK_Q=DELTA_ROWS,
    )
    return delta


def launch_grad_key_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    problem: Problem,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value."""
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_key_value_kernel[(triton.cdiv(problem.keys, tiles.keys), problem.batch * problem.key_heads)](
        *(query, key, value, grad_output, logsumexp, delta, grad_key, grad_value),
        *_strides(query, key, value, grad_output, grad_key, grad_value),
        *problem.sizes(),
        **problem.constants(tiles),
    )
    return grad_key, grad_value


def launch_grad_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    problem: Problem,
    tiles: Tiles,
) -> Tensor:
    """Gradient of query."""
    grad_query = query.new_empty(query.shape)
    grad_query_kernel[(triton.cdiv(problem.queries, tiles.queries), problem.batch * problem.heads)](
        *(query, key, value, grad_output, logsumexp, delta, grad_query),
        *_strides(query, key, value, grad_output, grad_query),
        *problem.sizes(),
        **problem.constants(tiles),
    )
    return grad_query


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and row, per tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]

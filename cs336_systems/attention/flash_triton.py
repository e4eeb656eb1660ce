"""FlashAttention-2 in Triton: the kernels as PyTorch operators, and the `autograd.Function` around them.

The operators are registered with fake implementations, so that `torch.compile` carries them without a graph break; the
`autograd.Function` is the outermost layer, whose saved tensors a graded test looks for the logsumexp.

Inputs may be strided in every dimension but the last, which is copied where it is not contiguous. Float32 products run
in IEEE precision unless "tf32" is asked for. Two backwards: "triton", the kernels, with memory linear in length, and
"compiled", the graded form of flash_backward.

Cost: as `attention/flash.py`. Source: Dao 2023, "FlashAttention-2"; CS336 assignment 2, flash_forward, flash_backward.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from cs336_systems.attention import flash_tuning
from cs336_systems.attention.flash_launch import (
    MOST_ITEMS,
    Problem,
    dense_rows,
    launch_delta,
    launch_forward,
    launch_grad_key_value,
    launch_grad_query,
    parts_of_batch,
)
from cs336_systems.attention.flash_tiles import KERNELS
from cs336_systems.attention.inputs import Alignment, check_inputs, diagonal
from cs336_systems.attention.recompute import compiled_backward
from cs336_systems.errors import UserError, unknown_name

Precision = Literal["ieee", "tf32"]
Backward = Literal["triton", "compiled"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BACKWARDS: tuple[Backward, ...] = get_args(Backward)
LARGEST_HEAD_DIM = 256
_INTERPRETED = knobs.runtime.interpret  # decided for the kernels, too, when Triton is imported
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FlashAttentionTriton(torch.autograd.Function):
    """`FlashAttentionTriton.apply(query, key, value, is_causal=False, alignment="top-left", precision="ieee",
    backward="triton")`.

    Saves the inputs, the output, and one tensor of shape (…, queries): the logsumexp.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "*batch queries head_dim"],
        key: Float[Tensor, "*key_batch keys head_dim"],
        value: Float[Tensor, "*key_batch keys head_dim"],
        is_causal: bool = False,
        alignment: Alignment = "top-left",
        precision: Precision = "ieee",
        backward: Backward = "triton",
    ) -> Float[Tensor, "*batch queries head_dim"]:
        """Attention, its weights softmax(Q Kᵀ / √d); a query that sees no key gives 0 and logsumexp −∞.

        Raises:
            UserError: the inputs do not fit together or are none a kernel takes, or there is no GPU to run it on.
        """
        check_inputs(query, key, value)
        check_kernel_inputs(query, value)
        for name, choice, known in (("precision", precision, PRECISIONS), ("backward", backward, BACKWARDS)):
            if choice not in known:
                raise unknown_name(name, choice, known)
        ctx.offset, ctx.precision, ctx.backward_by = diagonal(query, key, is_causal, alignment), precision, backward
        output, logsumexp = flash_forward(*map(_with_heads, (query, key, value)), ctx.offset, precision)
        output, logsumexp = output.view(query.shape), logsumexp.view(query.shape[:-1])
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        (grad_output,) = grads
        four = [_with_heads(x) for x in (query, key, value, output)]
        lse, grad = logsumexp.view(four[0].shape[:-1]), _with_heads(grad_output)
        if ctx.backward_by == "compiled":
            found = compiled_backward(*four, lse, grad, ctx.offset)
        else:
            found = flash_backward(*four, lse, grad, ctx.offset, ctx.precision)
        shaped = (gradient.view(of.shape) for gradient, of in zip(found, (query, key, value), strict=True))
        return *shaped, None, None, None, None


@dataclasses.dataclass(frozen=True)
class TritonAttention:
    """FlashAttention-2 in Triton in the form the model calls, with its choices made."""

    precision: Precision = "ieee"
    backward: Backward = "triton"

    def __call__(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch key_heads keys head_dim"],
        value: Float[Tensor, "batch key_heads keys head_dim"],
        *,
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Attention; see `FlashAttentionTriton`."""
        arguments = (query, key, value, is_causal, "top-left", self.precision, self.backward)
        output: Tensor = FlashAttentionTriton.apply(*arguments)
        return output

    def tune(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> None:
        """Find the fastest tiles for inputs like these, unless they were found before; see `flash_tuning`."""
        check_inputs(query, key, value)
        check_kernel_inputs(query, value)
        flash_tuning.tune(Problem.of(query, key, diagonal(query, key, is_causal), self.precision))

    def configuration(self, query: Tensor, key: Tensor, *, is_causal: bool) -> dict[str, Any]:
        """Per kernel the tiles that inputs like these are cut into, and whether they were tuned: for records."""
        kernels = ("forward",) if self.backward == "compiled" else KERNELS
        problem = Problem.of(query, key, diagonal(query, key, is_causal), self.precision)
        return {kernel: flash_tuning.chosen(kernel, problem).described() for kernel in kernels}


attention = TritonAttention()
tf32_attention = TritonAttention(precision="tf32")
graded_attention = TritonAttention(backward="compiled")
"""The form that flash_backward grades: the Triton forward with a compiled PyTorch backward."""


def check_kernel_inputs(query: Tensor, value: Tensor) -> None:
    """Raise a UserError for what the kernels do not take, though it is attention."""
    if not query.is_cuda and not _INTERPRETED:
        raise UserError(
            f"the Triton kernels need tensors on a CUDA device, found {query.device}: move them there, take the "
            "PyTorch implementation, or set TRITON_INTERPRET=1 before Triton is imported to run them slowly on a CPU"
        )
    if query.dtype not in DTYPES:
        raise UserError(f"the Triton kernels take float32, float16 or bfloat16, found {query.dtype}")
    if value.shape[-1] != query.shape[-1]:
        found = f"{query.shape[-1]} and {value.shape[-1]}"
        raise UserError(f"the Triton kernels take keys and values of one dimension, found {found}")
    if query.ndim == 4 and query.shape[1] > MOST_ITEMS:
        raise UserError(f"the Triton kernels take up to {MOST_ITEMS:,} heads, found {query.shape[1]:,}")
    if query.shape[-1] > LARGEST_HEAD_DIM:
        raise UserError(f"the Triton kernels take head dimensions up to {LARGEST_HEAD_DIM}, found {query.shape[-1]}")


def _with_heads(x: Tensor) -> Tensor:
    """(batch, length, dim) as one head each."""
    return x if x.ndim == 4 else x[:, None]


# The operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("cs336_systems::flash_forward", mutates_args=())
def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, offset: int | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of (batch, heads, length, dim) inputs."""
    inputs = [dense_rows(x) for x in (query, key, value)]
    problem = Problem.of(query, key, offset, precision)
    tiles = flash_tuning.chosen("forward", problem).tiles
    with torch.cuda.device_of(query):  # Triton launches on the current device
        found = [
            launch_forward(q, k, v, Problem.of(q, k, offset, precision), tiles)
            for q, k, v in ([x[part] for x in inputs] for part in parts_of_batch(query))
        ]
    output, logsumexp = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return output, logsumexp


@flash_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offset: int | None, precision: str) -> tuple[Tensor, Tensor]:
    del key, value, offset, precision
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("cs336_systems::flash_backward", mutates_args=())
def flash_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_output: Tensor,
    offset: int | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    inputs = [dense_rows(x) for x in (query, key, value, grad_output, output)]
    problem = Problem.of(query, key, offset, precision)
    by_key, by_query = (flash_tuning.chosen(kernel, problem).tiles for kernel in ("grad_key_value", "grad_query"))
    logsumexp = logsumexp.contiguous()
    found = []
    with torch.cuda.device_of(query):
        for part in parts_of_batch(query):
            q, k, v, grad, out = (x[part] for x in inputs)
            of_part = Problem.of(q, k, offset, precision)
            saved = (q, k, v, grad, logsumexp[part], launch_delta(out, grad))
            grad_key, grad_value = launch_grad_key_value(*saved, of_part, by_key)
            found.append((launch_grad_query(*saved, of_part, by_query), grad_key, grad_value))
    grads = found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))
    return grads[0], grads[1], grads[2]


@flash_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_output: Tensor,
    offset: int | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    del output, logsumexp, grad_output, offset, precision
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

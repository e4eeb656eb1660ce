"""FlashAttention-2 in Triton: the kernels as PyTorch operators, and the `autograd.Function` around them.

The operators are registered with fake implementations, so that `torch.compile` carries them without a graph break; the
`autograd.Function` is the outermost layer, whose saved tensors a graded test looks for the logsumexp.

Inputs may be strided in every dimension but the last, which is copied where it is not contiguous. Float32 products run
in IEEE precision unless "tf32" is asked for. Two backwards: "triton", the kernels, with memory linear in length, and
"compiled", the graded form of flash_backward.

Cost: as `attention/flash.py`. Source: Dao 2023, "FlashAttention-2"; CS336 assignment 2, flash_forward, flash_backward.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from cs336_systems.attention.flash_kernels import delta_kernel, forward_kernel, grad_key_value_kernel, grad_query_kernel
from cs336_systems.attention.flash_tiles import Kernel, tiles_for
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
            found = compiled_backward()(*four, lse, grad, ctx.offset)
        else:
            found = flash_backward(*four, lse, grad, ctx.offset, ctx.precision)
        shaped = (gradient.view(of.shape) for gradient, of in zip(found, (query, key, value), strict=True))
        return *shaped, None, None, None, None


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys head_dim"],
    *,
    is_causal: bool,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """FlashAttention-2 in Triton in the form the model calls."""
    output: Tensor = FlashAttentionTriton.apply(query, key, value, is_causal)
    return output


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
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    batch, heads, length, _ = query.shape
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    constants = _constants("forward", query, offset, precision)
    forward_kernel[(triton.cdiv(length, constants["BLOCK_Q"]), batch * heads)](
        *(query, key, value, output, logsumexp),
        *_strides(query, key, value, output),
        *_sizes(query, key, offset),
        **constants,
    )
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
    query, key, value, output, grad_output = (_dense_rows(x) for x in (query, key, value, output, grad_output))
    logsumexp = logsumexp.contiguous()
    batch, heads, length, _ = query.shape
    delta = torch.empty_like(logsumexp)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    by_query = _constants("grad_query", query, offset, precision)
    by_key = _constants("grad_key_value", query, offset, precision)
    query_tiles = (triton.cdiv(length, by_query["BLOCK_Q"]), batch * heads)
    delta_kernel[query_tiles](
        *(output, grad_output, delta),
        *_strides(output, grad_output),
        *(heads, length),
        **{name: by_query[name] for name in ("HEAD_DIM", "BLOCK_D", "BLOCK_Q")},
    )
    saved, strides = (query, key, value, grad_output, logsumexp, delta), _strides(query, key, value, grad_output)
    sizes = _sizes(query, key, offset)
    grad_key_value_kernel[(triton.cdiv(key.shape[2], by_key["BLOCK_K"]), batch * key.shape[1])](
        *saved, grad_key, grad_value, *strides, *_strides(grad_key, grad_value), *sizes, **by_key
    )
    grad_query_kernel[query_tiles](*saved, grad_query, *strides, *_strides(grad_query), *sizes, **by_query)
    return grad_query, grad_key, grad_value


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


def _dense_rows(x: Tensor) -> Tensor:
    """With its last dimension contiguous, which the kernels count on; the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and row, per tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(query: Tensor, key: Tensor, offset: int | None) -> tuple[int, int, int, int, int, float]:
    heads, head_dim = query.shape[1], query.shape[3]
    return heads, heads // key.shape[1], query.shape[2], key.shape[2], offset or 0, 1 / math.sqrt(head_dim)


def _constants(kernel: Kernel, query: Tensor, offset: int | None, precision: str) -> dict[str, Any]:
    """The compile-time arguments of a kernel, and how it is cut."""
    head_dim = query.shape[3]
    tiles = tiles_for(kernel, head_dim, query.element_size(), _capability(query))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "IS_CAUSAL": offset is not None,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _capability(tensor: Tensor) -> int:
    """90 for compute capability 9.0; what the interpreter runs is cut as for the smallest GPU."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor

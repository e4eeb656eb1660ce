"""FlashAttention-2 in plain PyTorch: attention in tiles, without ever storing the score matrix.

A tile of queries meets the keys tile by tile and keeps three things: the running maximum m of its scores, the running
sum ℓ of exp(score − m), and the output accumulated under the same shift. A later, larger maximum rescales the other
two; at the end O = acc / ℓ and L = m + log ℓ, the logsumexp of each row, which is all that backward needs besides the
inputs and the output: it recomputes the weights as exp(score − L).

    forward, per query tile i:   S = Qᵢ Kⱼᵀ/√d,  m′ = max(m, rowmax S),  P = exp(S − m′),
                                 ℓ = exp(m − m′) ℓ + rowsum P,  acc = exp(m − m′) acc + P Vⱼ
    backward, per key tile j:    P = exp(S − L),  dV += Pᵀ dO,  dP = dO Vᵀ,  dS = P (dP − D),
                                 dK += dSᵀ Q/√d,  dQ += dS K/√d      with D = rowsum(dO · O)

Cost: memory linear in length, one tile of scores at a time; 4·queries·keys·d FLOPs forward and 10 backward (five
products, S again among them), of which a causal mask leaves the tiles on and below the diagonal. Lower precisions are
computed in float32, as the kernels do.

Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; CS336 assignment 2, flash_forward and flash_backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs336_systems.attention.inputs import Alignment, check_inputs, diagonal

TILE = 128
"""Queries and keys per tile; at least 16, as the matrix units of GPUs want it."""


class FlashAttention(torch.autograd.Function):
    """`FlashAttention.apply(query, key, value, is_causal=False, alignment="top-left")`.

    Saves the inputs, the output, and one tensor of shape (…, queries): the logsumexp. Gradients of gradients are
    refused: the saved logsumexp would be taken for a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "*batch queries head_dim"],
        key: Float[Tensor, "*key_batch keys head_dim"],
        value: Float[Tensor, "*key_batch keys value_dim"],
        is_causal: bool = False,
        alignment: Alignment = "top-left",
    ) -> Float[Tensor, "*batch queries value_dim"]:
        """Attention, its weights softmax(Q Kᵀ / √d); a query that sees no key gives 0 and logsumexp −∞.

        Raises:
            UserError: the inputs do not fit together; see `check_inputs`.
        """
        check_inputs(query, key, value)
        ctx.diagonal = diagonal(query, key, is_causal, alignment)
        output, logsumexp = tiled_forward(query, key, value, ctx.diagonal)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        (grad_output,) = grads
        found = tiled_backward(query, key, value, output, logsumexp, grad_output, ctx.diagonal)
        return *found, None, None


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    is_causal: bool,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """FlashAttention-2 in the form the model calls."""
    output: Tensor = FlashAttention.apply(query, key, value, is_causal)
    return output


def tiled_forward(query: Tensor, key: Tensor, value: Tensor, offset: int | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, one tile of queries after the other (algorithm 1)."""
    q, k, v = (_computed(x) for x in _grouped(query, key, value))
    output = q.new_empty(*q.shape[:-1], v.shape[-1])
    logsumexp = q.new_empty(q.shape[:-1])
    for rows in _tiles(q.shape[-2]):
        q_tile = q[..., rows, :]
        maximum = q.new_full(q_tile.shape[:-1], -math.inf)
        total = q.new_zeros(q_tile.shape[:-1])
        accumulated = q.new_zeros(*q_tile.shape[:-1], v.shape[-1])
        for columns in _tiles(_seen(rows, k.shape[-2], offset)):
            scores = _scores(q_tile, k[..., columns, :], rows, columns, offset)
            larger = torch.maximum(maximum, scores.amax(-1))
            shift = _finite(larger)
            weights = torch.exp(scores - shift[..., None])
            rescale = torch.exp(maximum - shift)
            total = rescale * total + weights.sum(-1)
            accumulated = rescale[..., None] * accumulated + weights @ v[..., columns, :]
            maximum = larger
        unseen = total == 0
        output[..., rows, :] = accumulated / torch.where(unseen, 1.0, total)[..., None]
        logsumexp[..., rows] = torch.where(unseen, -math.inf, maximum + torch.log(total))
    return output.reshape(*query.shape[:-1], -1).to(query.dtype), logsumexp.reshape(query.shape[:-1])


def tiled_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_output: Tensor,
    offset: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, one tile of keys after the other (algorithm 2)."""
    q, k, v = (_computed(x) for x in _grouped(query, key, value))
    out, grad_out = (_computed(x).reshape(*q.shape[:-1], v.shape[-1]) for x in (output, grad_output))
    shift = _finite(logsumexp).reshape(q.shape[:-1])
    delta = (out * grad_out).sum(-1)
    scale = 1 / math.sqrt(q.shape[-1])
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for columns in _tiles(k.shape[-2]):
        k_tile, v_tile = k[..., columns, :], v[..., columns, :]
        for rows in _tiles(q.shape[-2]):
            if columns.start >= _seen(rows, k.shape[-2], offset):
                continue
            scores = _scores(q[..., rows, :], k_tile, rows, columns, offset)
            weights = torch.exp(scores - shift[..., rows, None])
            grad_tile = grad_out[..., rows, :]
            grad_scores = weights * (grad_tile @ v_tile.mT - delta[..., rows, None])
            grad_q[..., rows, :] += scale * (grad_scores @ k_tile)
            # Keys and values serve a group of heads: their gradients are summed over it.
            grad_k[..., columns, :] += scale * (grad_scores.mT @ q[..., rows, :]).sum(-3, keepdim=True)
            grad_v[..., columns, :] += (weights.mT @ grad_tile).sum(-3, keepdim=True)
    pairs = ((grad_q, query), (grad_k, key), (grad_v, value))
    return tuple(grad.reshape(of.shape).to(of.dtype) for grad, of in pairs)  # type: ignore[return-value]


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All as (batch, key_heads, group, length, dim), the group of keys and values being 1."""
    if query.ndim == 3:
        query, key, value = query[:, None], key[:, None], value[:, None]
    group = query.shape[1] // key.shape[1]
    return query.unflatten(1, (key.shape[1], group)), key[:, :, None], value[:, :, None]


def _computed(x: Tensor) -> Tensor:
    """In the precision it is computed in: half precisions in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _tiles(length: int) -> Iterator[slice]:
    """0…length in tiles, the last one as short as it comes."""
    return (slice(start, min(start + TILE, length)) for start in range(0, length, TILE))


def _seen(rows: slice, num_keys: int, offset: int | None) -> int:
    """How many keys, from the first, the last of these queries sees."""
    return num_keys if offset is None else max(0, min(num_keys, rows.stop + offset))


def _scores(q_tile: Tensor, k_tile: Tensor, rows: slice, columns: slice, offset: int | None) -> Tensor:
    """Q Kᵀ / √d of a tile; −∞ where the mask is, which only tiles on the diagonal have."""
    scores = q_tile @ k_tile.mT / math.sqrt(q_tile.shape[-1])
    if offset is None or columns.stop - 1 <= rows.start + offset:
        return scores
    queries = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
    keys = torch.arange(columns.start, columns.stop, device=scores.device)
    return scores.masked_fill(keys > queries + offset, -math.inf)


def _finite(maximum: Tensor) -> Tensor:
    """A shift that leaves exp(−∞ − shift) = 0 where a row has seen no key so far."""
    return torch.where(maximum == -math.inf, 0.0, maximum)

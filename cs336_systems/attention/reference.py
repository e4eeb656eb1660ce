"""Materialised scaled dot-product attention: the oracle every other implementation is compared with.

    scores = Q Kᵀ / √d            (… queries keys), masked entries −∞
    weights = softmax(scores)     over the keys
    output = weights V            (… queries head_dim)

Written with the operators of the course's model, because published time and memory figures depend on them: two
einsums, `where` for the mask, and a softmax of four separate operators. The full score matrix is stored several
times over, which is exactly what FlashAttention removes. To a profiler its parts are scores, softmax and value product.

Cost: 4·queries·keys·head_dim FLOPs per head forward (two products), twice that backward; the masked half of a
causal score matrix is computed all the same.

Source: Vaswani et al. 2017, section 3.2.1; CS336 assignment 1, "Scaled dot-product attention".
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cs336_systems.profiling.ranges import named_range


def softmax(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Softmax along `dim`, shifted by the maximum so that `exp` cannot overflow."""
    shifted = x - x.max(dim=dim, keepdim=True).values
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "1 1 queries keys"]:
    """True where a query may see a key: key ≤ query, aligned at the top left."""
    queries = torch.arange(num_queries, device=device)[None, None, :, None]
    keys = torch.arange(num_keys, device=device)[None, None, None, :]
    return queries >= keys


def scaled_dot_product_attention(
    query: Float[Tensor, "... queries head_dim"],
    key: Float[Tensor, "... keys head_dim"],
    value: Float[Tensor, "... keys value_dim"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
) -> Float[Tensor, "... queries value_dim"]:
    """Attention with every intermediate stored; `mask` is True where a query may see a key."""
    with named_range("scores"):
        scores = torch.einsum("...qd,...kd->...qk", query, key) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = torch.where(mask, scores, float("-inf"))
    with named_range("softmax"):
        weights = softmax(scores, dim=-1)
    with named_range("value product"):
        return torch.einsum("...qk,...kv->...qv", weights, value)


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    is_causal: bool,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The reference in the form the model calls: the mask is built anew in every call, as in the course's."""
    mask = causal_mask(query.shape[-2], key.shape[-2], query.device) if is_causal else None
    return scaled_dot_product_attention(query, key, value, mask)

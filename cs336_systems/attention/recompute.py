"""The backward of attention from what forward saved, in a few PyTorch operators meant for `torch.compile`.

    P = exp(Q Kᵀ/√d − L),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P (dP − D),  dQ = dS K/√d,  dK = dSᵀ Q/√d

The graded form of flash_backward: no tiles, so the score matrix is stored again, but the compiler fuses everything
between the products. Cost: 10·queries·keys·head_dim FLOPs per head, memory quadratic in length.

Source: Dao 2023, "FlashAttention-2", equations of section 2.2; CS336 assignment 2, flash_backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from jaxtyping import Float
from torch import Tensor


def recomputed_backward(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    output: Float[Tensor, "batch heads queries value_dim"],
    logsumexp: Float[Tensor, "batch heads queries"],
    grad_output: Float[Tensor, "batch heads queries value_dim"],
    offset: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; query i sees keys up to i + offset, or all of them."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1])
    scores = (query @ keys.mT).to(logsumexp.dtype) * scale
    if offset is not None:
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        scores = scores.masked_fill(torch.arange(key.shape[-2], device=query.device) > rows + offset, -math.inf)
    # A row that sees no key has logsumexp −∞ and no weights.
    weights = torch.exp(scores - torch.where(logsumexp == -math.inf, 0.0, logsumexp)[..., None])
    delta = (output.to(scores.dtype) * grad_output.to(scores.dtype)).sum(-1, keepdim=True)
    grad_scores = weights * ((grad_output @ values.mT).to(scores.dtype) - delta) * scale
    weights, grad_scores = weights.to(query.dtype), grad_scores.to(query.dtype)
    grad_key, grad_value = grad_scores.mT @ query, weights.mT @ grad_output
    return (
        grad_scores @ keys,
        grad_key.unflatten(1, (key.shape[1], group)).sum(2),
        grad_value.unflatten(1, (key.shape[1], group)).sum(2),
    )


KINDS = 64
"""How many kinds of calls are compiled for: precision, mask, groups of heads, and dimensions that are 1."""


def compiled_backward(*saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same through `torch.compile`, once for lengths of any kind; `fullgraph`, so that it never falls back."""
    if torch.compiler.is_compiling():
        return recomputed_backward(*saved)
    with dynamo_config.patch(recompile_limit=KINDS):
        found: tuple[Tensor, Tensor, Tensor] = _compiled()(*saved)
    return found


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(recomputed_backward, dynamic=True, fullgraph=True)

"""Attention with every intermediate stored, in float64: what the implementations in tiles are compared with.

Independent of the code under test: the mask is a comparison of positions, gradients come from autograd, and a query
that sees no key gives output 0, logsumexp −∞ and no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cs336_systems.attention.reference import scaled_dot_product_attention


class Results(NamedTuple):
    """What an attention gives; the gradients are those of sum(output · grad_output)."""

    output: Tensor
    logsumexp: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def visible(num_queries: int, num_keys: int, offset: int | None, device: torch.device | None = None) -> Tensor:
    """True where query i may see key j: j ≤ i + offset, or everywhere."""
    if offset is None:
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)


def float64_attention(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, offset: int | None) -> Results:
    """Output, logsumexp and gradients in float64, for 3-D and 4-D inputs and grouped queries."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    q, k, v = _per_head(*leaves)
    mask = visible(q.shape[-2], k.shape[-2], offset, q.device)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    shift = scores.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    exponentials = torch.exp(scores - shift)
    total = exponentials.sum(-1, keepdim=True)
    output = exponentials @ v / total.where(total > 0, 1.0)
    logsumexp = (shift + total.log()).where(total > 0, -math.inf)[..., 0]
    grads = torch.autograd.grad(output, leaves, grad_output.detach().double())
    return Results(output.detach(), logsumexp.detach(), *grads)


def materialised_errors(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, offset: int | None
) -> dict[str, float]:
    """The largest error of each result of the reference, computed in the precision of the inputs.

    Of the logsumexp none is told: the reference has none.
    """
    exact = float64_attention(query, key, value, grad_output, offset)
    # The reference knows no row without a visible key. Such rows come first, and contribute nothing.
    hidden = 0 if offset is None else min(query.shape[-2], max(0, -offset))
    if hidden == query.shape[-2]:
        return dict.fromkeys(("output", "grad_query", "grad_key", "grad_value"), 0.0)
    leaves = [query[..., hidden:, :].detach(), key.detach(), value.detach()]
    leaves = [x.clone().requires_grad_() for x in leaves]
    q, k, v = _per_head(*leaves)
    mask = visible(query.shape[-2], key.shape[-2], offset, query.device)[hidden:]
    output = scaled_dot_product_attention(q, k, v, mask.expand(*q.shape[:-1], -1))
    grads = torch.autograd.grad(output, leaves, grad_output[..., hidden:, :])
    found = dict(zip(("output", "grad_query", "grad_key", "grad_value"), (output, *grads), strict=True))
    expected = exact._asdict()
    for name in ("output", "grad_query"):
        expected[name] = expected[name][..., hidden:, :]
    return {name: largest_error(found[name], expected[name]) for name in found}


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where one is not finite and the other is not the same."""
    found, expected = found.detach().double(), expected.double()
    difference = (found - expected).abs().where(found != expected, 0.0)
    return float(difference.nan_to_num(nan=math.inf).max())


def _per_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A key and a value for every head of the queries."""
    if query.ndim == 3:
        return query, key, value
    group = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

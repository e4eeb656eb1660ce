"""Attention step by step in float64: how far from it a precision may be, where a result is not it, and what it is then.

Every quantity of forward and backward stands by itself, so that a classical mistake is one changed line, and a wrong
result can be recognised as that of the mistake. Everything here is on the CPU, whatever was tried elsewhere.

Source: Dao 2023, "FlashAttention-2", section 2.2, equations of the backward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from cs336_systems.attention.reference import scaled_dot_product_attention

RESULTS = MappingProxyType(
    {
        "output": "the output",
        "grad_value": "the gradient of V",
        "grad_query": "the gradient of Q",
        "grad_key": "the gradient of K",
        "logsumexp": "the saved logsumexp",
    }
)
TF32_EPS = 2.0**-10


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """Attention of (batch, heads, length, dim) and the gradients of sum(output · grad_output), all in float64.

    Query i sees the keys up to i + offset, or all of them where it is None; one that sees none has output 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    offset: int | None
    scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, offset: int | None) -> Exact:
        q, k, v, grad = (x.detach().cpu().double() for x in (query, key, value, grad_output))
        return cls(q, k, v, grad, offset, 1 / math.sqrt(query.shape[-1]))

    @cached_property
    def visible(self) -> Tensor:
        everything = torch.ones(self.query.shape[-2], self.key.shape[-2], dtype=torch.bool)
        return everything if self.offset is None else everything.tril(self.offset)

    @cached_property
    def unmasked(self) -> Tensor:
        return self.scale * self.query @ self.key.mT

    @cached_property
    def scores(self) -> Tensor:
        return self.unmasked.masked_fill(~self.visible, -math.inf)

    @cached_property
    def maximum(self) -> Tensor:
        return self.scores.amax(-1)

    @cached_property
    def logsumexp(self) -> Tensor:
        return self.scores.logsumexp(-1)

    @cached_property
    def unnormalised(self) -> Tensor:
        return torch.exp(self.scores - self.maximum[..., None])

    @cached_property
    def weights(self) -> Tensor:
        return torch.exp(self.scores - self.logsumexp[..., None]).nan_to_num(nan=0.0)

    @cached_property
    def output(self) -> Tensor:
        return self.weights @ self.value

    @cached_property
    def delta(self) -> Tensor:
        return (self.grad_output * self.output).sum(-1, keepdim=True)

    @cached_property
    def grad_weights(self) -> Tensor:
        return self.grad_output @ self.value.mT

    @cached_property
    def grad_scores(self) -> Tensor:
        return self.weights * (self.grad_weights - self.delta)

    @cached_property
    def grad_value(self) -> Tensor:
        return self.weights.mT @ self.grad_output

    @cached_property
    def grad_query(self) -> Tensor:
        return self.scale * self.grad_scores @ self.key

    @cached_property
    def grad_key(self) -> Tensor:
        return self.scale * self.grad_scores.mT @ self.query


# How exact a result must be --------------------------------------------------------------------------------------


def allowed_errors(exact: Exact, dtype: torch.dtype, *, tf32: bool = False) -> dict[str, float]:
    """Of each result, a small multiple of what the materialised reference itself errs in `dtype`.

    With `tf32`, its inputs are rounded as the matrix units of a GPU round float32, which is `tl.dot`'s default.
    """
    inputs = (exact.query, exact.key, exact.value, exact.grad_output)
    query, key, value, grad_output = (x.to(dtype, copy=True) for x in inputs)
    if tf32:
        query, key, value, grad_output = (_rounded_to_tf32(x) for x in (query, key, value, grad_output))
    for x in (query, key, value):
        x.requires_grad_()
    mask = None if exact.offset is None else exact.visible[None, None]
    output = scaled_dot_product_attention(query, key, value, mask)
    grads = torch.autograd.grad(output, (query, key, value), grad_output)
    found = dict(zip(("output", "grad_query", "grad_key", "grad_value"), (output.detach(), *grads), strict=True))
    rounding = TF32_EPS if tf32 else torch.finfo(dtype).eps
    # Where roundings are small, sums in another order are what differs; where they are large, they are what is asked.
    roundings = (8 if rounding > 1e-4 else 64) * rounding
    allowed = {}
    for name, result in found.items():
        expected: Tensor = getattr(exact, name)
        error = float((result.double() - expected).abs().max())
        allowed[name] = 4 * error + roundings * float(expected.abs().max())
    # The reference has no logsumexp. Its error is that of the scores, and it is kept in float32 at most.
    finest = max(rounding, torch.finfo(torch.float32).eps) if dtype != torch.float64 else rounding
    allowed["logsumexp"] = 16 * finest * max(1.0, float(exact.logsumexp.abs().max()))
    return allowed


def _rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits of mantissa kept."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# Where a result is wrong -----------------------------------------------------------------------------------------


def deviation(name: str, found: Tensor, exact: Exact, allowed: float) -> str | None:
    """Which rows of a (batch, heads, length, …) result are wrong, by how much, and by which mistake; None if right."""
    expected: Tensor = getattr(exact, name)
    found = found.detach().cpu().double()
    rows = "keys" if name in ("grad_key", "grad_value") else "queries"
    errors = (found - expected).abs().reshape(*expected.shape[:3], -1)
    bad = ~found.isfinite().reshape(errors.shape).all(-1)
    if bad.any():
        kind = "NaN" if found.isnan().any() else "infinite"
        return f"{RESULTS[name]} is {kind}. {_where(bad, rows, kind)}" + _recognised(name, found, exact, allowed)
    row_errors = errors.amax(-1)
    wrong = row_errors > allowed
    if not wrong.any():
        return None
    size = f"{RESULTS[name]} is off by up to {float(row_errors.max()):.2g}, where {allowed:.2g} is allowed"
    batch, head, row = (int(index) for index in torch.unravel_index(row_errors.argmax(), row_errors.shape))
    worst = f"most in {'key' if rows == 'keys' else 'query'} {row}" + _item(wrong.shape, batch, head)
    where = _where(wrong, rows, "wrong", (batch, head))
    return f"{size}, {worst}. {where}" + _recognised(name, found, exact, allowed)


def _item(shape: Sequence[int], batch: int, head: int) -> str:
    """Which item of the batch and which head, where there are several."""
    parts = [f"{kind} {at}" for kind, at, of in (("batch item", batch, shape[0]), ("head", head, shape[1])) if of > 1]
    return f" of {', '.join(parts)}" if parts else ""


def _where(wrong: Tensor, rows: str, kind: str, item: tuple[int, int] | None = None) -> str:
    """Which rows of an item are wrong and which are right, and which items."""
    items = wrong.any(-1)
    batch, head = item or tuple(int(index) for index in items.nonzero()[0])
    flags = [bool(flag) for flag in wrong[batch, head]]
    those, others = ranges(flags), ranges([not flag for flag in flags])
    if all(flags):
        told = f"{kind}: all {len(flags)} {rows}"
    elif len(those) <= _READABLE:
        told = f"{kind}: {rows} {', '.join(those)}; right: {', '.join(others)}"
    else:
        told = f"{kind}: {sum(flags)} of {len(flags)} {rows}, first {those[0]}"
    for name, of_items in (("batch items", items.any(1)), ("heads", items.any(0))):
        if len(of_items) > 1:
            such = "all" if of_items.all() else f"only {', '.join(ranges(of_items.tolist()))}"
            told += f"; of the {len(of_items)} {name} {such}"
    return f"{told[0].upper()}{told[1:]}."


_READABLE = 4
"""More ranges than these tell less than their number."""


def ranges(flags: Sequence[bool]) -> list[str]:
    """The positions of what is true, as ranges.

    >>> ranges([True, True, False, True]), ranges([False, True, True, True])
    (['0 to 1', '3'], ['1 to 3'])
    """
    found: list[str] = []
    position = 0
    for flag, run in itertools.groupby(flags):
        length = len(list(run))
        if flag:
            found.append(f"{position}" if length == 1 else f"{position} to {position + length - 1}")
        position += length
    return found


# What it is instead ----------------------------------------------------------------------------------------------


def _with_offset(exact: Exact, offset: int | None) -> Exact:
    return dataclasses.replace(exact, offset=offset)


def _off_diagonal(exact: Exact, by: int) -> Tensor | None:
    return None if exact.offset is None else _with_offset(exact, exact.offset + by).output


def _lower_right(exact: Exact) -> Tensor | None:
    offset = exact.key.shape[-2] - exact.query.shape[-2]
    return None if exact.offset is None or offset == 0 else _with_offset(exact, offset).output


def _unmasked_backward(exact: Exact) -> Exact | None:
    """The weights recomputed without the mask, from the logsumexp with it."""
    if exact.offset is None:
        return None
    changed = dataclasses.replace(exact)
    # What a cached property would compute.
    vars(changed)["weights"] = torch.exp(exact.unmasked - exact.logsumexp[..., None])
    vars(changed)["delta"] = exact.delta
    return changed


def _of_unmasked(name: str) -> Callable[[Exact], Tensor | None]:
    return lambda exact: getattr(_unmasked_backward(exact), name, None)


def _of_ones(name: str) -> Callable[[Exact], Tensor | None]:
    return lambda exact: getattr(dataclasses.replace(exact, grad_output=torch.ones_like(exact.grad_output)), name)


def _square(exact: Exact) -> bool:
    return exact.query.shape[-2] == exact.key.shape[-2]


Suspect = tuple[str, Callable[[Exact], Tensor | None]]
"""A mistake, and what the result is with it; None where it makes no sense."""

SUSPECTS: Mapping[str, tuple[Suspect, ...]] = MappingProxyType(
    {
        "output": (
            ("without the scale 1/√d", lambda e: dataclasses.replace(e, scale=1.0).output),
            ("with the scale 1/d in place of 1/√d", lambda e: dataclasses.replace(e, scale=e.scale**2).output),
            ("without the mask", lambda e: None if e.offset is None else _with_offset(e, None).output),
            ("with a mask that is not asked for", lambda e: _with_offset(e, 0).output if e.offset is None else None),
            ("when a query also sees the key after its own", lambda e: _off_diagonal(e, 1)),
            ("when a query does not see its own key", lambda e: _off_diagonal(e, -1)),
            ("with the mask aligned at the lower right", _lower_right),
            ("without the division by the sum", lambda e: e.unnormalised @ e.value),
        ),
        "grad_value": (
            ("with P in place of its transpose", lambda e: e.weights @ e.grad_output if _square(e) else None),
            ("when P is recomputed without the mask", _of_unmasked("grad_value")),
            ("when dO is taken for ones", _of_ones("grad_value")),
            ("when P = exp(S − m) is not normalised", lambda e: e.unnormalised.mT @ e.grad_output),
        ),
        "grad_query": (
            ("without the scale 1/√d", lambda e: e.grad_query / e.scale),
            ("with the scale 1/√d twice", lambda e: e.grad_query * e.scale),
            ("without D = rowsum(dO ∘ O)", lambda e: e.scale * (e.weights * e.grad_weights) @ e.key),
            ("when P is recomputed without the mask", _of_unmasked("grad_query")),
            ("when dO is taken for ones", _of_ones("grad_query")),
            ("with dS transposed", lambda e: e.scale * e.grad_scores.mT @ e.key if _square(e) else None),
        ),
        "grad_key": (
            ("without the scale 1/√d", lambda e: e.grad_key / e.scale),
            ("with the scale 1/√d twice", lambda e: e.grad_key * e.scale),
            ("without D = rowsum(dO ∘ O)", lambda e: e.scale * (e.weights * e.grad_weights).mT @ e.query),
            ("when P is recomputed without the mask", _of_unmasked("grad_key")),
            ("when dO is taken for ones", _of_ones("grad_key")),
            ("with dS in place of its transpose", lambda e: e.scale * e.grad_scores @ e.query if _square(e) else None),
        ),
        "logsumexp": (
            ("in base 2: multiply by ln 2", lambda e: e.logsumexp / math.log(2)),
            ("without the maximum, log ℓ alone", lambda e: e.logsumexp - e.maximum),
            ("without log ℓ, the maximum m alone", lambda e: e.maximum),
            ("without the logarithm, the sum ℓ alone", lambda e: e.unnormalised.sum(-1)),
            ("with m + ℓ in place of m + log ℓ", lambda e: e.maximum + e.unnormalised.sum(-1)),
            ("without the scale 1/√d", lambda e: dataclasses.replace(e, scale=1.0).logsumexp),
        ),
    }
)  # fmt: skip


def _recognised(name: str, found: Tensor, exact: Exact, allowed: float) -> str:
    """The mistake whose result this is, as a sentence; nothing where it is none that is known."""
    finite = found.isfinite()
    if finite.sum() * 2 < found.numel():
        return ""
    if (found == 0).all():
        return " It is 0 everywhere."
    for told, mistake in SUSPECTS[name]:
        candidate = mistake(exact)
        if candidate is not None and bool(((found - candidate).abs() <= 4 * allowed)[finite].all()):
            return f" This is what comes out {told}."
    return ""

"""Attention implementations by name.

The operation is always the same mathematics; the name picks the code. A name of ours, or `module:function`
for one from outside with the signature of `AttentionFunction`.

Ours beyond the plain ones are named by reference and imported when they are chosen: not every system has Triton, and
a measurement of one implementation does not depend on the source of another.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from cs336_systems.attention import reference
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.object_reference import is_object_reference, load_object


@runtime_checkable
class AttentionFunction(Protocol):
    """What the model calls: query, key and value of shape (batch, heads, length, head_dim)."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """PyTorch's fused attention, whichever kernel it dispatches to."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


IMPLEMENTATIONS = MappingProxyType({"reference": reference.attention, "sdpa": sdpa})
BY_REFERENCE = MappingProxyType(
    {
        "flash": "cs336_systems.attention.flash:attention",
        "flash-triton": "cs336_systems.attention.flash_triton:attention",
    }
)
NAMES = (*IMPLEMENTATIONS, *BY_REFERENCE)


def resolve_attention(choice: str) -> AttentionFunction:
    """The implementation called `choice`.

    Raises:
        UserError: `choice` is neither a name of ours nor an importable `module:function`.
    """
    if choice in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[choice]
    at = attention_source(choice)
    if at is None:
        raise unknown_name("attention", choice, [*NAMES, "module:function"])
    function: AttentionFunction = load_object(at)
    if not callable(function):
        raise UserError(f"{choice} must be a function (query, key, value, *, is_causal), found {function!r}")
    return function


def attention_source(choice: str) -> str | None:
    """The `module:function` that `choice` stands for, on whose source its measurements depend; None for a plain one."""
    return choice if is_object_reference(choice) else BY_REFERENCE.get(choice)

"""Attention implementations by name.

The operation is always the same mathematics; the name picks the code. A name of ours, or `module:function`
for one from outside with the signature of `AttentionFunction`.
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


def resolve_attention(choice: str) -> AttentionFunction:
    """The implementation called `choice`.

    Raises:
        UserError: `choice` is neither a name of ours nor an importable `module:function`.
    """
    if is_object_reference(choice):
        function: AttentionFunction = load_object(choice)
        if not callable(function):
            raise UserError(f"{choice} must be a function (query, key, value, *, is_causal), found {function!r}")
        return function
    if choice not in IMPLEMENTATIONS:
        raise unknown_name("attention", choice, [*IMPLEMENTATIONS, "module:function"])
    return IMPLEMENTATIONS[choice]

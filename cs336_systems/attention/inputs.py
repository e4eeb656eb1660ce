"""What every attention of ours asks of its inputs, and which keys a causal query sees.

Shapes: query (…, queries, head_dim), key (…, keys, head_dim), value (…, keys, value_dim), where … is (batch) or
(batch, heads). With heads, key and value may have fewer (grouped-query attention): each serves heads / key_heads
consecutive heads of the queries.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cs336_systems.errors import UserError, unknown_name

Alignment = Literal["top-left", "lower-right"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a UserError for tensors that are no attention inputs; the message says what was expected and found."""
    inputs = {"query": query, "key": key, "value": value}
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
    for name, tensor in inputs.items():
        if tensor.ndim not in (3, 4) or tensor.ndim != query.ndim:
            raise UserError(
                f"expected (batch, length, dim) or (batch, heads, length, dim) of all three, found {shapes}"
            )
        if 0 in tensor.shape:
            raise UserError(f"{name} is empty: found {shapes}")
        if not tensor.is_floating_point():
            raise UserError(f"{name} must be floating point, found {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            found = ", ".join(f"{each} {of.dtype} on {of.device}" for each, of in inputs.items())
            raise UserError(f"query, key and value must be of one dtype on one device, found {found}")
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        raise UserError(f"keys and values must be of one length, queries and keys of one dimension, found {shapes}")
    if query.shape[0] != key.shape[0] or key.shape[:-2] != value.shape[:-2]:
        raise UserError(f"batch (and, of key and value, heads) must agree, found {shapes}")
    if query.ndim == 4 and query.shape[1] % key.shape[1] != 0:
        raise UserError(f"the heads of the queries must be a multiple of those of the keys, found {shapes}")


def in_autocast_precision(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the precision that autocast asks of matrix products on their device; as they are without autocast.

    Autocast does this for PyTorch's own attention, and for no function that it does not know. Queries and keys need it
    more than values: the rotary table is in float32, and what it rotates becomes so too.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def diagonal(query: Tensor, key: Tensor, is_causal: bool, alignment: Alignment = "top-left") -> int | None:
    """The offset by which query i sees keys up to i + offset; None where it sees all of them.

    top-left, as in the course and in PyTorch: query 0 sees key 0 alone. lower-right, as decoding with a cache needs
    it: the last query sees the last key, so that with more queries than keys the first ones see none.
    """
    if alignment not in ALIGNMENTS:
        raise unknown_name("alignment", alignment, ALIGNMENTS)
    if not is_causal:
        return None
    return 0 if alignment == "top-left" else key.shape[-2] - query.shape[-2]

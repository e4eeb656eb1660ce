"""What eager operators read and write: bytes of matrix products, and of everything between them.

Every operator reads its inputs from memory and writes its output there, whatever its neighbours do. Between two
products that is what a compiler can save, by making one pass of many. Bytes are counted from shapes as the operators
are dispatched, so this holds for any model, backward and optimizer included; a view moves nothing.

Source: Ivanov et al. 2021, "Data movement is all you need".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that the operators of a call read and write, and how many operators there were besides products."""

    product_bytes: int
    other_bytes: int
    other_operators: int


def operator_traffic(call: Callable[[], object]) -> Traffic:
    """Run `call` once, and count what its operators read and write."""
    with _Counting() as counting:
        call()
    return Traffic(counting.product_bytes, counting.other_bytes, counting.other_operators)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.product_bytes = self.other_bytes = self.other_operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = _moved(func, [*args, *(kwargs or {}).values()], result)
        if func.overloadpacket in flop_registry:
            self.product_bytes += moved
        elif moved:
            self.other_bytes += moved
            self.other_operators += 1
        return result


def _moved(func: Any, arguments: list[Any], result: Any) -> int:
    inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    known = {leaf.untyped_storage()._cdata for leaf in inputs}
    written = sum(_size(leaf) for leaf in outputs if leaf.untyped_storage()._cdata not in known)
    is_allocation = not inputs or func.overloadpacket.__name__.startswith(("empty", "new_empty"))
    if func._schema.is_mutable:
        changed = [
            leaf
            for value, argument in zip(arguments, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, torch.Tensor)
        ]
        return written + sum(map(_size, changed)) + sum(map(_size, inputs))
    if is_allocation:
        return 0 if func.overloadpacket.__name__.startswith(("empty", "new_empty")) else written
    return written + sum(map(_size, inputs)) if written else 0


def _size(tensor: torch.Tensor) -> int:
    """Distinct bytes: an expanded tensor has more elements than there are in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

"""Attention implementations by name.

The operation is always the same mathematics; the name picks the code:

    reference, sdpa, flash, …            ours, and PyTorch's fused attention as it dispatches
    sdpa-math, -flash, -efficient, …     PyTorch's with one backend forced; no other is taken in its place
    my_module:my_attention               one from outside: a function as `AttentionFunction`, or a class derived from
                                         torch.autograd.Function with the course's `apply(Q, K, V, is_causal)`
    <any of these>+compile               the same through torch.compile

Ours beyond the plain ones are named by reference and imported when they are chosen: not every system has Triton, and
a measurement of one implementation does not depend on the source of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cs336_systems.attention import reference
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.object_reference import is_object_reference, load_object

COMPILED = "+compile"


@runtime_checkable
class AttentionFunction(Protocol):
    """What the model calls: query, key and value of shape (batch, heads, length, head_dim)."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """PyTorch's fused attention, whichever kernel it dispatches to."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


@dataclasses.dataclass(frozen=True)
class ForcedSdpa:
    """PyTorch's fused attention through one backend alone."""

    backend: SDPBackend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        """Raises a UserError for inputs, or on a device, that the backend does not take."""
        try:
            with sdpa_kernel(self.backend):
                return sdpa(query, key, value, is_causal=is_causal)
        except RuntimeError as error:
            # The two texts for it: of the choice among backends, and of the dispatch on CUDA.
            if not any(text in str(error) for text in ("No viable backend", "No available kernel")):
                raise
            raise UserError(
                f"PyTorch's backend {self.backend.name} takes no {query.dtype} of shape {tuple(query.shape)} on "
                f"{query.device.type}: choose another"
            ) from error


@dataclasses.dataclass(frozen=True)
class AppliedFunction:
    """A `torch.autograd.Function` with the course's interface: `apply(Q, K, V, is_causal)` of three dimensions."""

    function: type[torch.autograd.Function]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = (x if group == 1 else x.repeat_interleave(group, 1) for x in (key, value))
        output: Any = self.function.apply(*(x.flatten(0, 1) for x in (query, keys, values)), is_causal)
        if not isinstance(output, Tensor) or output.ndim != 3:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"{self.function.__name__}.apply must return one (batch, queries, dim), found {found}")
        return output.unflatten(0, query.shape[:2])


IMPLEMENTATIONS: Mapping[str, AttentionFunction] = MappingProxyType(
    {
        "reference": reference.attention,
        "sdpa": sdpa,
        "sdpa-math": ForcedSdpa(SDPBackend.MATH),
        "sdpa-efficient": ForcedSdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa-flash": ForcedSdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": ForcedSdpa(SDPBackend.CUDNN_ATTENTION),
    }
)
BY_REFERENCE = MappingProxyType(
    {
        "flash": "cs336_systems.attention.flash:attention",
        "flash-triton": "cs336_systems.attention.flash_triton:attention",
        "flash-triton-tf32": "cs336_systems.attention.flash_triton:tf32_attention",
        "flash-triton-graded": "cs336_systems.attention.flash_triton:graded_attention",
    }
)
NAMES = (*IMPLEMENTATIONS, *BY_REFERENCE)


def check_name(choice: str) -> None:
    """Raise a UserError that lists the known, unless `choice` names one of ours or is spelt as a reference.

    Nothing is imported for it: a machine without Triton can tell of the records of one that has it.
    """
    plain = choice.removesuffix(COMPILED)
    if plain not in NAMES and not is_object_reference(plain):
        raise unknown_name("attention", plain, [*NAMES, "module:attribute", f"any of these with {COMPILED}"])


def resolve_attention(choice: str) -> AttentionFunction:
    """The implementation called `choice`.

    Raises:
        UserError: `choice` is neither a name of ours nor an importable `module:attribute`.
    """
    check_name(choice)
    if choice.endswith(COMPILED):
        # For exactly the shapes it meets, and without a silent retreat to eager code.
        plain: Any = resolve_attention(choice.removesuffix(COMPILED))
        compiled: AttentionFunction = torch.compile(plain, fullgraph=True, dynamic=False)
        return compiled
    if choice in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[choice]
    found = load_object(BY_REFERENCE.get(choice, choice))
    if isinstance(found, type) and issubclass(found, torch.autograd.Function):
        return AppliedFunction(found)
    if isinstance(found, type) or not callable(found):
        raise UserError(
            f"{choice} must be a function (query, key, value, *, is_causal) or a class derived from "
            f"torch.autograd.Function, found {found!r}"
        )
    function: AttentionFunction = found
    return function


def attention_source(choice: str) -> str | None:
    """The `module:attribute` that `choice` stands for, on whose source its measurements depend; None for a plain one.

    A name that is none is no reference either: `check_name` tells of it.
    """
    choice = choice.removesuffix(COMPILED)
    return choice if is_object_reference(choice) else BY_REFERENCE.get(choice)

"""What torch.compile keeps of blocks for their backward, asked of the compiler without computing or holding anything.

    sum(tensor.bytes for tensor in compiled_residuals(config, batch_size=4, seq_len=2048, blocks=4, group=2))

The spring 2026 handout compiles a block and prints every tensor that autograd saves, by `saved_tensors_hooks`. Which
these are is decided when the compiler parts the joint graph of forward and backward in two, before any code is
generated: so a backend that stops there gives the same, on tensors without data. As in the handout every saved tensor
counts with its own size, parameters excepted, each time that it is saved: the table of cosines and sines, a buffer,
once per block. Blocks are compiled one by one; a checkpoint of several saves its input, and no block in it anything.

The graph that is parted has elementary operators alone. So it makes no difference how our model is written: of the
handout's block as much is kept in both formulations, and with the rotary embeddings of both years.

Source: CS336 assignment 2 (2026), gradient_checkpointing; torch._functorch.partitioners, which keeps what a minimal cut
between forward and backward crosses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cs336_systems.checkpointing import Policy, plan_of, run_plan
from cs336_systems.errors import UserError
from cs336_systems.kept import kept
from cs336_systems.model import TransformerConfig, build_model

BACKEND = "aot_eager_decomp_partition"
"""Decomposes and parts the graph as Inductor does, then runs it as it is."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """One tensor that autograd saved."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def compiled_residuals(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    *,
    blocks: int = 1,
    group: int | None = None,
    **choices: Any,
) -> tuple[Residual, ...]:
    """What so many blocks save when they run one after the other on an activation that needs a gradient.

    Takes a second or two; what was asked once in a checkout is not asked again (`kept.py`).

    Args:
        config: of which the width is taken, and the heads; not the number of blocks.
        group: how many blocks go into a checkpoint together; none do, without it.
        choices: rope, formulation and attention, as `build_model` takes them.

    Raises:
        UserError: an unknown choice; groups of less than one block or more than there are.
    """
    if group is not None and not 1 <= group <= blocks:
        raise UserError(f"a checkpoint must have from 1 to {blocks} blocks, found {group!r}")
    several = dataclasses.replace(config, num_layers=blocks, context_length=seq_len)
    policy = Policy("none") if group is None else Policy("every", group)
    asked = {"config": dataclasses.asdict(several), "batch_size": batch_size, "choices": choices}
    asked["policy"] = dataclasses.asdict(policy)

    def ask() -> list[dict[str, Any]]:
        return [dataclasses.asdict(residual) for residual in _saved(several, batch_size, policy, choices)]

    is_ours = not any(":" in str(choice) for choice in choices.values())  # the source of others is not watched
    found = kept("residuals", asked, ask) if is_ours else ask()
    return tuple(Residual(**each | {"shape": tuple(each["shape"])}) for each in found)


def _saved(config: TransformerConfig, batch_size: int, policy: Policy, choices: dict[str, Any]) -> tuple[Residual, ...]:
    saved: list[Residual] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            dtype = str(tensor.dtype).removeprefix("torch.")
            saved.append(Residual(tuple(tensor.shape), dtype, tensor.numel() * tensor.element_size()))
        return tensor

    torch.compiler.reset()  # code for tensors without data is of no use to others, nor theirs here
    try:
        with _as_the_compiler_wants(), FakeTensorMode():
            model: Any = build_model(config, **choices)
            x = torch.randn(batch_size, config.context_length, config.d_model, requires_grad=True)
            compiled = [torch.compile(layer, backend=BACKEND, fullgraph=True) for layer in model.layers]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run_plan(plan_of(policy, config.num_layers), compiled, x)
    finally:
        torch.compiler.reset()
    # A checkpoint also saves a tensor without elements, which makes autograd call it.
    return tuple(residual for residual in saved if residual.bytes)


@contextlib.contextmanager
def _as_the_compiler_wants() -> Iterator[None]:
    """It cannot look through a check of shapes around every call, and what it imports warns of PyTorch's own code."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)

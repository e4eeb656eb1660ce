"""Activation checkpointing: what of a forward is kept for its backward, and what is computed once more.

A checkpoint keeps its input alone; when backward comes to it, its blocks run again from there. A policy says which
blocks go into a checkpoint together:

    none         every block keeps all that its backward needs
    every-K      groups of K consecutive blocks, a checkpoint each
    nested       halves, a checkpoint each, and within it the half's halves, down to single blocks
    from-start   a checkpoint of all blocks but the last, within it one of all but the last of those, and so on: every
                 block's backward runs the forward from its start
    selective    two checkpoints per block: its input and attention's output are kept, the rest is computed again

With N blocks, S bytes of the activation between two of them, and A of what one keeps, about this is held at most, and
so many forwards of a block run (`analysis/checkpointing.py` counts both exactly):

    none         N·A                                             N
    every-K      N/K·S + K·A; 2·√(N·S·A) at K = √(N·S/A)         2N
    nested       (log₂N + 1)·S + A                               2N + N/2·(log₂N − 1)
    from-start   2·S + A                                         N·(N + 1)/2
    selective    2N·S + the larger part of A                     2N

So memory need not grow with N at all, if the work may grow with its square; O(log N) costs O(N log N); without nesting
O(√N) costs one forward more.

A rerun ends with the last tensor that backward asked for. What a checkpoint has kept before need not be made again, so
when an outer one reruns, the last of its inner ones is left out: half of the work of each level of halves.

Under torch.compile the blocks are compiled one by one, or the whole model with its checkpoints, of which the compiler
then makes one graph; in that it runs again what a checkpoint has, but knows no checkpoint within another.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", sections 4.2 and 4.3; Griewank and Walther
2000, "Revolve"; torch.utils.checkpoint; CS336 assignment 2, gradient_checkpointing.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cs336_systems.errors import UserError, unknown_name

POLICIES = ("none", "every-K", "nested", "from-start", "selective")
Node: TypeAlias = int | tuple["Node", ...]
"""A block by its number, or a checkpoint of what it has within."""
Plan: TypeAlias = tuple[Node, ...]
Block: TypeAlias = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which blocks go into a checkpoint together."""

    name: str
    group: int | None = None
    """Blocks per checkpoint, of every-K."""

    def __str__(self) -> str:
        return self.name if self.group is None else f"every-{self.group}"


def parse_policy(text: str, num_blocks: int) -> Policy:
    """The policy that `text` names, for a model of so many blocks.

    Raises:
        UserError: it names none, or groups of less than one block or more than there are.
    """
    named = re.fullmatch(r"every-(.*)", text) if isinstance(text, str) else None
    if named is None or named[1] == "K":
        if text not in POLICIES or named is not None:
            raise unknown_name("checkpointing", text, POLICIES, where="(K is a number of blocks, as in every-2)")
        return Policy(text)
    group = int(named[1]) if re.fullmatch(r"\d{1,9}", named[1], re.ASCII) else 0
    if not 1 <= group <= num_blocks:
        raise UserError(
            f"checkpointing every-K needs a whole number K from 1 to {num_blocks}, the number of blocks: found {text!r}"
        )
    return Policy("every", group)


def plan_of(policy: Policy, num_blocks: int) -> Plan:
    """How a policy lays out blocks 0 … num_blocks − 1.

    >>> plan_of(Policy("every", 2), 5), plan_of(Policy("nested"), 4), plan_of(Policy("from-start"), 3)
    (((0, 1), (2, 3), (4,)), (((0,), (1,)), ((2,), (3,))), (((0,), 1), 2))
    """
    blocks = range(num_blocks)
    if policy.group is not None:
        return tuple(tuple(blocks[first : first + policy.group]) for first in blocks[:: policy.group])
    if policy.name == "nested":
        return _halves(blocks)
    if policy.name == "from-start":
        plan: Plan = (0,)
        for block in blocks[1:]:
            plan = (plan, block)
        return plan
    return tuple(blocks)  # what a selective one keeps is decided within the block


def _halves(blocks: range) -> Plan:
    if len(blocks) == 1:
        return (blocks[0],)
    middle = (len(blocks) + 1) // 2
    return (_halves(blocks[:middle]), _halves(blocks[middle:]))


def is_nested(plan: Plan) -> bool:
    """Whether a checkpoint has another within."""
    return any(isinstance(inner, tuple) for node in plan if isinstance(node, tuple) for inner in node)


def run_plan(plan: Plan, blocks: Sequence[Block], x: Tensor, *, preserve_rng_state: bool = False) -> Tensor:
    """Run the blocks that a plan names, in its order, and its checkpoints as such.

    `preserve_rng_state`: blocks draw random numbers, which must be the same in a rerun. It costs a copy of the
    generators' state per checkpoint, and on a GPU a wait for the device.
    """
    for node in plan:
        if isinstance(node, int):
            x = blocks[node](x)
        else:
            part = partial(run_plan, node, blocks, preserve_rng_state=preserve_rng_state)
            x = rerun_in_backward(part, x, preserve_rng_state=preserve_rng_state)
    return x


def rerun_in_backward(part: Block, x: Tensor, *, preserve_rng_state: bool = False) -> Tensor:
    """`part(x)`, of which its input alone is kept; without autograd nothing is, and nothing need be."""
    if not torch.is_grad_enabled():
        return part(x)
    result: Tensor = checkpoint(part, x, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    return result


def rerun_but_for_attention(part: Block, x: Tensor, *, preserve_rng_state: bool = False) -> Tensor:
    """The same, but attention that is a single operator is not run again: what it returned is kept too."""
    if not torch.is_grad_enabled():
        return part(x)
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    result: Tensor = checkpoint(
        part, x, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=contexts
    )
    return result


ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "cs336_systems::flash_forward",
    }
)
"""Attention as one operator, which returns its output and what its backward needs beside its inputs."""


def _keep_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del args, kwargs
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


# Somebody else's model -----------------------------------------------------------------------------------------


def checkpoint_layers(model: nn.Module, policy: Policy) -> None:
    """Have a model with its blocks in a ModuleList called `layers` run them by `policy`. In place.

    Its own loop over them stays: the first block of a checkpoint runs all that are in it, the others hand on what they
    are given. Whether they draw random numbers is not known, so that the generators' state is kept.

    Raises:
        UserError: there is no such list, or the policy needs to know more of a block than its call. When it runs:
            a block takes more than one activation, or something is done between the blocks of a checkpoint.
    """
    if policy.name == "none":
        return
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        found = "none" if layers is None else type(layers).__name__
        raise UserError(
            f"checkpointing {policy} needs the blocks of {type(model).__name__} in a torch.nn.ModuleList called "
            f"layers, found {found}"
        )
    if policy.name == "selective":
        raise UserError(
            f"checkpointing selective keeps what attention in a block returns, which is not known of "
            f"{type(model).__name__}: choose every-K, nested or from-start"
        )
    blocks = [_tensor_to_tensor(layer, layer.forward) for layer in layers]
    for node in plan_of(policy, len(layers)):
        first, *others = blocks_within(node)
        together = _Together((node,), blocks)
        layers[first].forward = together.run
        for other in others:
            layers[other].forward = together.hand_on


def blocks_within(node: Node) -> list[int]:
    """The numbers of a node's blocks, in their order."""
    return [node] if isinstance(node, int) else [block for inner in node for block in blocks_within(inner)]


def _tensor_to_tensor(layer: nn.Module, forward: Callable[..., Any]) -> Block:
    name = type(layer).__name__

    def block(x: Tensor) -> Tensor:
        found = forward(x)
        if not isinstance(found, Tensor):
            raise UserError(f"to be checkpointed, {name} must return one tensor, found {type(found).__name__}")
        return found

    return block


class _Together:
    """Blocks of one checkpoint in a model whose own loop calls them one by one."""

    def __init__(self, plan: Plan, blocks: Sequence[Block]) -> None:
        self.plan, self.blocks = plan, blocks
        self.result: Callable[[], Tensor | None] = lambda: None

    def run(self, x: Tensor, *others: object, **named: object) -> Tensor:
        """The call of the first block: all of them run."""
        self._require_alone(others, named)
        result = run_plan(self.plan, self.blocks, x, preserve_rng_state=True)
        if not torch.compiler.is_compiling():
            self.result = weakref.ref(result)
        return result

    def hand_on(self, x: Tensor, *others: object, **named: object) -> Tensor:
        """The call of another, which has run already."""
        self._require_alone(others, named)
        if not torch.compiler.is_compiling() and self.result() is not x:
            raise UserError(
                "blocks go into one checkpoint only where each is given what the one before it returned, and something "
                "else was given here: choose every-1"
            )
        return x

    def _require_alone(self, others: tuple[object, ...], named: dict[str, object]) -> None:
        if others or named:
            raise UserError(
                f"to be checkpointed, a block must take one activation, found {len(others) + len(named)} more arguments"
            )

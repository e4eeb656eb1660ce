"""What checkpointing holds and what it computes again, counted from the plan of its checkpoints.

    counted(SIZES["xl"], "every-2", batch_size=4, seq_len=2048).activation_bytes

A plan (`checkpointing.plan_of`) is run here with nothing in it: `walk` follows a forward and a backward and tells, when
the backward of a block begins, which activations between blocks are there and which blocks have all that they keep.
Memory is these counts times sizes, and work is how often each block runs. Nothing is fitted.

    S    the activation between two blocks, of which a checkpoint keeps one
    A    what one block keeps for its backward, without its input: `activations.saved_by_block`

A rerun of a checkpoint ends with the last tensor that backward asked for: before the last product of its last block,
that of w2, whose result nobody asks for. In the plan of a selective policy each block counts as two, its attention and
its feed-forward; the last product of attention's half is the output projection.

Source: Chen et al. 2016, section 4; CS336 assignment 2, gradient_checkpointing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cs336_systems.analysis import activations, flops
from cs336_systems.checkpointing import Node, Plan, Policy, blocks_within, parse_policy, plan_of
from cs336_systems.model import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is held when the backward of one block begins."""

    block: int
    inputs: int
    """How many activations between blocks: inputs of checkpoints, and of blocks that have what they keep."""
    kept: tuple[int, ...]
    """The blocks that have all that their backward needs."""


def walk(plan: Plan) -> Iterator[Moment]:
    """The moments of one step's backward, from the last block to the first."""
    return _Walk().backward(plan)


class _Walk:
    """An activation that several checkpoints keep is one tensor, so it is known by the block that it goes into."""

    def __init__(self) -> None:
        self.inputs: Counter[int] = Counter()
        self.kept: set[int] = set()

    def backward(self, nodes: Plan) -> Iterator[Moment]:
        """Of nodes that are forwarded here, be it for the first time or once more."""
        for node in nodes:
            self.inputs[blocks_within(node)[0]] += 1
            if isinstance(node, int):
                self.kept.add(node)
        for node in reversed(nodes):
            if isinstance(node, int):
                yield Moment(node, len(+self.inputs), tuple(sorted(self.kept)))
                self.kept.remove(node)
            else:
                yield from self.backward(node)
            self.inputs[blocks_within(node)[0]] -= 1


def forward_runs(plan: Plan) -> Counter[int]:
    """How often each block's forward runs in one step, the first time included.

    >>> sum(forward_runs(plan_of(Policy("nested"), 8)).values())
    24
    """
    runs = Counter(block for node in plan for block in blocks_within(node))
    return sum((_reruns(node) for node in plan), runs)


def _reruns(node: Node) -> Counter[int]:
    if isinstance(node, int):
        return Counter()
    # The input of a last checkpoint is what the rerun is for: that one is not run for the outer one's sake.
    *others, last = node
    again = [*others, last] if isinstance(last, int) else others
    runs = Counter(block for inner in again for block in blocks_within(inner))
    return sum((_reruns(inner) for inner in node), runs)


def cut_short(plan: Plan) -> list[int]:
    """The blocks with which a rerun ends, each as often as one does."""
    ends: list[int] = []
    for node in plan:
        if isinstance(node, tuple):
            last = node[-1]
            ends += [last] if isinstance(last, int) else []
            ends += cut_short(node)
    return ends


# Our model -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counted:
    """What one forward and backward of a model under a policy holds and does."""

    policy: str
    inputs: int
    """Activations between blocks, when the most is held for backward."""
    kept_bytes: int
    """What blocks keep at that moment."""
    activation_bytes: int
    """Both together: the most that blocks hold for backward."""
    step_bytes: int
    """The least that the peak can be, on top of what was there before: with logits and gradients too, but without what
    is temporary."""
    block_runs: float
    """How often a block's forward runs, on average."""
    flops: int
    """Of all products of forward and backward, reruns included."""
    work: float
    """That, as a multiple of what is done without checkpointing."""


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a number of a plan stands for: a block, or half of one."""

    saved_bytes: int
    """Kept for backward, its input not counted."""
    cast_bytes: int
    """Of the casts of its parameters that autocast makes, which are kept as well."""
    gradient_bytes: int
    flops: int
    """Of its forward's products."""
    last_flops: int
    """Of the last of them."""


def counted(
    config: TransformerConfig,
    policy: str,
    batch_size: int,
    seq_len: int,
    *,
    itemsize: int = 4,
    autocast: str = "none",
    **choices: Any,
) -> Counted:
    """Memory and work of forward and backward of our model with the reference attention.

    Args:
        choices: rope, formulation and device, as `activations.saved_by_block` takes them.

    Raises:
        UserError: an unknown or impossible policy, or as `activations.saved_by_block`.
    """
    chosen = parse_policy(policy, config.num_layers)
    is_halved = chosen.name == "selective"
    plan = plan_of(Policy("every", 1), 2 * config.num_layers) if is_halved else plan_of(chosen, config.num_layers)
    units = config.num_layers * _units_of_block(
        config, batch_size, seq_len, is_halved=is_halved, itemsize=itemsize, autocast=autocast, **choices
    )
    between = activations.residual_bytes(config, batch_size, seq_len, itemsize)
    ends = activations.held_after_forward(config, batch_size, seq_len, itemsize=itemsize, autocast=autocast, **choices)

    moments = list(walk(plan))
    kept = [sum(units[unit].saved_bytes + units[unit].cast_bytes for unit in moment.kept) for moment in moments]
    held = [moment.inputs * between + size for moment, size in zip(moments, kept, strict=True)]
    most = held.index(max(held))

    # When forward ends autocast still has every cast that it made. Gradients come from the last block to the first.
    saved_at_once = sum(units[node].saved_bytes for node in plan if isinstance(node, int))
    head = sum(ends.get(name, 0) for name in ("last norm", "input of the logits", "logits", "casts of parameters"))
    gradients = _gradients_of_the_head(config, itemsize)
    least = [len(plan) * between + saved_at_once + head]
    for moment, size in zip(moments, held, strict=True):
        least.append(size + gradients)
        gradients += units[moment.block].gradient_bytes
    least.append(gradients + config.vocab_size * config.d_model * itemsize)  # the embedding's, at last

    runs = forward_runs(plan)
    plain = flops.total(flops.phase_work(config, "forward-backward", batch_size, seq_len).values()).flops
    again = sum((runs[unit] - 1) * units[unit].flops for unit in runs)
    again -= sum(units[unit].last_flops for unit in cut_short(plan))
    return Counted(
        policy=policy,
        inputs=moments[most].inputs,
        kept_bytes=kept[most],
        activation_bytes=held[most],
        step_bytes=max(least),
        block_runs=sum(runs.values()) / len(units),
        flops=plain + again,
        work=(plain + again) / plain,
    )


def _units_of_block(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    *,
    is_halved: bool,
    itemsize: int,
    autocast: str,
    **choices: Any,
) -> tuple[_Unit, ...]:
    """A block, or its attention and its feed-forward, each with its norm."""
    saved = activations.saved_by_block(config, batch_size, seq_len, itemsize=itemsize, autocast=autocast, **choices)
    between = saved.pop(activations.BLOCK_INPUT, 0)
    names, middle = list(saved), next(name for name in saved if name.startswith("norm 2"))
    of_attention = sum(saved[name] for name in names[: names.index(middle)])
    of_feed_forward = sum(saved.values()) - of_attention

    one = dataclasses.replace(config, num_layers=1)
    counts, works = flops.parameters(one), flops.forward_work(one, batch_size, seq_len)
    cast_itemsize = activations.cast_parameters_of_block(config, autocast) // activations.matrices_of_block(config)
    attention = _Unit(
        saved_bytes=of_attention,
        cast_bytes=counts["attention"] * cast_itemsize,
        gradient_bytes=(counts["attention"] + config.d_model) * itemsize,
        flops=sum(works[name].flops for name in _OF_ATTENTION),
        last_flops=works["output_projection"].flops,
    )
    feed_forward = _Unit(
        saved_bytes=of_feed_forward,
        cast_bytes=counts["ffn"] * cast_itemsize,
        gradient_bytes=(counts["ffn"] + config.d_model) * itemsize,
        flops=works["ffn"].flops,
        last_flops=works["ffn"].flops // 3,
    )
    if is_halved:  # the second half's input, where it is saved as it is, is one of the activations between halves
        return attention, dataclasses.replace(feed_forward, saved_bytes=of_feed_forward - between)
    block = _Unit(
        saved_bytes=attention.saved_bytes + feed_forward.saved_bytes,
        cast_bytes=attention.cast_bytes + feed_forward.cast_bytes,
        gradient_bytes=attention.gradient_bytes + feed_forward.gradient_bytes,
        flops=attention.flops + feed_forward.flops,
        last_flops=feed_forward.last_flops,
    )
    return (block,)


_OF_ATTENTION = ("qkv_projections", "attention_scores", "attention_values", "output_projection")


def _gradients_of_the_head(config: TransformerConfig, itemsize: int) -> int:
    """Of the last norm and of the logits' weight, which are there before the last block's backward begins."""
    return (flops.parameters(config)["lm_head"] + config.d_model) * itemsize


def group_sizes(config: TransformerConfig, batch_size: int, seq_len: int, **choices: Any) -> list[Counted]:
    """What groups of 1, 2, …, all blocks hold and do, without nesting; `choices` as `counted`."""
    return [
        counted(config, f"every-{size}", batch_size, seq_len, **choices) for size in range(1, config.num_layers + 1)
    ]


def best_group(config: TransformerConfig, batch_size: int, seq_len: int, **choices: Any) -> int:
    """The number of blocks per checkpoint, without nesting, with which blocks hold the least."""
    found = group_sizes(config, batch_size, seq_len, **choices)
    return 1 + min(range(len(found)), key=lambda place: found[place].activation_bytes)

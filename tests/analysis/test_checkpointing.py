"""What is counted of checkpoints is what steps hold and do: differences to the byte, products to the last one."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis.activations import residual_bytes, saved_by_block
from cs336_systems.analysis.checkpointing import best_group, counted, cut_short, forward_runs, group_sizes, walk
from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.checkpointing import Policy, parse_policy, plan_of, run_plan
from cs336_systems.errors import UserError
from cs336_systems.model import SIZES, TransformerConfig, build_model
from cs336_systems.step import BuiltStep, StepConfig, build_step

pytestmark = pytest.mark.problem("gradient_checkpointing")

POLICIES = ("none", "every-1", "every-2", "every-3", "every-4", "every-8", "nested", "from-start", "selective")
CHECKPOINTED = POLICIES[1:]
STEP = StepConfig(64, 128, 8, 2, 96, "cpu", vocab_size=64, batch_size=2, phase="forward-backward")
XL = dataclasses.replace(SIZES["xl"], context_length=2048)
every_policy = pytest.mark.parametrize("policy", POLICIES)
powers = pytest.mark.parametrize("depth", [1, 2, 4, 8, 16, 32])


def built(policy: str, **changes: Any) -> BuiltStep:
    torch.manual_seed(0)
    return build_step(dataclasses.replace(STEP, checkpointing=policy, **changes))


# Work ----------------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("formulation", ["reference", "fused"])
def test_all_products_of_a_step_are_counted_reruns_included(policy: str, formulation: str) -> None:
    step = built(policy, formulation=formulation)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counted(STEP.config, policy, 2, 96).flops == counter.get_total_flops()


def test_a_model_of_odd_depth_and_one_head_is_counted_too() -> None:
    odd = dataclasses.replace(STEP, num_layers=5, num_heads=1, d_ff=72)
    for policy in ("every-2", "every-5", "nested", "from-start", "selective"):
        step = build_step(dataclasses.replace(odd, checkpointing=policy))
        with FlopCounterMode(display=False) as counter:
            step()
        assert counted(odd.config, policy, 2, 96).flops == counter.get_total_flops()


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 16])
def test_without_nesting_every_rerun_ends_with_the_last_block_of_its_group(depth: int) -> None:
    for size in range(1, depth + 1):
        plan = plan_of(Policy("every", size), depth)
        assert len(cut_short(plan)) == math.ceil(depth / size)
        assert set(forward_runs(plan).values()) == {2}


# Memory --------------------------------------------------------------------------------------------------------


@functools.cache
def growth(policy: str, autocast: str = "none") -> int:
    """What a step allocates at most."""
    step = built(policy, autocast=autocast)
    step()
    step.optimizer.zero_grad(set_to_none=True)
    peak, _ = allocated_bytes(step, "cpu")
    return peak


@every_policy
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_no_peak_is_less_than_the_least_that_is_counted(policy: str, autocast: str) -> None:
    found = counted(STEP.config, policy, 2, 96, autocast=autocast, device="cpu")
    assert found.step_bytes <= growth(policy, autocast) < 1.7 * found.step_bytes


def peak_of_blocks(policy: str, depth: int) -> float:
    """In units of S, of a forward and a backward of blocks alone, whose parameters get no gradients."""
    config = TransformerConfig(d_model=32, d_ff=64, num_layers=depth, num_heads=1, vocab_size=8, context_length=64)
    model = build_model(config, checkpointing=policy).requires_grad_(False)
    layers: Any = model.layers
    x = torch.randn(2, 64, 32, requires_grad=True)
    plan = plan_of(parse_policy(policy, depth), depth)

    def call() -> None:
        run_plan(plan, layers, x).backward(torch.ones(()).expand(x.shape))
        x.grad = None

    call()
    peak, _ = allocated_bytes(call, "cpu")
    return peak / residual_bytes(config, 2, 64)


close = functools.partial(pytest.approx, abs=0.01)  # but for numbers of Python's, of eight bytes each


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_with_twice_the_blocks_memory_grows_as_the_formulas_say(depth: int) -> None:
    """The input of the first block was there before. From four blocks on a gradient is there with a rerun's first."""

    def grown(policy: str) -> float:
        return peak_of_blocks(policy, depth) - peak_of_blocks(policy, depth // 2)

    assert grown("every-1") == close(depth / 2)
    assert grown("nested") == close(1)
    assert grown("from-start") == close(1 if depth <= 4 else 0)
    assert grown("none") > 10 * depth / 2


@pytest.mark.parametrize("depth", [4, 8])
def test_a_group_of_two_holds_another_block_and_fewer_activations_between(depth: int) -> None:
    one, two = (peak_of_blocks(f"every-{size}", depth) for size in (1, 2))
    of_a_block = peak_of_blocks("none", 2) - peak_of_blocks("none", 1)  # A and S
    assert two - one == close(of_a_block - depth / 2)


@powers
def test_the_walk_has_the_counts_of_the_formulas(depth: int) -> None:
    def most(policy: str) -> tuple[int, int]:
        moments = list(walk(plan_of(parse_policy(policy, depth), depth)))
        assert [moment.block for moment in moments] == list(reversed(range(depth)))
        return max(moment.inputs for moment in moments), max(len(moment.kept) for moment in moments)

    assert most("none") == (depth, depth)
    assert most("every-1") == (depth, 1)
    assert most("nested") == (math.log2(depth) + 1, 1)
    assert most("from-start") == (min(2, depth), 1)
    for size in {2, 4, 8} & set(range(depth + 1)):
        assert most(f"every-{size}") == (depth // size + size - 1, size)


def test_without_checkpoints_all_that_blocks_save_is_held() -> None:
    found = counted(STEP.config, "none", 2, 96)
    assert found.activation_bytes == 8 * sum(saved_by_block(STEP.config, 2, 96).values())
    assert found.work == found.block_runs == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_of_a_block_make_up_the_whole(dtype: str) -> None:
    itemsize = getattr(torch, dtype).itemsize
    one = dataclasses.replace(STEP.config, num_layers=1)
    whole, half = (counted(one, policy, 2, 96, itemsize=itemsize) for policy in ("every-1", "selective"))
    assert half.kept_bytes < whole.kept_bytes
    assert half.activation_bytes < whole.activation_bytes


# The best group ------------------------------------------------------------------------------------------------


def test_the_best_group_holds_no_more_than_any_other() -> None:
    found = group_sizes(XL, 4, 2048)
    assert len(found) == XL.num_layers
    best = best_group(XL, 4, 2048)
    assert min(group.activation_bytes for group in found) == found[best - 1].activation_bytes


@pytest.mark.parametrize("depth", [36, 100])
def test_where_blocks_keep_little_the_best_group_is_near_the_root(depth: int) -> None:
    """K = √(N·S/A), by the sizes of a narrow feed-forward and short sequences."""
    config = TransformerConfig(d_model=64, d_ff=1, num_layers=depth, num_heads=1, vocab_size=8, context_length=1)
    kept = sum(saved_by_block(config, 1, 1).values())
    root = math.sqrt(depth * residual_bytes(config, 1, 1) / kept)
    assert root > 1.5
    assert abs(best_group(config, 1, 1) - root) <= 1


def test_nested_checkpoints_hold_less_than_the_best_group_and_cost_more() -> None:
    group, nested, start = (counted(XL, policy, 4, 2048) for policy in ("every-1", "nested", "from-start"))
    assert group.activation_bytes > nested.activation_bytes > start.activation_bytes
    assert group.work < nested.work < start.work


def test_what_is_not_known_is_an_error() -> None:
    with pytest.raises(UserError, match="from 1 to 32"):
        counted(XL, "every-33", 4, 2048)
    with pytest.raises(UserError, match="only what the reference attention saves"):
        counted(XL, "every-1", 4, 2048, attention="flash")

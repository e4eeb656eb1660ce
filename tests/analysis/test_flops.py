"""The accounting equals what PyTorch counts on the model itself, and what is counted by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis.flops import (
    Work,
    attended_pairs,
    backward_work,
    compulsory_bytes,
    forward_work,
    matmul,
    optimizer_work,
    parameters,
    phase_work,
    resident_bytes,
    total,
)
from cs336_systems.errors import UserError
from cs336_systems.loss import cross_entropy
from cs336_systems.model import SIZES, RopeYear, TransformerConfig, build_model
from cs336_systems.step import PHASES, Phase

# No two symbols have the same value, so that none can stand for another.
ODD = TransformerConfig(d_model=24, d_ff=56, num_layers=3, num_heads=2, vocab_size=97, context_length=40)
WIDE = TransformerConfig(d_model=64, d_ff=40, num_layers=1, num_heads=8, vocab_size=30, context_length=16)
ONE_HEAD = TransformerConfig(d_model=16, d_ff=48, num_layers=2, num_heads=1, vocab_size=500, context_length=64)
CASES = [(ODD, 2, 17), (ODD, 5, 40), (WIDE, 3, 11), (WIDE, 1, 16), (ONE_HEAD, 2, 64)]
HANDOUT_SIZES = [name for name in SIZES if name not in ("tiny", "mini")]


def count(config: TransformerConfig, batch_size: int, seq_len: int, rope: RopeYear, *, backward: bool) -> Any:
    """What PyTorch counts while the reference model runs, per module."""
    torch.manual_seed(0)
    model = build_model(config, rope=rope)
    tokens = torch.randint(config.vocab_size, (batch_size, seq_len))
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(model(tokens), tokens)
        if backward:
            loss.backward()
    return counter


@pytest.mark.parametrize(("config", "batch_size", "seq_len"), CASES)
@pytest.mark.parametrize("rope", ["2025", "2026"])
@pytest.mark.parametrize("phase", ["forward", "forward-backward"])
def test_flops_equal_what_pytorch_counts_on_the_model(
    config: TransformerConfig, batch_size: int, seq_len: int, rope: RopeYear, phase: Phase
) -> None:
    counted = count(config, batch_size, seq_len, rope, backward=phase == "forward-backward").get_total_flops()
    assert total(phase_work(config, phase, batch_size, seq_len).values()).flops == counted


def test_flops_of_each_component_are_those_of_its_module() -> None:
    counts = count(ODD, 2, 17, "2025", backward=False).get_flop_counts()

    def of_modules(*suffixes: str) -> int:
        return sum(
            flops for name, per_operator in counts.items() if name.endswith(suffixes) for flops in per_operator.values()
        )

    work = forward_work(ODD, 2, 17)
    assert work["qkv_projections"].flops == of_modules("q_proj", "k_proj", "v_proj")
    assert work["output_projection"].flops == of_modules("output_proj")
    assert work["ffn"].flops == of_modules(".ffn")
    assert work["lm_head"].flops == of_modules(".lm_head")
    attention = of_modules(".attn") - of_modules("_proj")
    assert attention > 0
    assert work["attention_scores"].flops + work["attention_values"].flops == attention
    without_products = ("embedding", "norms", "rope", "softmax", "residuals", "swiglu_gate")
    assert all(work[name].flops == 0 for name in without_products)


def test_components_of_the_parameters_equal_those_of_a_model() -> None:
    named = {name: value.numel() for name, value in build_model(ODD).named_parameters()}

    def of_names(*parts: str) -> int:
        return sum(size for name, size in named.items() if any(part in name for part in parts))

    assert parameters(ODD) == {
        "embedding": of_names("token_embeddings"),
        "attention": of_names(".attn."),
        "ffn": of_names(".ffn."),
        "norms": of_names(".ln1.", ".ln2.", "ln_final"),
        "lm_head": of_names("lm_head"),
    }


@pytest.mark.parametrize("name", list(SIZES))
def test_parameters_sum_to_those_of_the_model_in_every_size(name: str) -> None:
    with torch.device("meta"):
        model = build_model(SIZES[name])
    assert sum(parameters(SIZES[name]).values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("num_queries", [1, 2, 5, 8])
@pytest.mark.parametrize("num_keys", [1, 3, 5, 9])
def test_attended_pairs_equal_counting_them_one_by_one(num_queries: int, num_keys: int) -> None:
    pairs = [(query, key) for query in range(num_queries) for key in range(num_keys)]
    assert attended_pairs(num_queries, num_keys, skips_masked=False) == len(pairs)
    seen = [query for query, key in pairs if key <= query]
    assert attended_pairs(num_queries, num_keys, skips_masked=True) == len(seen)


def test_a_product_counted_by_hand() -> None:
    # (2, 3) × (3, 5): ten results of three multiply-adds each; 6 and 15 values read, 10 written.
    assert matmul(2, 3, 5, itemsize=4) == Work(flops=60, bytes=124)
    assert matmul(2, 3, 5, itemsize=2, times=3) == Work(flops=180, bytes=186)


def test_work_adds_and_multiplies_flops_and_bytes_apart() -> None:
    assert Work(1, 10) + Work(2, 20) == Work(3, 30)
    assert Work(2, 5) * 3 == Work(6, 15)
    assert total([]) == Work(0, 0)
    assert total([Work(1, 2), Work(3, 4), Work(5, 6)]) == Work(9, 12)


# A layer's tensors by letter, for ODD with batch 2 and sequence 17.
ELEMENTS = {
    "x": 2 * 17 * 24,  # anything of the residual stream's shape
    "h": 2 * 17 * 56,
    "s": 2 * 2 * 17 * 17,  # scores, or the weights they become
    "l": 2 * 17 * 97,
    "D": 24 * 24,
    "F": 24 * 56,
    "V": 97 * 24,
}


def count_bytes(tensors: str, itemsize: int) -> int:
    return itemsize * sum(ELEMENTS[letter] for letter in tensors if letter != " ")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_of_the_forward_pass_are_each_components_inputs_and_outputs(itemsize: int) -> None:
    found = {name: work.bytes for name, work in forward_work(ODD, 2, 17, itemsize=itemsize).items()}
    layers = 3
    assert found == {
        "embedding": count_bytes("xx", itemsize),
        "norms": count_bytes("xx", itemsize) * 7,
        "qkv_projections": count_bytes("xDx xDx xDx", itemsize) * layers,
        "rope": count_bytes("xx xx", itemsize) * layers,
        "attention_scores": count_bytes("xxs", itemsize) * layers,
        "softmax": count_bytes("ss", itemsize) * layers,
        "attention_values": count_bytes("sxx", itemsize) * layers,
        "output_projection": count_bytes("xDx", itemsize) * layers,
        "residuals": count_bytes("xxx xxx", itemsize) * layers,
        "ffn": count_bytes("xFh xFh hFx", itemsize) * layers,
        "swiglu_gate": count_bytes("hhh", itemsize) * layers,
        "lm_head": count_bytes("xVl", itemsize),
    }


@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_of_the_backward_pass_are_each_gradients_inputs_and_outputs(itemsize: int) -> None:
    found = {name: work.bytes for name, work in backward_work(ODD, 2, 17, itemsize=itemsize).items()}
    layers = 3
    # A product's backward is two: the gradient and the other input in, an input's gradient out.
    projection = count_bytes("xDx xxD", itemsize)
    assert found == {
        "loss": count_bytes("l ll", itemsize),
        "lm_head": count_bytes("lVx lxV", itemsize),
        "swiglu_gate": count_bytes("hhh hh", itemsize) * layers,
        "ffn": count_bytes("hFx hxF hFx hxF xFh xhF", itemsize) * layers,
        "residuals": count_bytes("xxx xxx", itemsize) * layers,
        "output_projection": projection * layers,
        "attention_values": count_bytes("xxs xsx", itemsize) * layers,
        "softmax": count_bytes("sss", itemsize) * layers,
        "attention_scores": count_bytes("sxx sxx", itemsize) * layers,
        "rope": count_bytes("xx xx", itemsize) * layers,
        "qkv_projections": 3 * projection * layers,
        "norms": count_bytes("xxx", itemsize) * 7,
        "embedding": count_bytes("xV", itemsize),
    }


def test_attention_that_skips_what_is_masked_stores_no_scores_and_computes_half() -> None:
    dense, skipping = forward_work(ODD, 2, 17), forward_work(ODD, 2, 17, skips_masked=True)
    assert skipping["softmax"] == Work(0, 0)
    # Queries, keys and values in, the output out: "xx" for each of the two products.
    fused_bytes = skipping["attention_scores"].bytes + skipping["attention_values"].bytes
    assert fused_bytes == count_bytes("xx xx", 4) * 3
    # 17·18/2 of the 17·17 pairs.
    assert skipping["attention_scores"].flops * 17 * 17 == dense["attention_scores"].flops * 153
    untouched = set(dense) - {"softmax", "attention_scores", "attention_values"}
    assert all(dense[name] == skipping[name] for name in untouched)


def test_the_step_adds_the_optimizers_seven_values_per_parameter() -> None:
    model_parameters = sum(parameter.numel() for parameter in build_model(ODD).parameters())
    before, step = phase_work(ODD, "forward-backward", 2, 17), phase_work(ODD, "step", 2, 17)
    assert step.pop("optimizer") == Work(0, 28 * model_parameters)
    assert step == before
    assert optimizer_work(ODD, itemsize=2) == Work(0, 14 * model_parameters)


def test_forward_and_backward_are_added_component_by_component() -> None:
    both = phase_work(ODD, "forward-backward", 2, 17, itemsize=2)
    forward, backward = forward_work(ODD, 2, 17, itemsize=2), backward_work(ODD, 2, 17, itemsize=2)
    assert both["loss"] == backward["loss"]
    assert both["ffn"].bytes == forward["ffn"].bytes + backward["ffn"].bytes
    assert total(both.values()).bytes == total(forward.values()).bytes + total(backward.values()).bytes


def test_compulsory_bytes_counted_by_hand() -> None:
    body = 3 * (4 * 24 * 24 + 3 * 24 * 56 + 2 * 24) + 24
    table = 97 * 24
    # 34 tokens are fewer than the vocabulary's 97, so at most 34 rows are looked up.
    read = 34 * 24 + body + table
    assert compulsory_bytes(ODD, "forward", 2, 17) == 4 * read + 4 * 34 * 97
    assert compulsory_bytes(ODD, "forward", 2, 17, logits_itemsize=2) == 4 * read + 2 * 34 * 97
    assert compulsory_bytes(ODD, "forward-backward", 2, 17) == 4 * (read + table + body + table)
    assert compulsory_bytes(ODD, "step", 2, 17) == 4 * 7 * (table + body + table)


def test_no_more_rows_are_looked_up_than_the_vocabulary_has() -> None:
    whole = 4 * 2 * (3 * (4 * 24 * 24 + 3 * 24 * 56 + 2 * 24) + 24 + 2 * 97 * 24)
    assert compulsory_bytes(ODD, "forward-backward", 5, 40) == whole


@pytest.mark.parametrize("name", [name for name in HANDOUT_SIZES if name != "leaderboard"])
@pytest.mark.parametrize("context", [128, 512, 1024])
def test_compulsory_bytes_grow_from_phase_to_phase_in_the_standard_setting(name: str, context: int) -> None:
    _, forward, both, step = (compulsory_bytes(SIZES[name], phase, 4, context) for phase in PHASES)
    assert forward < both < step


@pytest.mark.parametrize("phase", PHASES)
def test_compulsory_bytes_are_never_more_than_what_the_components_move(phase: Phase) -> None:
    for config, batch_size, seq_len in CASES:
        moved = total(phase_work(config, phase, batch_size, seq_len).values()).bytes
        assert 0 < compulsory_bytes(config, phase, batch_size, seq_len) <= moved


def test_resident_bytes_are_weights_then_gradients_then_two_moments() -> None:
    weights = 4 * sum(parameter.numel() for parameter in build_model(ODD).parameters())
    assert [resident_bytes(ODD, phase) for phase in PHASES] == [weights, weights, 2 * weights, 4 * weights]
    assert resident_bytes(ODD, "step", itemsize=2) == 2 * weights


@pytest.mark.parametrize(
    "account",
    [
        lambda phase: phase_work(ODD, phase, 2, 17),
        lambda phase: compulsory_bytes(ODD, phase, 2, 17),
        lambda phase: resident_bytes(ODD, phase),
    ],
    ids=["phase_work", "compulsory_bytes", "resident_bytes"],
)
def test_an_unknown_phase_is_an_error_that_lists_the_known(account: Callable[[Any], object]) -> None:
    with pytest.raises(
        UserError, match=r"unknown phase 'forwards': did you mean 'forward'\? Known: inference, forward, forward-b"
    ):
        account("forwards")


def test_flops_double_with_the_batch_and_attentions_share_grows_with_the_sequence() -> None:
    config = dataclasses.replace(ODD, context_length=64)
    once, twice = (total(forward_work(config, batch_size, 16).values()).flops for batch_size in (1, 2))
    assert twice == 2 * once
    short, long = (forward_work(config, 1, seq_len) for seq_len in (16, 64))
    assert long["attention_scores"].flops == 16 * short["attention_scores"].flops
    assert long["ffn"].flops == 4 * short["ffn"].flops

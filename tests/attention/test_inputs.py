"""What is no attention input is told in one sentence, with what was expected and found; the diagonal of both masks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.flash import FlashAttention
from cs336_systems.attention.inputs import ALIGNMENTS, Alignment, check_inputs, diagonal, in_autocast_precision
from cs336_systems.errors import UserError
from cs336_systems.model import TransformerConfig, build_model

pytestmark = pytest.mark.problem("flash_forward")


def of(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    "inputs",
    [
        (of(2, 3, 4), of(2, 5, 4), of(2, 5, 6)),
        (of(2, 6, 3, 4), of(2, 2, 5, 4), of(2, 2, 5, 6)),
        (of(1, 1, 1), of(1, 1, 1), of(1, 1, 1)),
        (
            of(1, 2, 1, 3, dtype=torch.bfloat16),
            of(1, 1, 1, 3, dtype=torch.bfloat16),
            of(1, 1, 1, 1, dtype=torch.bfloat16),
        ),
    ],
)
def test_inputs_that_fit_together_are_taken(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    check_inputs(*inputs)


THREE = "(batch, length, dim) or (batch, heads, length, dim)"


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        pytest.param((of(3, 4), of(3, 4), of(3, 4)), [THREE, "query (3, 4)"], id="two dimensions"),
        pytest.param((of(1, 1, 1, 3, 4),) * 3, [THREE, "query (1, 1, 1, 3, 4)"], id="five dimensions"),
        pytest.param(
            (of(2, 3, 4), of(2, 1, 3, 4), of(2, 1, 3, 4)), [THREE, "query (2, 3, 4)", "key (2, 1, 3, 4)"], id="mixed"
        ),
        pytest.param((of(2, 3, 4), of(2, 3, 4), of(3, 4)), [THREE, "value (3, 4)"], id="a value of fewer"),
        pytest.param((of(2, 0, 4), of(2, 3, 4), of(2, 3, 4)), ["query is empty", "query (2, 0, 4)"], id="no query"),
        pytest.param((of(2, 3, 4), of(2, 0, 4), of(2, 0, 4)), ["key is empty", "key (2, 0, 4)"], id="no key"),
        pytest.param((of(2, 3, 4), of(2, 3, 4), of(2, 3, 0)), ["value is empty", "value (2, 3, 0)"], id="no value"),
        pytest.param((of(0, 3, 4),) * 3, ["query is empty", "query (0, 3, 4)"], id="no batch"),
        pytest.param((of(2, 3, 4, dtype=torch.int64),) * 3, ["query", "floating point", "torch.int64"], id="integers"),
        pytest.param(
            (of(2, 3, 4), of(2, 3, 4), of(2, 3, 4, dtype=torch.complex64)),
            ["value", "floating point", "torch.complex64"],
            id="complex",
        ),
        pytest.param(
            (of(2, 3, 4), of(2, 3, 4, dtype=torch.float16), of(2, 3, 4)),
            ["one dtype on one device", "query torch.float32 on cpu", "key torch.float16 on cpu"],
            id="another precision",
        ),
        pytest.param(
            (of(2, 3, 4), of(2, 3, 4), of(2, 3, 4, device="meta")),
            ["one dtype on one device", "query torch.float32 on cpu", "value torch.float32 on meta"],
            id="another device",
        ),
        pytest.param(
            (of(2, 3, 4), of(2, 5, 4), of(2, 6, 4)), ["of one length", "key (2, 5, 4)", "value (2, 6, 4)"], id="lengths"
        ),
        pytest.param(
            (of(2, 3, 4), of(2, 3, 5), of(2, 3, 5)), ["of one dimension", "query (2, 3, 4)", "key (2, 3, 5)"], id="dims"
        ),
        pytest.param(
            (of(2, 3, 4), of(1, 3, 4), of(1, 3, 4)),
            ["batch", "must agree", "query (2, 3, 4)", "key (1, 3, 4)"],
            id="batch",
        ),
        pytest.param(
            (of(2, 3, 4), of(2, 3, 4), of(1, 3, 4)), ["batch", "must agree", "value (1, 3, 4)"], id="batch of values"
        ),
        pytest.param(
            (of(2, 4, 3, 4), of(2, 4, 3, 4), of(2, 2, 3, 4)),
            ["heads", "must agree", "key (2, 4, 3, 4)", "value (2, 2, 3, 4)"],
            id="heads of values",
        ),
        pytest.param(
            (of(2, 4, 3, 4), of(2, 3, 3, 4), of(2, 3, 3, 4)),
            ["heads", "multiple", "query (2, 4, 3, 4)", "key (2, 3, 3, 4)"],
            id="no multiple",
        ),
        pytest.param(
            (of(2, 2, 3, 4), of(2, 4, 3, 4), of(2, 4, 3, 4)),
            ["heads", "multiple", "key (2, 4, 3, 4)"],
            id="fewer heads",
        ),
    ],
)
def test_a_mistake_is_told_with_what_was_expected_and_found(
    inputs: tuple[Tensor, Tensor, Tensor], told: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        check_inputs(*inputs)
    assert not [part for part in told if part not in str(error.value)], str(error.value)


def test_flash_attention_checks_its_inputs() -> None:
    with pytest.raises(UserError, match="multiple"):
        FlashAttention.apply(of(2, 4, 3, 4), of(2, 3, 3, 4), of(2, 3, 3, 4))


def test_an_unknown_alignment_is_told_with_the_known_ones() -> None:
    x = of(1, 1, 1)
    unchecked = inspect.unwrap(diagonal)  # the type checker of the tests would be faster
    for is_causal in (False, True):
        with pytest.raises(UserError, match=r"unknown alignment 'top-lef'.*top-left.*lower-right"):
            unchecked(x, x, is_causal, "top-lef")


@pytest.mark.parametrize(("num_queries", "num_keys"), [(4, 4), (2, 5), (5, 2), (1, 7), (7, 1)])
def test_the_diagonal_begins_at_the_first_key_or_ends_at_the_last(num_queries: int, num_keys: int) -> None:
    query, key = of(1, num_queries, 2), of(1, num_keys, 2)
    top, low = (diagonal(query, key, True, alignment) for alignment in ALIGNMENTS)
    assert top is not None
    assert low is not None
    # Query i sees keys up to i + offset: the first query the first key alone, or the last query the last key.
    assert 0 + top == 0
    assert num_queries - 1 + low == num_keys - 1


def test_the_diagonal_is_at_the_top_left_unless_asked() -> None:
    assert diagonal(of(1, 3, 2), of(1, 5, 2), True) == diagonal(of(1, 3, 2), of(1, 5, 2), True, "top-left")


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_without_a_causal_mask_there_is_no_diagonal(alignment: Alignment) -> None:
    assert diagonal(of(1, 2, 3), of(1, 4, 3), False, alignment) is None


def test_under_autocast_inputs_take_its_precision_and_without_it_they_are_the_same_objects() -> None:
    inputs = of(1, 3, 2), of(1, 3, 2).to(torch.bfloat16), of(1, 3, 2)
    assert all(found is given for found, given in zip(in_autocast_precision(*inputs), inputs, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {found.dtype for found in in_autocast_precision(*inputs)} == {torch.bfloat16}
    with torch.autocast("cpu", enabled=False):
        assert in_autocast_precision(*inputs)[0] is inputs[0]


@pytest.mark.parametrize("attention", ["flash", "sdpa", "cs336_systems.attention.flash:FlashAttention"])
def test_every_attention_runs_in_a_model_under_autocast_near_the_reference(attention: str) -> None:
    config = TransformerConfig(d_model=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, context_length=8)
    models = []
    for name in ("reference", attention):
        torch.manual_seed(0)
        models.append(build_model(config, attention=name))
    tokens = torch.randint(50, (2, 8))
    exact = models[0](tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference, other = (model(tokens) for model in models)
    # No farther from float32 than a few times the reference's own error under autocast.
    assert (other - exact).norm() <= 4 * (reference - exact).norm()

"""Which model is built: ours or somebody else's, and what no model can be built from."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cs336_systems.errors import UserError
from cs336_systems.model import (
    SIZES,
    TransformerConfig,
    TransformerLM,
    build_model,
    check_choices,
    model_size,
)

# An unusual theta, a context longer than the sequence and a d_ff that is no multiple of d_model: none of them can be
# swapped for another unnoticed.
CONFIG = TransformerConfig(
    d_model=24, d_ff=40, num_layers=2, num_heads=3, vocab_size=29, context_length=13, rope_theta=70.0
)


COURSE_MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self, vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta):
        super().__init__()
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}

class Other(torch.nn.Module):
    def __init__(self, width):
        super().__init__()

class NoModule:
    def __init__(self, **arguments):
        pass
"""


def test_somebody_elses_model_gets_the_courses_arguments(write_module: Callable[[str], str]) -> None:
    built = build_model(CONFIG, model=f"{write_module(COURSE_MODEL)}:Model")
    assert built.arguments == {
        "vocab_size": 29,
        "context_length": 13,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 3,
        "d_ff": 40,
        "rope_theta": 70.0,
    }


def test_our_own_class_can_be_named_like_somebody_elses() -> None:
    built = build_model(CONFIG, model="cs336_systems.model:TransformerLM")
    assert isinstance(built, TransformerLM)
    assert built.config == CONFIG


def test_a_class_that_is_not_there_is_an_error_with_the_nearest_name(write_module: Callable[[str], str]) -> None:
    name = write_module(COURSE_MODEL)
    with pytest.raises(UserError, match=rf"unknown attribute 'Modell' of '{name}': did you mean 'Model'\?"):
        build_model(CONFIG, model=f"{name}:Modell")


def test_a_constructor_without_the_courses_arguments_is_an_error_that_lists_them(
    write_module: Callable[[str], str],
) -> None:
    with pytest.raises(UserError, match=r"does not take the course's arguments \(.*num_heads.*\)"):
        build_model(CONFIG, model=f"{write_module(COURSE_MODEL)}:Other")


def test_a_class_that_is_no_module_is_an_error(write_module: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"must build a torch\.nn\.Module, found NoModule"):
        build_model(CONFIG, model=f"{write_module(COURSE_MODEL)}:NoModule")


@pytest.mark.parametrize(("choice", "value"), [("rope", "2026"), ("attention", "sdpa"), ("formulation", "fused")])
def test_a_choice_only_ours_has_is_an_error_beside_somebody_elses_model(
    write_module: Callable[[str], str], choice: str, value: str
) -> None:
    chosen: dict[str, Any] = {choice: value}
    with pytest.raises(UserError, match=rf"^{choice} cannot be chosen for "):
        build_model(CONFIG, model=f"{write_module(COURSE_MODEL)}:Model", **chosen)


def test_our_model_runs_with_somebody_elses_attention(write_module: Callable[[str], str]) -> None:
    name = write_module(
        "def first_value(query, key, value, *, is_causal):\n    return value[:, :, :1].expand_as(value)\n"
    )
    torch.manual_seed(0)
    model = build_model(CONFIG, attention=f"{name}:first_value")
    tokens = torch.tensor([[1, 2, 2, 3]])
    logits = model(tokens)
    # With every position attending to the first alone, equal tokens have equal logits wherever they stand.
    torch.testing.assert_close(logits[0, 1], logits[0, 2])
    assert not torch.allclose(logits[0, 2], logits[0, 3])


@pytest.mark.parametrize(
    "field", ["d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "rope_theta"]
)
@pytest.mark.parametrize("value", [0, -4])
def test_a_size_that_is_not_positive_is_an_error(field: str, value: int) -> None:
    given: Any = float(value) if field == "rope_theta" else value
    with pytest.raises(UserError, match=rf"^{field} must be a positive (whole|finite) number, found {given}$"):
        dataclasses.replace(CONFIG, **{field: given})


def validate(**wrong: object) -> None:
    """Validate CONFIG with values of a wrong type, which the type checks of a test run keep out of the constructor."""
    config = copy.copy(CONFIG)
    for field, value in wrong.items():
        object.__setattr__(config, field, value)
    config.__post_init__()


@pytest.mark.parametrize("value", [2.5, "24", True, None])
def test_a_width_that_is_no_whole_number_is_an_error(value: object) -> None:
    with pytest.raises(UserError, match=r"^d_model must be a positive whole number, found "):
        validate(d_model=value)


# PyYAML reads `rope_theta: 1e4` as a string.
@pytest.mark.parametrize("value", ["1e4", None, math.nan, math.inf])
def test_a_theta_that_is_no_finite_number_is_an_error(value: object) -> None:
    with pytest.raises(UserError, match=r"^rope_theta must be a positive .*number, found "):
        validate(rope_theta=value)


def test_a_theta_may_be_a_whole_number_as_yaml_reads_it() -> None:
    config = copy.copy(CONFIG)
    object.__setattr__(config, "rope_theta", 70)
    config.__post_init__()
    assert config == CONFIG


def test_heads_that_do_not_divide_the_width_are_an_error() -> None:
    with pytest.raises(UserError, match="5 heads do not divide d_model 24"):
        dataclasses.replace(CONFIG, num_heads=5)


def test_an_odd_head_is_an_error_because_features_rotate_in_pairs() -> None:
    with pytest.raises(UserError, match=r"must be even.*found 3$"):
        dataclasses.replace(CONFIG, num_heads=8)


def test_a_negative_context_is_an_error_of_the_model_too() -> None:
    with pytest.raises(UserError, match="context_length must be a positive whole number, found -1"):
        TransformerLM(vocab_size=8, context_length=-1, d_model=8, num_layers=1, num_heads=2, d_ff=16)


def test_a_misspelt_size_is_an_error_that_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(UserError, match=r"unknown size 'smal': did you mean 'small'\? Known: ") as caught:
        model_size("smal")
    assert all(name in str(caught.value) for name in SIZES)


def test_a_misspelt_rope_or_formulation_is_an_error_that_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown rope '2o25': did you mean '2025'\? Known: 2025, 2026"):
        check_choices("2o25", "reference")
    with pytest.raises(UserError, match=r"unknown formulation 'fusd': did you mean 'fused'\? Known: reference, fused"):
        check_choices("2025", "fusd")


def test_a_misspelt_attention_is_an_error_of_the_model() -> None:
    with pytest.raises(UserError, match=r"unknown attention 'spda': did you mean 'sdpa'\? Known: reference, sdpa"):
        build_model(CONFIG, attention="spda")


def test_more_tokens_than_the_context_are_an_error_and_as_many_are_not() -> None:
    model = build_model(CONFIG)
    assert model(torch.zeros(1, 13, dtype=torch.long)).shape == (1, 13, 29)
    with pytest.raises(ValueError, match="14 tokens are more than the model's context_length 13"):
        model(torch.zeros(1, 14, dtype=torch.long))

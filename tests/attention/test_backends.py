"""Every attention implementation is the same function, and somebody else's can be named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.backends import IMPLEMENTATIONS, NAMES, AttentionFunction, resolve_attention
from cs336_systems.errors import UserError

ON_ANY_DEVICE = [name for name in NAMES if name != "flash-triton"]


def dense_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """exp(q·k/√d), zeroed where masked, divided by its sum: no −∞ and no shift, safe for small scores in float64."""
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp()
    if is_causal:
        weights = weights.tril()
    return (weights / weights.sum(-1, keepdim=True)) @ value


def output_and_gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    direction = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), leaves)]


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(6, 6), (4, 7), (7, 4), (1, 5)])
def test_every_implementation_agrees_in_output_and_gradients(
    name: str, is_causal: bool, num_queries: int, num_keys: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
        for length in (num_queries, num_keys, num_keys)
    )
    function = resolve_attention(name)
    found = output_and_gradients(lambda q, k, v: function(q, k, v, is_causal=is_causal), query, key, value)
    expected = output_and_gradients(lambda q, k, v: dense_attention(q, k, v, is_causal), query, key, value)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_the_names_are_the_reference_and_sdpa() -> None:
    assert NAMES == ("reference", "sdpa", "flash", "flash-triton")
    assert all(resolve_attention(name) is function for name, function in IMPLEMENTATIONS.items())
    assert all(isinstance(function, AttentionFunction) for function in IMPLEMENTATIONS.values())


def test_a_function_from_outside_is_found_by_its_reference(write_module: Callable[[str], str]) -> None:
    name = write_module("def mine(query, key, value, *, is_causal):\n    return 2 * value if is_causal else value\n")
    function = resolve_attention(f"{name}:mine")
    ones = torch.ones(1, 1, 2, 2)
    assert torch.equal(function(ones, ones, ones, is_causal=True), 2 * ones)
    assert torch.equal(function(ones, ones, ones, is_causal=False), ones)


def test_a_misspelt_name_is_an_error_that_suggests_the_nearest_and_lists_how_to_bring_ones_own() -> None:
    known = "reference, sdpa, flash, flash-triton, module:function"
    with pytest.raises(UserError, match=rf"unknown attention 'spda': did you mean 'sdpa'\? Known: {known}"):
        resolve_attention("spda")


def test_a_function_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_module'"):
        resolve_attention("no_such_module:mine")


def test_something_that_cannot_be_called_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="math:pi"):
        resolve_attention("math:pi")

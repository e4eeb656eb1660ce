"""Every attention implementation is the same function, and somebody else's can be named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.backends import (
    COMPILED,
    IMPLEMENTATIONS,
    NAMES,
    AttentionFunction,
    attention_source,
    resolve_attention,
)
from cs336_systems.errors import UserError

ON_ANY_DEVICE = ("reference", "sdpa", "sdpa-math", "sdpa-flash", "flash")
ON_A_GPU_ALONE = ("sdpa-efficient", "sdpa-cudnn", "flash-triton", "flash-triton-tf32", "flash-triton-graded")
# A class with the course's interface, of three dimensions.
STUDENTS = """
import torch

class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q, K, V, is_causal=False):
        assert Q.ndim == K.ndim == V.ndim == 3
        scores = Q @ K.mT / Q.shape[-1] ** 0.5
        if is_causal:
            seen = torch.ones(Q.shape[1], K.shape[1], dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        P = scores.softmax(-1)
        ctx.save_for_backward(Q, K, V, P)
        return P @ V

    @staticmethod
    def backward(ctx, dO):
        Q, K, V, P = ctx.saved_tensors
        dP = dO @ V.mT
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) / Q.shape[-1] ** 0.5
        return dS @ K, dS.mT @ Q, P.mT @ dO, None
"""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """exp(q·k/√d), zeroed where masked, divided by its sum: no −∞ and no shift, safe for small scores in float64."""
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp()
    if is_causal:
        weights = weights.tril()
    return (weights / weights.sum(-1, keepdim=True)) @ value


def drawn(num_queries: int, num_keys: int, *, heads: int = 3, key_heads: int | None = None) -> tuple[Tensor, ...]:
    """query, key and value in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, num_queries), (key_heads or heads, num_keys), (key_heads or heads, num_keys)]
    return tuple(torch.randn(2, *shape, 8, generator=generator, dtype=torch.float64) for shape in shapes)


def output_and_gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    direction = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), leaves)]


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(6, 6), (4, 7), (7, 4), (1, 5)])
def test_every_implementation_agrees_in_output_and_gradients(
    name: str, is_causal: bool, num_queries: int, num_keys: int
) -> None:
    query, key, value = drawn(num_queries, num_keys)
    function = resolve_attention(name)
    found = output_and_gradients(lambda q, k, v: function(q, k, v, is_causal=is_causal), query, key, value)
    expected = output_and_gradients(lambda q, k, v: dense_attention(q, k, v, is_causal), query, key, value)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_every_name_runs_on_any_device_or_on_a_gpu_alone() -> None:
    assert sorted(NAMES) == sorted([*ON_ANY_DEVICE, *ON_A_GPU_ALONE])
    assert all(resolve_attention(name) is function for name, function in IMPLEMENTATIONS.items())
    assert all(isinstance(function, AttentionFunction) for function in IMPLEMENTATIONS.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU_ALONE)
@pytest.mark.parametrize("is_causal", [True, False])
def test_what_runs_on_a_gpu_alone_agrees_there_in_half_precision(name: str, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 64, 32, generator=generator).half() for _ in range(3)]
    function = resolve_attention(name)
    found = output_and_gradients(lambda q, k, v: function(q, k, v, is_causal=is_causal), *(x.cuda() for x in inputs))
    expected = output_and_gradients(lambda q, k, v: dense_attention(q, k, v, is_causal), *(x.double() for x in inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("sdpa-efficient", "EFFICIENT_ATTENTION"), ("sdpa-cudnn", "CUDNN_ATTENTION")],
)
def test_a_backend_that_takes_no_such_input_is_an_error_that_names_it_and_what_it_was_given(
    name: str, backend: str
) -> None:
    x = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
    with pytest.raises(UserError, match=rf"{backend} takes no torch.float64 of shape \(1, 2, 4, 8\) on cpu"):
        resolve_attention(name)(x, x, x, is_causal=False)


def test_another_error_of_a_backend_is_not_taken_for_a_refusal() -> None:
    with pytest.raises(RuntimeError) as raised:
        resolve_attention("sdpa-math")(torch.zeros(1, 1, 4, 8), *[torch.zeros(1, 1, 4, 7)] * 2, is_causal=False)
    assert not isinstance(raised.value, UserError)


@pytest.mark.slow
def test_the_compiled_reference_gives_what_the_reference_gives() -> None:
    """In a fresh process: the checks of shapes that tests put around the reference are not for the compiler."""
    program = """
import torch
from cs336_systems.attention.backends import resolve_attention

torch.manual_seed(0)
inputs = [torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
direction = torch.randn(2, 3, 6, 8, dtype=torch.float64)
for is_causal in (False, True):
    results = []
    for name in ("reference", "reference+compile"):
        output = resolve_attention(name)(*inputs, is_causal=is_causal)
        results.append([output, *torch.autograd.grad(output, inputs, direction)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-13)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def test_a_measurement_depends_on_the_source_behind_a_name_compiled_or_not() -> None:
    assert attention_source("sdpa-math") is attention_source(f"reference{COMPILED}") is None
    assert (
        attention_source("flash") == attention_source(f"flash{COMPILED}") == "cs336_systems.attention.flash:attention"
    )
    assert attention_source(f"mine:attention{COMPILED}") == "mine:attention"


# From outside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_class_with_the_courses_interface_is_applied_with_heads_folded_into_the_batch(
    is_causal: bool, key_heads: int, write_module: Callable[[str], str]
) -> None:
    function = resolve_attention(f"{write_module(STUDENTS)}:Mine")
    inputs = drawn(6, 7, heads=4, key_heads=key_heads)
    group = 4 // key_heads

    def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dense_attention(query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal)

    found = output_and_gradients(lambda q, k, v: function(q, k, v, is_causal=is_causal), *inputs)
    for one, other in zip(found, output_and_gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("returned", "told"),
    [("Q[0]", r"found \(5, 8\)"), ("(Q, K)", "found tuple"), ("Q.unflatten(0, (2, 3))", r"found \(2, 3, 5, 8\)")],
)
def test_a_class_that_returns_no_tensor_of_three_dimensions_is_an_error(
    returned: str, told: str, write_module: Callable[[str], str]
) -> None:
    source = f"    @staticmethod\n    def forward(ctx, Q, K, V, is_causal=False):\n        return {returned}\n"
    name = write_module(f"import torch\n\nclass Mine(torch.autograd.Function):\n{source}")
    with pytest.raises(UserError, match=rf"Mine.apply must return one \(batch, queries, dim\), {told}"):
        resolve_attention(f"{name}:Mine")(*drawn(5, 5), is_causal=False)


def test_a_class_that_is_no_autograd_function_is_an_error(write_module: Callable[[str], str]) -> None:
    name = write_module("class Mine:\n    def apply(self, Q, K, V, is_causal):\n        return V\n")
    with pytest.raises(UserError, match=f"{name}:Mine must be a function .* or a class derived from torch.autograd"):
        resolve_attention(f"{name}:Mine")


def test_a_function_from_outside_is_found_by_its_reference(write_module: Callable[[str], str]) -> None:
    name = write_module("def mine(query, key, value, *, is_causal):\n    return 2 * value if is_causal else value\n")
    function = resolve_attention(f"{name}:mine")
    ones = torch.ones(1, 1, 2, 2)
    assert torch.equal(function(ones, ones, ones, is_causal=True), 2 * ones)
    assert torch.equal(function(ones, ones, ones, is_causal=False), ones)


def test_a_misspelt_name_is_an_error_that_suggests_the_nearest_and_lists_how_to_bring_ones_own() -> None:
    known = re.escape(f"{', '.join(NAMES)}, module:attribute, any of these with {COMPILED}")
    for misspelt in ("spda", f"spda{COMPILED}"):
        with pytest.raises(UserError, match=rf"unknown attention 'spda': did you mean 'sdpa'\? Known: {known}$"):
            resolve_attention(misspelt)


def test_a_function_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_module'"):
        resolve_attention("no_such_module:mine")


def test_something_that_cannot_be_called_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="math:pi"):
        resolve_attention("math:pi")

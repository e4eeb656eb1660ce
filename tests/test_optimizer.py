"""AdamW follows its formula step by step, computed here with NumPy, and the fused one differs by ε alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from cs336_systems.errors import UserError
from cs336_systems.optimizer import AdamW, build_optimizer, fused_adamw

Array = npt.NDArray[np.float64]
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def random_arrays(seed: int, shapes: tuple[tuple[int, ...], ...] = ((3, 4), (5,))) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def run(optimizer_of: Any, steps: int, **options: Any) -> list[Array]:
    """`steps` updates of two parameters with random gradients, which depend on the step only."""
    parameters = [nn.Parameter(torch.tensor(start)) for start in random_arrays(0)]
    optimizer = optimizer_of(parameters, **options)
    for step in range(steps):
        for parameter, gradient in zip(parameters, random_arrays(100 + step), strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def plain_adamw(
    steps: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, folded: bool
) -> list[Array]:
    """The handout's formula (ε beside √v) or, not `folded`, the paper's (ε beside the corrected √v̂)."""
    thetas = random_arrays(0)
    moments = [(np.zeros_like(theta), np.zeros_like(theta)) for theta in thetas]
    for step in range(steps):
        t = step + 1
        for i, gradient in enumerate(random_arrays(100 + step)):
            first, second = moments[i]
            first = betas[0] * first + (1 - betas[0]) * gradient
            second = betas[1] * second + (1 - betas[1]) * gradient * gradient
            moments[i] = (first, second)
            first_hat, second_hat = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
            scaled_eps = eps / math.sqrt(1 - betas[1] ** t) if folded else eps
            thetas[i] = thetas[i] * (1 - lr * weight_decay) - lr * first_hat / (np.sqrt(second_hat) + scaled_eps)
    return thetas


def assert_equal(found: list[Array], expected: list[Array], rtol: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_equal_the_formula_with_the_correction_folded_into_the_rate(steps: int) -> None:
    assert_equal(run(AdamW, steps, **OPTIONS), plain_adamw(steps, **OPTIONS, folded=True))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_fused_one_adds_epsilon_to_the_corrected_moment(steps: int) -> None:
    found = run(fused_adamw, steps, **OPTIONS)
    assert_equal(found, plain_adamw(steps, **OPTIONS, folded=False), rtol=1e-10)
    gap = max(
        float(np.abs(one - other).max())
        for one, other in zip(found, plain_adamw(steps, **OPTIONS, folded=True), strict=True)
    )
    assert gap > 1e-6, "this ε does not tell the two apart"


def test_fused_and_reference_agree_where_epsilon_is_negligible() -> None:
    options = {**OPTIONS, "eps": 1e-20}
    assert_equal(run(AdamW, 5, **options), run(fused_adamw, 5, **options), rtol=1e-10)


def test_groups_keep_their_own_rate_and_decay() -> None:
    quick, slow, frozen = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [quick], "lr": 0.5, "weight_decay": 0.0},
        {"params": [slow]},
        {"params": [frozen], "lr": 0.0},
    ]
    optimizer = AdamW(groups, lr=0.1, eps=0.0, weight_decay=0.2)
    for parameter in (quick, slow, frozen):
        parameter.grad = torch.full((2,), 4.0, dtype=torch.float64)
    optimizer.step()
    # The first corrected step of Adam is lr times the gradient's sign.
    torch.testing.assert_close(quick.detach(), torch.full((2,), 1 - 0.5, dtype=torch.float64))
    torch.testing.assert_close(slow.detach(), torch.full((2,), 1 - 0.1 * 0.2 - 0.1, dtype=torch.float64))
    assert torch.equal(frozen.detach(), torch.ones(2, dtype=torch.float64))


def test_decay_is_decoupled_so_that_a_zero_gradient_only_shrinks() -> None:
    parameter = nn.Parameter(torch.tensor([2.0, -8.0], dtype=torch.float64))
    parameter.grad = torch.zeros(2, dtype=torch.float64)
    AdamW([parameter], lr=0.5, weight_decay=0.25).step()
    assert parameter.tolist() == [2.0 * 0.875, -8.0 * 0.875]


@pytest.mark.parametrize("choice", ["reference", "fused"])
def test_a_quadratic_is_minimised(choice: str) -> None:
    minimum = torch.tensor([3.0, -1.0, 0.5])
    curvature = torch.tensor([1.0, 10.0, 100.0])
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(choice, [parameter], lr=0.05, weight_decay=0.0)

    def loss() -> Tensor:
        return (curvature * (parameter - minimum).square()).sum()

    start = loss().item()
    for _ in range(400):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 1e-4 * start
    assert (parameter - minimum).abs().max() < 0.01


def test_parameters_without_a_gradient_are_untouched_and_have_no_state() -> None:
    still = nn.Parameter(torch.tensor([1.0, 2.0]))
    moving = nn.Parameter(torch.tensor([1.0, 2.0]))
    moving.grad = torch.ones(2)
    optimizer = AdamW([still, moving], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert still.tolist() == [1.0, 2.0]
    assert moving.tolist() != [1.0, 2.0]
    assert still not in optimizer.state
    assert moving in optimizer.state


def test_a_late_first_gradient_is_corrected_as_a_first_step() -> None:
    early, late = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW([early, late], lr=0.1, eps=0.0, weight_decay=0.0)
    for _ in range(3):
        early.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    late.grad = torch.full((1,), -9.0, dtype=torch.float64)
    optimizer.step()
    assert late.item() == pytest.approx(0.1, rel=1e-12)


def test_a_closure_runs_with_gradients_on_and_its_loss_is_returned() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    returned = optimizer.step(closure)
    assert returned is not None
    assert returned.item() == 4.0
    assert parameter.item() == pytest.approx(1.9, rel=1e-6)
    assert optimizer.step() is None


def test_a_saved_state_continues_as_if_never_stopped() -> None:
    def advance(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            parameter.grad = torch.tensor(random_arrays(seed, ((4,),))[0])
            optimizer.step()

    whole = nn.Parameter(torch.ones(4, dtype=torch.float64))
    advance(AdamW([whole], **OPTIONS), whole, range(6))
    first = nn.Parameter(torch.ones(4, dtype=torch.float64))
    saving = AdamW([first], **OPTIONS)
    advance(saving, first, range(3))
    second = nn.Parameter(first.detach().clone())
    loaded = AdamW([second], **OPTIONS)
    loaded.load_state_dict(copy.deepcopy(saving.state_dict()))
    advance(loaded, second, range(3, 6))
    assert torch.equal(second, whole)


def test_a_rate_changed_between_steps_is_used() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(1)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert parameter.item() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must not be negative, found -0.001"),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\), found \(1.0, 0.9\)"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas must lie in \[0, 1\)"),
    ],
)
def test_a_negative_rate_or_a_beta_outside_zero_to_one_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(1))], **options)


def test_optimizers_are_built_by_name_with_their_options() -> None:
    parameter = nn.Parameter(torch.ones(1))
    reference = build_optimizer("reference", [parameter], lr=0.3)
    fused = build_optimizer("fused", [parameter], lr=0.4)
    assert isinstance(reference, AdamW)
    assert isinstance(fused, torch.optim.AdamW)
    assert (reference.param_groups[0]["lr"], fused.param_groups[0]["lr"]) == (0.3, 0.4)
    assert fused.param_groups[0]["fused"] is True


def test_an_unknown_optimizer_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown optimizer 'fusd': did you mean 'fused'\? Known: reference, fused"):
        build_optimizer("fusd", [nn.Parameter(torch.ones(1))])

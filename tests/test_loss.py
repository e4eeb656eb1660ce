"""Both cross-entropies are minus the log-probability of the target, and safe for large logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cs336_systems.loss import FORMULATIONS, cross_entropy, fused_cross_entropy, log_softmax

Loss = Callable[[Tensor, Tensor], Tensor]
every_loss = pytest.mark.parametrize("loss", [cross_entropy, fused_cross_entropy])
SHAPES = [(5,), (2, 3), (2, 3, 4)]


def random_case(shape: tuple[int, ...], vocab_size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, vocab_size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab_size, shape, generator=generator)


def plain_loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """One position at a time: ln Σ exp(logits) − logit of the target, and (softmax − one-hot) / positions."""
    rows = logits.reshape(-1, logits.shape[-1]).tolist()
    losses, gradients = [], []
    for row, target in zip(rows, targets.flatten().tolist(), strict=True):
        normaliser = math.fsum(math.exp(logit) for logit in row)
        losses.append(math.log(normaliser) - row[target])
        gradients.append([math.exp(logit) / normaliser - (i == target) for i, logit in enumerate(row)])
    gradient = torch.tensor(gradients, dtype=torch.float64).reshape(logits.shape) / len(rows)
    return math.fsum(losses) / len(rows), gradient


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_the_formula(loss: Loss, shape: tuple[int, ...]) -> None:
    logits, targets = random_case(shape)
    expected, expected_gradient = plain_loss_and_gradient(logits, targets)
    logits.requires_grad_()
    found = loss(logits, targets)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_pytorchs_cross_entropy_with_its_gradient(shape: tuple[int, ...]) -> None:
    logits, targets = random_case(shape)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = cross_entropy(ours, targets)
    expected = F.cross_entropy(theirs.reshape(-1, 7), targets.reshape(-1))
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_a_single_position_has_a_loss_in_both_formulations() -> None:
    logits = torch.tensor([0.0, 0.0, math.log(2.0)])
    for name, loss in FORMULATIONS.items():
        assert loss(logits, torch.tensor(2)).item() == pytest.approx(math.log(2.0), rel=1e-6), name


@every_loss
def test_logits_of_ten_thousand_do_not_overflow(loss: Loss) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]], requires_grad=True)
    found = loss(logits, torch.tensor([1, 2]))
    found.backward()
    # First row: 1e4 behind the certain class; second: two equal classes.
    assert found.item() == pytest.approx((1e4 + math.log(2.0)) / 2, rel=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.25, -0.25]]))


@every_loss
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(loss: Loss) -> None:
    assert loss(torch.full((4, 1000), 3.0), torch.arange(4)).item() == pytest.approx(math.log(1000), rel=1e-6)


@every_loss
def test_a_certain_and_right_prediction_costs_nothing(loss: Loss) -> None:
    assert loss(torch.tensor([[0.0, 200.0]]), torch.tensor([1])).item() == 0.0


@every_loss
def test_adding_a_constant_to_a_positions_logits_changes_nothing(loss: Loss) -> None:
    logits, targets = random_case((4,))
    shifts = torch.tensor([[-50.0], [0.0], [3.0], [1000.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(logits + shifts, targets), loss(logits, targets), rtol=1e-11, atol=0)


def test_log_softmax_exponentiates_to_probabilities_in_the_logits_ratios() -> None:
    logits, _ = random_case((2, 3))
    probabilities = log_softmax(logits).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        probabilities[..., 0] / probabilities[..., 1], (logits[..., 0] - logits[..., 1]).exp(), rtol=1e-12, atol=0
    )


def test_the_formulations_are_called_reference_and_fused() -> None:
    assert dict(FORMULATIONS) == {"reference": cross_entropy, "fused": fused_cross_entropy}

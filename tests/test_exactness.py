"""Errors against float64 grow as precision falls, and what is not finite is no error but a fault."""

from __future__ import annotations

import copy

import pytest
import torch

from cs336_systems.exactness import exact_results
from cs336_systems.model import TransformerConfig, TransformerLM

CONFIG = TransformerConfig(16, 32, 2, 2, vocab_size=50, context_length=8)


def model_and_batch() -> tuple[TransformerLM, torch.Tensor]:
    torch.manual_seed(0)
    return TransformerLM(**CONFIG.course_arguments()), torch.randint(50, (2, 2, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("formulation", ["reference", "fused"])
def test_the_fewer_digits_a_model_computes_with_the_larger_its_errors(formulation: str) -> None:
    model, batch = model_and_batch()
    exact = exact_results(model, batch, formulation)
    precisions = (torch.float64, torch.float32, torch.bfloat16)
    found = [exact.errors_of(copy.deepcopy(model).to(dtype)(batch[0]).detach()) for dtype in precisions]
    for name in ("logits_error", "loss_error"):
        double, single, half = (errors[name] for errors in found)
        assert double == 0
        assert single < half
    assert 0 < found[1]["logits_error"] < 1e-5
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays as it was


def test_logits_that_are_not_finite_are_a_fault() -> None:
    model, batch = model_and_batch()
    exact = exact_results(model, batch)
    with pytest.raises(ArithmeticError, match="not finite"):
        exact.errors_of(torch.full_like(exact.logits, float("nan")))

"""How far a model's logits and loss are from the same model's in float64.

The parameters are the same numbers, so that what is left is the rounding of the computation.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from cs336_systems.loss import FORMULATIONS as LOSSES


@dataclasses.dataclass(frozen=True)
class Exact:
    """Logits and loss in float64."""

    logits: Tensor
    targets: Tensor
    loss: float
    formulation: str

    def errors_of(self, logits: Tensor) -> dict[str, float]:
        """`logits_error`, ‖logits − exact‖ / ‖exact‖, and `loss_error`, |loss − exact| / |exact|.

        The loss is computed in the precision of the logits.

        Raises:
            ArithmeticError: an error is not finite.
        """
        distance = torch.linalg.vector_norm(logits.double() - self.logits)
        loss = float(LOSSES[self.formulation](logits, self.targets))
        errors = {
            "logits_error": float(distance / torch.linalg.vector_norm(self.logits)),
            "loss_error": abs(loss - self.loss) / abs(self.loss),
        }
        if not all(map(math.isfinite, errors.values())):
            raise ArithmeticError(f"logits or loss are not finite: {errors}")
        return errors


def exact_results(model: nn.Module, batch: Tensor, formulation: str = "reference") -> Exact:
    """Forward of a copy of `model` in float64, on tokens and targets of shape (2, batch, seq)."""
    tokens, targets = batch
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(tokens)
        return Exact(logits, targets, float(LOSSES[formulation](logits, targets)), formulation)

"""Cross-entropy of next-token predictions, in nats per token.

`cross_entropy` has the operators of the course's assignment 1 (section "Cross-entropy loss"): minus log-softmax,
gather, mean. `fused_cross_entropy` is PyTorch's one kernel for the same.
"""

from __future__ import annotations

from types import MappingProxyType

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def log_softmax(x: Float[Tensor, "... classes"]) -> Float[Tensor, "... classes"]:
    """log softmax over the last dimension, shifted by the maximum so that `exp` cannot overflow."""
    shifted = x - x.max(dim=-1, keepdim=True).values
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def cross_entropy(logits: Float[Tensor, "... vocab"], targets: Int[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean of −log p(target) over all positions."""
    negative_log_probabilities = -log_softmax(logits)
    return negative_log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


def fused_cross_entropy(logits: Float[Tensor, "... vocab"], targets: Int[Tensor, "..."]) -> Float[Tensor, ""]:
    """The same by `torch.nn.functional.cross_entropy`."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


FORMULATIONS = MappingProxyType({"reference": cross_entropy, "fused": fused_cross_entropy})

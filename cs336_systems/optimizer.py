"""AdamW, as the course writes it and as PyTorch fuses it.

For each parameter θ with gradient g, at step t = 1, 2, …:

    θ ← θ − lr·λ·θ                                  weight decay first
    m ← β₁m + (1 − β₁)g        v ← β₂v + (1 − β₂)g²
    θ ← θ − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)   bias correction folded into the learning rate

Cost: no matrix products; at least 28 bytes per float32 parameter moved (read θ, g, m, v; write θ, m, v). The loop of
separate operators below moves about three times that, in some twelve kernels per parameter tensor.

Source: Loshchilov & Hutter 2019; CS336 assignment 1, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cs336_systems.errors import unknown_name


class AdamW(torch.optim.Optimizer):
    """A Python loop over the parameters, one operator at a time."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"lr must not be negative, found {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), found {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(parameter)
                    state["v"] = torch.zeros_like(parameter)
                state["step"] += 1
                correction = math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
                parameter -= group["lr"] * group["weight_decay"] * parameter
                state["m"] = beta1 * state["m"] + (1.0 - beta1) * gradient
                state["v"] = beta2 * state["v"] + (1.0 - beta2) * gradient.square()
                parameter -= group["lr"] * correction * state["m"] / (state["v"].sqrt() + group["eps"])
        return loss


def fused_adamw(params: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """PyTorch's AdamW in one kernel per group of tensors (ε joins √v after its bias correction; above, before)."""
    return torch.optim.AdamW(params, fused=True, **options)


FORMULATIONS: MappingProxyType[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"reference": AdamW, "fused": fused_adamw}
)


def build_optimizer(choice: str, params: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The optimizer called `choice` over `params`; an unknown name is an error that lists the known ones."""
    if choice not in FORMULATIONS:
        raise unknown_name("optimizer", choice, FORMULATIONS)
    return FORMULATIONS[choice](params, **options)

"""Data-parallel wrappers from outside that are wrong."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.distributed.ddp import NaiveDDP


class NoAverage(nn.Module):
    """Leaves every rank its own gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for each in module.parameters():
            dist.broadcast(each.detach(), src=0)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.module(tokens)
        return logits

    def finish_gradient_synchronization(self) -> None: ...


class AnotherBit(NaiveDDP):
    """Averages, and on one rank turns the last bit of one number."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        gradient = next(self.module.parameters()).grad
        if dist.get_rank() == 1 and gradient is not None:
            gradient.view(-1).view(torch.int32)[3] ^= 1


class NotDivided(NaiveDDP):
    """Sums."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        for each in self.module.parameters():
            if each.grad is not None:
                each.grad *= dist.get_world_size()


class LacksOne(NaiveDDP):
    """Averages, and loses one gradient, on every rank."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        next(self.module.parameters()).grad = None


class LacksOneOnTheLastRank(NaiveDDP):
    """Averages, and loses one gradient on the last rank."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        if dist.get_rank() == dist.get_world_size() - 1:
            next(self.module.parameters()).grad = None


class LacksAll(NaiveDDP):
    """Loses every gradient."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        for each in self.module.parameters():
            each.grad = None


class NoNumber(NaiveDDP):
    """Averages, and makes one number none."""

    def finish_gradient_synchronization(self) -> None:
        super().finish_gradient_synchronization()
        gradient = next(self.module.parameters()).grad
        if gradient is not None:
            gradient.view(-1)[0] = math.nan

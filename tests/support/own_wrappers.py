"""Data-parallel wrappers of somebody else's, some of which do not work."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist
from torch import nn


class Summed(nn.Module):
    """Sums each gradient over the ranks, and divides."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def finish_gradient_synchronization(self) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(dist.get_world_size())


class Killed(Summed):
    """One rank is killed as a system does that runs out of memory."""

    def finish_gradient_synchronization(self) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().finish_gradient_synchronization()


class Raising(Summed):
    def finish_gradient_synchronization(self) -> None:
        raise ArithmeticError("the numbers are wrong")


class Unfinished(nn.Module):
    """Lacks what is called after backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

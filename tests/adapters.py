"""The interface of the course's own test suites, both years: thirteen functions over this package.

The suites call these and nothing else, so that they run unchanged. This file imports nothing but torch and the
package. A function whose problem is not built yet says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def get_flashattention_autograd_function_pytorch() -> type[torch.autograd.Function]:
    """FlashAttention-2 in plain PyTorch: `forward(ctx, Q, K, V, is_causal=False)`, saving the logsumexp."""
    from cs336_systems.attention.flash import FlashAttention

    return FlashAttention


def get_flashattention_autograd_function_triton() -> type[torch.autograd.Function]:
    """The same with Triton kernels, forward and backward."""
    from cs336_systems.attention.flash_triton import FlashAttentionTriton

    return FlashAttentionTriton


def get_ddp_individual_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """A wrapper that all-reduces each gradient as soon as it is ready (2025)."""
    from cs336_systems.distributed.ddp import OverlappedDDP

    return OverlappedDDP(module)


def ddp_individual_parameters_on_after_backward(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After the backward pass, before the optimizer's step (2025)."""
    del optimizer  # the gradients alone are its matter
    wrapper: Any = ddp_model
    wrapper.finish_gradient_synchronization()


def get_ddp_bucketed(module: torch.nn.Module, bucket_size_mb: float) -> torch.nn.Module:
    """A wrapper that all-reduces gradients in buckets of at most `bucket_size_mb` (2025)."""
    from cs336_systems.distributed.ddp import BucketedDDP

    return BucketedDDP(module, bucket_size_mb)


def ddp_bucketed_on_after_backward(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After the backward pass, before the optimizer's step (2025)."""
    del optimizer  # the gradients alone are its matter
    wrapper: Any = ddp_model
    wrapper.finish_gradient_synchronization()


def ddp_bucketed_on_train_batch_start(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """At the start of every training step (2025): nothing, since every step ends with its buckets empty."""


def get_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """The data-parallel wrapper of 2026."""
    from cs336_systems.distributed.ddp import OverlappedDDP

    return OverlappedDDP(module)


def ddp_on_after_backward(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After the backward pass, before the optimizer's step (2026)."""
    del optimizer  # the gradients alone are its matter
    wrapper: Any = ddp_model
    wrapper.finish_gradient_synchronization()


def get_fsdp(module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A wrapper that shards every Linear and Embedding (2026)."""
    raise NotImplementedError("problem fsdp is not built yet")


def fsdp_on_after_backward(fsdp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After the backward pass, before the optimizer's step (2026)."""
    raise NotImplementedError("problem fsdp is not built yet")


def fsdp_gather_full_params(fsdp_model: torch.nn.Module) -> dict[str, Tensor]:
    """The full parameters under their unprefixed names (2026)."""
    raise NotImplementedError("problem fsdp is not built yet")


def get_sharded_optimizer(
    params: Any, optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimizer whose state is sharded over the ranks."""
    raise NotImplementedError("problem optimizer_state_sharding is not built yet")

"""Equal models on every rank: what must hold before ranks train together, and the parts of a batch.

A collective that ranks call with different shapes hangs or mixes up memory. So the ranks first tell each other what
their models are, and all of them raise the same error where two differ; then all take over rank 0's values. Values go
as bytes, so that every dtype is copied bit for bit, whatever the backend can compute with.

Source: the constructor of PyTorch's DistributedDataParallel, which verifies parameter shapes and broadcasts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cs336_systems.errors import UserError


def require_process_group() -> None:
    """Raise unless this process is one of several ranks, or of one.

    Raises:
        UserError: there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(
            "no process group: run this in a worker of cs336_systems.distributed.launch.launch, or call "
            "torch.distributed.init_process_group in a process that torchrun started"
        )


def require_equal_models(module: nn.Module, settings: str) -> None:
    """Raise the same error on every rank unless all have the same names, shapes, dtypes and settings.

    Raises:
        UserError: the ranks differ; the message has the first parameter or buffer that does, as both have it. Or a
            parameter has no values yet.
    """
    descriptions: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(descriptions, [settings, *_description(module)])
    for rank, description in enumerate(descriptions):
        for expected, found in itertools.zip_longest(descriptions[0], description, fillvalue="nothing more"):
            if found != expected:
                raise UserError(
                    f"the ranks do not have equal models: rank 0 has {expected}, rank {rank} has {found}; "
                    "build the same model with the same settings on every rank"
                )
    without_values = [name for name, each in module.named_parameters() if is_lazy(each) or each.is_meta]
    if without_values:
        raise UserError(f"{without_values[0]!r} has no values yet: give every parameter its values before wrapping")


def _description(module: nn.Module) -> Iterator[str]:
    """A line for each parameter and buffer, tied ones by every name they have."""
    first_names: dict[int, str] = {}
    for kind, named in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            shape = "not known yet" if is_lazy(tensor) else str(tuple(tensor.shape))
            place = " on meta" if tensor.is_meta else ""
            frozen = ", frozen" if kind == "parameter" and not tensor.requires_grad else ""
            first = first_names.setdefault(id(tensor), name)
            tied = f", tied to {first!r}" if first != name else ""
            yield f"the {kind} {name!r} of shape {shape} and {tensor.dtype}{place}{frozen}{tied}"


@torch.no_grad()
def broadcast_from_rank_0(module: nn.Module) -> None:
    """Give every rank rank 0's parameters, frozen ones too, and buffers; bit for bit."""
    for tensor in (*module.parameters(), *module.buffers()):
        dense = tensor.detach().contiguous()  # the tensor's own memory where that is contiguous
        if dense.numel() > 0:
            dist.broadcast(dense.view(-1).view(torch.uint8), src=0)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.copy_(dense)


def shard_of(batch: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of a batch that a rank trains on: the rank-th of `world_size` equal, successive parts; a view.

    Equal parts, because the average of the ranks' mean losses is the batch's mean loss only then.

    Raises:
        UserError: the batch does not divide into equal parts, or there is no such rank.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"expected a rank from 0 to world_size - 1, found rank {rank!r} of {world_size!r}")
    if batch.ndim == 0 or len(batch) % world_size != 0 or len(batch) == 0:
        found = "a number" if batch.ndim == 0 else f"a batch of {len(batch)}"
        raise UserError(
            f"{found} does not divide into equal parts for {world_size} ranks: use a multiple of {world_size}"
        )
    size = len(batch) // world_size
    return batch[rank * size : (rank + 1) * size]

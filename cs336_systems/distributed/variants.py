"""Data-parallel wrappers by name.

    naive, flat, overlapped, bucketed    ours (ddp.py)
    torch                                PyTorch's DistributedDataParallel with the same interface
    my_module:MyDDP                      one from outside: `MyDDP(module)`, or `MyDDP(module, bucket_size_mb)` where a
                                         size is given, with `forward` and `finish_gradient_synchronization()`

A bucket size is for what has buckets: to any other it is an error, not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cs336_systems.distributed.ddp import BucketedDDP, FlatDDP, NaiveDDP, OverlappedDDP, bucket_bytes_of
from cs336_systems.distributed.replicas import broadcast_from_rank_0, require_process_group
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.object_reference import is_object_reference, load_object

Wrapper = Callable[..., nn.Module]
BYTES_PER_MIB = 1 << 20


class TorchDDP(DistributedDataParallel):
    """PyTorch's wrapper with the interface of ours; buckets of at most so many MB (10^6 bytes).

    Without a size they are PyTorch's own: 25 MiB, the first one 1 MiB. It adds a gradient to a bucket until that has
    reached its size, so that a bucket may be larger. Every parameter must be used in every step. Buffers are rank 0's
    at construction and each rank's own afterwards, as with ours: by default PyTorch's wrapper broadcasts them anew, and
    waits for it, in the first forward after each averaging.
    """

    def __init__(self, module: nn.Module, bucket_size_mb: float | None = None) -> None:
        require_process_group()
        size_bytes = bucket_bytes_of(bucket_size_mb)
        super().__init__(
            module,
            bucket_cap_mb=None if bucket_size_mb is None else size_bytes / BYTES_PER_MIB,
            broadcast_buffers=False,
        )
        broadcast_from_rank_0(module)  # without that, PyTorch's takes over parameters only

    def finish_gradient_synchronization(self) -> None:
        """Nothing: at the end of its backward PyTorch's wrapper waits itself."""


WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        "naive": NaiveDDP,
        "flat": FlatDDP,
        "overlapped": OverlappedDDP,
        "bucketed": BucketedDDP,
        "torch": TorchDDP,
    }
)
NAMES = tuple(WRAPPERS)
WITH_BUCKETS = ("bucketed", "torch")


def check_name(name: str) -> None:
    """Raise a UserError that lists the known, unless `name` is one of ours or spelt as a reference; imports nothing."""
    if name not in WRAPPERS and not is_object_reference(name):
        raise unknown_name("data-parallel wrapper", name, [*NAMES, "module:Class"])


def load_ddp(name: str) -> Wrapper:
    """The wrapper called `name`: to be called with a module.

    Where ranks are to wrap a student's, call this before `launch` too: it makes the working directory importable, which
    the ranks take over, and what is wrong with the reference is told once.

    Raises:
        UserError: `name` is neither one of ours nor an importable `module:Class`.
    """
    check_name(name)
    found: Any = WRAPPERS[name] if name in WRAPPERS else load_object(name)
    if not callable(found):
        raise UserError(f"{name} must be a class that wraps a module, found {found!r}")
    return found


def wrap(name: str, module: nn.Module, bucket_size_mb: float | None = None) -> nn.Module:
    """The module in the data-parallel wrapper called `name`; every rank calls this.

    Args:
        name: one of `NAMES`, or `module:Class`.
        module: the model.
        bucket_size_mb: in MB (10^6 bytes), for a wrapper with buckets; None for its own default.

    Raises:
        UserError: an unknown name, a bucket size for a wrapper without buckets, or something that is no wrapper.
    """
    wrapper = load_ddp(name)
    if bucket_size_mb is None:
        wrapped = wrapper(module)
    elif name in WITH_BUCKETS or is_object_reference(name):
        wrapped = wrapper(module, bucket_size_mb)
    else:
        raise UserError(f"{name} has no buckets: bucket_size_mb is for {' and '.join(WITH_BUCKETS)}")
    if not isinstance(wrapped, nn.Module) or not callable(getattr(wrapped, "finish_gradient_synchronization", None)):
        raise UserError(
            f"{name} must give a torch.nn.Module with finish_gradient_synchronization(), "
            f"found {type(wrapped).__name__} without"
        )
    return wrapped

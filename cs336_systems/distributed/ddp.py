"""Data parallel: every rank has the whole model and a part of the batch; gradients are averaged over all ranks.

    model = BucketedDDP(model, bucket_size_mb=25)           # rank 0's parameters and buffers on every rank
    loss(model(shard_of(batch, rank, world_size))).backward()
    model.finish_gradient_synchronization()                 # every .grad is now the average, the same on all ranks
    optimizer.step()

Four wrappers of one interface. They differ in what one all-reduce takes, and when it begins:

    NaiveDDP         each gradient by itself                         after the backward, one after the other
    FlatDDP          all gradients as one tensor (one per dtype)     after the backward
    OverlappedDDP    each gradient by itself                         as soon as it is accumulated
    BucketedDDP      buckets of gradients, at most so many MB        as soon as the last of its gradients is

Order. Ranks must call collectives in one order, but in which order gradients come may depend on a rank's data. So the
buckets have a fixed order, the reverse of `parameters()`, which is about that of the backward, and none begins before
all earlier ones have. A gradient that comes late or not at all holds back those after it, at the latest until
`finish_gradient_synchronization`, where all that are left begin. That is one call per bucket on every rank, always.

Parameters without a gradient. A rank whose part of the batch did not use a parameter contributes zeros: the whole
batch's gradient is the sum over all parts. Where no rank used it, `.grad` stays None, as in one process, so that no
optimizer decays it. One more all-reduce, of a byte per parameter, tells which those are. Every rank makes it in every
step, since no rank knows what the others lack; only a rank that itself lacks a gradient reads the answer, so that on a
GPU no other waits for it.

Rounding. Every rank divides the same sum by the number of ranks, or NCCL does: ranks are equal bit for bit.

Buffers are rank 0's at construction and each rank's own afterwards. The names in `state_dict()` begin with `module.`,
as those of PyTorch's wrapper do; `.module.state_dict()` has the model's own.

Cost: on top of the all-reduces, each bucket is copied once on the way out and once back, and takes its size in memory
until the averages are there. During a backward nothing may be reduced in place: after `view`, `cat` or `chunk` a
`.grad` may lie in memory that autograd has yet to read for another gradient. After the backward a bucket of one
gradient is reduced in place, which only NaiveDDP and a FlatDDP of one parameter do: one call at a time, since two
`.grad` may even then share their memory.

Source: CS336 assignment 2, sections 2.2 and 2.3; Li et al. 2020, "PyTorch Distributed" (buckets, order, unused
parameters).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from cs336_systems.distributed.replicas import broadcast_from_rank_0, require_equal_models, require_process_group
from cs336_systems.errors import UserError
from cs336_systems.profiling.ranges import named_range

BYTES_PER_MB = 1_000_000
"""The handout says MB, and MiB where it means 2^20 bytes. PyTorch's `bucket_cap_mb` is in MiB."""
Bucket = tuple[nn.Parameter, ...]


def buckets_of(parameters: Iterable[nn.Parameter], bucket_bytes: float) -> tuple[Bucket, ...]:
    """The buckets for gradients of these parameters, in the order in which they are reduced.

    The parameters are taken from the last to the first. Each joins the open bucket of its dtype and device, or opens
    the next where that would exceed `bucket_bytes`; one that is larger has a bucket of its own.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    filled_bytes: dict[tuple[torch.dtype, torch.device], int] = {}
    closed: list[list[int]] = []
    backwards = list(parameters)[::-1]
    for place, parameter in enumerate(backwards):
        kind = (parameter.dtype, parameter.device)
        size_bytes = parameter.numel() * parameter.element_size()
        if kind in open_buckets and filled_bytes[kind] + size_bytes > bucket_bytes:
            closed.append(open_buckets.pop(kind))
        if kind not in open_buckets:
            open_buckets[kind], filled_bytes[kind] = [], 0
        open_buckets[kind].append(place)
        filled_bytes[kind] += size_bytes
    # Of several dtypes, the bucket that is complete first comes first.
    in_order = sorted([*closed, *open_buckets.values()], key=lambda bucket: bucket[-1])
    return tuple(tuple(backwards[place] for place in bucket) for bucket in in_order)


class _Reduction:
    """One all-reduce under way: the average of a bucket's gradients over all ranks.

    `in_place` lets a bucket of one gradient be reduced where it lies; only for what nobody else reads or reduces
    meanwhile.
    """

    def __init__(self, bucket: Bucket, in_place: bool) -> None:
        self.bucket = bucket
        self.is_missing = [parameter.grad is None for parameter in bucket]
        gradients = [_gradient_or_zeros(parameter) for parameter in bucket]
        stays = in_place and len(gradients) == 1 and gradients[0].is_contiguous()
        self._buffer = gradients[0] if stays else torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._averages = dist.get_backend() == "nccl"  # Gloo has no average
        operation = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        self._work = dist.all_reduce(self._buffer, operation, async_op=True) if self._buffer.numel() else None

    def wait(self) -> None:
        """Until the sums are there: on a CPU this thread waits, on a GPU its stream."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def take_over(self, used: Iterable[bool]) -> None:
        """Make the averages the parameters' gradients; to be called once.

        `used` says of each parameter whether any rank has a gradient of it: else it keeps none.
        """
        self.wait()
        pairs = []
        pieces = self._buffer.view(-1).split([parameter.numel() for parameter in self.bucket])
        for parameter, piece, is_used in zip(self.bucket, pieces, used, strict=True):
            if parameter.grad is None and is_used:
                parameter.grad = torch.empty_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
            if parameter.grad is not None:
                pairs.append((parameter.grad, piece.view(parameter.shape)))
        if not self._averages:
            for gradient, total in pairs:
                torch.div(total, dist.get_world_size(), out=gradient)  # one pass over memory: it divides as it copies
        elif elsewhere := [pair for pair in pairs if pair[0].data_ptr() != pair[1].data_ptr()]:
            gradients, averages = zip(*elsewhere, strict=True)
            torch._foreach_copy_(gradients, averages)


def _gradient_or_zeros(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
    if gradient.layout is not torch.strided:
        raise UserError(
            f"a gradient of shape {tuple(gradient.shape)} is {gradient.layout}: only dense gradients are averaged; "
            "use an embedding with sparse=False"
        )
    return gradient.detach()


class DataParallel(nn.Module):
    """What the four wrappers share.

    Args:
        module: the model; its parameters and buffers become rank 0's.
        bucket_bytes: of which all-reduces take gradients together; 0 for each by itself.
        settings: what else must be the same on every rank, in words.

    Attributes:
        module: the model.
        buckets: of its trainable parameters, tied ones once, in the order of their all-reduces.

    Raises:
        UserError: no process group; a model that differs between ranks (on every rank, in the same words); a module
            that holds such a wrapper already.
    """

    overlaps: ClassVar[bool] = False
    """Whether all-reduces begin during the backward."""
    blocks: ClassVar[bool] = False
    """Whether each all-reduce is waited for before the next begins."""

    def __init__(self, module: nn.Module, bucket_bytes: float, settings: str = "") -> None:
        super().__init__()
        require_process_group()
        if not isinstance(module, nn.Module):
            raise UserError(f"expected a torch.nn.Module, found {type(module).__name__}")
        if any(isinstance(each, DataParallel) for each in module.modules()):
            raise UserError("the module is data-parallel already: wrap it once")
        require_equal_models(module, f"the wrapper {type(self).__name__}{settings}")
        broadcast_from_rank_0(module)
        self.module = module
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.buckets = buckets_of(trainable, bucket_bytes)
        self._frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self._place = {parameter: place for place, bucket in enumerate(self.buckets) for parameter in bucket}
        self._synchronises = True
        self._context = contextvars.copy_context()
        self._begin_round()
        if self.overlaps:
            arrived = weakref.WeakMethod(self._arrived)  # a hook shall not keep this wrapper alive
            for parameter in trainable:
                parameter.register_post_accumulate_grad_hook(_if_alive(arrived))

    def _begin_round(self) -> None:
        """A round is what lies between two calls of `finish_gradient_synchronization`."""
        self._begun: list[_Reduction] = []
        self._came: set[nn.Parameter] = set()
        self._lacking = [len(bucket) for bucket in self.buckets]
        self._backward_is_over = False

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the model returns.

        Raises:
            UserError: `finish_gradient_synchronization` was not called after the last backward. After a backward that
                raised it need not be where all ranks skip it: all gradients are then dropped here, which are those of
                half a backward.
        """
        if torch.is_grad_enabled() and self._came:
            if self._backward_is_over:
                raise UserError(
                    "the gradients of the last backward are still being averaged: call "
                    "finish_gradient_synchronization() after every backward, before the optimizer's step"
                )
            self._drop_round()
        self._context = contextvars.copy_context()  # autograd's threads have none of their own
        return self.module(*arguments, **keywords)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A backward within adds to this rank's own gradients; the next one outside averages the sums.

        The same on every rank: ranks outside it wait for all others.
        """
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def finish_gradient_synchronization(self) -> None:
        """Make every `.grad` its average over all ranks; to be called on every rank after a backward outside `no_sync`.

        It averages what is there: also what only a backward under `no_sync` has touched, and without any backward the
        gradients as they stand.

        Raises:
            UserError: a parameter that was frozen at construction is so no more, or a gradient is sparse.
        """
        if any(parameter.requires_grad for parameter in self._frozen):
            raise UserError("a parameter was unfrozen after the model was wrapped: wrap the model after unfreezing")
        with named_range("communicate"), torch.no_grad():
            self._take_over_averages(self._used_anywhere())
        self._begin_round()

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient has been accumulated; called in the thread of the backward."""
        if parameter in self._came:
            raise UserError(
                "a gradient was computed again while its average is under way: call finish_gradient_synchronization() "
                "after every backward, and accumulate gradients of several under no_sync()"
            )
        if not self._synchronises:
            return
        if not self._came:
            # Runs when a backward ends, and not when it raises.
            Variable._execution_engine.queue_callback(self._note_end_of_backward)
        self._came.add(parameter)
        self._lacking[self._place[parameter]] -= 1
        while len(self._begun) < len(self.buckets) and self._lacking[len(self._begun)] == 0:
            with self._context.copy().run(named_range, "communicate bucket", len(self._begun)), torch.no_grad():
                self._begin_next()

    def _note_end_of_backward(self) -> None:
        self._backward_is_over = True

    def _begin_next(self) -> None:
        reduction = _Reduction(self.buckets[len(self._begun)], in_place=self.blocks and not self.overlaps)
        if self.blocks:
            reduction.wait()
        self._begun.append(reduction)

    def _used_anywhere(self) -> list[bool]:
        """Begin what has not; for each parameter in the order of the buckets, whether any rank has a gradient of it."""
        while len(self._begun) < len(self.buckets):
            self._begin_next()
        is_missing = [each for reduction in self._begun for each in reduction.is_missing]
        if not is_missing:
            return []
        used = torch.ones(len(is_missing), dtype=torch.uint8, device=self.buckets[0][0].device)
        if any(is_missing):
            used.copy_(~torch.tensor(is_missing))
        dist.all_reduce(used, dist.ReduceOp.MAX)
        return [flag > 0 for flag in used.tolist()] if any(is_missing) else [True] * len(is_missing)

    def _take_over_averages(self, used: Sequence[bool]) -> None:
        flags = iter(used)
        for reduction in self._begun:
            reduction.take_over([next(flags) for _ in reduction.bucket])

    @torch.no_grad()
    def _drop_round(self) -> None:
        """After a backward that raised: call what the other ranks call, and keep nothing of it."""
        self._used_anywhere()
        for reduction in self._begun:
            reduction.wait()
        for parameter in self._place:
            parameter.grad = None
        self._begin_round()


def _if_alive(method: weakref.WeakMethod[Any]) -> Callable[[nn.Parameter], None]:
    def call(parameter: nn.Parameter) -> None:
        found = method()
        if found is not None:
            found(parameter)

    return call


class NaiveDDP(DataParallel):
    """One all-reduce per gradient after the backward, each waited for before the next begins."""

    blocks = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, bucket_bytes=0)


class FlatDDP(DataParallel):
    """One all-reduce after the backward, of all gradients as one tensor; of several dtypes, one for each."""

    blocks = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, bucket_bytes=math.inf)


class OverlappedDDP(DataParallel):
    """One all-reduce per gradient, which begins as soon as the gradient is accumulated."""

    overlaps = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, bucket_bytes=0)


class BucketedDDP(DataParallel):
    """One all-reduce per bucket of gradients, which begins as soon as the last of them is accumulated.

    Args:
        module: the model.
        bucket_size_mb: at most so many MB (10^6 bytes) of gradients per bucket; None for one bucket (per dtype).

    Raises:
        UserError: a size that is not a positive number.
    """

    overlaps = True

    def __init__(self, module: nn.Module, bucket_size_mb: float | None = None) -> None:
        super().__init__(module, bucket_bytes_of(bucket_size_mb), f" with bucket_size_mb {bucket_size_mb!r}")


def bucket_bytes_of(bucket_size_mb: float | None) -> float:
    """A bucket's size in bytes, from one in MB; infinite for None.

    Raises:
        UserError: the size is not a positive number.
    """
    if bucket_size_mb is None:
        return math.inf
    is_number = isinstance(bucket_size_mb, int | float) and not isinstance(bucket_size_mb, bool)
    if not is_number or not bucket_size_mb > 0:
        raise UserError(
            f"bucket_size_mb must be a positive number of MB, or None for one bucket, found {bucket_size_mb!r}"
        )
    return bucket_size_mb * BYTES_PER_MB

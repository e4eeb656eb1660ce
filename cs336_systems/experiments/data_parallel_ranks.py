"""What one rank does where data parallel is measured: build, check, time and record every wrapper in turn.

Each rank builds one model and one optimizer, and wraps a replica per wrapper: modules of their own whose parameters
share the memory of the first, so that a dozen wrappers hold the weights once, and the hooks of one are none of
another's. Before anything is timed, the averaged gradients are compared with those of one process on the whole batch.
Then every round takes one step with each wrapper, after a barrier, the plain model without any communication among
them. Afterwards one step of each is recorded by the profiler, from which follows, once the traces of all ranks are side
by side, how much of the communication was overlapped.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.distributed.ddp import DataParallel
from cs336_systems.distributed.rank import Rank
from cs336_systems.distributed.variants import wrap
from cs336_systems.profiling.overlap import Overlap, read_overlap
from cs336_systems.profiling.ranges import named_range
from cs336_systems.profiling.recorder import record_trace
from cs336_systems.step import BuiltStep, StepConfig, build_step, step_of

if TYPE_CHECKING:
    from cs336_systems.experiments.data_parallel import Case

ALONE = "alone"
"""The step without any communication: what is below every other."""
ONE_NUMBER, AT_ONCE = "one number", "all gradients"
"""The two reductions, with nothing beside them, from which the price of a call and its bandwidth follow."""
CALLS_OF_ONE_NUMBER = 20
STEP, GRADIENTS, FINISH = "step_ms", "gradients_ms", "finish_ms"
TIMES = (STEP, GRADIENTS, FINISH)
"""Of a step: the whole, until the gradients are there, and what of that comes after backward."""


def variant_name(wrapper: str, bucket_mb: float | None) -> str:
    """`bucketed 25 MB`, or the wrapper's name alone."""
    return wrapper if bucket_mb is None else f"{wrapper} {bucket_mb:g} MB"


class Variant:
    """One wrapper around its own replica of the model, and its steps."""

    def __init__(self, name: str, model: nn.Module, wrapped: Any, replica: nn.Module) -> None:
        self.name, self._wrapped, self._replica = name, wrapped, replica
        self._pairs = list(zip(model.parameters(), replica.parameters(), strict=True))
        self.times: dict[str, list[float]] = {each: [] for each in TIMES}

    def gradients(self, rank: Rank, case: StepConfig, optimizer: torch.optim.Optimizer, batch: Tensor) -> list[float]:
        """Forward, backward and communication, after which the shared model has the gradients.

        Gives the moments of the beginning, the end of backward, and the end of communication.
        """
        for _, mine in self._pairs:
            mine.grad = None
        run = step_of(dataclasses.replace(case, phase="forward-backward"), self.module, optimizer, batch)
        moments = [time.perf_counter()]
        run()
        if rank.device.type == "cuda":  # the products, not what NCCL does beside them
            torch.cuda.current_stream().synchronize()
        moments.append(time.perf_counter())
        if self._wrapped is not None:
            self._wrapped.finish_gradient_synchronization()
        _wait_for_all(rank)
        moments.append(time.perf_counter())
        for shared, mine in self._pairs:
            shared.grad, mine.grad = mine.grad, None
        return moments

    def step(self, rank: Rank, case: StepConfig, optimizer: torch.optim.Optimizer, batch: Tensor) -> list[float]:
        """One step of this rank, from a moment at which all are there; its times in the order of `TIMES`."""
        dist.barrier()
        _wait_for_all(rank)
        with named_range("step"):
            begin, computed, communicated = self.gradients(rank, case, optimizer, batch)
            with named_range("optimizer"):
                optimizer.step()
            _wait_for_all(rank)
        end = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        spans = ((begin, end), (begin, communicated), (computed, communicated))
        return [1e3 * (until - since) for since, until in spans]

    @property
    def reductions(self) -> int | None:
        """How many reductions of gradients a step makes, where the wrapper says it: one per bucket that is not empty.

        A trace of ours has one more, of a byte per parameter.
        """
        if not isinstance(self._wrapped, DataParallel):
            return None
        return sum(any(each.numel() for each in bucket) for bucket in self._wrapped.buckets)

    @property
    def module(self) -> nn.Module:
        found: nn.Module = self._replica if self._wrapped is None else self._wrapped
        return found


def _wait_for_all(rank: Rank) -> None:
    """For everything that the GPU was given."""
    if rank.device.type == "cuda":
        torch.cuda.synchronize()


def replica_of(model: nn.Module) -> nn.Module:
    """The same modules with parameters and buffers of their own that lie in the memory of the model's."""
    same: dict[int, Any] = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in model.parameters()}
    same |= {id(each): each.detach() for each in model.buffers()}
    return copy.deepcopy(model, same)


def train(rank: Rank, case: Case, chosen_variants: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """What one rank measures: times of every variant, and one recorded step of each.

    `chosen_variants` are those of the case for which there is memory: wrapper and bucket size.
    """
    torch.manual_seed(case.seed + rank.rank)  # weights are rank 0's once a wrapper is there, batches are not
    chosen = case.step_of_rank
    built = build_step(chosen)
    rank.alive()
    variants = [Variant(ALONE, built.model, None, replica_of(built.model))]
    for wrapper, size in chosen_variants:
        replica = replica_of(built.model)
        wrapped = wrap(wrapper, replica, size)
        variants.append(Variant(variant_name(wrapper, size), built.model, wrapped, replica))
        rank.alive()
    checked = check(variants, rank, chosen, built)
    for turn in range(case.warmup + case.rounds):
        for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
            times = variant.step(rank, chosen, built.optimizer, built.batch)
            if turn >= case.warmup:
                for name, taken in zip(TIMES, times, strict=True):
                    variant.times[name].append(taken)
            rank.report(None)
    reductions = time_reductions(rank, built.model, case)
    recorded = {each.name: record(each, rank, chosen, built.optimizer, built.batch) for each in variants[1:]}
    gradients = [each for each in built.model.parameters() if each.requires_grad]
    return {
        "times": {each.name: each.times for each in variants},
        "recorded": recorded,
        "reductions": {each.name: each.reductions for each in variants[1:]},
        "checked": checked,
        "reductions_ms": reductions,
        "gradient_bytes": sum(each.numel() * each.element_size() for each in gradients),
        "gradients": len(gradients),
    }


def check(variants: Sequence[Variant], rank: Rank, case: StepConfig, built: BuiltStep) -> dict[str, dict[str, Any]]:
    """How far each variant's gradients are from those of one process on the whole batch, and whether ranks agree.

    `relative_error` is the norm of the difference by that of the expected, of the gradients that both have; None where
    it is no number: none is in common, or one is not finite.
    """
    parts = [torch.empty_like(built.batch) for _ in range(rank.world_size)]
    dist.all_gather(parts, built.batch)
    alone, found = variants[0], {}
    alone.gradients(rank, case, built.optimizer, torch.cat(parts, dim=1))
    expected = [each.grad for each in built.model.parameters()]
    built.optimizer.zero_grad(set_to_none=True)
    for variant in variants[1:]:
        variant.gradients(rank, case, built.optimizer, built.batch)
        pairs = [(each.grad, other) for each, other in zip(built.model.parameters(), expected, strict=True)]
        both = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        off, size = (
            math.hypot(*(float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in tensors))
            for tensors in ((ours - theirs for ours, theirs in both), (theirs for _, theirs in both))
        )
        found[variant.name] = {
            "relative_error": off / size if size > 0 and math.isfinite(off / size) else None,
            "same_parameters": all((ours is None) == (theirs is None) for ours, theirs in pairs),
            "ranks_equal": _equal_on_all_ranks([ours for ours, _ in both], rank),
        }
        built.optimizer.zero_grad(set_to_none=True)
        rank.report(None)
    return found


def _equal_on_all_ranks(tensors: Sequence[Tensor], rank: Rank) -> bool:
    """Whether every rank has the same bits, by two sums over them, one of which depends on their order."""
    sums = torch.zeros(2, dtype=torch.int64, device=rank.device)
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.int32).long()
        sums += torch.stack([bits.sum(), (bits * torch.arange(1, len(bits) + 1, device=rank.device)).sum()])
    all_sums = [torch.empty_like(sums) for _ in range(rank.world_size)]
    dist.all_gather(all_sums, sums)
    return all(bool((each == sums).all()) for each in all_sums)


def time_reductions(rank: Rank, model: nn.Module, case: Case) -> dict[str, list[float]]:
    """Calls alone, while nothing else is done, in turn: of a single number, and of all gradients at once."""
    gradients = sum(each.numel() for each in model.parameters() if each.requires_grad)
    tensors = {ONE_NUMBER: torch.zeros(1, device=rank.device), AT_ONCE: torch.zeros(gradients, device=rank.device)}
    taken: dict[str, list[float]] = {name: [] for name in tensors}
    for turn in range(case.warmup + case.rounds):
        for name, tensor in tensors.items():
            calls = CALLS_OF_ONE_NUMBER if name == ONE_NUMBER else 1
            dist.barrier()
            _wait_for_all(rank)
            begin = time.perf_counter()
            for _ in range(calls):
                dist.all_reduce(tensor)
            _wait_for_all(rank)
            if turn >= case.warmup:
                taken[name].append(1e3 * (time.perf_counter() - begin) / calls)
        rank.report(None)
    return taken


def record(variant: Variant, rank: Rank, case: StepConfig, optimizer: torch.optim.Optimizer, batch: Tensor) -> Overlap:
    """When a recorded step computed and communicated, as this rank saw it."""
    with tempfile.TemporaryDirectory(prefix="cs336-trace-") as folder:
        path = Path(folder) / "trace.json"
        with record_trace(path, rank.device.type):
            variant.step(rank, case, optimizer, batch)
        found = read_overlap(path, "step")
    rank.report(None)
    return found

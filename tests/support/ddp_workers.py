"""What ranks do in the tests of data parallel, and the same in one process on the whole batch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from source_files import load_file
from torch import Tensor, nn

from cs336_systems.distributed.rank import Rank
from cs336_systems.distributed.replicas import shard_of
from cs336_systems.distributed.variants import wrap
from cs336_systems.errors import UserError
from cs336_systems.profiling.ranges import record_ranges
from cs336_systems.repository import repository_root

BATCH = 12
FEATURES = 6
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
BUCKET_MB = 0.0005
"""500 bytes: the toy's matrices have 288 or 576, so that there are several buckets."""
Named = dict[str, Tensor]


class Toy(nn.Module):
    """Tied weights, a frozen parameter in the middle, buffers of several dtypes; nothing whose gradient is zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(FEATURES, 12)
        self.frozen = nn.Parameter(torch.randn(12), requires_grad=False)
        self.second = nn.Linear(12, FEATURES, bias=False)
        self.norm = nn.LayerNorm(FEATURES)
        self.third = nn.Linear(FEATURES, 12, bias=False)
        self.head = nn.Linear(FEATURES, 3)
        self.head_again = nn.Linear(FEATURES, 3)
        self.head_again.weight = self.head.weight
        self.register_buffer("scale", torch.rand(12) + 0.5)
        self.register_buffer("mask", torch.rand(12) > 0.5)
        self.register_buffer("seen", torch.randint(1000, ()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.get_buffer("scale") + self.frozen
        hidden = self.norm(self.second(hidden))
        hidden = self.second(torch.tanh(self.third(hidden))) + hidden
        return self.head(hidden) + torch.tanh(self.head_again(hidden))


def toy(seed: int) -> Toy:
    return Toy(seed).double()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64),
        torch.randn(BATCH, 3, generator=generator, dtype=torch.float64),
    )


def copied(named: Any) -> Named:
    return {name: tensor.detach().clone() for name, tensor in named}


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in module.named_parameters()}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    initial: Named
    """Parameters and buffers before the first step."""
    gradients: list[dict[str, Tensor | None]]
    final: Named
    is_tied: bool


Hook = Callable[[Any, Any], object]
"""Called with the wrapper and the optimizer."""
OF_SUITES = "suite "
"""Before the name of a wrapper that is made and used as the course's suites do."""


def _nothing(_model: Any, _optimizer: Any) -> None:
    pass


def _finish(model: Any, _optimizer: Any) -> None:
    model.finish_gradient_synchronization()


class Suite:
    """One of the wrappers of the course's suites, through the functions that the suites call."""

    def __init__(self, name: str) -> None:
        functions: Any = load_file(repository_root() / "tests" / "adapters.py", "adapters_on_a_rank")
        make = getattr(functions, f"get_{name}")
        self.make = (lambda module: make(module, BUCKET_MB)) if name == "ddp_bucketed" else make
        self.before = getattr(functions, f"{name}_on_train_batch_start", _nothing)
        self.after = getattr(functions, f"{name}_on_after_backward")


def train(rank: Rank, cases: list[tuple[str, float | None, str]], steps: int) -> list[Trained | str]:
    """For each wrapper, bucket size and optimizer; every rank begins with a model of its own. An error as its text.

    All in one launch: the first optimizer in a process costs seconds of imports.
    """
    results: list[Trained | str] = []
    for name, bucket_size_mb, optimizer_name in cases:
        module = toy(seed=rank.rank)
        shard = functools.partial(shard_of, rank=rank.rank, world_size=rank.world_size)
        try:
            if name.startswith(OF_SUITES):
                suite = Suite(name.removeprefix(OF_SUITES))
                model, hooks = suite.make(module), (suite.before, suite.after)
            else:
                model, hooks = wrap(name, module, bucket_size_mb), (_nothing, _finish)
            results.append(trained(model, module, optimizer_name, steps, shard, *hooks))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def trained(
    model: nn.Module,
    module: Toy,
    optimizer_name: str,
    steps: int,
    shard: Callable[[Tensor], Tensor] = lambda batch: batch,
    before: Hook = _nothing,
    after: Hook = _nothing,
) -> Trained:
    """Train `model`, which holds `module`."""
    initial = copied(itertools.chain(module.named_parameters(), module.named_buffers()))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    gradients = []
    for step in range(steps):
        x, y = (shard(each) for each in batch_of(step))
        before(model, optimizer)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        after(model, optimizer)
        gradients.append(gradients_of(module))
        optimizer.step()
    return Trained(
        initial, gradients, copied(module.named_parameters()), module.head.weight is module.head_again.weight
    )


def train_alone(optimizer_name: str, steps: int) -> Trained:
    """In one process on the whole batch, with the model of rank 0."""
    module = toy(seed=0)
    return trained(module, module, optimizer_name, steps)


# What is called, and when -----------------------------------------------------------------------------------------


class _Watched:
    """An all-reduce under way that tells when it is waited for."""

    def __init__(self, work: Any, number: int, events: list[tuple]) -> None:
        self.work, self.number, self.events = work, number, events

    def wait(self) -> None:
        self.events.append(("waited", self.number))
        self.work.wait()


@contextlib.contextmanager
def recorded_reductions(events: list[tuple]) -> Iterator[None]:
    """Appends ("reduce", number of elements, dtype), and ("waited", which of them), for all that is done within."""
    original, numbers = dist.all_reduce, itertools.count()

    def all_reduce(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        events.append(("reduce", tensor.numel(), str(tensor.dtype)))
        work, number = original(tensor, *arguments, **keywords), next(numbers)
        return None if work is None else _Watched(work, number, events)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def layers(_rank: Rank, name: str, bucket_size_mb: float | None) -> list[list[tuple]]:
    """Events of two steps of linear layers: ("gradient", name) where one is computed, beside the reductions."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2))
    model: Any = wrap(name, module, bucket_size_mb)
    events: list[tuple] = []
    for parameter_name, parameter in module.named_parameters():

        def told(_gradient: Tensor, which: str = parameter_name) -> None:
            events.append(("gradient", which))

        parameter.register_hook(told)
    steps = []
    for _ in range(2):
        events.clear()
        with recorded_reductions(events):
            model(torch.randn(3, 4)).sum().backward()
            events.append(("backward is over",))
            model.finish_gradient_synchronization()
        steps.append(list(events))
        model.zero_grad()
    return steps


class Crossed(nn.Module):
    """Two layers of different size, of which the input says which comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4).double()
        self.b = nn.Linear(4, 4, bias=False).double()

    def forward(self, x: Tensor, a_first: bool) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))) if a_first else self.a(torch.tanh(self.b(x))))


def crossed(rank: Rank, name: str, bucket_size_mb: float | None) -> tuple[list[str], list[tuple], dict, dict]:
    """Order of gradients, reductions, averaged gradients, this rank's own gradients."""
    torch.manual_seed(0)
    module = Crossed()
    order: list[str] = []
    for parameter_name, parameter in module.named_parameters():
        parameter.register_hook(lambda _, which=parameter_name: order.append(which))
    x = torch.randn(2, 4, dtype=torch.float64) + rank.rank
    module(x, rank.rank == 0).sum().backward()
    own = gradients_of(module)
    module.zero_grad()
    model: Any = wrap(name, module, bucket_size_mb)
    order.clear()
    events: list[tuple] = []
    with recorded_reductions(events):
        model(x, rank.rank == 0).sum().backward()
        model.finish_gradient_synchronization()
    return order, [event for event in events if event[0] == "reduce"], gradients_of(module), own


# Gradients that share memory --------------------------------------------------------------------------------------

SHARING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "view": lambda h, w, v: h + w.view(-1) + v.view(-1),
    "cat": lambda h, w, v: torch.cat([h, h]) + torch.cat([w.view(-1), v.view(-1)]),
    "chunk": lambda h, w, v: torch.stack([*torch.cat([h, h]).chunk(4), *torch.cat([w.view(-1), v.view(-1)]).chunk(4)]),
    "stack": lambda h, w, v: torch.stack([h, h]) + torch.stack([w.view(-1), v.view(-1)]),
}
"""Ways in which backward may give the memory of one gradient to several parameters, of which one is used on."""


class Sharing(nn.Module):
    """The gradient of the last parameter comes first, as a view of what those before it are computed from."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.w, self.v = (nn.Parameter(torch.ones(3, 4)) for _ in range(3))

    def forward(self, factor: float) -> Tensor:
        mixed = SHARING[self.how]((self.first * 2).view(-1), self.w, self.v)
        return (mixed * torch.arange(1.0, 1 + mixed.numel()).view(mixed.shape) * factor).sum()


@contextlib.contextmanager
def _done_at_once() -> Iterator[None]:
    """Every all-reduce is done when its call returns: the earliest that it may write."""
    original = dist.all_reduce

    def all_reduce(*arguments: Any, **keywords: Any) -> Any:
        work = original(*arguments, **keywords)
        if work is not None:
            work.wait()
        return work

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def share(rank: Rank, cases: list[tuple[str, float | None]]) -> list[dict[str, tuple[dict, dict]]]:
    """For each wrapper and bucket size, by how memory is shared, the averages and this rank's own gradients."""
    return [{how: _shared(rank, *case, how) for how in SHARING} for case in cases]


def _shared(rank: Rank, name: str, bucket_size_mb: float | None, how: str) -> tuple[dict, dict]:
    own, module, factor = Sharing(how), Sharing(how), 1.0 + rank.rank
    own(factor).backward()
    model: Any = wrap(name, module, bucket_size_mb)
    with _done_at_once():
        for _ in range(2):  # PyTorch's reducer arranges its buckets anew after the first
            model.zero_grad()
            model(factor).backward()
            model.finish_gradient_synchronization()
    return gradients_of(module), gradients_of(own)


class Counting(nn.Module):
    """Counts in a buffer what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(x.sum())
        return self.linear(x)


def count(rank: Rank, names: tuple[str, ...]) -> dict[str, float]:
    """By wrapper what this rank's buffer holds after three steps of a number of its own."""
    found = {}
    for name in names:
        model: Any = wrap(name, Counting())
        for _ in range(3):
            model(torch.full((1, 1), 1.0 + rank.rank).expand(1, 2) / 2).sum().backward()
            model.finish_gradient_synchronization()
            model.zero_grad()
        found[name] = float(model.module.get_buffer("seen"))
    return found


# What is not used -------------------------------------------------------------------------------------------------

EXPERTS = ("a", "b", "c")
ROUTES = [({"a", "b"}, {"a"}), ({"a"}, {"b", "c"}), ({"a"}, {"a", "c"}), (set("c"), set("c"))]
"""Of each step, the experts that each of two ranks uses."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleDict({name: nn.Linear(FEATURES, 3) for name in EXPERTS}).double()

    def forward(self, x: Tensor, used: set[str]) -> Tensor:
        return torch.stack([torch.tanh(self.experts[name](x)) for name in sorted(used)]).sum(0)


def route(rank: Rank, cases: list[tuple[str, float | None]]) -> list[tuple[list[dict], Named]]:
    """For each wrapper and bucket size, gradients of every step and the final parameters."""
    return [_routed(rank, *case) for case in cases]


def _routed(rank: Rank, name: str, bucket_size_mb: float | None) -> tuple[list[dict], Named]:
    module = Experts()
    model: Any = wrap(name, module, bucket_size_mb)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    gradients = []
    for step, routes in enumerate(ROUTES):
        x, y = (shard_of(each, rank.rank, rank.world_size) for each in batch_of(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x, routes[rank.rank]), y).backward()
        model.finish_gradient_synchronization()
        gradients.append(gradients_of(module))
        optimizer.step()
    return gradients, copied(module.named_parameters())


def route_alone() -> tuple[list[dict], Named]:
    module = Experts()
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    gradients = []
    for step, routes in enumerate(ROUTES):
        x, y = batch_of(step)
        optimizer.zero_grad()
        parts = [module(shard_of(x, each, 2), used) for each, used in enumerate(routes)]
        nn.functional.mse_loss(torch.cat(parts), y).backward()
        gradients.append(gradients_of(module))
        optimizer.step()
    return gradients, copied(module.named_parameters())


# Several backward passes ------------------------------------------------------------------------------------------


def accumulate(rank: Rank, name: str, bucket_size_mb: float | None) -> tuple[list[tuple], dict, dict]:
    """Two backwards under no_sync, of which the first alone uses b, and one outside.

    Returns what was communicated under no_sync, the averages, and this rank's own sums.
    """

    def backward(model: nn.Module, step: int, used: set[str]) -> None:
        x, y = (shard_of(each, rank.rank, rank.world_size) for each in batch_of(step))
        nn.functional.mse_loss(model(x, used), y).backward()

    own = Experts()
    for step, used in enumerate(({"a", "b"}, {"a"}, {"a"})):
        backward(own, step, used)
    module = Experts()
    model: Any = wrap(name, module, bucket_size_mb)
    events: list[tuple] = []
    with recorded_reductions(events), model.no_sync():
        with contextlib.suppress(KeyError), model.no_sync():
            raise KeyError  # leaving one within leaves the outer one as it was, however it is left
        backward(model, 0, {"a", "b"})
        backward(model, 1, {"a"})
    backward(model, 2, {"a"})
    model.finish_gradient_synchronization()
    return events, gradients_of(module), gradients_of(own)


def misuse(rank: Rank, name: str, bucket_size_mb: float | None, ways: list[str]) -> dict[str, tuple[str, dict, dict]]:
    """For each way of using the wrapper what was raised, the averages of the next step, this rank's own gradients."""
    return {how: _misused(rank, name, bucket_size_mb, how) for how in ways}


def _misused(rank: Rank, name: str, bucket_size_mb: float | None, how: str) -> tuple[str, dict, dict]:
    module = toy(seed=0)
    x, y = (shard_of(each, rank.rank, rank.world_size) for each in batch_of(0))
    nn.functional.mse_loss(module(x), y).backward()
    own = gradients_of(module)
    module.zero_grad()
    model: Any = wrap(name, module, bucket_size_mb)

    def backward(parallel: nn.Module = model) -> None:
        nn.functional.mse_loss(parallel(x), y).backward()

    raised = ""
    try:
        if how == "no backward":
            model.finish_gradient_synchronization()
            assert all(parameter.grad is None for parameter in module.parameters())
        elif how == "two backwards":
            backward()
            backward(module)
        elif how == "a backward under no_sync after one outside":
            backward()
            with model.no_sync():
                backward(module)
        elif how == "no finish":
            backward()
            backward()
        elif how == "unfrozen":
            module.frozen.requires_grad_()
            backward()
            model.finish_gradient_synchronization()
    except UserError as error:
        raised = str(error)
    module.frozen.requires_grad_(False)
    if raised:
        model.finish_gradient_synchronization()
        model.zero_grad()
        backward()
    elif how == "no backward":
        backward()
    model.finish_gradient_synchronization()
    return raised, gradients_of(module), own


class _Raises(torch.autograd.Function):
    """The identity, whose backward raises when it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raises: bool) -> Tensor:
        ctx.raises = raises
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.raises:
            raise ArithmeticError("in the middle of the backward")
        return gradients[0], None


class Fragile(nn.Module):
    """Raises in its backward, between the last layer and the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(FEATURES, FEATURES).double() for _ in range(3))

    def forward(self, x: Tensor, raises: str = "") -> Tensor:
        x = _Raises.apply(self.first(x), raises == "early")
        return self.last(_Raises.apply(self.second(x), raises == "at once"))


def fail_once(
    rank: Rank, name: str, bucket_size_mb: float | None, cases: list[tuple[tuple[str, ...], bool]]
) -> list[tuple[int, dict, dict]]:
    """For where each rank's backward raises, and whether they finish it: one that raises, then one that does not.

    Returns how many reductions had begun when it raised, the averages of the next step and this rank's own gradients.
    """
    return [_failed_once(rank, name, bucket_size_mb, *case) for case in cases]


def _failed_once(
    rank: Rank, name: str, bucket_size_mb: float | None, raises: tuple[str, ...], finishes: bool
) -> tuple[int, dict, dict]:
    own = Fragile()
    x = batch_of(rank.rank)[0]
    own(x).square().mean().backward()
    module = Fragile()
    model: Any = wrap(name, module, bucket_size_mb)
    events: list[tuple] = []
    with recorded_reductions(events), contextlib.suppress(ArithmeticError):
        model(x, raises[rank.rank]).square().mean().backward()
    begun = len([event for event in events if event[0] == "reduce"])
    if finishes:
        model.finish_gradient_synchronization()
    model.zero_grad(set_to_none=rank.rank == 0)
    model(x).square().mean().backward()
    model.finish_gradient_synchronization()
    return begun, gradients_of(module), gradients_of(own)


# Gradients of other kinds -----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Parameters of several dtypes, one whose memory is not in the order of its dimensions, and an empty one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16, torch.complex64, torch.float32)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in dtypes)
        self.transposed = nn.Parameter(torch.randn(3, 5).T)
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, factor: float) -> Tensor:
        sums = [(weight.abs() * factor).square().sum().double() for weight in self.weights]
        return torch.stack([*sums, (self.transposed * factor).square().sum().double()]).sum() + self.empty.sum()


def mixed(rank: Rank, name: str, bucket_size_mb: float | None) -> tuple[dict, dict, list[tuple]]:
    """Averages of two steps' last, this rank's own gradients, and the reductions."""
    model: Any = wrap(name, Mixed(rank.rank), bucket_size_mb)
    own = Mixed(0)
    own(1.1 + rank.rank / 3).backward()
    events: list[tuple] = []
    for _ in range(2):
        events.clear()
        model.zero_grad()
        with recorded_reductions(events):
            model(1.1 + rank.rank / 3).backward()
            model.finish_gradient_synchronization()
    averages = gradients_of(model.module)
    return averages, gradients_of(own), [event for event in events if event[0] == "reduce"]


def sparse(_: Rank, name: str, bucket_size_mb: float | None) -> None:
    model: Any = wrap(name, nn.Embedding(5, 2, sparse=True), bucket_size_mb)
    model(torch.tensor([1, 2])).sum().backward()
    model.finish_gradient_synchronization()


# What cannot be wrapped -------------------------------------------------------------------------------------------


def _tied(is_tied: bool) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    if is_tied:
        module[1].weight = module[0].weight
    return module


def _with_buffer(length: int) -> nn.Module:
    module = nn.Linear(3, 3)
    module.register_buffer("table", torch.zeros(length))
    return module


DIFFERENT: dict[str, Callable[[int], nn.Module]] = {
    "shape": lambda rank: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4 + rank)),
    "order of dimensions": lambda rank: nn.Linear(3 + rank, 4 - rank, bias=False),
    "number": lambda rank: nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + rank)]),
    "dtype": lambda rank: nn.Linear(3, 3, dtype=(torch.float32, torch.float64)[rank]),
    "frozen": lambda rank: nn.Linear(3, 3).requires_grad_(rank == 0),
    "tied": lambda rank: _tied(rank == 1),
    "buffer": lambda rank: _with_buffer(2 + rank),
    "meta": lambda rank: nn.Linear(3, 3, device="meta" if rank else "cpu"),
    "lazy": lambda _: nn.LazyLinear(3),
}


def different(rank: Rank, name: str) -> dict[str, str]:
    """What each kind of difference between ranks raises on this rank."""
    told: dict[str, str] = {}
    cases: dict[str, Callable[[], object]] = {}
    for what, build in DIFFERENT.items():
        cases[what] = functools.partial(lambda make: wrap(name, make(rank.rank)), build)
    cases["bucket size"] = lambda: wrap("bucketed", nn.Linear(3, 3), 1 + rank.rank)
    cases["wrapper"] = lambda: wrap(("naive", "flat")[rank.rank], nn.Linear(3, 3))
    cases["twice"] = lambda: wrap(name, nn.Sequential(wrap(name, nn.Linear(3, 3))))
    for what, case in cases.items():
        try:
            case()
        except UserError as error:
            told[what] = str(error)
    return told


# Others -----------------------------------------------------------------------------------------------------------


def ranges(_: Rank, cases: list[tuple[str, float | None]]) -> list[list[str]]:
    """For each wrapper and bucket size, the ranges that a profiler shows of one step, as they begin."""
    shown = []
    for name, bucket_size_mb in cases:
        model: Any = wrap(name, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), bucket_size_mb)
        with torch.profiler.profile() as profiler, record_ranges():
            model(torch.randn(2, 3)).sum().backward()
            model.finish_gradient_synchronization()
        events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
        shown.append([event.name for event in events if event.name.startswith("communicate")])
    return shown


def leave(_: Rank, name: str, bucket_size_mb: float | None) -> tuple[list[tuple], list[str], int]:
    """Reductions of a module whose wrapper is gone, names in a wrapper's state, loaded again; trainable parameters."""
    module = nn.Linear(3, 3)
    wrapped = wrap(name, module, bucket_size_mb)
    names = list(wrapped.state_dict())
    wrapped.load_state_dict(wrapped.state_dict())
    del wrapped
    events: list[tuple] = []
    with recorded_reductions(events):
        module(torch.randn(2, 3)).sum().backward()
    nothing: Any = wrap(name, nn.Linear(3, 3).requires_grad_(False), bucket_size_mb)
    with recorded_reductions(events):
        nothing(torch.randn(2, 3))
        nothing.finish_gradient_synchronization()
    return events, names, sum(len(bucket) for bucket in nothing.buckets)


def averages_on_a_gpu(rank: Rank, names: tuple[str, ...]) -> dict[str, float]:
    """With the same input on every rank, by how much each wrapper's gradients differ from those without any."""
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rank.device)
    alone = toy(seed=0).to(rank.device)
    alone(x).square().sum().backward()
    found = {}
    for name in names:
        wrapped: Any = wrap(name, toy(seed=0).to(rank.device), BUCKET_MB if name == "bucketed" else None)
        wrapped(x).square().sum().backward()
        wrapped.finish_gradient_synchronization()
        pairs = zip(wrapped.parameters(), alone.parameters(), strict=True)
        grads = [
            (ours.grad, theirs.grad) for ours, theirs in pairs if ours.grad is not None and theirs.grad is not None
        ]
        assert grads
        found[name] = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in grads)
    return found

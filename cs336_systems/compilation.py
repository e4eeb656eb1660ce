"""torch.compile of a model, whole or block by block, and what the compiler made of it.

Whole, one graph is compiled of all blocks: Inductor may fuse across them, and compiles for as long as the model is
deep. Block by block, every block is compiled by itself; blocks of one shape share their code, so that the time does not
grow with the depth.

Dynamo turns Python into graphs, AOTAutograd derives the backward of each, Inductor makes code of both. The backward's
code is made when backward is first called, not before.

Where Dynamo cannot go on it ends a graph and begins another behind it: a graph break. What lies between runs as plain
Python, and nothing is fused across it. A function may even be left as it is. Both are counted here, with the reason and
the line. What does not compile at all is an error (`no_fallback`): an eager function timed as a compiled one would be
a wrong number.

Source: CS336 assignment 2, torch_compile; PyTorch's "Reducing torch.compile cold start compilation time with regional
compilation", and its notes on graph breaks and on recompilation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import torch
from torch import nn

from cs336_systems.errors import UserError, unknown_name

CompileMode = Literal["none", "model", "blocks"]
MODES: tuple[CompileMode, ...] = get_args(CompileMode)
STAGES = ("dynamo", "aot_autograd", "inductor")
"""The parts of a compilation, in their order."""
_MOST_COMPILATIONS = 4096
_LONGEST_REASON = 160


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that keeps them in a list called `layers`, as the course's does; else none."""
    blocks = getattr(model, "layers", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []


Backend = str | Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., Any]]


def compile_model(model: nn.Module, mode: str, backend: Backend = "inductor") -> None:
    """Have `model`, or each of its blocks, compiled when it is first called. In place: its parameters stay its own.

    Raises:
        UserError: an unknown mode; "blocks" of a model whose blocks are not in a list called `layers`.
    """
    if mode not in MODES:
        raise unknown_name("compile", mode, MODES)
    if mode == "model":
        model.compile(backend=backend)
    if mode == "blocks":
        blocks = blocks_of(model)
        if not blocks:
            raise UserError(
                f"{type(model).__name__} keeps no blocks in a ModuleList called `layers`, so they cannot be compiled "
                "one by one: compile the whole model"
            )
        for block in blocks:
            block.compile(backend=backend)


def inductor_apart() -> Backend:
    """Inductor as a backend that equals no other.

    Dynamo keeps what it compiled by function and backend, so that a twin whose functions were compiled before would
    find them there: after a graph break a whole model's blocks are compiled one by one, too.
    """
    from torch._dynamo.backends.registry import lookup_backend

    def inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = lookup_backend("inductor")(graph, inputs)
        return compiled

    return inductor


def twin_of(model: nn.Module) -> nn.Module:
    """The same model once more, on the very same parameters and buffers: to be compiled in another way."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


# What was compiled ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Break:
    """Why Dynamo ended a graph, or left a function as it is, and at which line of which file."""

    reason: str
    place: str
    """`file.py:12 in forward`, without the folder."""
    count: int


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler did meanwhile."""

    graphs: int
    """Graphs of forward functions that were compiled; the backward of one is none of its own."""
    breaks: tuple[Break, ...]
    """Graph breaks."""
    left: tuple[Break, ...]
    """Functions that run uncompiled, since Dynamo could not take up after a break in them, as within a loop."""
    forward_s: dict[str, float]
    """Seconds of each of `STAGES` for the functions as they were called, by PyTorch's own clock."""
    backward_s: dict[str, float]
    """The same of backward, where Dynamo has no part."""

    @property
    def seconds(self) -> float:
        return sum(self.forward_s.values()) + sum(self.backward_s.values())

    @property
    def graph_breaks(self) -> int:
        return sum(each.count for each in self.breaks)


class Watch:
    """What is compiled within `watch_compilation`; `compilation` is there when it has ended."""

    compilation: Compilation


@contextlib.contextmanager
def watch_compilation() -> Iterator[Watch]:
    """Note what is compiled within. PyTorch keeps such notes by process, so two at once would see each other's."""
    from torch._dynamo import utils  # with the whole compiler behind it, which only those who compile wait for

    utils.set_compilation_metrics_limit(_MOST_COMPILATIONS)
    utils.clear_compilation_metrics()
    before = len(utils.graph_break_reasons)
    watch = Watch()
    yield watch
    watch.compilation = _compilation(utils.get_compilation_metrics(), utils.graph_break_reasons[before:])


def _compilation(notes: Sequence[Any], reasons: Sequence[Any]) -> Compilation:
    """What PyTorch noted, in our words."""
    made = [note for note in notes if note.is_forward and note.has_guarded_code and note.graph_op_count]
    left = [note for note in notes if note.is_forward and note.fail_reason]
    return Compilation(
        graphs=len(made),
        breaks=_counted((_reason(each.reason), _place(each.user_stack)) for each in reasons),
        left=_counted(
            (_reason(note.fail_reason), f"{_file(note.co_filename)}:{note.co_firstlineno} in {note.co_name}")
            for note in left
        ),
        forward_s=_seconds([note for note in notes if note.is_forward]),
        backward_s=_seconds([note for note in notes if note.is_forward is False]),
    )


def _seconds(notes: Sequence[Any]) -> dict[str, float]:
    """PyTorch's clocks of the stages run inside one another; these are what each has for itself."""

    def total(*names: str) -> float:
        known = [next((getattr(note, name) for name in names if getattr(note, name, None)), 0) for note in notes]
        return float(sum(known)) / 1e6

    dynamo = total("dynamo_cumulative_compile_time_us")
    inductor = total("inductor_cumulative_compile_time_us")
    autograd = total("aot_autograd_cumulative_compile_time_us", "backward_cumulative_compile_time_us")
    parts = (max(0.0, dynamo - autograd), max(0.0, autograd - inductor), inductor)
    return dict(zip(STAGES, parts, strict=True))


def _counted(found: Any) -> tuple[Break, ...]:
    return tuple(Break(reason, place, count) for (reason, place), count in Counter(found).items())


def _reason(text: str) -> str:
    """The first line; a branch on a tensor is told by the name of the function that handles it."""
    line = str(text).strip().partition("\n")[0]
    if line.startswith("generic_jump"):
        line = f"branch on the value of a tensor ({line})"
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 1]}…"


def _place(stack: Sequence[Any]) -> str:
    if not stack:
        return "unknown place"
    return f"{_file(stack[-1].filename)}:{stack[-1].lineno} in {stack[-1].name}"


def _file(path: str | None) -> str:
    return PurePath(path).name if path else "unknown file"


# Never another thing than was asked for ------------------------------------------------------------------------


class CompileError(RuntimeError):
    """What was to be compiled was not, or not all of it."""


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Within, what cannot be compiled is an error of the call instead of running eagerly: see `failures_told`."""
    from torch._dynamo import config

    with config.patch(suppress_errors=False, fail_on_recompile_limit_hit=True):
        yield


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Around a call of what is compiled: the compiler's own errors in a line that says what was the matter.

    Raises:
        CompileError: the compiler failed, or (within `no_fallback`) compiled a function anew more often than PyTorch
            allows.
    """
    from torch._dynamo import config, exc

    exceeded = getattr(exc, "FailOnRecompileLimitHit", ())
    try:
        yield
    except exceeded as error:
        raise CompileError(
            "a function was compiled anew more often than torch._dynamo.config.recompile_limit "
            f"({config.recompile_limit}) allows, so part of the model would run eagerly{_last_recompilation()}"
        ) from error
    except exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"{type(error).__name__}: {' '.join(lines[:2])}") from error


def _last_recompilation() -> str:
    from torch._dynamo import utils

    reasons = [note.recompile_reason for note in utils.get_compilation_metrics() if note.recompile_reason]
    return f"; the last time because not {' '.join(_reason(reasons[-1]).split())}" if reasons else ""


def require_compiled(compilation: Compilation) -> None:
    """Raise a CompileError if the compiler made no graph at all, so that all would run eagerly."""
    if compilation.graphs:
        return
    left = "; ".join(f"{each.reason} ({each.place})" for each in (*compilation.left, *compilation.breaks))
    raise CompileError(f"nothing was compiled: {left or 'is torch.compile turned off (TORCH_COMPILE_DISABLE)?'}")


@contextlib.contextmanager
def compiled_or_error(mode: str) -> Iterator[None]:
    """Around all of what is built and called: an error unless, where that was asked for, something was compiled.

    Raises:
        CompileError: see `failures_told` and `require_compiled`.
    """
    if mode == "none":
        yield
        return
    with no_fallback(), failures_told(), watch_compilation() as watch:
        yield
    require_compiled(watch.compilation)


# Cold ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cold_caches(folder: Path) -> Iterator[None]:
    """Within, the compiler finds none of its earlier work: its cache is an empty folder inside `folder`.

    What it makes can still be called afterwards; the folder is removed. Remote caches are off unless configured.
    """
    from torch._inductor.utils import fresh_cache

    folder.mkdir(parents=True, exist_ok=True)
    # PyTorch leaves its folder behind after an error; this one is removed in any case.
    inside = tempfile.TemporaryDirectory(prefix="cold-", dir=folder, ignore_cleanup_errors=True)
    with inside as empty, fresh_cache(dir=empty):
        yield


@functools.cache
def prepare_compiler(device: str) -> None:
    """Compile a trivial function and its backward once per process: the compiler's own imports are no model's."""
    ones = torch.ones(64, device=device, requires_grad=True)
    torch.compile(_trivial)(ones).backward()


def _trivial(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() + 1).sum()

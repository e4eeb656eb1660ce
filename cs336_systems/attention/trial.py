"""An implementation of attention on trial: called on inputs made for one question, and compared with float64.

What an implementation raises, returns in another shape, or computes wrongly is a `Failed` with a sentence that says
where. Memory that it takes and does not write is NaN meanwhile, so that it cannot be right by luck.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from cs336_systems.attention import backends, oracle
from cs336_systems.attention.backends import AppliedFunction, AttentionFunction
from cs336_systems.attention.oracle import Exact, allowed_errors, deviation
from cs336_systems.errors import UserError, first_line

Scores = Literal["normal", "large", "rising"]


class Failed(Exception):
    """What was found wrong."""


class Raised(Failed):
    """The implementation raised something."""


class Skipped(Exception):
    """Why a rung asks nothing of this implementation."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one call."""

    queries: int = 16
    keys: int = 16
    head_dim: int = 16
    batch: int = 1
    heads: int = 1
    is_causal: bool = False
    scores: Scores = "normal"

    def __str__(self) -> str:
        parts = [f"{self.queries} queries", f"{self.keys} keys", f"head dimension {self.head_dim}"]
        parts += [f"batch {self.batch}"] * (self.batch > 1) + [f"{self.heads} heads"] * (self.heads > 1)
        return ", ".join([*parts, "causal" if self.is_causal else "no mask"])

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        """query, key, value and the gradient of the output, on the CPU; the same every time."""
        generator = torch.Generator().manual_seed(0)
        query, key, value, grad_output = (
            torch.randn(self.batch, self.heads, length, self.head_dim, generator=generator, dtype=torch.float64)
            for length in (self.queries, self.keys, self.keys, self.queries)
        )
        if self.scores == "large":
            # Scores up to three times what exp can bear. 16-bit inputs are usually computed in float32.
            computed = torch.float64 if dtype == torch.float64 else torch.float32
            largest = (query @ key.mT).abs().max() / math.sqrt(self.head_dim)
            query *= 3 * math.log(torch.finfo(computed).max) / largest
        if self.scores == "rising":
            # About −140 at the first key and −120 at the last: below what exp can tell from 0 in float32.
            query[..., 0] = 8.0
            key[..., 0] = torch.linspace(-140.0, -120.0, self.keys) * math.sqrt(self.head_dim) / 8
        return [x.to(dtype) for x in (query, key, value, grad_output)]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The implementation on the ladder, where it runs and in which precision."""

    function: AttentionFunction
    device: torch.device
    dtype: torch.dtype

    def call(self, case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output as the implementation shapes it: a class of the course's interface knows no heads."""
        shape = query.shape
        with self.watched(case, ""):
            if isinstance(self.function, AppliedFunction):
                query, key, value = (x.flatten(0, 1) for x in (query, key, value))
                output: Any = self.function.function.apply(query, key, value, case.is_causal)
            else:
                output = self.function(query, key, value, is_causal=case.is_causal)
        expected = (*query.shape[:-1], value.shape[-1])
        if not isinstance(output, Tensor):
            raise Failed(f"it returned {_described(output)}, where one tensor of shape {expected} is expected ({case})")
        if tuple(output.shape) != expected:
            raise Failed(f"the output is of shape {tuple(output.shape)}, not {expected} ({case})")
        if output.dtype != query.dtype:
            raise Failed(f"the output is {output.dtype} for inputs of {query.dtype}: return it in their precision")
        if output.device != query.device:
            raise Failed(f"the output is on {output.device}, the inputs are on {query.device}")
        return output.reshape(*shape[:-1], -1)

    def gradients(self, case: Case, leaves: list[Tensor], output: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
        """Of query, key and value, as far as there are any."""
        if not output.requires_grad:
            raise Failed("the output has no gradient: it was computed under no_grad, or detached")
        with self.watched(case, "in backward, "):
            # One call for the three: that is what training does.
            found = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
        grads = zip(("grad_query", "grad_key", "grad_value"), found, strict=True)
        return {name: grad for name, grad in grads if grad is not None}

    @contextlib.contextmanager
    def watched(self, case: Case, where: str) -> Iterator[None]:
        """What the implementation raises is told in a sentence; unwritten memory is NaN meanwhile."""
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
        except UserError:
            raise
        except Exception as error:  # whatever it raises is theirs to see
            raise Raised(f"{where}it raised {first_line(error)}{self.place_of(error)} ({case})") from error
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]

    def place_of(self, error: Exception) -> str:
        """` at file:line`, the last of the implementation's own lines that the error came through."""
        home = _home_of(self.function)
        ours = {Path(file) for file in (__file__, str(oracle.__file__), str(backends.__file__))}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if home is None or path in ours or not path.is_relative_to(home):
                continue
            if not {"site-packages", "dist-packages"} & set(path.relative_to(home).parts):
                return f" at {path.name}:{frame.lineno}"
        return ""


def _described(result: object) -> str:
    return f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple) else "")


def _home_of(function: AttentionFunction) -> Path | None:
    """The folder of the implementation's source, as far as that can be told."""
    found: Any = getattr(function, "_torchdynamo_orig_callable", function)
    found = found.function if isinstance(found, AppliedFunction) else inspect.unwrap(found)
    for candidate in (found, type(found)):
        with contextlib.suppress(TypeError, OSError):
            return Path(inspect.getfile(candidate)).parent
    return None


# Checks ----------------------------------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "dimension before length": lambda x: x.mT.contiguous().mT,
        "batch after length": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
        "heads after length": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
    }
)


def _compare(subject: Subject, exact: Exact, found: Mapping[str, Tensor], said: object) -> None:
    """Raise what is wrong with the results, in the order they are given."""
    tf32 = subject.dtype == torch.float32 and subject.device.type == "cuda"
    allowed = allowed_errors(exact, subject.dtype, tf32=tf32)
    for name, result in found.items():
        expected: Tensor = getattr(exact, name)
        if name != "logsumexp" and (result.shape, result.dtype) != (expected.shape, subject.dtype):
            told = f"{oracle.RESULTS[name]} is {result.dtype} of shape {tuple(result.shape)}"
            raise Failed(f"{told}, not {subject.dtype} of {tuple(expected.shape)} ({said})")
        wrong = deviation(name, result, exact, allowed[name])
        if wrong is not None:
            raise Failed(f"{wrong}\n({said})")


def _exact(case: Case, inputs: list[Tensor]) -> Exact:
    query, key, value, grad_output = inputs
    return Exact.of(query, key, value, grad_output, 0 if case.is_causal else None)


def forward(subject: Subject, *cases: Case, layout: Layout = lambda x: x, said: str = "") -> None:
    """The output is right."""
    for case in cases:
        inputs = case.draw(subject.dtype)
        query, key, value = (layout(x.to(subject.device, copy=True)) for x in inputs[:3])
        output = subject.call(case, query, key, value)
        _compare(subject, _exact(case, inputs), {"output": output}, f"{case}{said}")


def strided(subject: Subject) -> None:
    for name, layout in LAYOUTS.items():
        # Heads that can be folded into the batch without a copy, except where they are what is strided.
        heads = 2 if name == "heads after length" else 1
        case = Case(64, 64, 32, batch=2, heads=heads)
        forward(subject, case, layout=layout, said=f", in memory: {name}")


def gradient(
    subject: Subject,
    *cases: Case,
    names: tuple[str, ...] = ("grad_value", "grad_query", "grad_key"),
    ones: bool = False,
) -> None:
    """The gradients are right, and with them the output."""
    for case in cases:
        inputs = case.draw(subject.dtype)
        *leaves, grad_output = (x.to(subject.device, copy=True) for x in inputs)
        if ones:
            # As .sum().backward() makes it: one number, with stride 0 everywhere.
            grad_output = grad_output.new_ones(()).expand(grad_output.shape)
            inputs[3] = torch.ones_like(inputs[3])
        leaves = [x.requires_grad_() for x in leaves]
        # What is changed in place may be no leaf; that it is changed shows at a rung of its own.
        output = subject.call(case, *(x.clone() for x in leaves))
        grads = subject.gradients(case, leaves, output, grad_output)
        missing = [oracle.RESULTS[name].removeprefix("the ") for name in names if name not in grads]
        if missing:
            raise Failed(f"there is no {', no '.join(missing)}: backward gave None ({case})")
        found = {"output": output} | {name: grads[name] for name in names}
        _compare(subject, _exact(case, inputs), found, case)


def other_upstream(subject: Subject) -> None:
    """Right for one gradient of the output, and after that for another, of other strides."""
    case = Case(64, 64, 32, batch=2)
    gradient(subject, case)
    gradient(subject, case, ones=True)
    gradient(subject, case)


def batch_items(subject: Subject) -> None:
    """Right, and an item that changes leaves the others as they are to the last bit."""
    case = Case(64, 64, 32, batch=3)
    forward(subject, case)
    inputs = [x.to(subject.device, copy=True) for x in case.draw(subject.dtype)[:3]]
    before = subject.call(case, *(x.clone() for x in inputs))
    for x in inputs:
        x[1] *= -2
    after = subject.call(case, *inputs)
    touched = [item for item in (0, 2) if not torch.equal(before[item], after[item])]
    if touched:
        items = " and ".join(map(str, touched))
        raise Failed(f"batch item 1 was changed, and the output of batch item {items} changed with it ({case})")


def saved_logsumexp(subject: Subject) -> None:
    """One saved tensor of one number per query is the logsumexp: what backward needs, and what the course grades."""
    if not isinstance(subject.function, AppliedFunction):
        raise Skipped("a function shows no saved tensors; name the class derived from torch.autograd.Function")
    for case in (Case(128, 64, 32, batch=2), Case(128, 128, 32, batch=2, is_causal=True)):
        inputs = case.draw(subject.dtype)
        query, key, value = (x.to(subject.device, copy=True).flatten(0, 1).requires_grad_() for x in inputs[:3])
        with subject.watched(case, ""):
            output: Any = subject.function.function.apply(query, key, value, case.is_causal)
            saved = [x for x in getattr(getattr(output, "grad_fn", None), "saved_tensors", ()) if x is not None]
        shape = (case.batch, case.queries)
        fitting = [x for x in saved if tuple(x.shape) == shape]
        if len(fitting) != 1:
            shapes = ", ".join(str(tuple(x.shape)) for x in saved) or "none"
            raise Failed(f"{len(fitting)} saved tensors are of shape {shape}, not 1; saved: {shapes}")
        _compare(subject, _exact(case, inputs), {"logsumexp": fitting[0][:, None]}, case)


def unchanged_inputs(subject: Subject) -> None:
    """Neither forward nor backward writes into what it was given."""
    case = Case(64, 64, 32, batch=2, is_causal=True)
    *leaves, grad_output = (x.to(subject.device, copy=True) for x in case.draw(subject.dtype))
    leaves = [x.requires_grad_() for x in leaves]
    given = [x.clone() for x in leaves]
    names = ("Q", "K", "V", "dO")
    output = subject.call(case, *given)
    before = (*leaves, grad_output.clone())
    for when in ("forward", "backward"):
        pairs = zip(names, before, (*given, grad_output), strict=True)
        changed = [name for name, old, new in pairs if not torch.equal(old.detach(), new.detach())]
        if changed:
            raise Failed(f"{when} changed {' and '.join(changed)} in place")
        if when == "forward":
            subject.gradients(case, leaves, output, grad_output)


def in_precision(subject: Subject, dtype: torch.dtype) -> None:
    """Output and gradients are as exact as a precision lets them be, and of that precision."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if interpreted and dtype == torch.bfloat16 and subject.device.type == "cpu":
        raise Skipped("Triton's interpreter computes in NumPy, which has no bfloat16")
    changed = dataclasses.replace(subject, dtype=dtype)
    for is_causal in (False, True):
        forward(changed, Case(128, 128, 64, heads=2, is_causal=is_causal))
        gradient(changed, Case(128, 128, 64, heads=2, is_causal=is_causal))

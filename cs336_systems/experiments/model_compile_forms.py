"""One form of a model, a phase of it eager or compiled: how it is called first, timed, weighed and compared.

All forms share the parameters of one model: what is compiled is a twin of it, and traffic is counted of the eager one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cs336_systems.bench.allocator import allocated_bytes, is_out_of_memory
from cs336_systems.bench.contest import Contender
from cs336_systems.bench.timing import synchronize
from cs336_systems.compilation import (
    Compilation,
    cold_caches,
    compile_model,
    failures_told,
    inductor_apart,
    require_compiled,
    twin_of,
    watch_compilation,
)
from cs336_systems.errors import UserError, first_line
from cs336_systems.exactness import Exact, exact_results
from cs336_systems.profiling.traffic import operator_traffic
from cs336_systems.repository import cache_folder
from cs336_systems.step import BuiltStep, StepConfig, step_of

if TYPE_CHECKING:
    from cs336_systems.experiments.model_compile import Case

EAGER = "none"


class Form(Contender):
    """One phase of one form of the model."""

    def __init__(self, phase: str, mode: str, case: Case, run: BuiltStep) -> None:
        super().__init__(name_of(phase, mode), case.device)
        self.phase, self.mode, self.run = phase, mode, run

    def call(self) -> object:
        with failures_told():
            return self.run()

    def first(self, exact: Sequence[Exact], *, is_uncompiled: bool) -> None:
        """The first call and the second, what was compiled meanwhile, and how far off its logits are, if it gives any.

        `is_uncompiled`: nothing was compiled for an earlier phase, so that something must be now.
        """
        with watch_compilation() as watch:
            first_s, result = self.timed()
        second_s, _ = self.timed()
        if self.mode != EAGER:
            if is_uncompiled:
                require_compiled(watch.compilation)
            self.values |= {"compile_s": max(0.0, first_s - second_s), **_told(watch.compilation)}
        if isinstance(result, Tensor):
            for each in exact:
                self.values |= each.errors_of(result.detach())

    def timed(self) -> tuple[float, object]:
        synchronize(self.device)
        start = time.perf_counter()
        result = self.call()
        synchronize(self.device)
        return time.perf_counter() - start, result

    def weigh(self) -> None:
        """What one untimed pass has allocated at most, beyond what is there before."""
        self.values["peak_bytes"], _ = allocated_bytes(self.call, self.device)


def name_of(phase: str, mode: str) -> str:
    """The contender's name: the form, then the phase."""
    return f"{mode} {phase}"


def _told(found: Compilation) -> dict[str, Any]:
    return {
        "graphs": found.graphs,
        "breaks": [dataclasses.asdict(each) for each in found.breaks],
        "left": [dataclasses.asdict(each) for each in found.left],
        "forward_stages_s": found.forward_s,
        "backward_stages_s": found.backward_s,
    }


def compare(case: Case, built: BuiltStep) -> Exact:
    """Logits and loss in float64.

    Raises:
        UserError: the model cannot be run in float64.
    """
    try:
        return exact_results(built.model, built.batch, case.formulation)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the model does not run in float64: {first_line(error)}") from error


def first_calls(
    case: Case,
    phases: Sequence[str],
    mode: str,
    forms: list[Form],
    built: BuiltStep,
    exact: Sequence[Exact],
    on_form: Callable[[], object],
) -> None:
    """Append these phases of one form to `forms`, called; where one falls out, so do those after it, for its reason."""
    model = forms[0].run.model if forms else built.model if mode == EAGER else twin_of(built.model)
    with cold_caches(cache_folder()):
        for phase in phases:
            form = Form(phase, mode, case, step_of(case.step(phase), model, built.optimizer, built.batch))
            if forms and forms[-1].status != "ok":
                form.status, form.reason = forms[-1].status, forms[-1].reason
            if not forms:
                form.attempt(partial(compile_model, model, mode, inductor_apart()))
            form.attempt(partial(form.first, exact, is_uncompiled=not forms))
            form.attempt(form.weigh)
            forms.append(form)
            on_form()


def count_traffic(traffic: Contender, chosen: StepConfig, built: BuiltStep) -> None:
    """Of the eager model alone: loss and optimizer are not compiled, and no part of what compiling can save."""
    tokens, _ = built.batch
    is_mixed = chosen.autocast != "none"
    half = getattr(torch, chosen.autocast) if is_mixed else torch.bfloat16
    autocast = torch.autocast(chosen.device, dtype=half, enabled=is_mixed)

    def call() -> None:
        with torch.set_grad_enabled(chosen.phase != "inference"), autocast:
            logits = built.model(tokens)
        if chosen.has_backward:
            logits.backward(torch.ones_like(logits))

    built.optimizer.zero_grad(set_to_none=True)
    traffic.values[chosen.phase] = dataclasses.asdict(operator_traffic(call))

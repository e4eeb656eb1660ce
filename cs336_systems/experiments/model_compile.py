"""A whole Transformer, eager beside compiled whole and block by block: time per phase, compilation, memory, error.

Problem `torch_compile` (b). One case is one model, context and precision. All its forms share one set of parameters,
and all its phases one compilation of a form: the forward of a training step is the forward that was timed before. A
round runs every form of every phase in turn, so that a disturbance hits all.

Compilation is cold: a form's first calls find an empty cache folder, in a process that has compiled a trivial function
before, so that what is counted is the model's and not the compiler's own imports. The stopwatch takes the first call
less the second; PyTorch's clocks beside it say how much of it was Dynamo's, AOTAutograd's and Inductor's. The optimizer
is not compiled.

Running out of memory, what does not compile and what falls back to eager is told for the form, and leaves the others.

Source: CS336 assignment 2, torch_compile (b).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published import PublishedSteps
from cs336_systems.bench import grid as grids
from cs336_systems.bench.contest import Contender, measurement_of
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.bench.timing import describe, float32_matmul_precision, time_rounds
from cs336_systems.compilation import MODES, STAGES, no_fallback, prepare_compiler, watch_compilation
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.exactness import Exact
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.model_compile_forms import EAGER, Form, compare, count_traffic, first_calls, name_of
from cs336_systems.experiments.transformer_step import bound_ms, require_memory
from cs336_systems.model import TransformerConfig, model_size
from cs336_systems.step import PHASES, PHASES_OF_TRAINING, StepConfig, build_step, size_name

EXACT, TRAFFIC = "float64", "traffic"
COMPILE_STAGES = tuple(f"{stage}_s" for stage in STAGES)
PUBLISHED_WARMUP = 5
"""Every form is called several times before it is timed: what was published for steady steps stands beside."""
LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"tiny": [128], "small": [128]}
LAPTOP_PHASES: Mapping[str, Sequence[str]] = {"tiny": PHASES_OF_TRAINING, "small": ["forward"]}
DEEPEST_WHOLE_ON_CPU = 4
"""Compiling the dozen blocks of the smallest of the handout's sizes as one takes longer than all the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model in several forms. All of it is checked on creation.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    context_length: int
    device: str
    vocab_size: int = 10_000
    rope_theta: float = 10_000.0
    batch_size: int = 4
    phases: tuple[str, ...] = PHASES_OF_TRAINING
    modes: tuple[str, ...] = MODES
    """What torch.compile is given, in the order in which a round runs them: none, the model, or its blocks."""
    dtype: str = "float32"
    autocast: str = "none"
    float32_matmul: str = "highest"
    attention: str = "reference"
    formulation: str = "reference"
    optimizer: str = "reference"
    rope: str = "2025"
    model: str | None = None
    warmup: int = 1
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("phases", PHASES), ("modes", MODES)):
            chosen = tuple(getattr(self, name))  # a list, as records have it
            for each in chosen:
                if each not in known:
                    raise unknown_name(name.removesuffix("s"), each, known)
            if not chosen:
                raise UserError(f"{name} is empty: name one or more of {', '.join(known)}")
            object.__setattr__(self, name, tuple(each for each in known if each in chosen))
        step = self.step(self.phases[0])  # validates the rest
        step.require_whole("batch_size", 1)
        for name, least in (("warmup", 0), ("rounds", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, found {value!r}")

    def step(self, phase: str, mode: str = EAGER) -> StepConfig:
        """One phase of one form as a step."""
        names = {field.name for field in dataclasses.fields(StepConfig)} - {"phase", "compile", "checkpointing"}
        return StepConfig(phase=phase, compile=mode, **{name: getattr(self, name) for name in names})

    @property
    def config(self) -> TransformerConfig:
        return self.step(self.phases[0]).config

    @property
    def size(self) -> str:
        """The name of the size, whatever its context length, or "custom"."""
        return size_name(self.config)

    @property
    def object_references(self) -> tuple[str, ...]:
        """Implementations from outside, whose source a record depends on beside what every case uses."""
        return self.step(self.phases[0]).object_references

    def __str__(self) -> str:
        tf32 = ", TF32" if self.float32_matmul == "high" else ""
        return f"{self.size}, context {self.context_length}{tf32}, compiled"


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    phases: Mapping[str, Sequence[str]] | Sequence[str] = LAPTOP_PHASES,
    modes: Sequence[str] | None = None,
    batch_size: int = 4,
    dtype: str = "float32",
    autocast: str | Sequence[str] = "none",
    float32_matmul: str | Sequence[str] = "highest",
    attention: str = "reference",
    formulation: str = "reference",
    optimizer: str = "reference",
    rope: str = "2025",
    model: str | None = None,
    device: str = "auto",
    warmup: int = 1,
    rounds: int = 3,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Sizes × contexts × precisions.

    Args:
        contexts: the context lengths of each size, by its name.
        phases: those of each size, by its name, or one list for all.
        modes: what torch.compile is given; by default all, but on a CPU no whole model of more than
            DEEPEST_WHOLE_ON_CPU blocks.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    if not isinstance(contexts, Mapping) or not contexts:
        raise UserError(f"contexts must map size names to lists of context lengths, found {contexts!r}")
    device = resolve_device(device)
    cells: list[grids.Cell[Case]] = []
    for name, lengths in contexts.items():
        size = model_size(name)
        cells += grids.product(
            Case,
            skip=_skip_reason,
            float32_matmul=float32_matmul,
            autocast=autocast,
            d_model=size.d_model,
            d_ff=size.d_ff,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            vocab_size=size.vocab_size,
            context_length=lengths,
            phases=[_phases_of(name, phases)],
            modes=[_modes_of(size, device, modes)],
            batch_size=batch_size,
            dtype=dtype,
            attention=attention,
            formulation=formulation,
            optimizer=optimizer,
            rope=rope,
            model=model,
            device=device,
            warmup=warmup,
            rounds=rounds,
            seed=seed,
        )
    return cells


def _phases_of(size: str, phases: Mapping[str, Sequence[str]] | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(phases, Mapping):
        return tuple(phases)
    if size not in phases:
        raise UserError(
            f"phases names none for {size}, but {', '.join(phases) or 'no size'}: name some, or give a list"
        )
    return tuple(phases[size])


def _modes_of(size: TransformerConfig, device: str, modes: Sequence[str] | None) -> tuple[str, ...]:
    if modes is not None:
        return tuple(modes)
    is_deep = device == "cpu" and size.num_layers > DEEPEST_WHOLE_ON_CPU
    return tuple(mode for mode in MODES if not (is_deep and mode == "model"))


def _skip_reason(case: Case) -> str | None:
    if case.device == "cpu" and case.float32_matmul != "highest":
        return "TF32 is a format of a GPU's tensor cores: a CPU has none"
    return None


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Compile every form, then time `rounds` rounds of all forms of all phases.

    Samples: `<form> <phase> ms`, wall clock with the synchronisation. Values: by `<form> <phase>` its status, the error
    of its logits and loss, the peak of its allocations, and of what is compiled the seconds, graphs and breaks that
    this phase added to those before it; `traffic` by phase the bytes of eager operators; how many graphs were compiled
    while it was timed, of which there should be none.

    Raises:
        OutOfMemory: weights, gradients and optimizer state alone exceed what is available.
    """
    for phase in case.phases:
        require_memory(case.step(phase))
    torch.manual_seed(case.seed)
    parts = len(case.modes) * len(case.phases) + case.warmup + case.rounds
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_part(done / parts)

    exact, traffic = Contender(EXACT, case.device), Contender(TRAFFIC, case.device)
    with float32_matmul_precision(case.float32_matmul), no_fallback():
        torch.compiler.reset()
        prepare_compiler(case.device)
        built = build_step(case.step(case.phases[0]))
        found: list[Exact] = []
        exact.attempt(lambda: found.append(compare(case, built)))
        forms: dict[str, list[Form]] = {mode: [] for mode in case.modes}
        for phases in _apart(case.phases):
            for mode in case.modes:
                first_calls(case, phases, mode, forms[mode], built, found, count)
        found.clear()
        every = [form for phase in zip(*forms.values(), strict=True) for form in phase]
        calls = {f"{form.name} ms": partial(form.attempt, form.call) for form in every if form.status == "ok"}
        with watch_compilation() as watch:
            timings = time_rounds(calls, warmup=case.warmup, rounds=case.rounds, device=case.device, on_round=count)
        for phase in case.phases:
            traffic.attempt(partial(count_traffic, traffic, case.step(phase), built))
    samples = {name: timing.samples_ms for name, timing in timings.items()}
    measured = measurement_of([*every, exact, traffic], samples)
    measured.values["compiled_while_timed"] = watch.compilation.graphs
    return measured


def _apart(phases: Sequence[str]) -> list[list[str]]:
    """The phases that leave the parameters as they are, then the one that does not: its logits would be others."""
    return [
        group for group in ([each for each in phases if each != "step"], ["step"] if "step" in phases else []) if group
    ]


# Summarising ---------------------------------------------------------------------------------------------------


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case and phase: products, the bytes that are compulsory, and the floor of any form."""
    rows = []
    for case in cases:
        for phase in case.phases:
            predicted = transformer_step.predict([transformer_step.Case(**dataclasses.asdict(case.step(phase)))], peaks)
            rows.append(predicted)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record, phase and form: its times beside the floor, what compiling it took, its errors, its peak.

    Of what is compiled, seconds and graphs are those of a phase and of what it needs from the phases before it.
    """
    published = PublishedSteps((store or Store.default()).reference)
    return pd.DataFrame(
        [row for record in records for row in _rows_of(record, Case(**record.case), peaks, published, fingerprint)]
    )


def _rows_of(
    record: Record, case: Case, peaks: Peaks, published: PublishedSteps, fingerprint: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    fields = {name: value for name, value in record.case.items() if name not in ("phases", "modes")}
    values = record.measurement.values
    for phase in case.phases:
        floor_ms, limited_by = bound_ms(case.step(phase), peaks)
        traffic = values.get(TRAFFIC, {}).get(phase, {})
        other_bytes = traffic.get("other_bytes", math.nan)
        for mode in case.modes:
            found = values.get(name_of(phase, mode), {})
            samples = record.measurement.samples.get(f"{name_of(phase, mode)} ms", [])
            statistics = describe(samples) if samples else None
            yield {
                "size": case.size,
                **fields,
                "phase": phase,
                "compile": mode,
                "checkpointing": "none",
                "case": record.key,
                **record.circumstances(fingerprint),
                "status": found.get("status", record.status),
                "reason": found.get("reason", record.reason),
                "mean_ms": statistics.mean if statistics else math.nan,
                "std_ms": statistics.std if statistics else math.nan,
                "median_ms": statistics.median if statistics else math.nan,
                "bound_ms": floor_ms,
                "bound_by": limited_by,
                "bound_lacks": peaks.lacks if math.isnan(floor_ms) else "",
                "peak_bytes": found.get("peak_bytes", math.nan),
                "logits_error": found.get("logits_error", math.nan),
                "loss_error": found.get("loss_error", math.nan),
                "other_bytes": other_bytes,
                "other_operators": traffic.get("other_operators", math.nan),
                "other_ms": 1e3 * other_bytes / peaks.bandwidth_bytes_per_s,
                "compiled_while_timed": values.get("compiled_while_timed", math.nan),
                **_compilation_of(values, case, phase, mode),
                **published.beside(
                    case.config,
                    phase=phase,
                    batch_size=case.batch_size,
                    autocast=case.autocast,
                    tf32=case.float32_matmul == "high",
                    compiled=mode != EAGER,
                    warmup=PUBLISHED_WARMUP,
                )
                | ({"h100_ms": math.nan} if mode == "blocks" else {}),
            }


def _compilation_of(values: Mapping[str, Any], case: Case, phase: str, mode: str) -> dict[str, Any]:
    """What compiling for a phase took, with the phases whose graphs it uses: training has one forward for all."""
    is_training = phase in PHASES_OF_TRAINING
    before = [
        each for each in case.phases[: case.phases.index(phase) + 1] if (each in PHASES_OF_TRAINING) is is_training
    ]
    parts = [values.get(name_of(each, mode), {}) for each in before]
    if not all("compile_s" in part for part in parts):
        nothing: dict[str, Any] = dict.fromkeys(("compile_s", "graphs", "graph_breaks", *COMPILE_STAGES), math.nan)
        return nothing | {"breaks": ()}
    told = [("graph break", each) for part in parts for each in part["breaks"]]
    told += [("left uncompiled", each) for part in parts for each in part["left"]]
    stages = [part[f"{way}_stages_s"] for part in parts for way in ("forward", "backward")]
    return {
        "compile_s": sum(part["compile_s"] for part in parts),
        "graphs": sum(part["graphs"] for part in parts),
        "graph_breaks": sum(each["count"] for part in parts for each in part["breaks"]),
        "breaks": tuple((kind, each["reason"], each["place"], each["count"]) for kind, each in told),
        **{f"{stage}_s": sum(each[stage] for each in stages) for stage in STAGES},
    }


def published_steps(store: Store | None = None) -> pd.DataFrame:
    """Training steps as others measured them on an H100, eager and compiled whole, in milliseconds."""
    rows = (store or Store.default()).reference("transformer_train_step_h100")
    columns = {"eager_s": "eager_ms", "compile_s": "compiled_ms", "compile_tf32_s": "compiled_tf32_ms"}
    return rows.assign(**{new: 1e3 * rows[old] for old, new in columns.items()}).drop(columns=list(columns))


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """About how long a case takes: every form's rounds at its floor's multiple, and compilation by depth."""
    calls = case.warmup + case.rounds + 3
    steps_s = sum(bound_ms(case.step(phase), peaks)[0] for phase in case.phases) * slowdown / 1e3
    passes = 2 if any(case.step(phase).has_backward for phase in case.phases) else 1
    compiled_s = {"none": 0.0, "blocks": BLOCK_S, "model": BLOCK_S + DEPTH_S * case.num_layers}
    return calls * len(case.modes) * steps_s + passes * sum(compiled_s[mode] for mode in case.modes)


BLOCK_S, DEPTH_S = 5.0, 1.0
"""About what compiling one pass of a block takes, and of the whole model for each of its blocks."""

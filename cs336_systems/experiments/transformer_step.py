"""The time of a Transformer's forward pass, forward and backward, and whole training step.

Problem `benchmarking_script`. A model with random weights sees random tokens; every step (`cs336_systems/step.py`) ends
with a synchronisation.

Each measured time stands beside its floor (`analysis/roofline.py`) and what others published for the same work.

Source: CS336 assignment 2, section 1.1.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis import flops
from cs336_systems.analysis.footprint import CPU, Footprint, plan_step
from cs336_systems.analysis.hardware import GPUS, Peaks, identify_gpu, product_precision
from cs336_systems.analysis.measured_times import predicted_columns
from cs336_systems.analysis.published import PublishedSteps
from cs336_systems.analysis.published_times import (
    TablePrediction,
    predict_table,
    published_estimate,
    published_tables,
)
from cs336_systems.analysis.roofline import bound, operators_seconds, step_bound
from cs336_systems.bench import grid as grids
from cs336_systems.bench.allocator import PeakMemory, available_bytes, describe_memory
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import bytes_in_words
from cs336_systems.bench.sweep import OnPart, OutOfMemory
from cs336_systems.bench.timing import describe, float32_matmul_precision, time_steps
from cs336_systems.compilation import compiled_or_error
from cs336_systems.errors import UserError
from cs336_systems.model import model_size
from cs336_systems.step import PHASES, PHASES_OF_TRAINING, Phase, StepConfig, build_step

LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"tiny": [128, 256], "mini": [128], "small": [128]}


@dataclasses.dataclass(frozen=True)
class Case(StepConfig):
    """One timed step.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    warmup: int = 5
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("warmup", 0)
        self.require_whole("steps", 1)
        self.require_whole("seed", 0)


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    phases: Sequence[str] = PHASES_OF_TRAINING,
    batch_size: int = 4,
    dtype: str = "float32",
    autocast: str | Sequence[str] = "none",
    float32_matmul: str | Sequence[str] = "highest",
    compile: str | Sequence[str] = "none",
    attention: str | Sequence[str] = "reference",
    formulation: str | Sequence[str] = "reference",
    optimizer: str = "reference",
    rope: str = "2025",
    checkpointing: str | Sequence[str] = "none",
    model: str | None = None,
    device: str = "auto",
    warmup: int = 2,
    steps: int = 3,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Sizes × contexts × phases, and whatever other axis is given several values.

    Args:
        contexts: the context lengths of each size, by its name.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    if not isinstance(contexts, Mapping) or not contexts:
        raise UserError(f"contexts must map size names to lists of context lengths, found {contexts!r}")
    cells: list[grids.Cell[Case]] = []
    for name, lengths in contexts.items():
        size = model_size(name)
        cells += grids.product(
            Case,
            d_model=size.d_model,
            d_ff=size.d_ff,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            vocab_size=size.vocab_size,
            context_length=lengths,
            phase=phases,
            batch_size=batch_size,
            dtype=dtype,
            autocast=autocast,
            float32_matmul=float32_matmul,
            compile=compile,
            attention=attention,
            formulation=formulation,
            optimizer=optimizer,
            rope=rope,
            checkpointing=checkpointing,
            model=model,
            device=resolve_device(device),
            warmup=warmup,
            steps=steps,
            seed=seed,
        )
    return cells


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Time the steps of one case, and the peak of memory over set-up and steps.

    Samples: `step_ms`, `warmup_ms`, and on a GPU `device_ms` by CUDA events. Values: `PeakMemory`'s, and what was
    planned: `planned_allocated_bytes`, on a GPU `planned_reserved_bytes`.

    Raises:
        OutOfMemory: the step is planned to hold more than is available.
    """
    plan = require_memory(case)
    torch.manual_seed(case.seed)
    done = 0

    def count_step() -> None:
        nonlocal done
        done += 1
        on_part(done / (case.warmup + case.steps))

    products = float32_matmul_precision(case.float32_matmul)
    with PeakMemory(case.device) as memory, products, compiled_or_error(case.compile):
        step = build_step(case)
        counted = count_products(step) if case.model is not None and case.compile == "none" else {}
        timing = time_steps(step, warmup=case.warmup, steps=case.steps, device=case.device, on_step=count_step)
    samples = {"step_ms": timing.samples_ms, "warmup_ms": timing.warmup_ms, "device_ms": timing.device_ms}
    return Measurement(
        samples={name: list(values) for name, values in samples.items() if values},
        values=memory.values | counted | planned_values(plan),
    )


def count_products(step: Callable[[], object]) -> dict[str, int]:
    """The FLOPs of one step by PyTorch's counter: of somebody else's model the architecture is not known."""
    with FlopCounterMode(display=False) as counter:
        step()
    return {"flops": counter.get_total_flops()}


_HELD = {
    "inference": "weights",
    "forward": "weights",
    "forward-backward": "weights and gradients",
    "step": "weights, gradients and optimizer state",
}


def plan_of(case: StepConfig, gpu: str | None = None) -> Footprint | None:
    """The memory that a step is planned to take; None where no plan can be made.

    `gpu`: whose plan, for a case of a GPU, by its key; by default this machine's.
    """
    device = CPU if case.device == "cpu" else gpu
    if device is None and torch.cuda.is_available():
        device = identify_gpu(torch.cuda.get_device_name())
    try:
        return None if device is None else plan_step(case, device)
    except UserError:  # measuring itself says what is wrong, if anything is
        return None


def planned_values(plan: Footprint | None) -> dict[str, int]:
    """Of a plan what a record keeps, to stand beside what was measured."""
    if plan is None:
        return {}
    values = {"planned_allocated_bytes": plan.peak_allocated_bytes}
    return values | ({} if plan.device == CPU else {"planned_reserved_bytes": plan.peak_reserved_bytes})


def require_memory(case: StepConfig) -> Footprint | None:
    """Refuse what cannot fit before it is built, and return the plan of what can; None where there is no plan.

    Raises:
        OutOfMemory: the step, or already what it must hold at once, takes more than the device has left.
    """
    phase = checked_phase(case)
    needed = flops.resident_bytes(case.config, phase, itemsize=getattr(torch, case.dtype).itemsize)
    available = available_bytes(case.device)
    if needed > available:
        raise OutOfMemory(
            f"{_HELD[phase]} need at least {bytes_in_words(needed)}, and {bytes_in_words(available)} are available: "
            "take a smaller size"
        )
    plan = plan_of(case)
    if plan is not None and plan.peak_allocated_bytes > available:
        raise OutOfMemory(
            f"the step is planned to hold {bytes_in_words(plan.peak_allocated_bytes)} at once "
            f"({plan.peak_allocated_bytes:,} bytes, the most in {plan.place}), and {bytes_in_words(available)} are "
            "available: take a shorter context or a smaller batch"
        )
    return plan


# Predicting ----------------------------------------------------------------------------------------------------


def checked_phase(case: StepConfig) -> Phase:
    return next(phase for phase in PHASES if phase == case.phase)


def precision_of(case: StepConfig) -> str:
    """In which the products of a case run, as a key of `Peaks.matmul_flops_per_s`."""
    return product_precision(case.dtype, case.autocast, case.float32_matmul)


def item_sizes(case: StepConfig) -> dict[str, int]:
    """Bytes per parameter, and per logit: autocast changes the one and not the other."""
    logits = case.dtype if case.autocast == "none" else case.autocast
    return {"itemsize": getattr(torch, case.dtype).itemsize, "logits_itemsize": getattr(torch, logits).itemsize}


# Summarising ---------------------------------------------------------------------------------------------------


def bound_ms(case: StepConfig, peaks: Peaks, counted_flops: int | None = None) -> tuple[float, str]:
    """The floor of one step in milliseconds, and the ceiling that sets it; (NaN, "") where a ceiling is not known.

    `counted_flops`: of somebody else's model, whose floor is that of the products it was seen to do.
    """
    precision = precision_of(case)
    if not peaks.bounds(precision) or (case.model is not None and counted_flops is None):
        return float("nan"), ""
    if counted_flops is not None:
        floor = bound(flops.Work(counted_flops), peaks, precision)
        return floor.seconds * 1e3, floor.limited_by
    floor = step_bound(
        case.config,
        checked_phase(case),
        case.batch_size,
        case.context_length,
        peaks,
        precision,
        **item_sizes(case),
        # Only the materialised reference is known to compute what the mask removes.
        skips_masked=case.attention != "reference",
    )
    return floor.seconds * 1e3, floor.limited_by


def operators_ms(case: StepConfig, peaks: Peaks) -> float:
    """The step in milliseconds if every component were one perfect kernel; NaN where that is not known."""
    precision = precision_of(case)
    if not peaks.bounds(precision) or case.model is not None or case.attention != "reference":
        return float("nan")
    return 1e3 * operators_seconds(
        case.config,
        checked_phase(case),
        case.batch_size,
        case.context_length,
        peaks,
        precision,
        itemsize=getattr(torch, case.dtype).itemsize,
        autocast_itemsize=None if case.autocast == "none" else getattr(torch, case.autocast).itemsize,
    )


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """How long measuring a case should take, if steps take `slowdown` times their floor."""
    floor_ms, _ = bound_ms(case, peaks)
    return (case.warmup + case.steps) * floor_ms * slowdown / 1e3


def published_beside(published: PublishedSteps, case: Case) -> dict[str, float]:
    """What others measured of the same step; see `PublishedSteps.beside`."""
    return published.beside(
        case.config,
        phase=case.phase,
        batch_size=case.batch_size,
        autocast=case.autocast,
        tf32=case.float32_matmul == "high",
        compiled=case.compile == "model",
        warmup=case.warmup,
    )


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: parameters, FLOPs, compulsory bytes and floor, from the architecture alone.

    `predicted_ms` is NaN but on a GPU that a published table of such steps is of.
    """
    rows = []
    for case in cases:
        phase = checked_phase(case)
        floor_ms, limited_by = bound_ms(case, peaks)
        work = flops.total(flops.phase_work(case.config, phase, case.batch_size, case.context_length).values())
        rows.append(
            {
                "size": case.size,
                **dataclasses.asdict(case),
                "parameters": sum(flops.parameters(case.config).values()),
                "flops": work.flops,
                "bytes": flops.compulsory_bytes(
                    case.config, phase, case.batch_size, case.context_length, **item_sizes(case)
                ),
                "bound_ms": floor_ms,
                "bound_by": limited_by,
                "ceilings": peaks.name,
                "predicted_ms": 1e3 * published_estimate(case, peaks.name, Store.default().reference),
                "planned_bytes": math.nan if (plan := plan_of(case, peaks.name)) is None else plan.peak_allocated_bytes,
            }
        )
    return pd.DataFrame(rows)


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record: its times in milliseconds, floor, prediction, peak memory, and what others published.

    A step is predicted by the records of other sizes, where every one that is asked for is there, else on a GPU by the
    published table of such steps; `matrix_fraction`, `bandwidth_fraction` and `host_step_us` are the constants.

    `fingerprint`: the current one, or as much of it as is to be compared; with it, stale records are marked.
    """
    store = store or Store.default()
    published = PublishedSteps(store.reference)
    rows = []
    for record in records:
        case = Case(**record.case)
        steps = record.measurement.samples.get("step_ms", [])
        statistics = describe(steps) if record.status == "ok" else None
        counted = record.measurement.values.get("flops")
        floor_ms, limited_by = bound_ms(case, peaks, counted)
        work = flops.phase_work(case.config, checked_phase(case), case.batch_size, case.context_length)
        row = {
            "size": case.size,
            **record.case,
            **record.circumstances(fingerprint),
            "mean_ms": statistics.mean if statistics else float("nan"),
            "std_ms": statistics.std if statistics else float("nan"),
            "median_ms": statistics.median if statistics else float("nan"),
            "min_ms": min(steps) if steps else float("nan"),
            "max_ms": max(steps) if steps else float("nan"),
            "bound_ms": floor_ms,
            "bound_by": limited_by,
            "bound_lacks": peaks.lacks if math.isnan(floor_ms) else "",
            "operators_ms": operators_ms(case, peaks),
            "flops": counted or flops.total(work.values()).flops,
            "peak_bytes": describe_memory(record.measurement.values),
            "planned_bytes": record.measurement.values.get("planned_allocated_bytes", math.nan),
            **published_beside(published, case),
        }
        rows.append(row | {"times_bound": row["median_ms"] / floor_ms})
    predicted = predicted_columns(rows, peaks, store.reference)
    return pd.DataFrame([row | columns for row, columns in zip(rows, predicted, strict=True)])


def published_autocast(store: Store | None = None) -> pd.DataFrame:
    """Training steps on an A100 without and with autocast, as others published them, beside what operators take there.

    Columns `none_ms` and `bfloat16_ms`, the same with `_operators_ms`, and `flops`.
    """
    rows = []
    for row in PublishedSteps((store or Store.default()).reference).by_autocast().to_dict("records"):
        shape: dict[str, Any] = {name: int(value) for name, value in row.items() if not name.endswith("_ms")}
        cases = {autocast: Case(**shape, device="cuda", autocast=autocast) for autocast in ("none", "bfloat16")}
        case = cases["none"]
        work = flops.phase_work(case.config, "step", case.batch_size, case.context_length)
        expected = {f"{name}_operators_ms": operators_ms(each, GPUS["a100-40gb"]) for name, each in cases.items()}
        rows.append({"size": case.size, **row, **expected, "flops": flops.total(work.values()).flops})
    return pd.DataFrame(rows)


def published_predictions(store: Store | None = None) -> list[TablePrediction]:
    """Every published table of step times, each size predicted by the others."""
    return [predict_table(table) for table in published_tables((store or Store.default()).reference)]

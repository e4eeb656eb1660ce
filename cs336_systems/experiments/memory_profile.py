"""What a step holds in memory, moment by moment: its peak, what makes it up, and what one block keeps for its backward.

Problem `memory_profiling`. One step is recorded with every allocation and release and the line it comes from: on a GPU
as a memory snapshot, on a CPU by PyTorch's profiler. A step of training follows on another, with gradients cleared, so
its moments are there before it begins.

What one block saves for its backward is seen by hooks on a block of its own, and what gradients its backward makes is
read off the record: allocated while that block's backward runs, and there when the backward ends. Both stand beside the
accounting of `analysis/activations.py`.

Source: CS336 assignment 2, section 1.1.6 (memory profiling).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis import activations, flops
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published_profiles import PublishedPeaks
from cs336_systems.bench import grid as grids
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.bench.timing import float32_matmul_precision
from cs336_systems.compilation import blocks_of
from cs336_systems.errors import UserError
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import Case, item_sizes, plan_of, require_memory
from cs336_systems.model import SIZES
from cs336_systems.profiling.backward_ranges import record_backward_ranges
from cs336_systems.profiling.live_memory import Group
from cs336_systems.profiling.live_memory import summarise as summarise_memory
from cs336_systems.profiling.memory_history import MemoryHistory
from cs336_systems.profiling.outline import Outline, outline
from cs336_systems.profiling.ranges import named_range
from cs336_systems.profiling.recorder import record_memory
from cs336_systems.profiling.saved_tensors import OF_THE_CALL, saved_by_middle_block
from cs336_systems.profiling.snapshot import read_snapshot
from cs336_systems.profiling.trace_memory import read_trace_memory
from cs336_systems.step import BuiltStep, build_step

LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"tiny": [128, 256, 512], "small": [128]}
MOST_GROUPS, MOST_FRAMES = 8, 6
"""Of what is live at the peak, by size and by line; and of a stack."""
MOST_BANDS, MOST_POINTS = 100, 500
"""Of a timeline: allocations that are drawn each on its own, and moments of the curve above them."""


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    phases: Sequence[str] = ("forward", "step"),
    batch_size: int = 4,
    autocast: str | Sequence[str] = ("none", "bfloat16"),
    attention: str | Sequence[str] = "reference",
    formulation: str | Sequence[str] = "reference",
    optimizer: str = "reference",
    rope: str = "2025",
    model: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Sizes × contexts × phases × autocast, as `transformer_step.grid`; of each one step is recorded, after another.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    return transformer_step.grid(
        contexts=contexts,
        phases=phases,
        batch_size=batch_size,
        autocast=autocast,
        attention=attention,
        formulation=formulation,
        optimizer=optimizer,
        rope=rope,
        model=model,
        device=device,
        warmup=1,
        steps=1,
        seed=seed,
    )


# Measuring -----------------------------------------------------------------------------------------------------

RECORDED = "recorded step"


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Record one step of a case.

    Values: `peak_bytes`, on a GPU also `peak_reserved_bytes` and the allocator's own `allocator_peak_bytes`;
    `before_bytes`, live before the step; when the peak is, in which ranges and at which line; of what is live then
    `by_size`, `by_place` and `largest`; `outline` of the timeline; `residual_count`, how many allocations of the size
    of a residual activation are live at the peak; `planned_peak_bytes` and `planned_place`. Of a backward
    `gradient_bytes` and `block_gradient_bytes`. Of a forward alone `saved`, what one block saves for its backward.

    Raises:
        OutOfMemory: the step is planned to hold more than is available.
    """
    plan = require_memory(case)
    torch.manual_seed(case.seed)
    with float32_matmul_precision(case.float32_matmul), tempfile.TemporaryDirectory() as folder:
        step = build_step(case)
        recorded = record_step(case, step, Path(folder))
        on_part(0.9)
        values = values_of(case, recorded)
        if case.device == "cuda":
            values["allocator_peak_bytes"] = torch.cuda.max_memory_allocated()
        if plan is not None:
            values |= {"planned_peak_bytes": plan.snapshot_peak_bytes, "planned_place": plan.place}
        if case.phase == "forward":
            values["saved"] = saved_values(case, step.model)
        elif case.has_backward:
            values |= gradients(recorded, len(blocks_of(step.model)) // 2)
    return Measurement(values=values)


def record_step(case: Case, step: BuiltStep, folder: Path) -> MemoryHistory:
    """What one step allocates and frees, and where, from its beginning on.

    On a GPU warm-ups come before: a snapshot knows what was there already. On a CPU only what is recorded from its
    birth is seen to be freed, so there the optimizer's moments must be born while it is recorded.
    """
    is_gpu = case.device == "cuda"
    path = folder / ("snapshot.pickle" if is_gpu else "trace.json")
    if is_gpu:
        run_before(case, step)
        torch.cuda.reset_peak_memory_stats()
    held = bytes_of([*step.model.parameters(), *step.model.buffers(), step.batch])
    marked = record_backward_ranges(blocks_of(step.model)) if case.has_backward else contextlib.nullcontext()
    with record_memory(path, case.device), marked:
        if not is_gpu:
            run_before(case, step)
        with named_range(RECORDED):
            step()
    recorded = read_snapshot(path) if is_gpu else read_trace_memory(path, "cpu", start_bytes=held)
    recorded = recorded.within(RECORDED)
    # PyTorch marks its optimizers' calls by ranges of its own, such as `Optimizer.step#AdamW.step`.
    ours = tuple(phase for phase in recorded.timeline.phases if not phase.name.startswith("Optimizer."))
    return dataclasses.replace(recorded, timeline=dataclasses.replace(recorded.timeline, phases=ours))


def run_before(case: Case, step: BuiltStep) -> None:
    """The steps before the one that is recorded; their gradients are cleared, as at the beginning of every step."""
    for _ in range(case.warmup):
        step()
    step.optimizer.zero_grad(set_to_none=True)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def values_of(case: Case, recorded: MemoryHistory) -> dict[str, Any]:
    """What a record keeps of a recording."""
    summary, timeline = summarise_memory(recorded), recorded.timeline
    live = timeline.size[timeline.live_at_peak()]
    one = activations.residual_bytes(case.config, case.batch_size, case.context_length, item_sizes(case)["itemsize"])
    values: dict[str, Any] = {
        "peak_bytes": summary.peak_allocated_bytes,
        "before_bytes": summary.before_trace_bytes,
        "peak_ms": summary.peak_ms,
        "peak_phases": [name for name in summary.peak_phases if name != RECORDED],
        "peak_place": summary.peak_place,
        "unit": summary.unit,
        "outline": outline(timeline, most=MOST_BANDS, points=MOST_POINTS).to_json(),
        "residual_count": int((live == one).sum()),
        **{
            name: [group_values(group) for group in getattr(summary, name)[:MOST_GROUPS]]
            for name in ("by_size", "by_place", "largest")
        },
    }
    if summary.peak_reserved_bytes is not None:
        values["peak_reserved_bytes"] = summary.peak_reserved_bytes
    return values


def group_values(group: Group) -> dict[str, Any]:
    """A group of live allocations as plain data; of its trace the innermost frames without their folders."""
    return dataclasses.asdict(group) | {"trace": [str(frame) for frame in group.trace[:MOST_FRAMES]]}


def gradients(recorded: MemoryHistory, block: int) -> dict[str, int]:
    """Bytes that are allocated during a backward and there at its end: of all of it, and of one block's.

    That of a block is left out where its backward is not told from the rest: it must take and give one tensor.
    """
    timeline = recorded.timeline
    phases = {phase.name: phase for phase in timeline.phases}
    backward, of_block = phases["backward"], phases.get(f"backward of block {block}")
    found = {"gradient_bytes": timeline.left_by(backward, until=backward)}
    return found | ({} if of_block is None else {"block_gradient_bytes": timeline.left_by(of_block, until=backward)})


def saved_values(case: Case, model: torch.nn.Module) -> dict[str, Any]:
    """What one block saves for its backward, tensor by tensor in the order of forward; or why that is not known."""
    try:
        saved = saved_by_middle_block(model, case.batch_size, case.context_length, case.d_model, autocast=case.autocast)
    except UserError as error:  # of somebody else's model; its peak is known all the same
        return {"reason": str(error)}
    return {
        "total_bytes": saved.total_bytes(*OF_THE_CALL),
        "cast_parameters_bytes": saved.total_bytes("cast of a parameter"),
        "items": [
            {"bytes": tensor.bytes, "shape": tensor.shape, "dtype": tensor.dtype, "place": tensor.place}
            for tensor in saved.of(*OF_THE_CALL)
        ],
    }


def named_items(items: Sequence[Mapping[str, Any]], known: Mapping[str, int]) -> list[dict[str, Any]]:
    """What was saved with its name in the accounting, which has the same order; the most bytes first.

    The names are left out, all of them, where the accounting has other sizes.
    """
    agree = [item["bytes"] for item in items] == list(known.values())
    names = list(known) if agree else [""] * len(items)
    named = [dict(item) | {"name": name} for item, name in zip(items, names, strict=True)]
    return sorted(named, key=lambda item: -int(item["bytes"]))


# Predicting ----------------------------------------------------------------------------------------------------


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: what it must hold by arithmetic, and what it is planned to hold at most, with the place."""
    return pd.DataFrame(
        {
            "size": case.size,
            **dataclasses.asdict(case),
            "ceilings": peaks.name,
            **accounted(case),
            "planned_bytes": math.nan if (plan := plan_of(case, peaks.name)) is None else plan.snapshot_peak_bytes,
            "planned_place": "" if plan is None else plan.place,
        }
        for case in cases
    )


def accounted(case: Case) -> dict[str, Any]:
    """What is known beforehand, in bytes; NaN, or nothing, where only the reference attention of our model is known.

    `accounted_bytes` is the least that the peak can be, what is held at one of two moments: when forward ends, and
    when backward does, with a gradient for each parameter.
    """
    config, batch, length = case.config, case.batch_size, case.context_length
    itemsize, product_itemsize = item_sizes(case).values()
    ours = 1 if case.model is None else math.nan  # of somebody else's model the parameters are not known
    weights = ours * flops.resident_bytes(config, "forward", itemsize=itemsize)
    moments = 2 * weights if case.phase == "step" else 0
    forward, saved = held_when_forward_ends(case), saved_accounted(case)
    least = sum(forward.values()) + moments if forward else math.nan
    if case.has_backward:
        least = max(least, float(2 * weights + moments))
    return {
        "weights_bytes": weights,
        "moments_bytes": moments,
        "held_after_forward": forward,
        "saved_accounted": saved,
        "saved_accounted_bytes": sum(saved.values()) if saved else math.nan,
        "accounted_bytes": least,
        "accounted_gradient_bytes": ours * activations.gradient_bytes_of_block(config, itemsize),
        "residual_bytes": activations.residual_bytes(config, batch, length, itemsize),
        "score_matrix_bytes": activations.score_matrix_bytes(config, batch, length, product_itemsize),
        "known_sizes": known_sizes(case) if case.model is None else {},
    }


def known_sizes(case: Case) -> dict[str, int]:
    """Bytes of what a step holds many of, by what it is, so that an allocation can be called by its name."""
    config, batch, length = case.config, case.batch_size, case.context_length
    itemsize, product_itemsize = item_sizes(case).values()
    tokens = batch * length
    found = {
        "a matrix of scores": activations.score_matrix_bytes(config, batch, length, product_itemsize),
        "logits": tokens * config.vocab_size * product_itemsize,
        "the embedding's or the head's weight, gradient or moment": config.vocab_size * config.d_model * itemsize,
        "a weight, gradient or moment of the feed-forward": config.d_ff * config.d_model * itemsize,
        "a weight, gradient or moment of attention": config.d_model**2 * itemsize,
        "a hidden activation of the feed-forward": tokens * config.d_ff * product_itemsize,
        "an activation of the residual stream": activations.residual_bytes(config, batch, length, itemsize),
    }
    alike: dict[int, list[str]] = {}
    for name, size in found.items():
        alike.setdefault(size, []).append(name)
    return {" or ".join(names): size for size, names in alike.items()}


def is_accounted(case: Case) -> bool:
    """Whether it is known what a case's blocks save."""
    is_ours = case.model is None and case.attention == "reference" and case.compile == "none"
    return is_ours and case.phase != "inference" and case.checkpointing == "none"


def choices_of(case: Case) -> dict[str, Any]:
    """What decides, beside the sizes, which tensors are saved."""
    return {
        "rope": case.rope,
        "formulation": case.formulation,
        "itemsize": item_sizes(case)["itemsize"],
        "autocast": case.autocast,
        "device": case.device,
    }


def held_when_forward_ends(case: Case) -> dict[str, int]:
    """What the whole model holds when a forward ends, by what it is; nothing where that is not known."""
    if not is_accounted(case):
        return {}
    return activations.held_after_forward(case.config, case.batch_size, case.context_length, **choices_of(case))


def saved_accounted(case: Case) -> dict[str, int]:
    """What one block saves by the accounting; nothing where that does not know it."""
    if not is_accounted(case):
        return {}
    return activations.saved_by_block(case.config, case.batch_size, case.context_length, **choices_of(case))


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record: its peak and what makes it up, beside the accounting and what others published."""
    published = PublishedPeaks((store or Store.default()).reference)
    rows = []
    for record in records:
        case, values = Case(**record.case), record.measurement.values
        saved = values.get("saved") or {}
        rows.append(
            {
                "size": case.size,
                **record.case,
                **record.circumstances(fingerprint),
                "noise": "",  # a busy machine changes no byte
                **{name: values.get(name, math.nan) for name in NUMBERS},
                "reserved_bytes": values.get("peak_reserved_bytes", math.nan),
                "planned_bytes": values.get("planned_peak_bytes", math.nan),
                "unit": values.get("unit", ""),
                "peak_phase": next(iter(values.get("peak_phases", [])), ""),
                "outline": Outline.from_json(values["outline"]) if record.status == "ok" else None,
                **{name: tuple(values.get(name, ())) for name in ("by_size", "by_place", "largest")},
                "saved_bytes": saved.get("total_bytes", math.nan),
                "saved_reason": saved.get("reason", ""),
                "allocator_bytes": values.get("allocator_peak_bytes", math.nan),
                **(known := accounted(case)),
                "saved": tuple(named_items(saved.get("items", ()), known["saved_accounted"])),
                "memory_bytes": peaks.memory_bytes,
                **published_beside(published, case),
            }
        )
    return pd.DataFrame(rows)


NUMBERS = ("peak_bytes", "before_bytes", "peak_ms", "residual_count", "gradient_bytes", "block_gradient_bytes")


def published_beside(published: PublishedPeaks, case: Case) -> dict[str, float | str]:
    """What others measured of the same step; see `PublishedPeaks.beside`."""
    return published.beside(
        case.config,
        phase=case.phase,
        batch_size=case.batch_size,
        autocast=case.autocast,
        compiled=case.compile == "model",
    )


def published_peaks(store: Store | None = None) -> pd.DataFrame:
    """A row per peak of GPT-2 XL on an A100 that others published, beside the least that ours can be of the same."""
    rows = []
    for peak in PublishedPeaks((store or Store.default()).reference).rows():
        config = dataclasses.replace(SIZES["gpt2-xl"], context_length=peak.context_length)
        case = Case(**dataclasses.asdict(config), device="cuda", phase=peak.phase, autocast=peak.autocast)
        rows.append({"size": case.size, **dataclasses.asdict(case), **dataclasses.asdict(peak), **accounted(case)})
    return pd.DataFrame(rows)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """A few steps, each slowed down by its recording, and reading what was recorded."""
    return 2 * transformer_step.predicted_seconds(case, peaks, slowdown) + READING_S


READING_S = 2.0
"""About what writing and reading a step's allocations takes."""

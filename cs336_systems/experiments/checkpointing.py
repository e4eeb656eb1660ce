"""What checkpointing saves of memory and costs of time: by policy, by the size of a group, and as the depth grows.

Problem `gradient_checkpointing`. Forward, loss and backward are timed under each policy of `checkpointing.py`; in
passes that are not timed the peak of what they allocate, the products that they do, and how often each block runs are
counted. All of it stands beside what follows from the plan of the checkpoints (`analysis/checkpointing.py`).

How memory and work grow with the number of blocks is measured of a narrow model, whose gradients are small beside its
activations.

Source: CS336 assignment 2 (2026), gradient_checkpointing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis import checkpointing as analysis
from cs336_systems.analysis import flops
from cs336_systems.analysis.activations import residual_bytes
from cs336_systems.analysis.footprint import Footprint
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.residuals import compiled_residuals
from cs336_systems.bench import grid as grids
from cs336_systems.bench.allocator import allocated_bytes, available_bytes
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import bytes_in_words
from cs336_systems.bench.sweep import OnPart, OutOfMemory
from cs336_systems.bench.timing import describe, float32_matmul_precision, time_steps
from cs336_systems.compilation import blocks_of
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import bound_ms, item_sizes
from cs336_systems.model import TransformerConfig, TransformerLM, model_size
from cs336_systems.step import BuiltStep, build_step, size_name

LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"tiny": [256]}
POLICIES = ("none", "every-1", "every-2", "every-4", "every-8", "selective", "nested")
DEPTH_POLICIES = ("none", "every-1", "nested", "from-start")
NARROW = TransformerConfig(d_model=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=16, context_length=64)
"""The model whose depth grows, and the batch that it sees."""
NARROW_BATCH = 8
HANDOUT_BLOCK = TransformerConfig(d_model=2560, d_ff=10_240, num_layers=1, num_heads=16, context_length=2048)
"""The block of which the handout quotes what it saves; with two of xl's heads in one."""


@dataclasses.dataclass(frozen=True)
class Case(transformer_step.Case):
    """One policy on one model.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    @property
    def size(self) -> str:
        """The name of the size, whatever its context length, blocks and vocabulary, "narrow" or "custom"."""
        if is_of_depth(self):
            return "narrow"
        return size_name(self.config, but_for=("context_length", "num_layers", "vocab_size"))

    def __str__(self) -> str:
        return f"{self.size} of {self.num_layers}, context {self.context_length}, {self.checkpointing}"


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    layers: int | None = 8,
    vocab_size: int | None = 512,
    policies: Sequence[str] = POLICIES,
    depths: Sequence[int] = (2, 4, 8, 16, 32),
    depth_policies: Sequence[str] = DEPTH_POLICIES,
    batch_size: int = 2,
    phase: str = "forward-backward",
    autocast: str | Sequence[str] = "none",
    compile: str | Sequence[str] = "none",
    attention: str = "reference",
    formulation: str = "reference",
    rope: str = "2025",
    model: str | None = None,
    device: str = "auto",
    warmup: int = 1,
    steps: int = 2,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Policies on sizes and contexts, then policies on the narrow model at several depths.

    Args:
        layers: blocks in the place of each size's own; None for its own.
        vocab_size: the same of the vocabulary: the logits of a large one would hide what few narrow blocks hold.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    chosen: dict[str, Any] = {"phase": phase, "device": resolve_device(device), "seed": seed}
    timed: dict[str, Any] = {"warmup": warmup, "steps": steps}
    cells: list[grids.Cell[Case]] = []
    for name, lengths in contexts.items():
        size = model_size(name, num_layers=layers, vocab_size=vocab_size)
        cells += grids.product(
            Case,
            **dataclasses.asdict(size) | {"context_length": lengths},
            batch_size=batch_size,
            autocast=autocast,
            compile=compile,
            attention=attention,
            formulation=formulation,
            rope=rope,
            model=model,
            checkpointing=policies,
            **chosen,
            **timed,
        )
    for depth in depths:
        cells += grids.product(
            Case,
            **dataclasses.asdict(dataclasses.replace(NARROW, num_layers=depth)),
            batch_size=NARROW_BATCH,
            checkpointing=depth_policies,
            **chosen,
            **timed,
        )
    return cells


def is_of_depth(case: Case) -> bool:
    """Whether a case is one of the narrow model, whose depth is the question."""
    return dataclasses.replace(case.config, num_layers=1) == NARROW


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Time the steps of one case, then count what one allocates and does.

    Samples: `step_ms`, `warmup_ms`, and on a GPU `device_ms` by CUDA events. Values: `peak_bytes`, on top of
    `before_bytes`, which were there, and `planned_bytes`, what it was planned to be; of eager code `flops` of all
    products, and of our model `block_runs`, how often the forward of each block ran.

    Raises:
        OutOfMemory: what the step is known or planned to hold is more than is available.
    """
    plan = require_memory(case)
    torch.manual_seed(case.seed)
    done, parts = 0, case.warmup + case.steps + 2

    def count_part() -> None:
        nonlocal done
        done += 1
        on_part(done / parts)

    with float32_matmul_precision(case.float32_matmul):
        step = build_step(case)
        timing = time_steps(step, warmup=case.warmup, steps=case.steps, device=case.device, on_step=count_part)
        step.optimizer.zero_grad(set_to_none=True)
        held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors_of(step)}
        peak, _ = allocated_bytes(step, case.device)
        count_part()
        counted = count_work(step) if case.compile == "none" else {}
    samples = {"step_ms": timing.samples_ms, "warmup_ms": timing.warmup_ms, "device_ms": timing.device_ms}
    return Measurement(
        samples={name: list(values) for name, values in samples.items() if values},
        values={"peak_bytes": peak, "before_bytes": sum(held.values())}
        | counted
        | ({} if plan is None else {"planned_bytes": plan.on_top_bytes}),
    )


def tensors_of(step: BuiltStep) -> list[torch.Tensor]:
    """What is there before a step without gradients."""
    return [*step.model.parameters(), *step.model.buffers(), step.batch]


def count_work(step: BuiltStep) -> dict[str, Any]:
    """The products of one step by PyTorch's counter; of our model also how often each block's forward runs in it.

    It is seen by its attention, which runs once in a forward of the block, and of which a selective checkpoint is half.
    """
    runs: Counter[int] = Counter()
    blocks = blocks_of(step.model) if isinstance(step.model, TransformerLM) else []
    handles = [
        block.get_submodule("attn").register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
        for number, block in enumerate(blocks)
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            step()
    finally:
        for handle in handles:
            handle.remove()
    return {"flops": counter.get_total_flops(), "block_runs": [runs[number] for number in range(len(blocks))]}


MOST_RUNS_PLANNED = 8
"""How often each block's forward may run in a step that is planned."""


def require_memory(case: Case) -> Footprint | None:
    """Refuse what cannot fit, before minutes are spent on it, and return the plan of what can.

    Raises:
        OutOfMemory: weights and what is counted of the step are more than the device has left, or what is planned.
    """
    weights = flops.resident_bytes(case.config, "forward", itemsize=item_sizes(case)["itemsize"])
    found = counted_of(case)
    needed = weights + (weights if found is None else found.step_bytes)
    available = available_bytes(case.device)
    if needed > available:
        raise OutOfMemory(
            f"weights and what the step keeps need at least {bytes_in_words(needed)}, and {bytes_in_words(available)} "
            "are available: take smaller groups, or a smaller size"
        )
    if is_of_depth(case) or (found is not None and found.block_runs > MOST_RUNS_PLANNED):
        return None  # small by design; or a plan, which follows every run, would take longer than the steps
    return transformer_step.require_memory(case)


# Predicting ----------------------------------------------------------------------------------------------------


def counted_of(case: Case) -> analysis.Counted | None:
    """What is counted of a case; None where only eager blocks of ours with the reference attention are known."""
    if case.model is not None or case.attention != "reference" or case.compile != "none":
        return None
    return analysis.counted(
        case.config,
        case.checkpointing,
        case.batch_size,
        case.context_length,
        itemsize=item_sizes(case)["itemsize"],
        autocast=case.autocast,
        rope=case.rope,
        formulation=case.formulation,
        device=case.device,
    )


def accounted(case: Case) -> dict[str, Any]:
    """The columns of what is counted; NaN where it is not known."""
    found = counted_of(case)
    values = dict.fromkeys(_ACCOUNTED, math.nan) if found is None else dataclasses.asdict(found)
    return {f"accounted_{name}": values[name] for name in _ACCOUNTED}


_ACCOUNTED = ("inputs", "kept_bytes", "activation_bytes", "step_bytes", "block_runs", "flops", "work")


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: what its checkpoints hold and do, and the floor of a step without any."""
    return pd.DataFrame(
        {
            "size": case.size,
            **dataclasses.asdict(case),
            "is_of_depth": is_of_depth(case),
            "ceilings": peaks.name,
            "bound_ms": bound_ms(case, peaks)[0],
            **accounted(case),
        }
        for case in cases
    )


def group_sizes(size: str = "xl", seq_len: int = 2048, batch_size: int = 4, autocast: str = "none") -> pd.DataFrame:
    """A row per size of a group, halves of a block first: what it holds, eager, and of blocks compiled in float32.

    Raises:
        UserError: an unknown size or autocast.
    """
    config = model_size(size, context_length=seq_len)
    eager = [
        analysis.counted(config, policy, batch_size, seq_len, autocast=autocast)
        for policy in ("selective", *(f"every-{group}" for group in range(1, config.num_layers + 1)))
    ]
    between = residual_bytes(config, batch_size, seq_len)
    of_block = sum(residual.bytes for residual in compiled_residuals(config, batch_size, seq_len)) - between
    rows = []
    for group, found in zip((0.5, *range(1, config.num_layers + 1)), eager, strict=True):
        row = {"size": size, "context_length": seq_len, "batch_size": batch_size, "blocks": config.num_layers}
        compiled = found.inputs * between + group * of_block if group >= 1 else math.nan
        rows.append(row | {"group": group, "compiled_bytes": compiled, **dataclasses.asdict(found)})
    return pd.DataFrame(rows)


def residuals(store: Store | None = None) -> pd.DataFrame:
    """What compiled blocks save, as computed here and as the handout quotes it."""
    published = (store or Store.default()).reference("checkpointing_residuals")
    rows = []
    for row in published.itertuples():
        group = int(row.group) or None
        found = compiled_residuals(
            HANDOUT_BLOCK, 4, HANDOUT_BLOCK.context_length, blocks=int(row.blocks), group=group, rope="2026"
        )
        rows.append(
            {
                "blocks": int(row.blocks),
                "group": group or 0,
                "tensors": len(found),
                "bytes": sum(residual.bytes for residual in found),
                "published_mib": row.residuals_mib,
            }
        )
    return pd.DataFrame(rows)


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record: its time, peak and work beside what is counted, and as multiples of those of no policy."""
    del store
    rows = []
    for record in records:
        case, values = Case(**record.case), record.measurement.values
        steps = record.measurement.samples.get("step_ms", [])
        statistics = describe(steps) if record.status == "ok" else None
        runs = values.get("block_runs")
        rows.append(
            {
                "size": case.size,
                **record.case,
                **record.circumstances(fingerprint),
                "is_of_depth": is_of_depth(case),
                "mean_ms": statistics.mean if statistics else math.nan,
                "std_ms": statistics.std if statistics else math.nan,
                "median_ms": statistics.median if statistics else math.nan,
                "bound_ms": bound_ms(case, peaks)[0],
                "peak_bytes": values.get("peak_bytes", math.nan),
                "planned_bytes": values.get("planned_bytes", math.nan),
                "before_bytes": values.get("before_bytes", math.nan),
                "flops": values.get("flops", math.nan),
                "block_runs": sum(runs) / len(runs) if runs else math.nan,
                **accounted(case),
            }
        )
    return beside_none(pd.DataFrame(rows))


_SAME = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size", "phase", "dtype")
_SAME_CHOICES = ("autocast", "float32_matmul", "compile", "attention", "formulation", "rope", "model")


def beside_none(summary: pd.DataFrame) -> pd.DataFrame:
    """`summary` with time and peak as multiples of the same without checkpointing, `times_none` and `peak_of_none`.

    `is_quiet_beside_none` says whether neither of the two times is noisy.
    """
    if not len(summary):
        return summary
    same = [*_SAME, *_SAME_CHOICES]
    plain = summary[summary["checkpointing"] == "none"].drop_duplicates(same)
    both = summary[same].merge(plain[[*same, "median_ms", "peak_bytes", "noise"]], on=same, how="left")
    return summary.assign(
        times_none=summary["median_ms"].to_numpy() / both["median_ms"].to_numpy(),
        peak_of_none=summary["peak_bytes"].to_numpy() / both["peak_bytes"].to_numpy(),
        is_quiet_beside_none=(summary["noise"] == "").to_numpy() & (both["noise"] == "").to_numpy(),
    )


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """All steps, those that are not timed too, each as long as its work makes it."""
    found = counted_of(case)
    passes = (case.warmup + case.steps + 2) / (case.warmup + case.steps)
    return transformer_step.predicted_seconds(case, peaks, slowdown) * passes * (1 if found is None else found.work)

"""Where the time of a step goes: its kernels, or on a CPU its operators, by named range; and what profiling costs.

Problem `nsys_profile`. The same step as in `transformer_step`, first by the stopwatch, then under PyTorch's profiler
with named ranges on, then by the stopwatch again, so that a machine that slows down does not pass for a profiler's
cost. Kernels on a GPU come from CUPTI, as in Nsight Systems. Warm-ups are not recorded.

A record keeps of every range how long it was open, its kernels summed and as busy time, and the kernels that take the
most. Ranges of blocks are taken together.

Source: CS336 assignment 2, section 1.1.4.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis import flops
from cs336_systems.analysis.attention import AttentionShape, flops_by_part, traffic_by_part
from cs336_systems.analysis.flops import Work
from cs336_systems.analysis.hardware import GPUS, Peaks
from cs336_systems.analysis.published import PublishedSteps
from cs336_systems.analysis.published_profiles import PublishedKernels, PublishedRanges
from cs336_systems.analysis.roofline import bound
from cs336_systems.bench import grid as grids
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.bench.timing import describe, float32_matmul_precision, time_steps
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import (
    Case,
    bound_ms,
    checked_phase,
    item_sizes,
    precision_of,
    published_beside,
    require_memory,
)
from cs336_systems.model import SIZES
from cs336_systems.profiling.categories import category_of
from cs336_systems.profiling.kernels import Recording, during, overview
from cs336_systems.profiling.kernels import summarise as summarise_kernels
from cs336_systems.profiling.recorder import record_trace
from cs336_systems.profiling.recordings import read_recording
from cs336_systems.step import build_step

LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"tiny": [128, 512], "small": [128]}
MOST_KERNELS = 12
"""Of a range, by name; the rest is kept by category alone."""
IN_FORWARD = ("forward", "block", "attention", "scores", "softmax", "value product", "feed-forward", "logits")
RANGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "forward": IN_FORWARD,
        "forward-backward": ("step", *IN_FORWARD, "loss", "backward"),
        "step": ("step", *IN_FORWARD, "loss", "backward", "optimizer"),
    }
)
"""The ranges that a phase of our model has, in the order in which tables show them; `step` is all of the phase."""


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    phases: Sequence[str] = ("forward", "step"),
    batch_size: int = 4,
    autocast: str | Sequence[str] = "none",
    attention: str | Sequence[str] = "reference",
    formulation: str | Sequence[str] = "reference",
    optimizer: str = "reference",
    model: str | None = None,
    device: str = "auto",
    warmup: int = 1,
    steps: int = 2,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Sizes × contexts × phases, as `transformer_step.grid`; a step has forward, loss, backward and optimizer within.

    Args:
        steps: how many are timed, and as many again recorded.

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
        model=model,
        device=device,
        warmup=warmup,
        steps=steps,
        seed=seed,
    )


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Time the steps of one case without and with the profiler, and keep what it saw.

    Samples: `stopwatch_ms`, `profiled_ms`. Values: `unit` and `ranges`, as `ranges_as_values` has them.

    Raises:
        OutOfMemory: the step is planned to hold more than is available.
    """
    require_memory(case)
    torch.manual_seed(case.seed)
    before = math.ceil(case.steps / 2)
    after = max(1, case.steps - before)
    settling = 1 if case.device == "cuda" else 0  # what CUPTI leaves behind ends with the next kernels
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_part(done / (case.warmup + before + 1 + case.steps + settling + after))

    with float32_matmul_precision(case.float32_matmul), tempfile.TemporaryDirectory() as folder:
        step = build_step(case)
        trace = Path(folder) / "trace.json"

        def timed(steps: int, warmup: int = 0) -> list[float]:
            timing = time_steps(step, warmup=warmup, steps=steps, device=case.device, on_step=count)
            return list(timing.samples_ms)

        stopwatch_ms = timed(before, case.warmup)
        with record_trace(trace, case.device):
            profiled_ms = timed(case.steps, warmup=1)  # the first has what the profiler does once
        stopwatch_ms += timed(after, settling)
        recording = with_blocks_together(during(read_recording(trace), "measured"))
    samples = {"stopwatch_ms": stopwatch_ms, "profiled_ms": profiled_ms}
    return Measurement(samples=samples, values=ranges_as_values(recording, RANGES[case.phase]))


def with_blocks_together(recording: Recording) -> Recording:
    """The ranges `block 0`, `block 1`, … as one that was open again and again."""
    names = recording.ranges["name"].str.replace(r"^block \d+$", "block", regex=True)
    return dataclasses.replace(recording, ranges=recording.ranges.assign(name=names))


def ranges_as_values(recording: Recording, kept: Collection[str]) -> dict[str, Any]:
    """What a record keeps of a recording: of the ranges named `kept`, in nanoseconds, all steps together.

    `names` are the kernels'. Per range: `occurrences`, `open_ns`, `busy_ns`, `total_ns`, `instances`; `kernels`, those
    with the most time as [name, instances, total, median, minimum, maximum, deviation]; `categories`, each as
    [instances, total].
    """
    by_kernel, by_category = (summarise_kernels(recording, group=group) for group in ("kernel", "category"))
    numbers: dict[str, int] = {}
    ranges: dict[str, Any] = {}
    for told in overview(recording).itertuples():
        if told.range not in kept:
            continue
        kernels, categories = (
            rows[(rows["range"] == told.range) & (rows["process"] == told.process)] for rows in (by_kernel, by_category)
        )
        ranges[told.range] = {
            "occurrences": told.occurrences,
            "open_ns": told.open,
            "busy_ns": told.busy,
            "total_ns": told.total,
            "instances": told.instances,
            "kernels": [
                [
                    numbers.setdefault(row.name, len(numbers)),
                    row.instances,
                    row.total,
                    row.median,
                    row.minimum,
                    row.maximum,
                    None if math.isnan(row.deviation) else round(row.deviation),
                ]
                for row in kernels.head(MOST_KERNELS).itertuples(index=False)
            ],
            "categories": {row.name: [row.instances, row.total] for row in categories.itertuples(index=False)},
        }
    return {"unit": recording.unit, "names": list(numbers), "ranges": ranges}


# Predicting ----------------------------------------------------------------------------------------------------


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: of the least times of a phase's parts, one after the other, the share of those with products.

    A part is taken to be one kernel, and takes as long as its products or its bytes, whichever is longer. Of operators
    that are not fused the bytes are more; products that miss their ceiling take longer.
    """
    rows = []
    for case in cases:
        floor_ms, _ = bound_ms(case, peaks)
        row = {"size": case.size, **dataclasses.asdict(case), "bound_ms": floor_ms, "ceilings": peaks.name}
        rows.append(row | {"product_share": predicted_product_share(case, peaks), **attention_ratios(case)})
    return pd.DataFrame(rows)


def predicted_product_share(case: Case, peaks: Peaks) -> float:
    """See `predict`; NaN where a ceiling is not known."""
    precision = precision_of(case)
    if not peaks.bounds(precision):
        return math.nan
    works = flops.phase_work(
        case.config,
        checked_phase(case),
        case.batch_size,
        case.context_length,
        itemsize=item_sizes(case)["logits_itemsize"],
        skips_masked=case.attention != "reference",
    )
    rate, bandwidth = peaks.rate(precision), peaks.bandwidth_bytes_per_s
    seconds = {name: max(work.flops / rate, work.bytes / bandwidth) for name, work in works.items()}
    return sum(time for name, time in seconds.items() if works[name].flops) / sum(seconds.values())


def range_floors_ms(case: Case, peaks: Peaks) -> dict[str, float]:
    """The least time of a step's ranges, all their times together: the products, and what must pass through memory.

    Somebody else's model has none: its ranges may hold anything.
    """
    precision = precision_of(case)
    if not peaks.bounds(precision) or case.model is not None:
        return {}
    config, layers = case.config, case.num_layers
    sizes: dict[str, Any] = {"skips_masked": case.attention != "reference"}
    forward = flops.forward_work(config, case.batch_size, case.context_length, **sizes)
    backward = flops.backward_work(config, case.batch_size, case.context_length, **sizes)
    heads = ("qkv_projections", "attention_scores", "attention_values", "output_projection")
    tokens = case.batch_size * case.context_length
    itemsize, logits_itemsize = item_sizes(case).values()
    scores_bytes = case.batch_size * case.num_heads * case.context_length**2 * logits_itemsize
    # Of one layer, and how many layers there are: what one layer leaves in the cache is no other's.
    works = {
        "attention": (Work(sum(forward[name].flops for name in heads) // layers), layers),
        "scores": (Work(forward["attention_scores"].flops // layers, scores_bytes), layers),
        "softmax": (Work(0, 2 * scores_bytes), layers),
        "value product": (Work(forward["attention_values"].flops // layers, scores_bytes), layers),
        "feed-forward": (Work(forward["ffn"].flops // layers), layers),
        "logits": (Work(forward["lm_head"].flops), 1),
        "loss": (Work(0, tokens * config.vocab_size * logits_itemsize), 1),
        "backward": (Work(sum(work.flops for work in backward.values())), 1),
        "optimizer": (flops.optimizer_work(config, itemsize=itemsize), 1),
    }
    floors = {name: times * bound(work, peaks, precision).seconds * 1e3 for name, (work, times) in works.items()}
    floors["block"] = floors["attention"] + floors["feed-forward"]
    floors["step"] = bound_ms(case, peaks)[0]
    floors["forward"] = bound_ms(dataclasses.replace(case, phase="forward"), peaks)[0]
    return floors


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """A row per record and range, all times in milliseconds per step.

    `open_ms`, `busy_ms` and `total_ms` (summed over kernels), `instances`; `kernels`, a list of dictionaries with the
    most time first; `categories`, milliseconds by category, and `product_share`; `range_bound_ms`. On every row of a
    record: `stopwatch_ms` and `profiled_ms`, the medians of whole steps, with `bound_ms`.
    """
    reference = (store or Store.default()).reference
    published, of_others = PublishedSteps(reference), PublishedKernels(reference)
    rows = []
    for record in records:
        case = Case(**record.case)
        floor_ms, limited_by = bound_ms(case, peaks)
        floors = range_floors_ms(case, peaks)
        samples, values = record.measurement.samples, record.measurement.values
        stopwatch, profiled = (describe(samples[f"{name}_ms"]) if record.status == "ok" else None for name in TIMED)
        common = {
            "size": case.size,
            **record.case,
            "case": record.key,
            **record.circumstances(fingerprint),
            "stopwatch_ms": stopwatch.median if stopwatch else math.nan,
            "std_stopwatch_ms": stopwatch.std if stopwatch else math.nan,
            "profiled_ms": profiled.median if profiled else math.nan,
            "std_profiled_ms": profiled.std if profiled else math.nan,
            "bound_ms": floor_ms,
            "bound_by": limited_by,
            "bound_lacks": peaks.lacks if math.isnan(floor_ms) else "",
            "unit": "kernel" if case.device == "cuda" else "operator",
            **attention_ratios(case),
            **published_beside(published, case),
        }
        found = values.get("ranges", {})
        for name in RANGES[case.phase]:
            if record.status == "ok" and name not in found:
                continue  # attention of another form has no range for its scores
            row = range_row(found[name], values["names"], case.steps) if name in found else dict(NO_RANGE)
            row |= {"range_bound_ms": floors.get(name, math.nan), **kernels_beside(of_others, case, name)}
            rows.append(common | {"range": name} | row)
    return pd.DataFrame(rows)


def kernels_beside(published: PublishedKernels, case: Case, name: str) -> dict[str, float | str]:
    """What others saw in the range called `name` of the same step; see `PublishedKernels.beside`."""
    return published.beside(
        case.config,
        phase=name,
        batch_size=case.batch_size,
        autocast=case.autocast,
        tf32=case.float32_matmul == "high",
        compiled=case.compile == "model",
    )


TIMED = ("stopwatch", "profiled")
NO_RANGE: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("occurrences", "open_ms", "busy_ms", "total_ms", "instances", "product_share"), math.nan),
        "kernels": (),
        "categories": MappingProxyType({}),
    }
)


def range_row(told: Mapping[str, Any], names: Sequence[str], steps: int) -> dict[str, Any]:
    """One range of a record, per step."""
    per_step_ms = 1 / (1e6 * steps)
    categories = {name: total * per_step_ms for name, (_, total) in told["categories"].items()}
    kernels = [
        {
            "name": names[number],
            "category": category_of(names[number]),
            "instances": instances / steps,
            "total_ms": total * per_step_ms,
            "share": total / told["total_ns"],
            "median_ms": median / 1e6,
            "min_ms": least / 1e6,
            "max_ms": most / 1e6,
            "std_ms": math.nan if deviation is None else deviation / 1e6,
        }
        for number, instances, total, median, least, most, deviation in told["kernels"]
    ]
    products = sum(categories.get(name, 0.0) for name in PRODUCTS)
    total_ms = told["total_ns"] * per_step_ms
    return {
        "occurrences": told["occurrences"] / steps,
        "open_ms": told["open_ns"] * per_step_ms,
        "busy_ms": told["busy_ns"] * per_step_ms,
        "total_ms": total_ms,
        "instances": told["instances"] / steps,
        "product_share": products / total_ms if total_ms else math.nan,
        "kernels": tuple(kernels),
        "categories": categories,
    }


PRODUCTS = ("matrix products", "attention kernels")
"""A fused attention kernel is its two products and what lies between them, in which no time of its own can be told."""


def attention_shape(case: Case) -> AttentionShape:
    """One layer's attention of a case, in the precision of its products."""
    return AttentionShape(
        case.batch_size,
        case.num_heads,
        case.context_length,
        case.config.head_dim,
        is_causal=True,
        itemsize=item_sizes(case)["logits_itemsize"],
    )


def attention_ratios(case: Case) -> dict[str, float]:
    """Softmax over the two products of attention: by their FLOPs, and by the bytes that their operators move."""
    shape = attention_shape(case)
    counted = flops_by_part(shape)
    # Scores are also scaled and masked; the products alone write the matrix once and read it once.
    of_products = 2 * shape.matrix_bytes + 4 * shape.tensor_bytes
    return {
        "softmax_flops_ratio": counted["softmax"] / (counted["scores"] + counted["value product"]),
        "softmax_traffic_ratio": traffic_by_part(shape, "forward")["softmax"] / of_products,
    }


# Published -----------------------------------------------------------------------------------------------------


def published_kernels(store: Store | None = None) -> pd.DataFrame:
    """The kernels of GPT-2 XL on an A100 that others published, range by range, with the kind of each."""
    rows = (store or Store.default()).reference("nsys_gpt2xl_ctx256_a100")
    return rows.assign(category=[category_of(name) for name in rows["kernel"]])


def published_shares(store: Store | None = None) -> pd.DataFrame:
    """A row per published range: its first kernel, and the least share that its products can have.

    Columns: kernel, percent, instances, products_percent, `range` as the index.
    """
    published = PublishedKernels((store or Store.default()).reference)
    firsts = {name: published.kernels(name)[0] for name in published.ranges}
    return pd.DataFrame(
        {
            name: {
                "kernel": first.kernel,
                "percent": first.time_percent,
                "instances": first.instances,
                "products_percent": published.percent_at_least(name),
            }
            for name, first in firsts.items()
        }
    ).T


def published_softmax(store: Store | None = None) -> dict[str, float]:
    """One layer's attention on the A100, and what arithmetic says of it; microseconds, and softmax over products."""
    config = dataclasses.replace(SIZES["gpt2-xl"], context_length=256)
    case = Case(**dataclasses.asdict(config), device="cuda", phase="forward")
    shape = attention_shape(case)
    traffic = traffic_by_part(shape, "forward")["softmax"] / GPUS["a100-40gb"].bandwidth_bytes_per_s
    measured = PublishedRanges((store or Store.default()).reference).beside(config, batch_size=case.batch_size)
    return {**measured, "softmax_traffic_us": 1e6 * traffic, **attention_ratios(case)}


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """As `transformer_step`'s for twice the steps, plus reading the trace."""
    whole = dataclasses.replace(case, steps=2 * case.steps)
    return transformer_step.predicted_seconds(whole, peaks, slowdown) + READING_S[case.device]


READING_S: Mapping[str, float] = MappingProxyType({"cpu": 1.0, "cuda": 3.0})
"""About what the profiler takes to begin, to write its trace, and the trace to be read."""

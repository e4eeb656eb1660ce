"""A training step on several ranks, by the wrapper that averages its gradients; all wrappers in one launch, in turn.

Problems `naive_ddp_benchmarking` to `ddp_bucketed_benchmarking`. What a rank does is in `data_parallel_ranks.py`.

Source: CS336 assignment 2, sections 2.2 and 2.3 (2025).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis.bucketing import CallCost, call_cost
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench import grid as grids
from cs336_systems.bench.allocator import available_bytes
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.ranks import lack_of_memory_told
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import AVAILABLE, OnPart
from cs336_systems.bench.timing import describe
from cs336_systems.distributed.launch import launch
from cs336_systems.distributed.variants import NAMES, WITH_BUCKETS, check_name, load_ddp
from cs336_systems.errors import UserError
from cs336_systems.experiments import data_parallel_ranks
from cs336_systems.experiments.data_parallel_memory import gradient_bytes, planned_bytes, without_room
from cs336_systems.experiments.data_parallel_ranks import (
    ALONE,
    AT_ONCE,
    FINISH,
    GRADIENTS,
    ONE_NUMBER,
    STEP,
    variant_name,
)
from cs336_systems.experiments.data_parallel_together import measurement_of
from cs336_systems.experiments.transformer_step import bound_ms
from cs336_systems.model import model_size
from cs336_systems.object_reference import is_object_reference
from cs336_systems.step import StepConfig, size_name

BYTES_PER_MB = 1_000_000
LAPTOP_CONTEXTS: Mapping[str, Sequence[int]] = {"small": [64]}
LAPTOP_BUCKETS_MB = (1, 10, 100)
WRAPPERS = ("naive", "flat", "overlapped", "bucketed", "torch")
COMPARED_MB = 25
"""The bucket size at which ours stands beside PyTorch's own, which takes about this by default."""
MOST_OFF: Mapping[str, float] = MappingProxyType({"none": 1e-4, "bfloat16": 0.1, "float16": 0.1})
"""By autocast, how far averaged gradients may be from those of one process, relative to their norm.

Sums of float32 in another order differ by some ε of 1.2e-7 each, which do not add up but in part cancel: no rounding
reaches 1e-4. Under autocast every part of the batch has its products rounded to 16 bits on its own, by ε of 0.008 for
bfloat16, through all layers. No mistake is so small: a factor of N, or a rank's own gradients, is off by about 1, and
that one of N ranks was left out by about 1/N.
"""
WRONG = ("ranks differ", "a gradient is missing or too many", "too far off")
"""What may be the matter with averaged gradients."""


@dataclasses.dataclass(frozen=True)
class Case(StepConfig):
    """One model on so many ranks. All of it is checked on creation; `batch_size` is that of all ranks together.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    world_size: int = 2
    wrappers: tuple[str, ...] = WRAPPERS
    buckets_mb: tuple[float, ...] = LAPTOP_BUCKETS_MB
    warmup: int = 1
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("world_size", 2), ("warmup", 0), ("rounds", 1), ("seed", 0)):
            self.require_whole(name, least)
        object.__setattr__(self, "wrappers", tuple(self.wrappers))
        object.__setattr__(self, "buckets_mb", tuple(self.buckets_mb))
        for name in self.wrappers:
            check_name(name)
        if not self.wrappers:
            raise UserError(f"wrappers is empty: name one or more of {', '.join(NAMES)}, or module:Class")
        for size in self.buckets_mb:
            if not isinstance(size, (int, float)) or isinstance(size, bool) or not 0 < size < math.inf:
                raise UserError(f"a bucket must be larger than 0 MB, found {size!r}")
        without = {*self.wrappers} - {name for name, _ in self.variants}
        if without:
            raise UserError(f"buckets_mb is empty: {' and '.join(without)} needs the size of a bucket in MB")
        if self.batch_size % self.world_size:
            raise UserError(
                f"a batch of {self.batch_size} cannot be divided among {self.world_size} ranks: "
                f"expected a multiple of {self.world_size}"
            )
        if self.compile != "none" or self.phase != "step" or self.dtype != "float32":
            raise UserError("data parallel is measured of whole eager steps with float32 weights")

    @property
    def object_references(self) -> tuple[str, ...]:
        return (*super().object_references, *filter(is_object_reference, self.wrappers))

    @property
    def size(self) -> str:
        """The name of the size, whatever its number of blocks, or "custom"."""
        return size_name(self.config, but_for=("context_length", "num_layers"))

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def step_of_rank(self) -> StepConfig:
        """The step of one rank, on its part of the batch."""
        return self.as_step(batch_size=self.batch_size // self.world_size)

    @property
    def variants(self) -> tuple[tuple[str, float | None], ...]:
        """Wrapper and bucket size of each that takes its turn; ours in buckets at PyTorch's size too, if both are."""
        sizes = dict.fromkeys(self.buckets_mb)
        found: list[tuple[str, float | None]] = []
        for name in dict.fromkeys(self.wrappers):
            if name == "torch":
                found.append((name, COMPARED_MB))
            elif name in WITH_BUCKETS:
                compared = [COMPARED_MB] if "torch" in self.wrappers else []
                found += [(name, size) for size in sorted({*sizes, *compared})]
            else:
                found.append((name, None))
        return tuple(found)

    def __str__(self) -> str:
        return f"{self.size}, context {self.context_length}, {self.world_size} ranks"


def grid(
    *,
    contexts: Mapping[str, Sequence[int]] = LAPTOP_CONTEXTS,
    layers: int | None = 4,
    world_sizes: Sequence[int] = (2,),
    wrappers: Sequence[str] = WRAPPERS,
    buckets_mb: Sequence[float] = LAPTOP_BUCKETS_MB,
    batch_size: int = 2,
    autocast: str | Sequence[str] = "none",
    optimizer: str = "reference",
    formulation: str = "reference",
    rope: str = "2025",
    model: str | None = None,
    device: str = "auto",
    device_count: int | None = None,
    warmup: int = 1,
    rounds: int = 3,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Sizes × contexts × world sizes; a case takes all wrappers.

    Args:
        contexts: the context lengths of each size, by its name.
        layers: blocks in the place of each size's own; None for its own.
        batch_size: of all ranks together.
        buckets_mb: of the wrapper in buckets, in MB of 10^6 bytes.
        device_count: the GPUs of the machine whose grid this is; by default those that are here.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    where = resolve_device(device)
    gpus = torch.cuda.device_count() if device_count is None else device_count

    def skip_reason(case: Case) -> str | None:
        if case.device == "cuda" and case.world_size > gpus:
            return f"{case.world_size} ranks need as many GPUs, and this machine has {gpus}"
        return None

    cells: list[grids.Cell[Case]] = []
    for name, lengths in contexts.items():
        size = model_size(name, num_layers=layers)
        cells += grids.product(
            Case,
            skip=skip_reason,
            **dataclasses.asdict(size) | {"context_length": lengths},
            world_size=world_sizes,
            wrappers=[tuple(wrappers)],
            buckets_mb=[tuple(buckets_mb)],
            batch_size=batch_size,
            autocast=autocast,
            optimizer=optimizer,
            formulation=formulation,
            rope=rope,
            model=model,
            device=where,
            warmup=warmup,
            rounds=rounds,
            seed=seed,
        )
    return cells


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Samples: `<variant> step_ms`, of the slowest rank. Values: `parts_ms`, what its steps are made of and reductions
    alone; by rank all times, and what was recorded; how gradients compare with those of one process, on the rank where
    that is worst; `left_out`, which variants have no room, and why.

    Raises:
        OutOfMemory: weights, gradients and optimizer state of all ranks exceed what is available, or a rank was killed.
        UserError: more ranks than GPUs, or a wrapper that cannot be made.
    """
    available = available_bytes(case.device)
    reasons = without_room(case, available)
    variants = [each for each in case.variants if each[0] not in reasons]
    for name in case.wrappers:
        load_ddp(name)  # the ranks take over what makes it importable
    steps = (2 + len(variants)) * (case.warmup + case.rounds) + 2 * len(variants)
    done = 0

    def count(_rank: int, _value: object) -> None:
        nonlocal done
        done += 1
        on_part(min(1.0, done / (steps * case.world_size)))

    with lack_of_memory_told():
        ranks = launch(
            data_parallel_ranks.train,
            case,
            variants,
            world_size=case.world_size,
            backend=case.backend,
            on_report=count,
        )
    left_out = {variant_name(*each): reasons[each[0]] for each in case.variants if each[0] in reasons}
    measured = measurement_of([variant_name(*each) for each in variants], ranks)
    # With more memory the case is worth another try.
    beside = {"left_out": left_out, **({AVAILABLE: available} if left_out else {})}
    return dataclasses.replace(measured, values={**measured.values, **beside})


# Summarising ---------------------------------------------------------------------------------------------------


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: what is reduced in every step, the model's floor, and the variants that take their turns."""
    return pd.DataFrame(
        [
            {
                "size": case.size,
                **dataclasses.asdict(case),
                "gradient_bytes": gradient_bytes(case),
                "planned_bytes": planned_bytes(case, case.wrappers, peaks.name),
                "bound_ms": floor_ms(case, peaks),
                "ceilings": peaks.name,
                "variants": len(case.variants),
            }
            for case in cases
        ]
    )


def floor_ms(case: Case, peaks: Peaks) -> float:
    """The floor of a step: on a CPU all ranks share its cores, each GPU has a rank of its own."""
    step = case.as_step() if case.device == "cpu" else case.step_of_rank
    return bound_ms(step, peaks)[0]


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and variant: its times, what of them is communication, and what a model of the overhead says.

    `exposed_ms` is what the gradients took longer than without communication: what was not hidden. `reductions` are
    those of gradients. A variant for which there was no room has the status "oom", whatever the record's.
    """
    del store
    rows = []
    for record in records:
        case = Case(**record.case)
        values, times = record.measurement.values, times_of(record)
        cost = fitted_cost(record)
        alone = _mean(times, ALONE, GRADIENTS)
        shared = {
            "size": case.size,
            **{name: value for name, value in record.case.items() if name not in ("wrappers", "buckets_mb")},
            "case": record.key,
            **record.circumstances(fingerprint),
            "gradient_bytes": values.get("gradient_bytes", math.nan),
            "gradients": values.get("gradients", math.nan),
            "bound_ms": floor_ms(case, peaks),
            "bytes_per_s": cost.bytes_per_s if cost else math.nan,
            "seconds_per_call": cost.seconds_per_call if cost else math.nan,
        }
        for wrapper, size in ((ALONE, None), *case.variants):
            name = variant_name(wrapper, size)
            statistics = describe(steps) if (steps := times.get(f"{name} {STEP}")) else None
            exposed = _mean(times, name, GRADIENTS) - alone if wrapper != ALONE else math.nan
            mean = statistics.mean if statistics else math.nan
            reductions = _over_ranks(values, name, "reductions")
            checked = values.get("checked", {}).get(name, {})
            error = checked.get("relative_error")
            left_out = values.get("left_out", {}).get(name)
            rows.append(
                {
                    **shared,
                    **({} if left_out is None else {"status": "oom", "reason": left_out}),
                    "is_left_out": left_out is not None,
                    "variant": name,
                    "wrapper": wrapper,
                    "bucket_mb": size if size is not None else math.nan,
                    "mean_ms": mean,
                    "std_ms": statistics.std if statistics else math.nan,
                    "median_ms": statistics.median if statistics else math.nan,
                    "finish_ms": _mean(times, name, FINISH) if wrapper != ALONE else math.nan,
                    "exposed_ms": exposed,
                    "exposed_share": exposed / mean,
                    "reductions": reductions,
                    "communication_ms": _over_ranks(values, name, "communication_ms"),
                    "overlapped": _overlapped_share(values, name),
                    "is_matched": all(each["is_matched"] for each in _recorded(values, name)),
                    "modelled_ms": _modelled_ms(cost, wrapper, shared["gradient_bytes"], reductions),
                    "recorded": _recorded(values, name),
                    "relative_error": math.nan if error is None else error,
                    "wrong": _wrong(checked, MOST_OFF[case.autocast]) if checked else None,
                }
            )
    return pd.DataFrame(rows)


def times_of(record: Record) -> dict[str, list[float]]:
    """Steps and their parts of the slowest rank, and the reductions alone, by name."""
    return {**record.measurement.samples, **record.measurement.values.get("parts_ms", {})}


def _mean(times: Mapping[str, Sequence[float]], name: str, part: str) -> float:
    taken = times.get(f"{name} {part}")
    return describe(taken).mean if taken else math.nan


def _recorded(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = [each["recorded"].get(name) for each in values.get("ranks", [])]
    return [each for each in found if each is not None]


def _over_ranks(values: Mapping[str, Any], name: str, what: str) -> float:
    found = [each[what] for each in _recorded(values, name)]
    return sum(found) / len(found) if found else math.nan


def _wrong(checked: Mapping[str, Any], most_off: float) -> list[str]:
    """What is the matter with averaged gradients, of `WRONG`; nothing where they are right."""
    error = checked["relative_error"]
    is_so = (not checked["ranks_equal"], not checked["same_parameters"], error is None or not error < most_off)
    return [what for what, is_it in zip(WRONG, is_so, strict=True) if is_it]


def _overlapped_share(values: Mapping[str, Any], name: str) -> float:
    """The share of communication during which its rank computed, over all ranks."""
    recorded = _recorded(values, name)
    communicating = sum(each["communication_ms"] for each in recorded)
    return sum(each["overlapped_ms"] for each in recorded) / communicating if communicating else math.nan


def fitted_cost(record: Record) -> CallCost | None:
    """What a call costs, from the reductions with nothing beside them; None where nothing follows."""
    if record.status != "ok":
        return None
    times, values = times_of(record), record.measurement.values
    few_s, many_s = (describe(times[f"{way} ms"]).median / 1e3 for way in (ONE_NUMBER, AT_ONCE))
    return call_cost(torch.float32.itemsize, few_s, values["gradient_bytes"], many_s)


def _modelled_ms(cost: CallCost | None, wrapper: str, gradient_bytes: float, reductions: float) -> float:
    """The overhead that the model expects of a wrapper; NaN for one of which it says nothing.

    Its n are the reductions of gradients: the one of a byte per parameter that ours make beside them is no bucket.
    """
    if cost is None or wrapper == ALONE or is_object_reference(wrapper) or reductions != reductions:
        return math.nan
    overhead = cost.in_turn_s if wrapper in ("naive", "flat") else cost.overlapped_s
    return 1e3 * overhead(gradient_bytes, reductions)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """As many steps as there are turns, and twice that for each that is recorded."""
    turns = (1 + len(case.variants)) * (case.warmup + case.rounds) + 3 * len(case.variants)
    return turns * floor_ms(case, peaks) * slowdown / 1e3

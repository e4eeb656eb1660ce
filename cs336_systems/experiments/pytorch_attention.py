"""One head's attention over lengths and head dimensions: eager beside compiled, time of each pass and memory between.

Problems `pytorch_attention` and `torch_compile` (a). Every implementation gets the same random inputs. A round is a
forward and a backward of each, so that a disturbance hits all; the gradients of one backward stay for the next to add
to, as in the published figures. What is in use between the passes is counted from the allocator in a pass that is not
timed.

Running out of memory is an answer: a row with what the implementation would have to hold at once.

Source: CS336 assignment 2, "Benchmarking PyTorch attention" and "Benchmarking JIT-compiled attention".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cs336_systems.analysis.attention import (
    AttentionShape,
    intensity,
    kept_by_flash,
    kept_for_backward,
    least_work,
    materialised_peak,
    materialised_traffic,
)
from cs336_systems.analysis.hardware import GPUS, Peaks, product_precision
from cs336_systems.analysis.published import PublishedAttention
from cs336_systems.analysis.roofline import bound
from cs336_systems.attention.backends import COMPILED, attention_source, check_name, resolve_attention
from cs336_systems.bench import grid as grids
from cs336_systems.bench.allocator import allocated_bytes, available_bytes, release_free_memory
from cs336_systems.bench.contest import Contender, measurement_of
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import bytes_in_words
from cs336_systems.bench.sweep import OnPart, OutOfMemory
from cs336_systems.bench.timing import describe, float32_matmul_precision, time_rounds
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.object_reference import is_object_reference

DTYPES = ("float32", "bfloat16", "float16")
FLOAT32_MATMUL = ("highest", "high")
PASSES = ("forward", "backward")
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Implementations of attention compared on one shape. All of it is checked on creation.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    head_dim: int
    seq_len: int
    device: str
    batch_size: int = 1
    heads: int = 1
    dtype: str = "float32"
    is_causal: bool = True
    float32_matmul: str = "highest"
    """PyTorch's float32_matmul_precision: "high" lets its float32 products run in TF32."""
    implementations: tuple[str, ...] = (REFERENCE,)
    """Names of `attention/backends.py`, in the order in which a round runs them."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("float32_matmul", FLOAT32_MATMUL), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        for name in ("head_dim", "seq_len", "batch_size", "heads"):
            self.require_whole(name, 1)
        object.__setattr__(self, "implementations", tuple(self.implementations))  # a list, as records have it
        if not self.implementations or len(set(self.implementations)) < len(self.implementations):
            raise UserError(f"implementations must be one or more names, each once, found {self.implementations}")

    def require_whole(self, name: str, least: int) -> None:
        """Raise a UserError unless a field is a whole number of at least `least`."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, found {value!r}")

    @property
    def shape(self) -> AttentionShape:
        itemsize = getattr(torch, self.dtype).itemsize
        return AttentionShape(self.batch_size, self.heads, self.seq_len, self.head_dim, self.is_causal, itemsize)

    @property
    def object_references(self) -> tuple[str, ...]:
        """Implementations on whose source a record depends beside what every case uses."""
        return tuple(filter(None, map(attention_source, self.implementations)))

    def precision(self, implementation: str) -> str:
        """In which the products of an implementation run, as a key of `Peaks.matmul_flops_per_s`."""
        if self.dtype == "float32" and implementation.startswith("flash-triton"):
            return "tf32" if implementation.endswith("tf32") else "float32"
        if (self.device, self.dtype, implementation) == ("cuda", "float32", "sdpa-efficient"):
            return "tf32"  # it makes a float32 product of three in TF32, so that of float32 is no ceiling for it
        return product_precision(self.dtype, "none", self.float32_matmul)

    def __str__(self) -> str:
        return f"length {self.seq_len}, d {self.head_dim}, {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """One shape of the problem, timed pass by pass."""

    batch_size: int = 8
    warmup: int = 3
    passes: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("warmup", 0)
        self.require_whole("passes", 1)


def grid(
    *,
    head_dims: Sequence[int] = (16, 64),
    seq_lens: Sequence[int] = (256, 1024, 16384),
    batch_size: int = 8,
    dtype: str = "float32",
    is_causal: bool = True,
    float32_matmul: str | Sequence[str] = "highest",
    implementations: Sequence[str] = (REFERENCE, REFERENCE + COMPILED),
    impl: str | None = None,
    device: str = "auto",
    warmup: int = 1,
    passes: int = 10,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """Head dimensions × lengths.

    `impl`: one more implementation to stand beside the others, by name or as `module:attribute`.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    return grids.product(
        Case,
        float32_matmul=float32_matmul,
        head_dim=head_dims,
        seq_len=seq_lens,
        batch_size=batch_size,
        dtype=dtype,
        is_causal=is_causal,
        implementations=[checked_implementations(implementations, impl)],
        device=resolve_device(device),
        warmup=warmup,
        passes=passes,
        seed=seed,
    )


def checked_implementations(implementations: Sequence[str], impl: str | None) -> tuple[str, ...]:
    """These and `impl`, each once; a name that none has is an error before anything runs."""
    names = tuple(dict.fromkeys([*implementations, *([impl] if impl is not None else [])]))
    for name in names:
        check_name(name)
        plain = name.removesuffix(COMPILED)
        if is_object_reference(plain) or name == impl:
            resolve_attention(plain)
    return names


# Measuring -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every implementation of a case is given, of shape (batch, heads, length, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def draw_inputs(case: AttentionCase) -> Inputs:
    """Random normal inputs, the same for a seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    shape = (case.batch_size, case.heads, case.seq_len, case.head_dim)
    dtype = getattr(torch, case.dtype)
    query, key, value, grad_output = (
        torch.randn(shape, device=case.device, generator=generator).to(dtype) for _ in range(4)
    )
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_output)


class AttentionContender(Contender):
    """One implementation of attention on the inputs of a case."""

    def __init__(self, name: str, case: AttentionCase, inputs: Inputs) -> None:
        super().__init__(name, case.device)
        self.case, self.inputs = case, inputs
        self.function = resolve_attention(name)
        self.output: Tensor | None = None

    def let_go(self) -> None:
        self.output = None

    def require_memory(self) -> None:
        """Refuse in a moment what cannot fit, where it is known what must be held.

        Raises:
            OutOfMemory: the materialised form needs more at once than there is.
        """
        if self.name.removesuffix(COMPILED) != REFERENCE:
            return
        release_free_memory(self.device)  # what the contender before left to the allocator is there to be had
        shape, compiled = self.case.shape, self.name.endswith(COMPILED)
        needed = materialised_peak(shape, "forward-backward", compiled=compiled)
        available = available_bytes(self.device)
        if needed > available:
            raise OutOfMemory(
                f"forward and backward hold {bytes_in_words(needed)} at once, in matrices of scores of "
                f"{bytes_in_words(shape.matrix_bytes)} each, and {bytes_in_words(available)} are available"
            )

    def forward(self) -> None:
        query, key, value = self.inputs.leaves
        self.output = self.function(query, key, value, is_causal=self.case.is_causal)

    def backward(self) -> None:
        """Adds to the inputs' gradients, and lets go of the output."""
        assert self.output is not None
        self.output.backward(self.inputs.grad_output)
        self.output = None

    def both(self) -> None:
        self.forward()
        self.backward()

    def weigh(self) -> None:
        """Count what one untimed pass allocates; gradients of an earlier pass are there."""
        forward_peak, left = allocated_bytes(self.forward, self.device)
        if self.device == "cuda":
            self.values["in_use_bytes"] = torch.cuda.memory_allocated()
        self.output = None
        peak, _ = allocated_bytes(self.both, self.device)
        self.values |= {
            # Inputs and gradients, and of the pass all that is still there.
            "kept_bytes": left + 2 * sum(leaf.nbytes for leaf in self.inputs.leaves),
            "forward_peak_bytes": forward_peak,
            "peak_bytes": peak,
        }


def contenders_of(case: AttentionCase) -> list[AttentionContender]:
    """The implementations of a case on inputs of their own, nothing compiled by an earlier case."""
    torch.compiler.reset()
    inputs = draw_inputs(case)
    return [AttentionContender(name, case, inputs) for name in case.implementations]


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Time `passes` rounds of forward and backward.

    Samples: `<implementation> forward_ms` and `backward_ms`, wall clock with the synchronisation. Values: by
    implementation its status, and the bytes of `Contender.weigh`.
    """
    done = 0

    def count(_: object = None) -> None:
        nonlocal done
        done += 1
        on_part(done / (case.warmup + case.passes + len(case.implementations)))

    with float32_matmul_precision(case.float32_matmul):
        contenders = contenders_of(case)
        for contender in contenders:
            for action in (contender.require_memory, contender.both, contender.weigh):
                contender.attempt(action)
            count()
        calls = {
            f"{contender.name} {part}_ms": partial(contender.attempt, getattr(contender, part))
            for contender in contenders
            for part in PASSES
            if contender.status == "ok"
        }
        timings = time_rounds(calls, warmup=case.warmup, rounds=case.passes, device=case.device, on_round=count)
    return measurement_of(contenders, {name: timing.samples_ms for name, timing in timings.items()})


# Summarising ---------------------------------------------------------------------------------------------------


def predict(cases: Sequence[AttentionCase], peaks: Peaks) -> pd.DataFrame:
    """One row per case: floors, traffic and memory of the materialised form, from the shape alone."""
    return pd.DataFrame(
        {
            **{name: value for name, value in dataclasses.asdict(case).items() if name != "implementations"},
            **floors("forward", case, REFERENCE, "forward", peaks),
            **floors("backward", case, REFERENCE, "backward", peaks),
            "kept_bytes": sum(kept_for_backward(case.shape).values()),
            "flash_bytes": sum(kept_by_flash(case.shape).values()),
            "peak_bytes": materialised_peak(case.shape, "forward-backward"),
            "ceilings": peaks.name,
        }
        for case in cases
    )


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and implementation: milliseconds per pass, floors, memory between, and what was published."""
    published = PublishedAttention((store or Store.default()).reference)
    rows = []
    for record in records:
        case = Case(**record.case)
        for row in rows_of(record, case, peaks, PASSES, fingerprint):
            name = row["implementation"]
            compiled, tf32 = name == REFERENCE + COMPILED, case.float32_matmul == "high"
            beside = published.beside(case.shape, compiled=compiled, tf32=tf32)
            if not compiled and name != REFERENCE:
                beside = dict.fromkeys(beside, math.nan)
            rows.append(row | beside)
    return pd.DataFrame(rows)


def rows_of(
    record: Record,
    case: AttentionCase,
    peaks: Peaks,
    parts: Sequence[str],
    fingerprint: Mapping[str, Any] | None,
) -> Iterator[dict[str, Any]]:
    """One row per implementation: the case, its status, and per part its times and floor."""
    fields = {name: value for name, value in record.case.items() if name != "implementations"}
    for name in case.implementations:
        values = record.measurement.values.get(name, {})
        accounted = accounted_bytes(case.shape, name)
        row = {
            **fields,
            "case": record.key,
            "implementation": name,
            **record.circumstances(fingerprint),
            "status": values.get("status", record.status),
            "reason": values.get("reason", record.reason),
            "kept_bytes": values.get("kept_bytes", math.nan),
            "accounted_bytes": math.nan if accounted is None else sum(accounted.values()),
            "peak_bytes": values.get("peak_bytes", math.nan),
            "flash_bytes": sum(kept_by_flash(case.shape).values()),
            "ridge": peaks.matmul_flops_per_s.get(case.precision(name), math.nan) / peaks.bandwidth_bytes_per_s,
            "intensity": intensity(case.shape, "forward", materialised=name.removesuffix(COMPILED) == REFERENCE),
            "bound_lacks": "",
        }
        for part in parts:
            samples = record.measurement.samples.get(f"{name} {part}_ms", [])
            row |= timed(column_of(part), samples) | floors(column_of(part), case, name, part, peaks)
            row["bound_lacks"] = peaks.lacks if math.isnan(row[f"{column_of(part)}_bound_ms"]) else row["bound_lacks"]
        yield row


def column_of(part: str) -> str:
    """How the columns of a part begin."""
    return "both" if part == "forward-backward" else part


def timed(column: str, samples: Sequence[float]) -> dict[str, float]:
    """Median, mean and deviation of a part in milliseconds."""
    if not samples:
        return dict.fromkeys((f"{column}_ms", f"{column}_mean_ms", f"{column}_std_ms"), math.nan)
    found = describe(samples)
    return {f"{column}_ms": found.median, f"{column}_mean_ms": found.mean, f"{column}_std_ms": found.std}


def floors(column: str, case: AttentionCase, implementation: str, part: str, peaks: Peaks) -> dict[str, Any]:
    """The least a part can take in any form, and the least its operators' traffic takes in the materialised form."""
    precision = case.precision(implementation)
    if not peaks.bounds(precision):
        return {f"{column}_bound_ms": math.nan, f"{column}_bound_by": "", f"{column}_traffic_ms": math.nan}
    floor = bound(least_work(case.shape, part), peaks, precision)
    traffic = materialised_traffic(case.shape, part) / peaks.bandwidth_bytes_per_s
    return {
        f"{column}_bound_ms": floor.seconds * 1e3,
        f"{column}_bound_by": floor.limited_by,
        f"{column}_traffic_ms": traffic * 1e3 if implementation == REFERENCE else math.nan,
    }


def published_roofline(store: Store | None = None) -> pd.DataFrame:
    """Eager forward as others measured it on an H100, beside what its traffic and its products take there."""
    rows = (store or Store.default()).reference("attention_eager_h100")
    peaks = GPUS["h100-sxm"]
    found = []
    for row in rows.itertuples():
        shape = AttentionShape(8, 1, int(row.seq_len), int(row.d_model), is_causal=False)  # the mask saves no product
        products = bound(least_work(shape, "forward"), peaks, "float32")
        traffic = materialised_traffic(shape, "forward") / peaks.bandwidth_bytes_per_s
        found.append(
            {
                "head_dim": shape.head_dim,
                "seq_len": shape.seq_len,
                "forward_ms": 10 * row.forward_s_per_100,
                "traffic_ms": traffic * 1e3,
                "products_ms": products.seconds * 1e3,
            }
        )
    return pd.DataFrame(found)


def accounted_bytes(shape: AttentionShape, implementation: str) -> dict[str, int] | None:
    """What an implementation is known to keep between the passes; None where its source does not tell."""
    if implementation == REFERENCE:
        return kept_for_backward(shape)
    return kept_by_flash(shape) if implementation.startswith("flash") else None


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """About how long a case takes: its rounds, forward and backward each at their traffic's time, and compilation."""
    seconds = sum(
        materialised_traffic(case.shape, part) / peaks.bandwidth_bytes_per_s * slowdown / 2 for part in PASSES
    )
    compiled = sum(name.endswith(COMPILED) for name in case.implementations)
    return (case.warmup + case.passes + 3) * seconds * len(case.implementations) + COMPILE_S[case.device] * compiled


COMPILE_S = MappingProxyType({"cpu": 3.0, "cuda": 8.0})
"""About what compiling attention, forward and backward, takes."""

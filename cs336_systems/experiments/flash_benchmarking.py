"""FlashAttention-2 against everything it competes with: time, rate, memory and error over lengths and dimensions.

Problem `flash_benchmarking`. On a shape all implementations are compared in one record, in rounds: ours in PyTorch and
in Triton, materialised attention eager and compiled, and PyTorch's fused attention with each of its backends. On a GPU
a sample is the median of one `triton.testing.do_bench`, which empties the cache before each call; on a CPU it is one
call by the clock. The error is the distance to attention in float64 on the same, already rounded inputs, so that the
materialised form's own error in that precision stands beside every other.

Two sets of shapes: the handout's, one head of one sequence; and training's, where 16,384 tokens and 16 heads fill a
GPU (at head dimension 64, length 16,384, causal, bfloat16 that is the shape of 2025's leaderboard).

Source: CS336 assignment 2, flash_benchmarking and section 1.3.3; counts as in Dao 2023, "FlashAttention-2", section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from cs336_systems.analysis.attention import PHASES, counted_flops, least_work
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published import PublishedFlash
from cs336_systems.analysis.roofline import bound
from cs336_systems.attention.backends import COMPILED
from cs336_systems.attention.reference import scaled_dot_product_attention
from cs336_systems.bench import grid as grids
from cs336_systems.bench.contest import measurement_of
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.bench.timing import benched_ms, float32_matmul_precision, no_garbage_collection, time_rounds
from cs336_systems.errors import UserError
from cs336_systems.experiments.pytorch_attention import (
    COMPILE_S,
    REFERENCE,
    AttentionCase,
    AttentionContender,
    Inputs,
    checked_implementations,
    column_of,
    contenders_of,
    rows_of,
)

TILED_IN_PYTHON = "flash"
LONGEST_TILED_IN_PYTHON = 8192
"""Its loop visits every pair of tiles from Python; at this length there are two thousand, causal."""
TOKENS, HEADS = 16_384, 16
"""Of a training shape: batch · length, and heads."""
_BLOCK_ELEMENTS = 2**26
"""Scores that the float64 oracle holds at a time."""

_WARMUP_ROUNDS = MappingProxyType({"cpu": 1, "cuda": 0})  # do_bench warms up by itself

ON_CPU = (REFERENCE, REFERENCE + COMPILED, "flash", "sdpa-math", "sdpa-flash")
ON_CUDA = (
    *(REFERENCE, REFERENCE + COMPILED, "flash", "flash-triton", "flash-triton-graded"),
    *("sdpa-math", "sdpa-efficient", "sdpa-flash", "sdpa-cudnn"),
)
_FLOAT32_ONLY, _HALF_ONLY = ("flash-triton-tf32",), ("sdpa-flash", "sdpa-cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """One shape, and how often each implementation is timed on it."""

    rounds: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("rounds", 1)

    def __str__(self) -> str:
        return f"{super().__str__()}, {'causal' if self.is_causal else 'no mask'}, {self.batch_size} × {self.heads}"


def grid(
    *,
    seq_lens: Sequence[int] = (256, 1024, 2048),
    head_dims: Sequence[int] = (64,),
    dtypes: Sequence[str] = ("float32",),
    is_causal: bool = True,
    training_seq_lens: Sequence[int] = (),
    training_head_dims: Sequence[int] = (64, 128),
    implementations: Sequence[str] | None = None,
    impl: str | None = None,
    device: str = "auto",
    rounds: int = 7,
    seed: int = 0,
) -> list[grids.Cell[Case]]:
    """The handout's shapes, then training's: bfloat16, 16,384 tokens, 16 heads, causal and not.

    Args:
        implementations: by default all that the device and the precision have.
        impl: one more to stand beside them, by name or as `module:attribute`.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    device = resolve_device(device)

    def cells(dtype: str, **shape: Any) -> list[grids.Cell[Case]]:
        names = checked_implementations(implementations or known_implementations(device, dtype), impl)
        return grids.product(
            Case, dtype=dtype, implementations=[names], **shape, device=device, rounds=rounds, seed=seed
        )

    found = []
    for dtype in dtypes:
        found += cells(dtype, head_dim=head_dims, seq_len=seq_lens, is_causal=is_causal)
    for seq_len in training_seq_lens:
        if seq_len < 1 or TOKENS % seq_len:
            raise UserError(f"training_seq_lens must divide {TOKENS}, found {seq_len}")
        batch = {"batch_size": TOKENS // seq_len, "heads": HEADS}
        found += cells("bfloat16", head_dim=training_head_dims, seq_len=seq_len, is_causal=[True, False], **batch)
    return found


def known_implementations(device: str, dtype: str) -> tuple[str, ...]:
    """All that a device has for a precision."""
    if device == "cpu":
        return ON_CPU
    if dtype == "float32":
        return (*(name for name in ON_CUDA if name not in _HALF_ONLY), *_FLOAT32_ONLY)
    return ON_CUDA


# Measuring -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Tunable(Protocol):
    """An implementation that can look for its fastest configuration, and tells which it has."""

    def tune(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> None: ...

    def configuration(self, query: Tensor, key: Tensor, *, is_causal: bool) -> dict[str, Any]: ...


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Time forward, backward and both in `rounds` rounds; weigh memory and error in passes of their own.

    Samples: `<implementation> forward_ms`, `backward_ms` and `forward-backward_ms`. Values: by implementation its
    status, bytes, errors and, where it has one, the configuration it ran with.
    """
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_part(done / (case.rounds + _WARMUP_ROUNDS[case.device] + len(case.implementations)))

    with float32_matmul_precision(case.float32_matmul):
        contenders = contenders_of(case)
        exact = exact_attention(contenders[0].inputs, case.is_causal)
        for contender in contenders:
            for action in (
                partial(refuse_long_loops, contender),
                contender.require_memory,
                partial(tune, contender),
                contender.both,
                contender.weigh,
                partial(compare, contender, exact),
            ):
                contender.attempt(action)
            count()
        for leaf in contenders[0].inputs.leaves:
            leaf.grad = None
        still_in = [contender for contender in contenders if contender.status == "ok"]
        samples = (time_on_gpu if case.device == "cuda" else time_on_cpu)(still_in, case.rounds, count)
    return measurement_of(contenders, samples)


def time_on_cpu(
    contenders: Sequence[AttentionContender], rounds: int, on_round: Callable[[], None]
) -> dict[str, Sequence[float]]:
    """One call each per round, by the clock."""
    calls: dict[str, Callable[[], object]] = {}
    for contender in contenders:
        for phase, call in (
            ("forward", contender.forward),
            ("backward", contender.backward),
            ("forward-backward", contender.both),
        ):
            calls[f"{contender.name} {phase}_ms"] = partial(contender.attempt, call)
    timings = time_rounds(calls, warmup=_WARMUP_ROUNDS["cpu"], rounds=rounds, device="cpu", on_round=on_round)
    return {name: timing.samples_ms for name, timing in timings.items()}


def time_on_gpu(
    contenders: Sequence[AttentionContender], rounds: int, on_round: Callable[[], None]
) -> dict[str, Sequence[float]]:
    """A median of `do_bench` each per round, which begins with another each time; of one's graphs at a time."""
    samples: dict[str, list[float]] = {}
    with no_garbage_collection():
        for number in range(rounds):
            # Whoever follows a long or a hot one does so once.
            first = number % max(1, len(contenders))
            for contender in [*contenders[first:], *contenders[:first]]:
                for phase in PHASES:
                    taken = samples.setdefault(f"{contender.name} {phase}_ms", [])
                    contender.attempt(partial(bench, contender, phase, taken))
            on_round()
    return dict(samples)


def bench(contender: AttentionContender, phase: str, taken: list[float]) -> None:
    """Take the milliseconds of one phase on a GPU; gradients are given back, not added up."""
    inputs = contender.inputs
    forward = partial(contender.function, *inputs.leaves, is_causal=contender.case.is_causal)

    def gradients(of: Tensor | None) -> tuple[Tensor, ...]:
        assert of is not None
        return torch.autograd.grad(of, inputs.leaves, inputs.grad_output)

    if phase == "forward":
        taken.append(benched_ms(forward))
    elif phase == "backward":
        # Of a graph of its own each, as in training: what forward kept may be written over, and is let go on the way.
        taken.append(benched_ms(lambda: gradients(contender.output), contender.forward))
        contender.let_go()
    else:
        taken.append(benched_ms(lambda: gradients(forward())))


def refuse_long_loops(contender: AttentionContender) -> None:
    """Raise a UserError for what would take minutes in Python's loop over tiles."""
    is_long = contender.case.seq_len > LONGEST_TILED_IN_PYTHON
    if contender.name == TILED_IN_PYTHON and is_long:
        raise UserError(f"its loop over tiles in Python is not measured beyond length {LONGEST_TILED_IN_PYTHON:,}")


def tune(contender: AttentionContender) -> None:
    """Let an implementation find its configuration, and note it."""
    if isinstance(contender.function, Tunable):
        query, key, value = contender.inputs.leaves
        is_causal = contender.case.is_causal
        contender.function.tune(query, key, value, is_causal=is_causal)
        contender.values["configuration"] = contender.function.configuration(query, key, is_causal=is_causal)


def compare(contender: AttentionContender, exact: Sequence[Tensor]) -> None:
    """Note how far output and gradients are from float64."""
    query, key, value = contender.inputs.leaves
    output = contender.function(query, key, value, is_causal=contender.case.is_causal)
    found = (output.detach(), *torch.autograd.grad(output, contender.inputs.leaves, contender.inputs.grad_output))
    errors = [relative_error(one, other) for one, other in zip(found, exact, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise ArithmeticError("output or gradients are not finite")
    contender.values |= {"output_error": errors[0], "gradient_error": max(errors[1:])}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, or ‖found‖ where exact is 0, as the gradients of a sequence of one are."""
    distance, size = torch.linalg.vector_norm(found.double() - exact), torch.linalg.vector_norm(exact)
    return float(distance / size if size != 0 else distance)


def exact_attention(inputs: Inputs, is_causal: bool) -> tuple[Tensor, ...]:
    """Output and gradients of Q, K and V in float64, a block of queries at a time so that any length fits."""
    query, key, value = (leaf.detach().double().requires_grad_() for leaf in inputs.leaves)
    length = query.shape[-2]
    block = max(1, _BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * length))
    positions = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        mask = positions[rows, None] >= positions if is_causal else None
        output = scaled_dot_product_attention(query[..., rows, :], key, value, mask)
        output.backward(inputs.grad_output[..., rows, :].double())
        outputs.append(output.detach())
    return torch.cat(outputs, dim=-2), *(leaf.grad for leaf in (query, key, value) if leaf.grad is not None)


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and implementation: times, floors, rates, memory and errors, and eager's beside them."""
    published = PublishedFlash((store or Store.default()).reference)
    rows = []
    for record in records:
        case = Case(**record.case)
        found = published.row(case.seq_len, case.head_dim, case.dtype) if _is_published(case) else None
        of_case = list(rows_of(record, case, peaks, PHASES, fingerprint))
        eager = next((row for row in of_case if row["implementation"] == REFERENCE), {})
        for row in of_case:
            values = record.measurement.values.get(row["implementation"], {})
            row |= {name: values.get(name, math.nan) for name in ("output_error", "gradient_error")}
            row |= {"configuration": values.get("configuration", {}), **_published_columns(found)}
            for phase in PHASES:
                row |= _rates(case, row, phase, peaks)
                column = f"{column_of(phase)}_ms"
                row[f"{column_of(phase)}_speedup"] = eager.get(column, math.nan) / row[column]
            rows.append(row)
    return pd.DataFrame(rows)


def _is_published(case: Case) -> bool:
    return (case.batch_size, case.heads, case.is_causal, case.float32_matmul) == (1, 1, True, "highest")


def published_shapes(store: Store | None = None) -> pd.DataFrame:
    """Every published shape, with the columns that `summarise` has of it."""
    published = PublishedFlash((store or Store.default()).reference)
    return pd.DataFrame(
        {"seq_len": seq_len, "head_dim": head_dim, "dtype": dtype, **_published_columns(found)}
        for dtype, seq_len, head_dim, found in published.rows()
    )


def _published_columns(found: Mapping[str, float] | None) -> dict[str, float]:
    """The published figures of a shape as `h100_<forward|backward|both>_<eager|triton>_ms` and tiles."""
    columns = {
        f"h100_{column_of(phase)}_{form}_ms": f"{phase}_{form}_ms" for phase in PHASES for form in ("eager", "triton")
    }
    columns |= {"h100_q_tile": "q_tile", "h100_k_tile": "k_tile"}
    return {name: float(found[key]) if found is not None else math.nan for name, key in columns.items()}


def _rates(case: Case, row: Mapping[str, Any], phase: str, peaks: Peaks) -> dict[str, float]:
    """FLOP/s of a phase, and their share of what the matrix units can."""
    column = column_of(phase)
    rate = counted_flops(case.shape, phase) / (row[f"{column}_ms"] / 1e3)
    peak = peaks.matmul_flops_per_s.get(case.precision(row["implementation"]), math.nan)
    return {f"{column}_flops_per_s": rate, f"{column}_share": rate / peak}


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """About how long a case takes: do_bench's repetitions or single calls, and compilation."""
    compiled = sum(name.endswith((COMPILED, "graded")) for name in case.implementations)
    if case.precision(REFERENCE) not in peaks.matmul_flops_per_s:
        return math.nan
    floor = sum(bound(least_work(case.shape, phase), peaks, case.precision(REFERENCE)).seconds for phase in PHASES)
    per_round = max(0.03 * len(PHASES) if case.device == "cuda" else 0.0, floor * slowdown)
    return (case.rounds + 5) * len(case.implementations) * per_round + COMPILE_S[case.device] * compiled

"""LayerNorm computed step by step, one of the steps in half precision and all others in float64: what each one loses.

Problem `benchmarking_mixed_precision`, part (b). The steps are

    mean        m = Σx / D           centre     c = x − m
    square      q = c²               variance   v = Σq / D
    rsqrt       r = 1/√(v + eps)     scale      y = c · r · weight + bias

and, before them, the rounding of the input itself. A step in half precision takes its operands in it and gives its
result in it. The two sums are added up one element after the other, each sum rounded, as a loop in that precision
would; beside that they are added up in float32, as PyTorch's sums of half precision are, and only rounded at the end.
Then all steps are in half precision.

The error is against float64, relative to the norm of the whole result; beside it stands that of PyTorch's own
`layer_norm` in the same precision, which computes in float32 inside. Inputs have a standard deviation of `scale` and a
mean of as much.

Source: CS336 assignment 2, section 1.1.5; Ba et al. 2016, "Layer normalization".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.rounding import format_of
from cs336_systems.bench import grid as grids
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.errors import UserError, unknown_name

HALVES = ("float16", "bfloat16")
MEAN_IN_FLOAT32, VARIANCE_IN_FLOAT32 = "mean, summed in float32", "variance, summed in float32"
STEPS = (
    "input",
    "mean",
    MEAN_IN_FLOAT32,
    "centre",
    "square",
    "variance",
    VARIANCE_IN_FLOAT32,
    "rsqrt",
    "scale",
)
ALL, ALL_SUMMED_IN_FLOAT32 = "all steps", "all steps, summed in float32"
VARIANTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **{step: frozenset({step}) for step in STEPS},
        ALL: frozenset(STEPS) - {MEAN_IN_FLOAT32, VARIANCE_IN_FLOAT32},
        ALL_SUMMED_IN_FLOAT32: frozenset(STEPS) - {"mean", "variance"},
    }
)
"""The steps that are in half precision, by the name of a row."""
REFERENCE, REFERENCE_FLOAT32 = "PyTorch's layer_norm", "PyTorch's layer_norm in float32"
ROWS = (*VARIANTS, REFERENCE, REFERENCE_FLOAT32)
EPS = 1e-5
LAPTOP_SCALES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
LOST = 0.5
"""A relative error from which on nothing is left of a result."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One half precision at one scale of the input.

    Raises:
        UserError: an unknown precision, or an impossible size.
    """

    precision: str
    scale: float
    device: str
    width: int = 1024
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in HALVES:
            raise unknown_name("precision", self.precision, HALVES)
        if not self.scale > 0 or not math.isfinite(self.scale):
            raise UserError(f"scale must be above 0 and finite, found {self.scale!r}")
        if self.width < 2 or self.rows < 1:
            raise UserError(f"an input has at least 1 row of 2 elements, found {self.rows} of {self.width}")

    def __str__(self) -> str:
        return f"{self.precision}, scale {self.scale:g}"


def grid(*, scales: Sequence[float] = LAPTOP_SCALES, width: int = 1024, device: str = "auto") -> list[grids.Cell[Case]]:
    """Both half precisions at every scale.

    Raises:
        UserError: an impossible scale or width.
    """
    as_numbers = [float(scale) for scale in scales]
    return grids.product(Case, precision=HALVES, scale=as_numbers, width=width, device=resolve_device(device))


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Compute every row; values: `errors`, by row, and `not_finite`, how many elements are none.

    An error is left out where an element is not finite.
    """
    low = getattr(torch, case.precision)
    x, weight, bias = inputs(case)
    exact = layer_norm(x, weight, bias)
    results: dict[str, Tensor] = {}
    for done, (name, steps) in enumerate(VARIANTS.items(), start=1):
        results[name] = layer_norm(x, weight, bias, in_half=steps, half=low)
        on_part(done / len(ROWS))
    for name, dtype in ((REFERENCE, low), (REFERENCE_FLOAT32, torch.float32)):
        given, w, b = (tensor.to(dtype) for tensor in (x, weight, bias))
        results[name] = torch.nn.functional.layer_norm(given, (case.width,), w, b, EPS).double()
    on_part(1.0)
    not_finite = {name: int((~result.isfinite()).sum()) for name, result in results.items()}
    errors = {
        name: ((result - exact).norm() / exact.norm()).item()
        for name, result in results.items()
        if not not_finite[name]
    }
    return Measurement(values={"errors": errors, "not_finite": not_finite, "extremes": extremes(x)})


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias in float64, the same on every device."""
    generator = torch.Generator().manual_seed(case.seed)
    x = case.scale * (1 + torch.randn(case.rows, case.width, generator=generator, dtype=torch.float64))
    weight = 1 + 0.1 * torch.randn(case.width, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(case.width, generator=generator, dtype=torch.float64)
    return x.to(case.device), weight.to(case.device), bias.to(case.device)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    in_half: Collection[str] = (),
    half: torch.dtype = torch.float64,
) -> Tensor:
    """LayerNorm over the last dimension in float64, with the steps of `in_half` in `half`."""

    def step(name: str, operation: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        if name not in in_half:
            return operation(*operands)
        return operation(*(operand.to(half) for operand in operands)).double()

    def averaged(one_by_one: str, in_float32: str, values: Tensor) -> Tensor:
        if one_by_one in in_half:
            return step(one_by_one, mean_one_by_one, values)
        return step(in_float32, mean_in_float32 if in_float32 in in_half else mean_of, values)

    x = step("input", torch.clone, x)
    mean = averaged("mean", MEAN_IN_FLOAT32, x)
    centred = step("centre", torch.sub, x, mean)
    squares = step("square", torch.square, centred)
    variance = averaged("variance", VARIANCE_IN_FLOAT32, squares)
    inverse = step("rsqrt", lambda v: torch.rsqrt(v + EPS), variance)
    return step("scale", lambda c, r, w, b: c * r * w + b, centred, inverse, weight, bias)


def mean_of(x: Tensor) -> Tensor:
    """The mean over the last dimension."""
    return x.mean(-1, keepdim=True)


def mean_one_by_one(x: Tensor) -> Tensor:
    """The mean over the last dimension, added up element by element in the precision of `x`."""
    total = torch.zeros_like(x[..., 0])
    for element in x.movedim(-1, 0).contiguous():
        total += element
    return (total / x.shape[-1]).unsqueeze(-1)


def mean_in_float32(x: Tensor) -> Tensor:
    """The same added up in float32, and rounded to the precision of `x` at the end."""
    return x.float().mean(-1, keepdim=True).to(x.dtype)


def extremes(x: Tensor) -> dict[str, float]:
    """The largest number that every step takes or makes, in float64: it is known from these where a step overflows.

    What comes of weight and bias is no larger than the result.
    """
    mean = mean_of(x)
    centred = x - mean
    squares = centred.square()
    variance = mean_of(squares) + EPS
    inverse = torch.rsqrt(variance)
    touched = {
        "input": [x],
        "mean": [x.cumsum(-1)],
        MEAN_IN_FLOAT32: [x],
        "centre": [x, centred],
        "square": [squares],
        "variance": [squares.cumsum(-1)],
        VARIANCE_IN_FLOAT32: [squares],
        "rsqrt": [variance, inverse],
        "scale": [centred, inverse, centred * inverse],
    }
    largest = {step: max(each.abs().max().item() for each in tensors) for step, tensors in touched.items()}
    return {name: max(largest[step] for step in steps) for name, steps in VARIANTS.items()}


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and way to compute: its error, infinite where an element is not finite.

    `roundoffs`: the error in unit roundoffs of the half precision; `largest`: the largest number that its steps take or
    make, NaN for PyTorch's own, beside `most`, the largest that the precision has.
    """
    del peaks, store  # arguments of every experiment's
    rows = []
    for record in records:
        case, values = Case(**record.case), record.measurement.values
        format = format_of(case.precision)
        errors = values.get("errors", {})
        for name in ROWS:
            is_known = record.status == "ok"
            error = errors.get(name, math.inf) if is_known else math.nan
            rows.append(
                {
                    "case": record.key,
                    **record.case,
                    **record.circumstances(fingerprint),
                    "noise": "",  # a busy machine changes no bit
                    "step": name,
                    "error": error,
                    "roundoffs": error / format.unit_roundoff,
                    "not_finite": values.get("not_finite", {}).get(name, 0),
                    "reference_error": errors.get(REFERENCE, math.nan),
                    "unit_roundoff": format.unit_roundoff,
                    "largest": values.get("extremes", {}).get(name, math.nan),
                    "most": float(format.largest),
                }
            )
    return pd.DataFrame(rows)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """Mostly the sums one element after the other, an operator each."""
    del peaks, slowdown
    loops = sum(len(steps & {"mean", "variance"}) for steps in VARIANTS.values())
    return loops * case.width * OPERATOR_S


OPERATOR_S = 1e-5
"""About what adding one column takes."""

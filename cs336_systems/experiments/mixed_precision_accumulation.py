"""A number added a thousand times in different precisions: the sum, and how its error grows.

Problem `mixed_precision_accumulation`. Two precisions matter: that of the addend, whose own rounding comes with every
addition, and that of the accumulator, which rounds every sum. PyTorch adds a scalar of float16 to one of float32 in
float32, so casting the addend first changes nothing. bfloat16 stands beside the handout's four.

What the sum must be is known beforehand, digit by digit: `analysis/rounding.py`.

Source: CS336 assignment 2, section 1.1.5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.rounding import Accumulation, accumulate, format_of
from cs336_systems.bench import grid as grids
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.errors import UserError

ACCUMULATIONS: tuple[tuple[str, str, bool], ...] = (
    ("float32", "float32", False),
    ("float16", "float16", False),
    ("float32", "float16", False),
    ("float32", "float16", True),
    ("bfloat16", "bfloat16", False),
    ("float32", "bfloat16", False),
)
"""Accumulator, addend, and whether the addend is cast to the accumulator's precision first."""
EVERY = 10
"""Of so many sums one is recorded."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One accumulation.

    Raises:
        UserError: an unknown precision, or a count that is not a multiple of `EVERY`.
    """

    accumulator: str
    addend: str
    cast: bool
    device: str
    value: float = 0.01
    count: int = 1000

    def __post_init__(self) -> None:
        format_of(self.accumulator)
        format_of(self.addend)
        if not isinstance(self.count, int) or self.count < EVERY or self.count % EVERY:
            raise UserError(f"count must be a positive multiple of {EVERY}, found {self.count!r}")

    @property
    def addend_in_words(self) -> str:
        return f"{self.addend} cast to {self.accumulator}" if self.cast else self.addend

    def __str__(self) -> str:
        return f"{self.accumulator} += {self.addend_in_words}"


def grid(*, count: int = 1000, device: str = "auto") -> list[grids.Cell[Case]]:
    """The handout's four accumulations and bfloat16's two.

    Raises:
        UserError: an impossible count, or an unknown device.
    """
    device = resolve_device(device)
    return [grids.Cell(Case(*each, device=device, count=count)) for each in ACCUMULATIONS]


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Add; values: `sums`, after every `EVERY` additions."""
    accumulator, addend = getattr(torch, case.accumulator), getattr(torch, case.addend)
    sums = []
    with torch.device(case.device):
        total = torch.tensor(0.0, dtype=accumulator)
        for index in range(1, case.count + 1):
            x = torch.tensor(case.value, dtype=addend)
            total += x.type(accumulator) if case.cast else x
            if index % EVERY == 0:
                sums.append(total.item())
    on_part(1.0)
    return Measurement(values={"sums": sums})


def expected(case: Case) -> Accumulation:
    """What must come of a case, in exact arithmetic; a cast to a wider precision changes nothing."""
    # The decimal that is meant, not the binary number that Python makes of it.
    return accumulate(Fraction(str(case.value)), format_of(case.addend), format_of(case.accumulator), case.count)


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case: the sum that must come, and what makes its error."""
    del peaks  # an argument of every experiment's
    return pd.DataFrame(_predicted(case) for case in cases)


@functools.lru_cache(maxsize=64)  # thousands of exact fractions, which every table of a case asks for again
def _predicted(case: Case) -> Mapping[str, Any]:
    known = expected(case)
    error, of_the_addend = float(known.errors()[-1]), float(known.of_the_addend()[-1])
    return {
        **dataclasses.asdict(case),
        "count_between": EVERY,
        "addend_in_words": case.addend_in_words,
        "exact": float(case.count * known.exact),
        "expected": float(known.sums[-1]),
        "error": error,
        "of_the_addend": of_the_addend,
        "of_rounding": error - of_the_addend,
        "worst_of_rounding": float(known.worst_of_rounding()[-1]),
        "as_argued": sum(stretch.as_argued for stretch in known.stretches()),
        "stretches": tuple(known.stretches()),
        "expected_sums": tuple(map(float, known.sums[EVERY::EVERY])),
        "band": _band(known),
    }


def _band(known: Accumulation) -> tuple[tuple[float, float], ...]:
    """Least and most error after every `EVERY` additions: the addend's, and half a spacing per addition either way."""
    both = zip(known.of_the_addend(), known.worst_of_rounding(), strict=True)
    return tuple((float(middle - worst), float(middle + worst)) for middle, worst in list(both)[EVERY::EVERY])


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record: the sum beside what must come of it, and what others printed."""
    del peaks
    published = (store or Store.default()).reference("mixed_precision_accumulation")
    printed = {(row.accumulator, row.addend): float(row.printed) for row in published.itertuples()}
    rows = []
    for record in records:
        case, sums = Case(**record.case), tuple(record.measurement.values.get("sums", ()))
        is_published = (case.value, case.count) == (0.01, 1000)
        known = _predicted(case)
        rows.append(
            {
                **known,
                **record.circumstances(fingerprint),
                "noise": "",  # a busy machine changes no bit
                "sums": sums,
                "total": sums[-1] if sums else math.nan,
                "agreeing": sum(map(float.__eq__, sums, known["expected_sums"])),
                "printed": printed.get((case.accumulator, case.addend_in_words), math.nan)
                if is_published
                else math.nan,
            }
        )
    return pd.DataFrame(rows)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """Additions of one number each: as many calls."""
    del peaks, slowdown
    return case.count * CALL_S


CALL_S = 2e-5
"""About what making a number and adding it takes."""

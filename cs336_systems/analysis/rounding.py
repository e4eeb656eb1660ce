"""Rounding on paper: what a floating-point format makes of a number, and of a sum that grows, in exact arithmetic.

A binary format of p significant bits has in [2^e, 2^(e+1)) numbers 2^(e-p+1) apart, its spacing there; a result is
rounded to the nearest of them, a tie to the even one. So adding the same a again and again goes like this: while the
sum is in one binade, it is a multiple of the spacing u, and what is added in truth is a rounded to a multiple of u. At
every power of two the spacing doubles and the step changes; where a is less than u/2 the sum stands still.

    spacing      float32      float16      bfloat16
    at 1         1.2e-07      0.00098      0.0078
    at 8         9.5e-07      0.0078       0.0625

Source: Goldberg 1991, "What every computer scientist should know about floating-point arithmetic"; Higham 2002,
"Accuracy and stability of numerical algorithms", section 4.2. CS336 assignment 2, mixed_precision_accumulation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

from cs336_systems.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format with gradual underflow, as IEEE 754 has them."""

    name: str
    bits: int
    """Significant bits, the hidden one included."""
    least_exponent: int
    """Of the smallest normal number."""
    most_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """The most by which rounding changes a normal number, relatively: 2^-bits."""
        return 2.0**-self.bits

    @property
    def largest(self) -> Fraction:
        """The largest finite number."""
        return (2 - Fraction(2) ** (1 - self.bits)) * Fraction(2) ** self.most_exponent

    @property
    def smallest(self) -> Fraction:
        """The smallest number above zero, a subnormal one."""
        return Fraction(2) ** (self.least_exponent - self.bits + 1)

    def spacing(self, value: Fraction) -> Fraction:
        """How far apart the format's numbers are at `value`."""
        exponent = max(_exponent(value), self.least_exponent) if value else self.least_exponent
        return Fraction(2) ** (exponent - self.bits + 1)

    def rounded(self, value: Fraction) -> Fraction:
        """The number of the format that is nearest, the even one of two.

        Raises:
            OverflowError: it would be infinite.
        """
        spacing = self.spacing(value)
        result = round(value / spacing) * spacing  # Python too rounds a tie to the even
        if abs(result) > self.largest:
            raise OverflowError(f"{float(value)} is beyond the largest number of {self.name}, {float(self.largest)}")
        return result


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        format.name: format
        for format in (
            Format("float64", 53, -1022, 1023),
            Format("float32", 24, -126, 127),
            Format("float16", 11, -14, 15),
            Format("bfloat16", 8, -126, 127),
        )
    }
)


def format_of(name: str) -> Format:
    """A format by PyTorch's name; an unknown one is an error that lists the known."""
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    return FORMATS[name]


def _exponent(value: Fraction) -> int:
    """The e of 2^e ≤ |value| < 2^(e+1)."""
    top, bottom = abs(value.numerator), value.denominator
    guess = top.bit_length() - bottom.bit_length()
    return guess if abs(value) >= Fraction(2) ** guess else guess - 1


# Sums ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """The same number added again and again, each addition rounded."""

    accumulator: Format
    exact: Fraction
    """What is meant to be added."""
    addend: Fraction
    """What is added: `exact` rounded to the addend's format."""
    sums: tuple[Fraction, ...]
    """After 0, 1, 2 … additions."""

    @property
    def count(self) -> int:
        return len(self.sums) - 1

    def errors(self) -> list[Fraction]:
        """Of every sum, against what was meant."""
        return [total - index * self.exact for index, total in enumerate(self.sums)]

    def of_the_addend(self) -> list[Fraction]:
        """The part of every error that the addend's own rounding makes: as often as it was added."""
        return [index * (self.addend - self.exact) for index in range(len(self.sums))]

    def worst_of_rounding(self) -> list[Fraction]:
        """The most that rounding the sums can add to that, either way: half a spacing for every addition."""
        halves = (self.accumulator.spacing(before + self.addend) / 2 for before in self.sums[:-1])
        return [Fraction(0), *itertools.accumulate(halves)]

    def stretches(self) -> list[Stretch]:
        """The additions, those of one spacing together."""
        places = range(self.count)
        grouped = itertools.groupby(places, lambda index: self.accumulator.spacing(self.sums[index] + self.addend))
        return [self._stretch(spacing, list(indices)) for spacing, indices in grouped]

    def _stretch(self, spacing: Fraction, indices: Sequence[int]) -> Stretch:
        first, last = self.sums[indices[0]], self.sums[indices[-1] + 1]
        step = round(self.addend / spacing) * spacing
        return Stretch(
            additions=len(indices),
            first=first,
            last=last,
            spacing=spacing,
            addend=self.addend,
            step=step,
            as_argued=sum(self.sums[index + 1] - self.sums[index] == step for index in indices),
            error=last - first - len(indices) * self.addend,
        )


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Additions that are rounded to the same spacing: within one binade, but for the first of them."""

    additions: int
    first: Fraction
    """The sum before them."""
    last: Fraction
    """And after."""
    spacing: Fraction
    addend: Fraction
    step: Fraction
    """What an addition amounts to by the argument: the addend rounded to the spacing."""
    as_argued: int
    """How many additions amounted to just that; others may be ties, or the first, from a sum of a finer spacing."""
    error: Fraction
    """What rounding the sums made of them, all together."""


def accumulate(value: Fraction, addend: Format, accumulator: Format, count: int) -> Accumulation:
    """What comes of adding `value` `count` times to zero, each sum rounded to `accumulator`.

    Raises:
        OverflowError: a sum would be infinite.
    """
    rounded = addend.rounded(value)

    def sums() -> Iterator[Fraction]:
        total = Fraction(0)
        yield total
        for _ in range(count):
            total = accumulator.rounded(total + rounded)
            yield total

    return Accumulation(accumulator, value, rounded, tuple(sums()))

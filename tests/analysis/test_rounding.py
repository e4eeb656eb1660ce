"""Rounding in exact arithmetic is what PyTorch's formats do, and explains every bit of a sum that grows."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from cs336_systems.analysis.rounding import FORMATS, Accumulation, accumulate, format_of
from cs336_systems.errors import UserError

pytestmark = pytest.mark.problem("mixed_precision_accumulation")

HUNDREDTH = Fraction(1, 100)
every_format = pytest.mark.parametrize("name", FORMATS)


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@every_format
def test_a_format_is_the_one_of_pytorch(name: str) -> None:
    format, known = FORMATS[name], torch.finfo(dtype_of(name))
    assert float(format.largest) == known.max
    assert float(format.spacing(Fraction(1))) == known.eps
    assert format.unit_roundoff == known.eps / 2
    assert float(format.smallest) == known.smallest_normal * known.eps


@every_format
def test_numbers_are_rounded_as_pytorch_rounds_them(name: str) -> None:
    """From the smallest subnormals to the largest numbers of each format, and ties among them."""
    format, known = FORMATS[name], torch.finfo(dtype_of(name))
    generator = torch.Generator().manual_seed(0)
    span = (math.log2(known.tiny * known.eps), math.log2(known.max) - 1)
    exponents = torch.empty(400, dtype=torch.float64).uniform_(*span, generator=generator)
    numbers = torch.exp2(exponents) * torch.randn(400, generator=generator, dtype=torch.float64).sign()
    exact = [Fraction(number) for number in numbers.tolist()]
    spacings = [format.spacing(number) for number in exact]
    ties = [format.rounded(number) + spacing / 2 for number, spacing in zip(exact, spacings, strict=True)]
    for number in [*exact, *(tie for tie in ties if Fraction(float(tie)) == tie)]:
        assert (
            float(format.rounded(number)) == torch.tensor(float(number), dtype=torch.float64).to(dtype_of(name)).item()
        )


@every_format
def test_the_spacing_is_the_way_to_the_next_number(name: str) -> None:
    for value in (1.0, 1.5, 8.0, 0.01, 3.0):
        number = torch.tensor(value, dtype=dtype_of(name))
        (after,) = torch.nextafter(number, torch.tensor(math.inf, dtype=dtype_of(name))).reshape(1).tolist()
        assert float(FORMATS[name].spacing(Fraction(number.item()))) == after - number.item()


def test_zero_stays_zero_and_what_is_too_small_becomes_it() -> None:
    half = FORMATS["float16"]
    assert half.rounded(Fraction(0)) == 0
    assert half.rounded(half.smallest / 2) == 0  # a tie, to the even
    assert half.rounded(half.smallest * Fraction(51, 100)) == half.smallest


def test_what_is_too_large_is_an_error_that_names_the_largest_number() -> None:
    half = FORMATS["float16"]
    assert half.rounded(Fraction(65519)) == half.largest == 65504
    with pytest.raises(OverflowError, match=r"65520.*float16, 65504"):
        half.rounded(Fraction(65520))


def test_an_unknown_format_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown format 'float8'.*float16"):
        format_of("float8")


# Sums ----------------------------------------------------------------------------------------------------------


# PyTorch rounds a wider addend to the accumulator's precision first.
@pytest.mark.parametrize(
    ("accumulator", "addend"),
    [(one, other) for one in FORMATS for other in FORMATS if FORMATS[one].bits >= FORMATS[other].bits],
)
@pytest.mark.parametrize("value", [0.01, 0.3, -1 / 7])
def test_every_sum_is_bit_for_bit_the_one_of_pytorch(accumulator: str, addend: str, value: float) -> None:
    known = accumulate(Fraction(value), FORMATS[addend], FORMATS[accumulator], 300)
    total = torch.tensor(0.0, dtype=dtype_of(accumulator))
    for index in range(1, 301):
        total += torch.tensor(value, dtype=dtype_of(addend))
        assert total.item() == float(known.sums[index])


def of_hundredths(accumulator: str, addend: str | None = None) -> Accumulation:
    return accumulate(HUNDREDTH, FORMATS[addend or accumulator], FORMATS[accumulator], 1000)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_no_error_leaves_the_band_of_the_addends_error_and_half_a_spacing_per_addition(name: str) -> None:
    known = of_hundredths(name)
    parts = zip(known.errors(), known.of_the_addend(), known.worst_of_rounding(), strict=True)
    assert all(abs(error - of_the_addend) <= worst for error, of_the_addend, worst in parts)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_stretches_are_all_additions_in_their_order_and_make_the_whole_error(name: str) -> None:
    known = of_hundredths(name)
    stretches = known.stretches()
    assert sum(stretch.additions for stretch in stretches) == known.count == 1000
    assert [stretch.first for stretch in stretches[1:]] == [stretch.last for stretch in stretches[:-1]]
    assert (stretches[0].first, stretches[-1].last) == (known.sums[0], known.sums[-1])
    assert sum(stretch.error for stretch in stretches) == known.errors()[-1] - known.of_the_addend()[-1]
    assert [stretch.spacing for stretch in stretches] == sorted({stretch.spacing for stretch in stretches})


def test_within_a_stretch_an_addition_amounts_to_the_addend_rounded_to_the_spacing() -> None:
    for name in ("float32", "float16", "bfloat16"):
        for stretch in of_hundredths(name).stretches():
            # But for a tie, and for the first, which comes from a sum of a finer spacing.
            is_tie = (stretch.addend / stretch.spacing * 2) % 2 == 1
            assert is_tie or stretch.as_argued >= stretch.additions - 1


def test_bfloat16_stands_still_where_the_addend_is_less_than_half_a_spacing() -> None:
    last = of_hundredths("bfloat16").stretches()[-1]
    assert last.step == 0
    assert last.first == last.last
    assert last.addend < last.spacing / 2


def test_float32_adds_numbers_of_half_precision_without_an_error_of_its_own() -> None:
    for addend in ("float16", "bfloat16"):
        known = of_hundredths("float32", addend)
        assert known.errors() == known.of_the_addend()
        assert known.errors()[-1] != 0

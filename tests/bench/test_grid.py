"""Axes become cases in a fixed order."""

from __future__ import annotations

import dataclasses

import pytest

from cs336_systems.bench import grid
from cs336_systems.errors import UserError


@dataclasses.dataclass(frozen=True)
class Case:
    size: str
    context: int = 128


def test_the_last_axis_varies_fastest() -> None:
    cells = grid.product(Case, size=["small", "large"], context=(1, 2))
    assert [(cell.case.size, cell.case.context) for cell in cells] == [
        ("small", 1),
        ("small", 2),
        ("large", 1),
        ("large", 2),
    ]


def test_a_single_value_is_an_axis_of_one_and_a_string_is_not_taken_apart() -> None:
    assert grid.product(Case, size="small") == [grid.Cell(Case("small"))]


def test_duplicates_come_once() -> None:
    assert len(grid.product(Case, size=["small", "small"], context=[1, 1, 2])) == 2


def test_a_skipped_case_stays_with_its_reason_and_is_not_runnable() -> None:
    cells = grid.product(Case, size="small", context=[1, 2], skip=lambda case: "odd" if case.context % 2 else None)
    assert [cell.skip_reason for cell in cells] == ["odd", None]
    assert grid.runnable(cells) == [Case("small", 2)]


def test_an_axis_without_a_field_is_an_error_that_lists_the_fields() -> None:
    with pytest.raises(
        UserError, match=r"unknown axis 'contxt' of Case: did you mean 'context'\? Known: size, context"
    ):
        grid.product(Case, size="small", contxt=1)


def test_an_empty_axis_is_an_error() -> None:
    with pytest.raises(UserError, match="axis 'context' is empty"):
        grid.product(Case, size="small", context=[])

"""Named axes to cases: the product of the axes as frozen dataclasses, in a fixed order.

A case that cannot or need not run stays in the grid with the reason why, so that a table shows the hole and says
what it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from cs336_systems.errors import UserError, unknown_name

CaseT = TypeVar("CaseT")


@dataclasses.dataclass(frozen=True)
class Cell(Generic[CaseT]):
    """A case of a grid, and why it is skipped, if it is."""

    case: CaseT
    skip_reason: str | None = None


def product(
    case_type: type[CaseT], *, skip: Callable[[CaseT], str | None] | None = None, **axes: Any
) -> list[Cell[CaseT]]:
    """Every combination of the axes as a `case_type`, the last axis varying fastest; duplicates once.

    An axis is a list or tuple of values, or a single value. `skip` gives the reason why a case is not to be
    measured, or None.

    Raises:
        UserError: an axis that `case_type` has no field for, or an empty axis.
    """
    fields = [field.name for field in dataclasses.fields(case_type)]  # type: ignore[arg-type]
    for name in axes:
        if name not in fields:
            raise unknown_name("axis", name, fields, where=f"of {case_type.__qualname__}")
    values = {name: list(axis) if isinstance(axis, (list, tuple)) else [axis] for name, axis in axes.items()}
    for name, axis in values.items():
        if not axis:
            raise UserError(f"axis {name!r} is empty: give at least one value")
    combinations = itertools.product(*values.values())
    cases = dict.fromkeys(case_type(**dict(zip(values, combination, strict=True))) for combination in combinations)
    return [Cell(case, skip(case) if skip else None) for case in cases]


def runnable(cells: Iterable[Cell[CaseT]]) -> list[CaseT]:
    """The cases of `cells` that are not skipped."""
    return [cell.case for cell in cells if cell.skip_reason is None]

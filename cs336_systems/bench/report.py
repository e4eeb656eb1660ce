"""Summaries to text and pictures: the one room that formats.

A table is Markdown with aligned columns, readable in a terminal as it stands and rendered by Jupyter and GitHub. A
figure is matplotlib's, in one style: colours told apart in grey by their lightness and always doubled by a marker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"

# Numbers -------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without exponents: 0.00123, 1.23, 1,234."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def with_deviation(mean: float | None, std: float | None) -> str:
    """`mean ± std`, the deviation to two significant digits and the mean to the same decimal place.

    >>> with_deviation(40.4321, 0.3149), with_deviation(1234.5, 36.0), with_deviation(2.5, float("nan"))
    ('40.43 ± 0.31', '1,234 ± 36', '2.50')
    """
    if mean is None or std is None or math.isnan(mean) or math.isnan(std) or std == 0:
        return number(mean)
    decimals = min(max(0, 1 - math.floor(math.log10(std))), 6)
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with two significant digits."""
    if share is None or math.isnan(share):
        return MISSING
    return f"{number(100 * share, 2)} %"


def bytes_in_words(count: float | None) -> str:
    """Binary units: 1.50 GiB, 12.0 MiB."""
    if count is None or math.isnan(count):
        return MISSING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"


def plural(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def seconds_in_words(seconds: float) -> str:
    """45 s, 3.2 min, 2.1 h."""
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Tables --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: its heading and how a row of the summary becomes its text."""

    heading: str
    text: Callable[[Any], str]
    align: str = "right"


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, headings, rows of text, and notes below. Its text form is aligned Markdown."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    alignments: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, summary: pd.DataFrame, columns: Sequence[Column], *, caption: str, notes: Sequence[str] = ()) -> Table:
        """One row of text per row of `summary`; a column without a single value is left out."""
        texts = {column: [column.text(row) for row in summary.itertuples()] for column in columns}
        shown = [column for column in columns if any(text != MISSING for text in texts[column])]
        return cls(
            caption=caption,
            headings=tuple(column.heading for column in shown),
            rows=tuple(zip(*(texts[column] for column in shown), strict=True)),
            alignments=tuple(column.align for column in shown),
            notes=tuple(notes),
        )

    def to_markdown(self) -> str:
        """A GitHub table, its columns padded to the same width."""
        cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in (self.headings, *self.rows)]
        widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(self.headings))]
        rules = [
            "-" * (width - 1) + ":" if align == "right" else "-" * width
            for width, align in zip(widths, self.alignments, strict=True)
        ]
        lines = []
        for row in (cells[0], tuple(rules), *cells[1:]):
            padded = (
                cell.rjust(width) if align == "right" else cell.ljust(width)
                for cell, width, align in zip(row, widths, self.alignments, strict=True)
            )
            lines.append("| " + " | ".join(padded) + " |")
        return "\n".join([f"**{self.caption}**", "", *lines, *(f"\n{note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.to_markdown()

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence whose numbers are computed, and whether they bear out what is usually said.

    What is said beside the numbers depends on them: a finding has a wording for either case.
    """

    text: str
    holds: bool | None = None
    """None where there is nothing to check."""

    @classmethod
    def checked(cls, fact: str, holds: bool, *, so: str, but: str) -> Finding:
        """`fact`, then what follows from it: `so` where the usual statement holds, `but` where it does not."""
        return cls(f"{fact}{so if holds else but}", holds)

    def _repr_markdown_(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.text


class Findings(tuple[Finding, ...]):
    """Several sentences, a bullet each."""

    def __str__(self) -> str:
        return "\n".join(f"- {finding}" for finding in self)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return str(self)


# Figures -------------------------------------------------------------------------------------------------------

# Lightness falls in even steps, so that the series stay apart on a grey printer; markers double the distinction.
COLOURS = ("#0b2545", "#a63d40", "#2a8f85", "#e09f3e", "#8d99ae")
MARKERS = ("o", "s", "^", "D", "v")
MEASURED, BOUND, PUBLISHED, PUBLISHED_TOO = COLOURS[0], "#5c6672", COLOURS[1], COLOURS[3]


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """The one style of every figure."""
    import matplotlib as mpl  # a command line that draws nothing need not wait for it
    import seaborn as sns
    from cycler import cycler

    settings = {
        "axes.prop_cycle": cycler(color=COLOURS, marker=MARKERS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "legend.frameon": False,
        "savefig.bbox": "tight",
        "savefig.dpi": 160,
        "svg.hashsalt": "cs336-systems",
    }
    with mpl.rc_context(), sns.axes_style("whitegrid", rc=settings), mpl.rc_context(settings):
        yield


def logarithmic(axis: Any) -> None:
    """Make a matplotlib axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_data_interval()
    within_a_decade = low > 0 and high / low < 10
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if within_a_decade else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `figure` as SVG and PNG beside each other; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    with figure_style():
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], metadata={"Software": None})
    return paths

"""Summaries to text and pictures: the one room that formats.

A table is Markdown with aligned columns, readable in a terminal as it stands and rendered by Jupyter and GitHub. A
figure is matplotlib's, in one style: colours told apart in grey by their lightness and always doubled by a marker.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"
GIB, MIB = 2**30, 2**20

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
    place = _decimal_place(std)
    if place is None or mean is None or math.isnan(mean):
        return number(mean)
    return f"{mean:,.{place}f} ± {std:,.{place}f}"


def within(value: float | None, std: float | None) -> str:
    """`value` to the decimal place that its deviation leaves it: the digits after that say nothing.

    >>> within(40.4321, 0.3149), within(1234.5, 36.0), within(2.5, float("nan"))
    ('40.43', '1,234', '2.50')
    """
    return with_deviation(value, std).partition(" ± ")[0]


def _decimal_place(std: float | None) -> int | None:
    """How many decimals show two significant digits of a deviation; None where there is none to tell."""
    if std is None or math.isnan(std) or std == 0:
        return None
    return min(max(0, 1 - math.floor(math.log10(std))), 6)


def percent(share: float | None) -> str:
    """A share as a percentage with two significant digits."""
    if share is None or math.isnan(share):
        return MISSING
    return f"{number(100 * share, 2)} %"


def bytes_in_words(count: float | None) -> str:
    """Binary units: 1.50 GiB, 12.0 MiB."""
    if count is None or math.isnan(count):
        return MISSING
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"


def mebibytes(count: float | None) -> str:
    """MiB to two decimals, for counts that are exact."""
    return MISSING if count is None or math.isnan(count) else f"{count / MIB:,.2f}"


def verbatim(text: str) -> str:
    """A text from elsewhere, such as an error's message, as Markdown code: nothing in it is markup.

    >>> verbatim("a*b*"), verbatim("say `x`")
    ('`a*b*`', '`` say `x` ``')
    """
    text = " ".join(text.split())
    if "`" not in text:
        return f"`{text}`" if text else MISSING
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def escaped(text: str) -> str:
    """A plain text as Markdown that shows it as it stands.

    >>> escaped("my_model:f [2*3]")
    'my\\_model:f \\[2\\*3\\]'
    """
    # Quotes, and second dots and dashes, because pandoc would make typographic ones of them.
    return re.sub(r"""([\\`*_\[\]<>$|#{}~^&'"]|(?<=\.)\.|(?<=-)-)""", r"\\\1", " ".join(text.split()))


def shortened(text: str, most: int = 90) -> str:
    """`text` with its end left out where it is too long for a table; a kernel's template arguments may take thousands.

    >>> shortened("ampere_sgemm_128x64_tn", 12)
    'ampere_sgem…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def beginning(text: str) -> str:
    """`text` as a sentence begins, the rest as it is: names keep their letters."""
    return text[:1].upper() + text[1:]


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
    """A caption in plain text, headings, rows, and notes below in Markdown. Its text form is aligned Markdown."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    alignments: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, summary: pd.DataFrame, columns: Sequence[Column], *, caption: str, notes: Sequence[str] = ()) -> Table:
        """One row of text per row of `summary`; a column without a single value is left out."""
        rows = list(summary.itertuples())
        texts = {column: [column.text(row) for row in rows] for column in columns}
        shown = [column for column in columns if any(text != MISSING for text in texts[column])]
        cells = [_aligned(texts[column]) if column.align == "right" else texts[column] for column in shown]
        return cls(
            caption=caption,
            headings=tuple(column.heading for column in shown),
            rows=tuple(zip(*cells, strict=True)),
            alignments=tuple(column.align for column in shown),
            notes=tuple(notes),
        )

    def pipe_table(self) -> str:
        """A GitHub table without caption and notes, its columns padded to the same width."""
        cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in (self.headings, *self.rows)]
        widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(self.headings))]
        rules = [
            "-" * (width - 1) + ":" if align == "right" else ":" + "-" * (width - 1)
            for width, align in zip(widths, self.alignments, strict=True)
        ]
        lines = []
        for row in (cells[0], tuple(rules), *cells[1:]):
            padded = (
                cell.rjust(width) if align == "right" else cell.ljust(width)
                for cell, width, align in zip(row, widths, self.alignments, strict=True)
            )
            lines.append("| " + " | ".join(padded) + " |")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The caption in bold, the table, and a paragraph per note."""
        return "\n".join([f"**{escaped(self.caption)}**", "", self.pipe_table(), *(f"\n{note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.to_markdown()

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


# A quantity as the functions above write it: 1,234.5 ± 0.6, and the marks of a table's notes.
_QUANTITY = re.compile(
    r"(?P<whole>[\d,]+)(?P<part>\.\d+)?(?: ± (?P<std_whole>[\d,]+)(?P<std_part>\.\d+)?)?(?P<marks>(?: [~†])*)"
)
# Blanks as wide as what they stand for, in any font whose digits are all of one width, and not collapsed by browsers.
_BLANKS = str.maketrans({**dict.fromkeys("0123456789~†±", "\u2007"), ".": "\u2008", ",": "\u2008", " ": "\u00a0"})


def _aligned(texts: Sequence[str]) -> list[str]:
    """The cells of a column of numbers, padded so that the decimal points stand below one another.

    Texts that are no quantities (a status, a dash) stay as they are.
    """
    found = [_QUANTITY.fullmatch(text) for text in texts]
    part, std_whole, std_part, marks = (
        max((match[name] or "" for match in found if match), key=len, default="")
        for name in ("part", "std_whole", "std_part", "marks")
    )
    cells = []
    for text, match in zip(texts, found, strict=True):
        if match is None:
            cells.append(text)
            continue
        cell = match["whole"] + _padded(match["part"], part)
        if match["std_whole"]:
            blank = std_whole[: len(std_whole) - len(match["std_whole"])].translate(_BLANKS)
            cell += f" ± {blank}{match['std_whole']}{_padded(match['std_part'], std_part)}"
        elif std_whole:
            cell += f" ± {std_whole}{std_part}".translate(_BLANKS)
        cells.append(cell + _padded(match["marks"], marks))
    return cells


def _padded(text: str | None, longest: str) -> str:
    """`text` and blanks for what `longest` has beyond it."""
    return (text or "") + longest[len(text or "") :].translate(_BLANKS)


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

    @classmethod
    def from_all(cls, rows: pd.DataFrame, subject: str, say: Callable[[pd.DataFrame], Finding | None]) -> list[Finding]:
        """`say(rows)`, if every one of `rows` has its record; else that `subject` is not known, and what to run.

        A sentence about part of what it speaks of would be about something else, so one missing record is enough.
        """
        missing = rows[rows["status"] == "missing"]
        if len(missing):
            to_do = "; ".join(dict.fromkeys(missing["reason"]))
            cases = f"{number_of_cases(missing)} of {plural(number_of_cases(rows), 'case')}"
            return [cls(f"{subject} cannot be told: no record of {cases}; {to_do}.")]
        said = say(rows)
        return [] if said is None else [said]

    def _repr_markdown_(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.text


def number_of_cases(rows: pd.DataFrame) -> int:
    """How many cases a summary is of, some of which may have several rows and then name theirs in a column."""
    return int(rows["case"].nunique()) if "case" in rows else len(rows)


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
BOUND, PUBLISHED, PUBLISHED_TOO = "#5c6672", COLOURS[1], COLOURS[3]


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
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()  # of all panels that share the axis
    within_a_decade = low > 0 and high / low < 10
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if within_a_decade else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def lengths(axis: Any, measured: Iterable[int]) -> None:
    """Make a matplotlib axis one of sequence lengths, named where one was measured: 256, 1k, 16k."""
    from matplotlib.ticker import NullLocator

    known = sorted(set(measured))
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(known, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in known])
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize="small" if len(known) > 5 else None)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and its caption; it is drawn when it is looked at."""

    caption: str
    draw: Callable[[], Figure]

    def svg(self) -> bytes:
        """The figure as SVG, its text as outlines; the same figure gives the same bytes."""
        return self._rendered("svg", {"Date": None, "Title": self.caption})

    def png(self) -> bytes:
        """The figure as PNG, for viewers that show no SVG."""
        return self._rendered("png", {"Software": None, "Title": self.caption})

    def _rendered(self, format: str, metadata: dict[str, str | None]) -> bytes:
        drawing, content = self.draw(), io.BytesIO()
        with figure_style():
            drawing.savefig(content, format=format, metadata=metadata)
        return content.getvalue()

    def __repr__(self) -> str:
        return self.caption

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """For Jupyter: the SVG with its caption below; a PNG where HTML is not shown; the caption in a console."""
        del include, exclude
        source = base64.b64encode(self.svg()).decode()
        caption = html.escape(self.caption)
        style = "max-width: 100%; background: white"
        return {
            "text/html": (
                f'<figure style="margin: 0"><img alt="{caption}" style="{style}" '
                f'src="data:image/svg+xml;base64,{source}"><figcaption>{caption}</figcaption></figure>'
            ),
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": self.caption,
        }

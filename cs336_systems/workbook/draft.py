"""A document before it is written for one reader or another: Markdown with marks for tables, figures and references.

GitHub, HTML and Typst each want a table's caption, a heading's anchor and a figure's place written otherwise, and
numbers of tables are only known when the whole text is there; so they are marks until then.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from cs336_systems.bench.report import Picture, Table, escaped
from cs336_systems.errors import UserError

Flavour = Literal["github", "html", "typst"]

# A mark is a private-use character, an id, and another such character: nothing that a text could hold by accident.
_BLOCK, _REFERENCE, _END = "\ue000", "\ue001", "\ue002"
_BLOCK_MARK = re.compile(f"{_BLOCK}([^{_END}]*){_END}")
_REFERENCE_MARK = re.compile(f"{_REFERENCE}([^{_END}]*){_END}")
_HEADING_ID = re.compile(r"^(#+ .*?) *\{#([\w:.-]+)\} *$", flags=re.MULTILINE)


def block_mark(name: str) -> str:
    """The mark of the table or figure with this id."""
    return f"{_BLOCK}{name}{_END}"


def reference_mark(name: str) -> str:
    """The mark of a reference to it, which becomes `Table 3` with a link."""
    return f"{_REFERENCE}{name}{_END}"


def picture_file(name: str) -> str:
    """The file of the figure with this id."""
    return f"{name.removeprefix('fig-')}.svg"


class DanglingReference(UserError):
    """A reference to what the document does not show."""

    def __init__(self, name: str, known: Mapping[str, object]) -> None:
        shown = ", ".join(known) or "no table or figure"
        super().__init__(f"{name!r} is referred to and not shown: {shown} can be referred to")
        self.name = name


@dataclasses.dataclass(frozen=True)
class Draft:
    """The text with its marks, and what stands behind them."""

    text: str
    blocks: Mapping[str, Table | Picture]
    """By id, in the order of their numbers: `tbl-…` and `fig-…`."""

    @classmethod
    def of(cls, text: str, shown: Mapping[str, Table | Picture]) -> Draft:
        """Number what `text` shows, in the order of its marks.

        Raises:
            DanglingReference: the text refers to what it does not show.
        """
        text = re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"
        numbered = {mark[1]: shown[mark[1]] for mark in _BLOCK_MARK.finditer(text)}
        for mark in _REFERENCE_MARK.finditer(text):
            if mark[1] not in numbered:
                raise DanglingReference(mark[1], numbered)
        return cls(text, numbered)

    @property
    def tables(self) -> dict[str, Table]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, Table)}

    @property
    def pictures(self) -> dict[str, Picture]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, Picture)}

    def label(self, name: str) -> str:
        """`Table 3` or `Figure 1`: tables and figures are numbered apart, as they first appear."""
        kind, group = ("Table", self.tables) if name in self.tables else ("Figure", self.pictures)
        return f"{kind} {list(group).index(name) + 1}"

    def markdown(self, flavour: Flavour, figures: str) -> str:
        """The text for GitHub, or for pandoc on the way to HTML or Typst; figures are files in the folder `figures`."""
        text = _BLOCK_MARK.sub(lambda mark: self._written(mark[1], flavour, figures), self.text)
        text = _REFERENCE_MARK.sub(lambda mark: f"[{self.label(mark[1])}](#{mark[1]})", text)
        if flavour == "github":  # which shows `{#id}` as it stands
            text = _HEADING_ID.sub(r'<a id="\2"></a>\n\n\1', text)
        return text

    def _written(self, name: str, flavour: Flavour, figures: str) -> str:
        block = self.blocks[name]
        caption = f"**{self.label(name)}.** {escaped(block.caption)}"
        if isinstance(block, Picture):
            file = f"{figures}/{picture_file(name)}"
            if flavour == "github":
                return f'<a id="{name}"></a>\n\n![{escaped(block.caption)}]({file})\n\n{caption}'
            return f"![{caption}]({file}){{#{name}}}"
        if flavour == "github":
            notes = "".join(f"\n\n{note}" for note in block.notes)
            return f'<a id="{name}"></a>\n\n{caption}\n\n{block.pipe_table()}{notes}'
        if flavour == "html":
            notes = "".join(f"\n\n::: {{.note}}\n{note}\n:::" for note in block.notes)
            return f"::: {{#{name} .table}}\n{block.pipe_table()}\n\n: [{caption}]{{.caption}}\n:::{notes}"
        notes = "".join(f"\n\n::: {{typst:text:size=0.8em}}\n{note}\n:::" for note in block.notes)
        whole = "typst:breakable=false" if len(block.rows) <= _ONE_PIECE else ""
        return f"::: {{#{name} {whole}}}\n{block.pipe_table()}\n\n: {caption}\n:::{notes}"


_ONE_PIECE = 24
"""Tables of up to so many rows are not divided between two pages."""

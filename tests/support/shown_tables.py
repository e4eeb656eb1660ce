"""What a table shows, as a test compares it."""

from __future__ import annotations

import re

from cs336_systems.bench.report import Finding, Table


def plain(text: object) -> str:
    """Without the blanks that align numbers."""
    return re.sub(r"[ \u2007\u2008\u00a0]+", " ", str(text))


def cells(table: Table | Finding, heading: str) -> list[str]:
    """A column of what must be a table, the first of that heading."""
    assert isinstance(table, Table)
    place = table.headings.index(heading)
    return [plain(row[place]).strip() for row in table.rows]

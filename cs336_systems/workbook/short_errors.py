"""IPython extension: in a notebook a user's mistake is one red line, not a traceback through the package.

`%load_ext cs336_systems.workbook.short_errors`. The cell still fails, for Run All and for papermill; any other
exception keeps its traceback.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from cs336_systems.errors import UserError


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython's `%load_ext`."""
    shell.set_custom_exc((UserError,), _show)


def unload_ipython_extension(shell: Any) -> None:
    """Called by IPython's `%unload_ext`."""
    shell.set_custom_exc((), None)


def _show(
    shell: Any, kind: type[BaseException], error: BaseException, _: TracebackType | None, tb_offset: int | None = None
) -> list[str]:
    """Send the one line as the cell's error, as IPython sends its traceback."""
    del tb_offset
    lines = [f"error: {error}"]
    shell._showtraceback(kind, error, lines)
    return lines

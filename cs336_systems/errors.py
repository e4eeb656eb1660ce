"""Errors that a user can put right, told in one sentence.

Everything a user may get wrong (a misspelt size, a config that is not YAML, a folder that cannot be written)
raises `UserError`; every command line runs under `run_command`, which prints the sentence and exits with 2.
Any other exception is a defect of the workbook, and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Something the user can put right; the message says what was expected, what was found and what to do."""


class WorkbookWarning(UserWarning):
    """Something the user may want to know that stops nothing, such as a damaged line that was skipped."""


def unknown_name(kind: str, found: object, known: Iterable[str], *, where: str = "") -> UserError:
    """The error for a name that is not one of `known`: it lists them, and says which is near.

    >>> str(unknown_name("size", "smal", ["small", "large"]))
    "unknown size 'smal': did you mean 'small'? Known: small, large"
    >>> str(unknown_name("key", "zz", ["a"], where="in file.yaml"))
    "unknown key 'zz' in file.yaml; known: a"
    """
    names = list(known)
    near = difflib.get_close_matches(str(found), names, n=1)
    hint = f": did you mean {near[0]!r}? Known" if near else "; known"
    place = f" {where}" if where else ""
    return UserError(f"unknown {kind} {str(found)!r}{place}{hint}: {', '.join(names) or 'none'}")


def first_line(error: BaseException) -> str:
    """`TypeName: first line of its message`, as records and one-line reports give an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Every option on a line of its own, whatever the terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=150)


def _discard_output() -> None:
    """What is still buffered cannot be written, and Python would complain of it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    kind = "warning" if issubclass(category, WorkbookWarning) else category.__name__
    print(f"{kind}: {message}", file=sys.stderr)


def run_command(main: Callable[[list[str] | None], int]) -> None:
    """Run a command line's `main` and exit with its status, without a traceback for the user's own mistakes.

    Exit statuses: what `main` returns; 2 for a `UserError`; 130 for Ctrl-C (what shells expect); 141 when
    the reader of our output went away (`… | head`).
    """
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    from cs336_systems.repository import keep_compiled_code_here  # which knows this module's errors

    try:
        keep_compiled_code_here()
        status = main(None)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as error:
        # Whoever caught Ctrl-C on the way adds what was saved: `raise KeyboardInterrupt("3 of 9 saved")`.
        print(f"\ninterrupted: {str(error) or 'nothing was running'}", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        _discard_output()
        status = 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        _discard_output()
        status = 2
    sys.exit(status)

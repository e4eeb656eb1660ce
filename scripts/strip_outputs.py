#!/usr/bin/env python3
"""Strip notebooks of their outputs, or with --check say which have any.

    python scripts/strip_outputs.py [NOTEBOOK…]           strip in place
    python scripts/strip_outputs.py --check [NOTEBOOK…]   exit with 1 if there is anything to strip

Without names, all of notebooks/. Outputs, execution counts and widget state go; everything else stays as it is. Needs
nothing but Python, since the git hook runs it with whatever Python there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.files import write_atomically
from cs336_systems.repository import repository_root


def main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebook files; all of notebooks/ by default")
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args(argv)
    found = 0
    for path in arguments.notebooks or sorted((repository_root() / "notebooks").glob("*.ipynb")):
        try:
            before = path.read_text(encoding="utf-8")
            after = stripped(before)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the notebook {path}: {error}") from error
        if before == after:
            continue
        found += 1
        print(f"{path}: {'has outputs, or is not in the stripped form' if arguments.check else 'stripped'}")
        if not arguments.check:
            write_atomically(path, after.encode())
    return 1 if arguments.check and found else 0


def stripped(text: str) -> str:
    """The notebook's JSON without what running it leaves behind."""
    notebook: dict[str, Any] = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        for name in ("execution", "papermill", "collapsed", "scrolled"):
            cell["metadata"].pop(name, None)
    for name in ("widgets", "papermill"):
        notebook["metadata"].pop(name, None)
    # Which Python ran it is no business of the source.
    notebook["metadata"]["language_info"] = {"name": "python"}
    notebook["metadata"]["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    run_command(main)

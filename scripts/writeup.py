#!/usr/bin/env python3
"""Render the writeup from the records: Markdown, one HTML file that works offline, and PDF.

python scripts/writeup.py                          this checkout's records beside the published → writeup/build/
python scripts/writeup.py --year 2026              just that handout's deliverables, as one would hand them in
python scripts/writeup.py --committed              the committed edition, from published records only
python scripts/writeup.py --committed --check      exit with 1 if it is not up to date
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cs336_systems.bench.records import Store
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.repository import shown_path
from cs336_systems.workbook.documents import FONT, FORMATS, require_tools
from cs336_systems.workbook.editions import (
    build,
    build_folder,
    committed,
    differing,
    executed_notebooks,
    write_committed,
)
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import Index, load_index
from cs336_systems.workbook.profiles import LAPTOP, load_profile


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    index = load_index()
    if arguments.committed:
        other = [name for name, value in vars(arguments).items() if value and name not in ("committed", "check")]
        if other:
            raise UserError(f"the committed edition is always the same: leave out {', '.join(map(option, other))}")
        require_tools()
        return update_committed(index, check=arguments.check)
    if arguments.check:
        raise UserError("--check compares the committed edition: give --committed as well")
    formats = arguments.format or FORMATS
    require_tools(formats)
    if arguments.profile is not None:
        load_profile(arguments.profile)
    handout = index.handout(arguments.year) if arguments.year else None
    store = Store.default(arguments.data_dir)
    paths = build(
        Archive(store, index, own=not arguments.published, profile=arguments.profile, handout=handout),
        folder=arguments.output or build_folder(arguments.profile, arguments.year),
        formats=formats,
        font=arguments.font or FONT,
        executed={} if arguments.published else executed_notebooks(store, index, arguments.profile or LAPTOP),
    )
    for path in paths:
        print(shown_path(path))
    return 0


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def update_committed(index: Index, *, check: bool) -> int:
    """Write the committed edition, or say which of its files are out of date."""
    files = committed(Store.default(), index)
    out_of_date = differing(files)
    for path in out_of_date:
        print(f"{shown_path(path)}: {'out of date' if check else 'written'}")
    if not check:
        write_committed(files)
    return 1 if check and out_of_date else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--year", help="2025 or 2026: that handout's deliverables in its order")
    parser.add_argument("--format", nargs="+", default=[], help=f"some of {', '.join(FORMATS)}; all by default")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to, if not writeup/build")
    parser.add_argument("--profile", help="what this checkout's records are asked for, if not what suits the machine")
    parser.add_argument("--published", action="store_true", help="leave this checkout's own records out")
    parser.add_argument("--font", help=f"of the PDF's text (default: {FONT}, which comes along)")
    parser.add_argument("--committed", action="store_true", help="write writeup/ and the README's head instead")
    parser.add_argument("--check", action="store_true", help="with --committed: change nothing")
    parser.add_argument("--data-dir", type=Path, help="where this checkout's records are, if not in data/local")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

#!/usr/bin/env python3
"""Every problem of both years: points, notebook, tests, state, and the records this checkout has.

python scripts/problems.py
python scripts/problems.py --write-readme      bring the README's index up to date
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from cs336_systems.bench.records import Store
from cs336_systems.bench.report import MISSING, Column, Table
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.files import write_atomically
from cs336_systems.repository import repository_root
from cs336_systems.workbook.index import YEARS, Index, load_index, points_text, with_readme_index


def main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--write-readme", action="store_true", help="write the index into README.md")
    arguments = parser.parse_args(argv)
    index = load_index()
    if arguments.write_readme:
        readme = repository_root() / "README.md"
        try:
            text = readme.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {readme}: {error.strerror}") from error
        write_atomically(readme, with_readme_index(text, index).encode())
        return 0
    print(problems_table(index, Store.default()))
    for year in YEARS:
        asked = [problem for problem in index.problems.values() if year in problem.points]
        built = sum(problem.points[year] for problem in asked if problem.state == "built")
        print(f"\n{year}: {built} of {sum(problem.points[year] for problem in asked)} points built", end="")
    print()
    return 0


def _points(row: Any, year: str) -> str:
    return points_text(row.problem, year)


def problems_table(index: Index, store: Store) -> Table:
    recorded: dict[str, int] = {}
    for machine, experiments in store.local_machines().items():
        for experiment in experiments:
            recorded[experiment] = recorded.get(experiment, 0) + len(store.local_records(machine, experiment))
    rows = []
    for problem in index.problems.values():
        read = index.notebooks[problem.notebook].experiments
        rows.append(
            {
                "problem": problem,
                "records": sum(recorded.get(name, 0) for name in read) if read else None,
            }
        )
    columns = [
        Column("problem", lambda row: row.problem.id, "left"),
        *(Column(year, partial(_points, year=year)) for year in YEARS),
        Column("notebook", lambda row: row.problem.notebook, "left"),
        Column("tests", lambda row: ", ".join(Path(path).stem for path in row.problem.tests) or MISSING, "left"),
        Column("state", lambda row: row.problem.state, "left"),
        Column("records here", lambda row: MISSING if row.records != row.records else f"{row.records:.0f}"),
    ]
    return Table.of(pd.DataFrame(rows), columns, caption="Problems of the Systems assignment, both years")


if __name__ == "__main__":
    run_command(main)

#!/usr/bin/env python3
"""Execute notebooks on this machine with papermill, print their tables, and render the writeup from the records.

python scripts/run.py                       every notebook at laptop size
python scripts/run.py 01 --profile h200     one notebook, with the parameters of a profile
python scripts/run.py 01 -p steps 10        one parameter given by hand
python scripts/run.py --dry-run             what would be measured, and about how long it takes
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from cs336_systems.bench.records import Store
from cs336_systems.bench.report import Column, Table, number, plural, seconds_in_words
from cs336_systems.distributed.cluster import leading_or_following
from cs336_systems.errors import HelpFormatter, UserError, run_command, unknown_name
from cs336_systems.repository import shown_path
from cs336_systems.workbook.documents import require_tools
from cs336_systems.workbook.editions import build, build_folder, executed_notebooks
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import Index, Notebook, load_index
from cs336_systems.workbook.plan import ASSUMED_SLOWDOWN, lay_out, plan_experiment
from cs336_systems.workbook.profiles import (
    LAPTOP,
    experiment_arguments,
    load_profile,
    local_data,
    names_notebook,
    notebook_parameters,
    parse_overrides,
    profile_names,
    profile_parameters,
)
from cs336_systems.workbook.run import NotebookRun, execute


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    with leading_or_following() as leads:
        return work(arguments) if leads else 0


def work(arguments: argparse.Namespace) -> int:
    """What the command does; under torchrun or srun the first rank does it, and the others follow its notebooks."""
    index = load_index()
    if arguments.list:
        print_list(index)
        return 0
    profile = load_profile(arguments.profile)
    overrides = parse_overrides(arguments.parameter)
    chosen = [index.notebook(name) for name in arguments.notebooks] or [
        notebook for notebook in index.notebooks_there() if names_notebook(profile.name, notebook)
    ]
    if not chosen:
        raise UserError(f"profile {profile.name} names no notebook that is there: see --list, or name a notebook")
    parameters = {
        notebook: profile_parameters(profile.name, notebook, own)
        for notebook, own in overrides_of(chosen, overrides).items()
    }
    with local_data(profile.name, arguments.data_dir) as is_temporary:
        if arguments.dry_run:
            print_plan(chosen, parameters, profile.name)
            return 0
        for notebook in chosen:  # a mistake in the last notebook is told before the first is run
            for name in notebook.experiments:
                lay_out(name, grid_arguments(notebook, name, parameters[notebook]), here=True)
        if not arguments.no_writeup:
            require_tools()
        if arguments.remeasure:
            os.environ["CS336_REMEASURE"] = "1"
        runs: list[NotebookRun] = []
        for notebook in chosen:
            runs.append(execute(notebook, parameters[notebook], Store.default().local / "notebooks" / profile.name))
            print(f"\n## {notebook.name}: {notebook.title}\n")
            print("\n\n".join(runs[-1].texts))
            if runs[-1].error:
                print(f"\nfailed: {runs[-1].error}")
            if arguments.fail_fast and not runs[-1].ok:
                break
        print(f"\n{runs_table(runs)}\n")
        print_places(is_temporary)
        written = arguments.no_writeup or render(profile.name, index, parameters, runs, is_temporary)
    return 0 if written and all(run.ok for run in runs) else 1


def render(
    profile: str,
    index: Index,
    parameters: dict[Notebook, dict[str, object]],
    runs: list[NotebookRun],
    is_temporary: bool,
) -> bool:
    """Render the writeup with the records of this run, and say where it is; whether it could be."""
    store = Store.default()
    grids: dict[str, list[dict[str, object]]] = {}
    for notebook, given in parameters.items():
        for name in notebook.experiments:
            grids.setdefault(name, []).append(grid_arguments(notebook, name, given))
    executed = executed_notebooks(store, index, profile) | {run.notebook.name: run.output for run in runs if run.ok}
    safe = "" if is_temporary else " Every record is saved."
    try:
        archive = Archive(store, index, profile=profile, run=grids, command=called_as())
        paths = build(archive, folder=build_folder(profile, None), executed=executed)
    except UserError as error:
        print(f"the writeup was not rendered: {error}.{safe}")
        return False
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the writeup was not rendered.{safe}") from None
    print(f"writeup: {', '.join(shown_path(path) for path in paths)}")
    return True


def called_as() -> str:
    """The command of this run, which measures what is missing when it is given again."""
    return shlex.join(["python", "scripts/run.py", *sys.argv[1:]])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names or numbers; all by default")
    parser.add_argument("--profile", default=LAPTOP, help=f"a folder of configs/profiles (default: {LAPTOP})")
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set one parameter of the notebooks that have it",
    )
    parser.add_argument("--list", action="store_true", help="list notebooks and profiles, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the cases and the predicted minutes, and stop")
    parser.add_argument("--remeasure", action="store_true", help="measure again what has a fresh record")
    parser.add_argument("--no-writeup", action="store_true", help="do not render the writeup at the end")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first notebook that fails")
    parser.add_argument("--data-dir", type=Path, help="keep records and executed notebooks there, not in data/local")
    return parser.parse_args(argv)


def grid_arguments(notebook: Notebook, experiment: str, parameters: dict[str, object]) -> dict[str, object]:
    """What one of a notebook's experiments gets of its parameters, those it keeps included."""
    return experiment_arguments(experiment, notebook_parameters(notebook) | parameters)


def overrides_of(chosen: list[Notebook], overrides: dict[str, Any]) -> dict[Notebook, dict[str, Any]]:
    """What was given with -p, for each notebook as far as it has such a parameter.

    Raises:
        UserError: none of them has it.
    """
    known = {notebook: notebook_parameters(notebook) for notebook in chosen}
    of_any = list(dict.fromkeys(name for parameters in known.values() for name in parameters))
    for name in overrides:
        if name not in of_any:
            of = chosen[0].name if len(chosen) == 1 else plural(len(chosen), "notebook")
            raise unknown_name("parameter", name, of_any, where=f"of {of} given with -p")
    return {
        notebook: {name: value for name, value in overrides.items() if name in parameters}
        for notebook, parameters in known.items()
    }


def print_list(index: Index) -> None:
    there = index.notebooks_there()
    print("Notebooks:")
    for notebook in index.notebooks.values():
        print(f"  {notebook.name:26}  {notebook.title}{'' if notebook in there else ' (planned)'}")
    print("\nProfiles:")
    for name in profile_names():
        print(f"  {name:26}  {load_profile(name).description}")


def print_plan(chosen: list[Notebook], parameters: dict[Notebook, dict[str, object]], profile_name: str) -> None:
    store, profile = Store.default(), load_profile(profile_name)
    plans = [
        plan_experiment(name, grid_arguments(notebook, name, parameters[notebook]), profile, store)
        for notebook in chosen
        for name in notebook.experiments
    ]
    columns = [
        Column("experiment", lambda row: row.experiment, "left"),
        Column("cases", lambda row: str(row.cases)),
        Column("skipped", lambda row: str(row.skipped)),
        Column("recorded", lambda row: str(row.recorded)),
        Column("minutes", lambda row: number(row.minutes, 2)),
    ]
    print(Table.of(pd.DataFrame(plans), columns, caption=f"What profile {profile_name} would do"))
    if all(math.isnan(plan.minutes) for plan in plans):
        print("\nNo minutes: this machine's ceilings are not measured yet; run scripts/measure.py machine_peaks.")
        return
    print(
        "\nMinutes are predicted for the steps of what has no record: their floor times what this machine's records "
        f"say (without records: {ASSUMED_SLOWDOWN:g}). Building models and starting processes comes on top; cases "
        "that run out of memory cost little."
    )


def _count(row: Any, status: str) -> str:
    return str(row.counts[status])


def runs_table(runs: list[NotebookRun]) -> Table:
    columns = [
        Column("notebook", lambda row: row.name, "left"),
        *(Column(status, partial(_count, status=status)) for status in ("ok", "reused", "oom", "skipped", "failed")),
        Column("ended", lambda row: row.ended, "left"),
        Column("time", lambda row: seconds_in_words(row.seconds)),
        Column("executed copy", lambda row: row.output, "left"),
    ]
    rows = [
        {
            "name": run.notebook.name,
            "counts": run.counts,
            "ended": "failed" if run.error else "well",
            "seconds": run.seconds,
            "output": shown_path(run.output),
        }
        for run in runs
    ]
    return Table.of(pd.DataFrame(rows), columns, caption="Cases by notebook")


def print_places(is_temporary: bool) -> None:
    store = Store.default()
    for machine, experiments in store.local_machines().items():
        print(f"records of {machine}: {shown_path(store.local / machine)} ({', '.join(experiments)})")
    if is_temporary:
        print("That folder was temporary and is gone now; --data-dir FOLDER keeps one.")


if __name__ == "__main__":
    run_command(main)

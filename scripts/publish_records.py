#!/usr/bin/env python3
"""Merge this checkout's records into the published ones, which are committed.

    python scripts/publish_records.py --list                         what there is
    python scripts/publish_records.py                                 everything
    python scripts/publish_records.py --machine h200-x1 --experiment transformer_step --run RUN

data/local/<machine>/<experiment>/*.jsonl go into data/<machine>/<experiment>.jsonl; of each case the newest good
record wins, those already published included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cs336_systems.bench.records import Store
from cs336_systems.errors import HelpFormatter, UserError, run_command, unknown_name


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    store = Store.default(arguments.data_dir)
    available = store.local_machines()
    if arguments.list:
        print_list(store, available)
        return 0
    if arguments.run and not (arguments.machine and len(arguments.experiment) == 1):
        raise UserError("--run names runs of one --machine and one --experiment: give both")
    if not available:
        raise UserError(f"there are no records in {store.local}: measure first (make run, scripts/measure.py)")
    if arguments.machine and arguments.machine not in available:
        raise unknown_name("machine", arguments.machine, available)
    machines = {name: available[name] for name in ([arguments.machine] if arguments.machine else available)}
    known = sorted({experiment for experiments in machines.values() for experiment in experiments})
    for experiment in arguments.experiment:
        if experiment not in known:
            raise unknown_name("experiment", experiment, known, where=f"of {', '.join(machines)}")
    for machine, experiments in machines.items():
        for experiment in experiments:
            if experiment in (arguments.experiment or known):
                publish(store, machine, experiment, arguments.run or None)
    return 0


def print_list(store: Store, available: dict[str, list[str]]) -> None:
    for machine, experiments in available.items():
        for experiment in experiments:
            cases = len(store.local_records(machine, experiment))
            print(
                f"{machine} {experiment}: {cases} cases, runs {', '.join(store.local_run_names(machine, experiment))}"
            )


def publish(store: Store, machine: str, experiment: str, runs: list[str] | None) -> None:
    """Publish, and say of which runs no commit tells what was measured."""
    path, count = store.publish(machine, experiment, runs)
    print(f"{path.relative_to(store.published.parent)}: {count} cases")
    for run, context in store.published_context(machine, experiment).items():
        if context.get("dirty") is not False:
            state = "changes that were not committed" if context.get("dirty") else "no commit that could be read"
            print(f"note: run {run} was measured from a checkout with {state}; its source hashes tell which")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--list", action="store_true", help="list machines, experiments and runs, and do nothing")
    parser.add_argument("--machine", help="only this machine's records")
    parser.add_argument("--experiment", nargs="+", default=[], help="only these experiments")
    parser.add_argument("--run", nargs="+", default=[], help="only these runs")
    parser.add_argument("--data-dir", type=Path, help="where the records are, if not in data/local")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

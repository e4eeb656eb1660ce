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
import os
from pathlib import Path

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError, run_command, unknown_name
from cs336_systems.repository import repository_root


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    if arguments.data_dir is not None:
        os.environ["CS336_DATA"] = str(arguments.data_dir.absolute())
    store = Store.default()
    available = store.local_machines()
    if arguments.list:
        for machine, experiments in available.items():
            for experiment in experiments:
                records = store.local_records(machine, experiment).values()
                runs = sorted({record.run for record in records})
                print(f"{machine} {experiment}: {len(records)} cases, runs {', '.join(runs)}")
        return 0
    if arguments.run and not (arguments.machine and len(arguments.experiment) == 1):
        raise UserError("--run names runs of one --machine and one --experiment: give both")
    if not available:
        raise UserError(f"there are no records in {store.local}: measure first (make run, scripts/measure.py)")
    if arguments.machine and arguments.machine not in available:
        raise unknown_name("machine", arguments.machine, available)
    for machine in [arguments.machine] if arguments.machine else list(available):
        for experiment in arguments.experiment or available[machine]:
            if experiment not in available[machine]:
                raise unknown_name(f"experiment of {machine}", experiment, available[machine])
            path, count = store.publish(machine, experiment, arguments.run or None)
            print(f"{path.relative_to(repository_root())}: {count} cases")
            for run, context in store.published_context(machine, experiment).items():
                if context.get("dirty") is not False:
                    state = (
                        "changes that were not committed" if context.get("dirty") else "no commit that could be read"
                    )
                    print(f"note: run {run} was measured from a checkout with {state}; its source hashes tell which")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list machines, experiments and runs, and do nothing")
    parser.add_argument("--machine", help="only this machine's records")
    parser.add_argument("--experiment", nargs="+", default=[], help="only these experiments")
    parser.add_argument("--run", nargs="+", default=[], help="only these runs")
    parser.add_argument("--data-dir", type=Path, help="where the records are, if not in data/local")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

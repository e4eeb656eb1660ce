#!/usr/bin/env python3
"""Measure experiments without notebooks, for machines with PyTorch but no Jupyter.

    python scripts/measure.py transformer_step                    one experiment at laptop size
    python scripts/measure.py --all --profile h200                everything a profile names
    torchrun --nnodes 2 … scripts/measure.py collectives …        with torchrun's ranks, on several machines

The grids are those of the notebooks. A call can be stopped at any time; the same call again goes on with what is
missing or stale.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cs336_systems.bench import sweep
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.records import Store
from cs336_systems.distributed.cluster import leading_or_following
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.experiments import experiment_names, load_experiment, machine_peaks
from cs336_systems.presentation import load_presentation
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.plan import lay_out_all
from cs336_systems.workbook.profiles import LAPTOP, experiments_of, load_profile, local_data


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    with leading_or_following() as leads:
        return work(arguments) if leads else 0


def work(arguments: argparse.Namespace) -> int:
    """What the command does; under torchrun or srun the first rank does it, and the others follow its jobs."""
    if arguments.list:
        print("\n".join(experiment_names()))
        return 0
    if arguments.experiments and arguments.all:
        raise UserError("--all is everything the profile names: leave it out, or the names of experiments")
    if not arguments.experiments and not arguments.all:
        raise UserError(f"name experiments to measure ({', '.join(experiment_names())}), or give --all")
    load_profile(arguments.profile)
    of_profile = experiments_of(arguments.profile, load_index())
    for name in arguments.experiments:
        load_experiment(name)  # a misspelt name ends the run before anything is measured
    chosen = {name: of_profile.get(name, [{}]) for name in (of_profile if arguments.all else arguments.experiments)}
    device = {} if arguments.device is None else {"device": arguments.device}
    # A mistake in the last experiment is told before the first is measured.
    cells = {name: lay_out_all(name, [each | device for each in grids], here=True) for name, grids in chosen.items()}
    failed = 0
    with local_data(arguments.profile, arguments.data_dir) as is_temporary:
        for name in chosen:
            failed += measure(name, cells[name], arguments.remeasure, Store.default())
        if is_temporary:
            print("Those records were temporary and are gone now; --data-dir FOLDER keeps them.")
    return 1 if failed else 0


def measure(name: str, cells: list[Cell[Any]], remeasure: bool, store: Store) -> int:
    """Measure the cases of one experiment and print its table; returns how many failed."""
    experiment = load_experiment(name)
    outcome = sweep.run(experiment, cells, store=store, remeasure=remeasure)
    peaks = None
    if experiment is not machine_peaks and cells:
        peaks = machine_peaks.ensure_peaks(cells[0].case.device, store)
    summary = experiment.summarise(outcome.records, peaks, store=store)
    print(f"\n{load_presentation(name).table(summary)}\n", flush=True)
    counted = ", ".join(f"{count} {what}" for what, count in outcome.counts.items() if count)
    print(f"{name}: {counted}; records in {store.local}", flush=True)
    for record in outcome.failed:
        print(f"failed: {record.case}: {'; '.join(record.failures)}", flush=True)
    return len(outcome.failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="names, as --list gives them")
    parser.add_argument("--profile", default=LAPTOP, help=f"a folder of configs/profiles (default: {LAPTOP})")
    parser.add_argument("--all", action="store_true", help="everything the profile names")
    parser.add_argument("--list", action="store_true", help="list the experiments, and do nothing")
    parser.add_argument("--device", help="cpu, cuda or auto, instead of the profile's")
    parser.add_argument("--remeasure", action="store_true", help="measure again what has a fresh record")
    parser.add_argument("--data-dir", type=Path, help="keep records there, not in data/local")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

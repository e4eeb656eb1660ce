#!/usr/bin/env python3
"""Time a Transformer's forward pass, forward and backward, or whole training step (problem benchmarking_script).

    python scripts/benchmark_step.py --size small --context 128 --phase step
    python scripts/benchmark_step.py --d-model 256 --d-ff 1024 --num-layers 4 --num-heads 4 --phase forward
    python scripts/benchmark_step.py --size small --model my_package.my_model:MyTransformer

Prints a table with the roofline's floor beside the times, and writes a record. With --ranges the steps name their parts
to a profiler, which takes time: see scripts/profile_step.py, which runs it so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cs336_systems.bench import sweep
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Record, Store
from cs336_systems.bench.report import number, plural
from cs336_systems.bench.timing import describe
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.presentation import transformer_step as presentation
from cs336_systems.profiling.ranges import record_ranges
from cs336_systems.step_options import add_step_options, build_case, chosen_config, ranged_store


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    config = chosen_config(arguments, arguments.context)
    cells = [Cell(build_case(arguments, config, phase)) for phase in arguments.phase]
    machine = this_machine(cells[0].case.device)
    if arguments.ranges:
        store = ranged_store(arguments.data_dir)
        with record_ranges():
            records = sweep.run(transformer_step, cells, store=store, machine=machine, remeasure=True).records
        print("\n".join(map(told, records)))
    else:
        store = Store.default(arguments.data_dir)
        peaks = machine_peaks.ensure_peaks(machine.device, store)
        # Whoever times a step by hand wants it timed now.
        remeasure = not arguments.reuse
        records = sweep.run(transformer_step, cells, store=store, machine=machine, remeasure=remeasure).records
        print(presentation.table(transformer_step.summarise(records, peaks, store=store)))
    print(f"\nrecords: {store.local / machine.name / 'transformer_step'}")
    # Running out of memory is an answer in a sweep; of a case that was asked for by name it is a failure.
    return 0 if all(record.status == "ok" for record in records) else 1


def told(record: Record) -> str:
    """How steps with named ranges ended, in a line: they are no timing, and have no place in a table of timings."""
    case = Case(**record.case)
    if record.status != "ok":
        return f"{case}: {record.status}: {record.reason}"
    steps = record.measurement.samples["step_ms"]
    return f"{case}: {plural(len(steps), 'step')} with named ranges, median {number(describe(steps).median, 4)} ms"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    timing = add_step_options(parser)
    timing.add_argument("--reuse", action="store_true", help="show a fresh record, if there is one, instead of timing")
    timing.add_argument("--data-dir", type=Path, help="keep records there, not in data/local")
    timing.add_argument(
        "--ranges", action="store_true", help="name the step's parts to a profiler: no timing; needs --data-dir"
    )
    arguments = parser.parse_args(argv)
    if arguments.ranges and arguments.data_dir is None:
        raise UserError(
            "--ranges takes time, so that what it records is no timing: name a folder for it with --data-dir"
        )
    if arguments.ranges and arguments.reuse:
        raise UserError("--reuse shows a record instead of running the step, and --ranges is for running it: leave one")
    return arguments


if __name__ == "__main__":
    run_command(main)

#!/usr/bin/env python3
"""Predict the time of a step on a GPU that is not there.

    python scripts/plan_time.py --size xl --context 512 --phase step --gpu h100-sxm
    python scripts/plan_time.py --size gpt2-xl --autocast bf16 --gpu a100-40gb h200
    python scripts/plan_time.py --size large --gpu h100-sxm --compile model --float32-matmul high --format json

The step's operators are counted without data and without the GPU. The floor is what they take at the GPU's ceilings;
the estimate has three constants, fitted to the published table of times that is nearest. On a GPU, or of a kind of
step, that no table has, it is extrapolated and says so. Takes about a quarter of a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from cs336_systems.analysis.published_times import TimePlan, plan_time, published_tables
from cs336_systems.bench.records import Store
from cs336_systems.errors import HelpFormatter, run_command
from cs336_systems.presentation import step_prediction as presentation
from cs336_systems.step import StepConfig
from cs336_systems.step_options import add_compute_options, add_plan_options, planned_step


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    chosen = planned_step(arguments)
    tables = published_tables(Store.default().reference)
    plans = [plan_time(chosen, gpu, tables) for gpu in arguments.gpu]
    if arguments.format == "json":
        print(json.dumps([as_json(chosen, plan) for plan in plans], indent=2))
    else:
        print("\n\n".join(presentation.described(chosen, plan) for plan in plans))
    return 0


def as_json(chosen: StepConfig, plan: TimePlan) -> dict[str, object]:
    """The step and its plan as plain data."""
    step = {name: value for name, value in dataclasses.asdict(chosen).items() if name != "device"}
    table = plan.prediction.table
    return {
        "step": {"size": chosen.size, **step},
        "gpu": plan.gpu,
        "floor_ms": 1e3 * plan.floor_s,
        "estimate_ms": 1e3 * plan.estimate_s,
        "label": "extrapolated" if plan.is_extrapolated else "estimate",
        "differs_in": list(plan.differs_in),
        "constants": dataclasses.asdict(plan.prediction.constants),
        "table": {"gpu": table.gpu, "file": table.file, "column": table.column, "mean_error": plan.prediction.error},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    step, _ = add_plan_options(parser)
    add_compute_options(step)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

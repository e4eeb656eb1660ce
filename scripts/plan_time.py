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

from cs336_systems.analysis.hardware import GPUS, gpu_peaks
from cs336_systems.analysis.published_times import TimePlan, plan_time, published_tables
from cs336_systems.bench.records import Store
from cs336_systems.errors import HelpFormatter, run_command
from cs336_systems.presentation import step_prediction as presentation
from cs336_systems.step import PHASES, StepConfig
from cs336_systems.step_options import add_compute_options, add_model_options, add_precision_options, chosen_config


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    for gpu in arguments.gpu:
        gpu_peaks(gpu)  # a misspelt name ends the run before anything is counted
    chosen = StepConfig(
        **dataclasses.asdict(chosen_config(arguments, arguments.context)),
        device="cuda",
        phase=arguments.phase,
        batch_size=arguments.batch,
        dtype=arguments.dtype,
        autocast=arguments.autocast,
        float32_matmul=arguments.float32_matmul,
        compile=arguments.compile,
        attention=arguments.attention,
        formulation=arguments.formulation,
        optimizer=arguments.optimizer,
        rope=arguments.rope,
        model=arguments.model,
        checkpointing=arguments.checkpointing,
    )
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
    add_model_options(parser)
    step = parser.add_argument_group("step")
    step.add_argument(
        "--phase",
        default="step",
        help=f"{', '.join(PHASES)}; forward has autograd on, inference has not (default: step)",
    )
    add_precision_options(step)
    add_compute_options(step)
    planned = parser.add_argument_group("plan")
    planned.add_argument("--gpu", nargs="+", default=["h200"], help=f"one or more of {', '.join(GPUS)} (default: h200)")
    planned.add_argument("--format", choices=("markdown", "json"), default="markdown")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

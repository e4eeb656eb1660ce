#!/usr/bin/env python3
"""Predict the memory of a step on a GPU that is not there, to the byte.

    python scripts/plan_memory.py --size xl --context 2048 --phase step --gpu h200
    python scripts/plan_memory.py --size xl --context 2048 --autocast bf16 --gpu a100-80gb h200
    python scripts/plan_memory.py --size xl --phase step --gpu h200 --find max-context
    python scripts/plan_memory.py --model my_package.my_model:MyTransformer --size small --gpu a100-40gb --format json

The step is followed without data and without the GPU, and its allocations are replayed in PyTorch's caching allocator:
half a minute for a training step of gpt2-xl, some seconds for a forward pass. Exits with 1 when a step does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from cs336_systems.analysis.footprint import Footprint, plan_step
from cs336_systems.analysis.longest import Longest, NothingFits, largest_batch, longest_context
from cs336_systems.errors import HelpFormatter, run_command
from cs336_systems.presentation import footprint as presentation
from cs336_systems.step import StepConfig
from cs336_systems.step_options import add_plan_options, planned_step

FIND = {"max-context": longest_context, "max-batch": largest_batch}


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    chosen = planned_step(arguments)
    if arguments.find is not None:
        return find(chosen, arguments)
    plans = {gpu: plan_step(chosen, gpu) for gpu in arguments.gpu}
    if arguments.format == "json":
        print(json.dumps([as_json(chosen, plan) for plan in plans.values()], indent=2))
    else:
        print("\n\n".join(presentation.described(chosen, plan) for plan in plans.values()))
    return 0 if all(plan.fits for plan in plans.values()) else 1


def find(chosen: StepConfig, arguments: argparse.Namespace) -> int:
    """The longest context or the largest batch on each GPU, and what it takes there."""
    found = {gpu: find_on(chosen, arguments.find, gpu) for gpu in arguments.gpu}
    if arguments.format == "json":
        print(json.dumps([longest_as_json(chosen, gpu, each) for gpu, each in found.items()], indent=2))
    else:
        texts = (
            str(each) if isinstance(each, NothingFits) else presentation.longest_described(chosen, each)
            for each in found.values()
        )
        print("\n\n".join(texts))
    return 1 if any(isinstance(each, NothingFits) for each in found.values()) else 0


def find_on(chosen: StepConfig, what: str, gpu: str) -> Longest | NothingFits:
    """What fits on one GPU, or why nothing does: an answer, that takes no other GPU's with it."""
    try:
        return FIND[what](chosen, gpu)
    except NothingFits as error:
        return error


def as_json(chosen: StepConfig, plan: Footprint) -> dict[str, object]:
    """The step and its plan as plain data; sizes are in bytes."""
    step = {name: value for name, value in dataclasses.asdict(chosen).items() if name not in ("device", "compile")}
    return {"step": {"size": chosen.size, **step}, **dataclasses.asdict(plan)}


def longest_as_json(chosen: StepConfig, gpu: str, found: Longest | NothingFits) -> dict[str, object]:
    """What was searched for and found, with its plan; a value of 0 and the reason where nothing fits."""
    if isinstance(found, NothingFits):
        return {"device": gpu, "value": 0, "fits": False, "reason": str(found)}
    changed = found.step_of(chosen)
    return {"find": f"max-{found.axis}", "value": found.value, "next_fails_at": found.next_fails_at} | as_json(
        changed, found.plan
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    _, planned = add_plan_options(parser)
    planned.add_argument(
        "--find", choices=FIND, help="instead of a plan for --context and --batch, the largest of one that fits"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

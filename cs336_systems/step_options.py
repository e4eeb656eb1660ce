"""The options that say which step is meant, for every command line that takes one.

`scripts/benchmark_step.py` times the step, `scripts/profile_step.py` has it timed under a profiler: both know the same
options, and the second tells the first which case it wants by `options_of`. `scripts/plan_memory.py` and
`scripts/plan_time.py` plan it for GPUs that need not be there.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cs336_systems.analysis.hardware import GPUS, gpu_peaks
from cs336_systems.attention.backends import NAMES
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Store
from cs336_systems.checkpointing import POLICIES
from cs336_systems.compilation import MODES as COMPILE_MODES
from cs336_systems.errors import UserError
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.model import SIZES, TransformerConfig, model_size
from cs336_systems.step import AUTOCAST, DTYPES, FLOAT32_MATMUL, PHASES, StepConfig

_DIMENSIONS = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "rope_theta")
# Fields of a case whose option has a shorter name.
_SHORT = {"context_length": "context", "batch_size": "batch"}
# Short names that people know, for those of PyTorch.
_AUTOCAST_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def add_model_options(parser: argparse.ArgumentParser, *, several_contexts: bool = False) -> None:
    """Add the options that say which model sees how many tokens.

    Args:
        several_contexts: --context takes one or more; `arguments.context` is then a list.
    """
    # Names are checked by the case itself, whose messages also suggest the nearest.
    model = parser.add_argument_group("model")
    model.add_argument("--size", help=f"a size by name: {', '.join(SIZES)}; dimensions given beside it replace its own")
    model.add_argument("--d-model", type=int, help="width of the residual stream")
    model.add_argument("--d-ff", type=int, help="width of the feed-forward layer")
    model.add_argument("--num-layers", type=int, help="number of blocks")
    model.add_argument("--num-heads", type=int, help="attention heads; must divide d_model")
    model.add_argument("--vocab-size", type=int, help="number of tokens in the vocabulary (default: 10000)")
    model.add_argument("--rope-theta", type=float, help="base of the rotary frequencies (default: 10000)")
    if several_contexts:
        model.add_argument(
            "--context", type=int, nargs="+", default=[512], help="tokens per sequence, one or more (default: 512)"
        )
    else:
        model.add_argument("--context", type=int, default=512, help="tokens per sequence (default: 512)")
    model.add_argument("--batch", type=int, default=4, help="sequences per batch (default: 4)")
    model.add_argument(
        "--attention", default="reference", help=f"{', '.join(NAMES)} or module:function (default: reference)"
    )
    model.add_argument(
        "--formulation", default="reference", help="reference (the course's operators) or fused (default: reference)"
    )
    model.add_argument("--rope", default="2025", help="form of the rotary embedding: 2025 or 2026 (default: 2025)")
    model.add_argument(
        "--checkpointing",
        default="none",
        help=f"what of the blocks backward computes again: {', '.join(POLICIES)} (default: none)",
    )
    model.add_argument("--model", help="somebody else's model as module:Class, with the course's constructor")


def add_precision_options(step: argparse._ArgumentGroup) -> None:
    """Add the options of a step that decide on its arithmetic."""
    step.add_argument("--optimizer", default="reference", help="AdamW: reference or fused (default: reference)")
    step.add_argument("--dtype", default="float32", help=f"of parameters: {', '.join(DTYPES)} (default: float32)")
    step.add_argument(
        "--autocast",
        default="none",
        type=lambda name: _AUTOCAST_NAMES.get(name, name),
        help=f"mixed precision: {', '.join(AUTOCAST)}, or {' and '.join(_AUTOCAST_NAMES)} for short (default: none)",
    )


def add_compute_options(step: argparse._ArgumentGroup) -> None:
    """Add the options of a step that change its time and not its tensors."""
    step.add_argument(
        "--float32-matmul",
        default="highest",
        help=f"float32 products: {' or '.join(FLOAT32_MATMUL)} (TF32; default: highest)",
    )
    step.add_argument("--compile", default="none", help=f"torch.compile: {', '.join(COMPILE_MODES)} (default: none)")


def add_step_options(
    parser: argparse.ArgumentParser, *, several_contexts: bool = False, steps: int = 10
) -> argparse._ArgumentGroup:
    """Add the options of a step that is run, and return the group of those on timing, for a script to add its own.

    Args:
        several_contexts: as `add_model_options`.
        steps: the default of --steps.
    """
    add_model_options(parser, several_contexts=several_contexts)
    step = parser.add_argument_group("step")
    step.add_argument(
        "--phase", nargs="+", default=["step"], help=f"one or more of {', '.join(PHASES)} (default: step)"
    )
    add_precision_options(step)
    add_compute_options(step)
    step.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--warmup", type=int, default=5, help="steps before the measured ones (default: 5)")
    timing.add_argument("--steps", type=int, default=steps, help=f"measured steps (default: {steps})")
    timing.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    return timing


def add_plan_options(parser: argparse.ArgumentParser) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Add the options of a step that is planned, and return the groups on the step and on the plan, for more."""
    add_model_options(parser)
    step = parser.add_argument_group("step")
    step.add_argument(
        "--phase",
        default="step",
        help=f"{', '.join(PHASES)}; forward has autograd on, inference has not (default: step)",
    )
    add_precision_options(step)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--gpu", nargs="+", default=["h200"], help=f"one or more of {', '.join(GPUS)} (default: h200)")
    plan.add_argument("--format", choices=("markdown", "json"), default="markdown")
    return step, plan


def planned_step(arguments: argparse.Namespace) -> StepConfig:
    """The step that is to be planned, on GPUs that are known.

    Raises:
        UserError: a value that cannot be, before anything is followed.
    """
    for gpu in arguments.gpu:
        gpu_peaks(gpu)
    config = chosen_config(arguments, arguments.context)
    return StepConfig(**_fields(arguments, config), device="cuda", phase=arguments.phase)


def _fields(arguments: argparse.Namespace, config: TransformerConfig) -> dict[str, Any]:
    """What the options say of a step, but for its phase and device."""
    own = {field.name for field in dataclasses.fields(StepConfig)} - {"phase", "device"}
    same = {name: value for name, value in vars(arguments).items() if name in own}
    return same | dataclasses.asdict(config) | {"batch_size": arguments.batch}


def chosen_config(arguments: argparse.Namespace, context: int) -> TransformerConfig:
    """The size by name with what was given beside it, or all dimensions by hand.

    Raises:
        UserError: no size is named and a dimension is missing.
    """
    given = {name: getattr(arguments, name) for name in _DIMENSIONS if getattr(arguments, name) is not None}
    given["context_length"] = context
    if arguments.size is not None:
        return model_size(arguments.size, **given)
    missing = [name for name in ("d_model", "d_ff", "num_layers", "num_heads") if name not in given]
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"give a --size ({', '.join(SIZES)}) or all dimensions: {options} missing")
    return TransformerConfig(**given)


def build_case(arguments: argparse.Namespace, config: TransformerConfig, phase: str) -> Case:
    """The case that the options describe, its device resolved.

    Raises:
        UserError: a value that cannot be.
    """
    return Case(
        **_fields(arguments, config),
        device=resolve_device(arguments.device),
        phase=phase,
        warmup=arguments.warmup,
        steps=arguments.steps,
        seed=arguments.seed,
    )


def options_of(case: Case) -> list[str]:
    """The options that give this very case, every one of them, whatever the defaults are."""
    options = []
    for name, value in dataclasses.asdict(case).items():
        option = f"--{_SHORT.get(name, name).replace('_', '-')}"
        if isinstance(value, bool):
            options += [option] if value else []
        elif value is not None:
            options.append(f"{option}={value}")
    return options


def ranged_store(data_dir: Path) -> Store:
    """Where steps with named ranges are recorded: in a folder apart, where nobody looks who wants a timing."""
    return Store.default(data_dir / "with-ranges")

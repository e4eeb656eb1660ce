#!/usr/bin/env python3
"""Time a Transformer's forward pass, forward and backward, or whole training step (problem benchmarking_script).

    python scripts/benchmark_step.py --size small --context 128 --phase step
    python scripts/benchmark_step.py --d-model 256 --d-ff 1024 --num-layers 4 --num-heads 4 --phase forward
    python scripts/benchmark_step.py --size small --model my_package.my_model:MyTransformer

Prints a table with the roofline's floor beside the times, and writes a record.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cs336_systems.analysis.flops import PHASES
from cs336_systems.attention.backends import NAMES
from cs336_systems.bench import sweep
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import resolve_device, this_machine
from cs336_systems.bench.records import Store
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.experiments.transformer_step import AUTOCAST, DTYPES, FLOAT32_MATMUL, Case
from cs336_systems.model import SIZES, TransformerConfig, model_size
from cs336_systems.presentation import transformer_step as presentation

_DIMENSIONS = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "rope_theta")


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    config = chosen_config(arguments)
    cells = [Cell(build_case(arguments, config, phase)) for phase in arguments.phase]
    machine = this_machine(cells[0].case.device)
    store = Store.default(arguments.data_dir)
    peaks = machine_peaks.ensure_peaks(machine.device, store)
    # Whoever times a step by hand wants it timed now.
    outcome = sweep.run(transformer_step, cells, store=store, machine=machine, remeasure=not arguments.reuse)
    print(presentation.table(transformer_step.summarise(outcome.records, peaks, store=store)))
    print(f"\nrecords: {store.local / machine.name / 'transformer_step'}")
    # Running out of memory is an answer in a sweep; of a case that was asked for by name it is a failure.
    return 0 if all(record.status == "ok" for record in outcome.records) else 1


def chosen_config(arguments: argparse.Namespace) -> TransformerConfig:
    """The size by name with what was given beside it, or all dimensions by hand.

    Raises:
        UserError: no size is named and a dimension is missing.
    """
    given = {name: getattr(arguments, name) for name in _DIMENSIONS if getattr(arguments, name) is not None}
    given["context_length"] = arguments.context
    if arguments.size is not None:
        return dataclasses.replace(model_size(arguments.size), **given)
    missing = [name for name in ("d_model", "d_ff", "num_layers", "num_heads") if name not in given]
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"give a --size ({', '.join(SIZES)}) or all dimensions: {options} missing")
    return TransformerConfig(**given)


def build_case(arguments: argparse.Namespace, config: TransformerConfig, phase: str) -> Case:
    return Case(
        **dataclasses.asdict(config),
        device=resolve_device(arguments.device),
        phase=phase,
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
        warmup=arguments.warmup,
        steps=arguments.steps,
        seed=arguments.seed,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    # Names are checked by the case itself, whose messages also suggest the nearest.
    model = parser.add_argument_group("model")
    model.add_argument("--size", help=f"a size by name: {', '.join(SIZES)}; dimensions given beside it replace its own")
    model.add_argument("--d-model", type=int, help="width of the residual stream")
    model.add_argument("--d-ff", type=int, help="width of the feed-forward layer")
    model.add_argument("--num-layers", type=int, help="number of blocks")
    model.add_argument("--num-heads", type=int, help="attention heads; must divide d_model")
    model.add_argument("--vocab-size", type=int, help="number of tokens in the vocabulary (default: 10000)")
    model.add_argument("--rope-theta", type=float, help="base of the rotary frequencies (default: 10000)")
    model.add_argument("--context", type=int, default=512, help="tokens per sequence (default: 512)")
    model.add_argument("--batch", type=int, default=4, help="sequences per batch (default: 4)")
    model.add_argument(
        "--attention", default="reference", help=f"{', '.join(NAMES)} or module:function (default: reference)"
    )
    model.add_argument(
        "--formulation", default="reference", help="reference (the course's operators) or fused (default: reference)"
    )
    model.add_argument("--rope", default="2025", help="form of the rotary embedding: 2025 or 2026 (default: 2025)")
    model.add_argument("--model", help="somebody else's model as module:Class, with the course's constructor")
    step = parser.add_argument_group("step")
    step.add_argument(
        "--phase", nargs="+", default=["step"], help=f"one or more of {', '.join(PHASES)} (default: step)"
    )
    step.add_argument("--optimizer", default="reference", help="AdamW: reference or fused (default: reference)")
    step.add_argument("--dtype", default="float32", help=f"of parameters: {', '.join(DTYPES)} (default: float32)")
    step.add_argument("--autocast", default="none", help=f"mixed precision: {', '.join(AUTOCAST)} (default: none)")
    step.add_argument(
        "--float32-matmul",
        default="highest",
        help=f"float32 products: {' or '.join(FLOAT32_MATMUL)} (TF32; default: highest)",
    )
    step.add_argument("--compile", action="store_true", help="torch.compile the model")
    step.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--warmup", type=int, default=5, help="steps before the measured ones (default: 5)")
    timing.add_argument("--steps", type=int, default=10, help="measured steps (default: 10)")
    timing.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    timing.add_argument("--reuse", action="store_true", help="show a fresh record, if there is one, instead of timing")
    timing.add_argument("--data-dir", type=Path, help="keep records there, not in data/local")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

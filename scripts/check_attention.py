#!/usr/bin/env python3
"""Check an implementation of attention rung by rung against float64, and say what usually makes a rung fail.

    python scripts/check_attention.py my_module:MyFlashAttention
    python scripts/check_attention.py my_module:my_attention --device cuda --dtype bfloat16
    python scripts/check_attention.py flash --all

A class derived from torch.autograd.Function is called as the course calls it, apply(Q, K, V, is_causal); a function as
f(query, key, value, *, is_causal) with tensors of (batch, heads, length, head_dim). The first rung that fails ends the
climb. The exit status is 0 when none failed, 1 when one did, 2 when there was nothing to try.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from types import MappingProxyType

import torch

from cs336_systems.attention.backends import NAMES, resolve_attention
from cs336_systems.attention.ladder import RUNGS, Outcome, climb
from cs336_systems.bench.machine import resolve_device
from cs336_systems.errors import HelpFormatter, run_command, unknown_name

DTYPES = MappingProxyType(
    {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
)
LABELS = MappingProxyType({"passed": "ok", "failed": "FAILED"})
_WIDTH = 110


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    if arguments.dtype not in DTYPES:
        raise unknown_name("dtype", arguments.dtype, DTYPES)
    device = resolve_device(arguments.device)
    function = resolve_attention(arguments.attention)
    counted: Counter[str] = Counter()
    for outcome in climb(function, device, DTYPES[arguments.dtype]):
        print(described(outcome), flush=True)
        counted[outcome.status] += 1
        if outcome.status == "failed" and not arguments.all:
            break
    untried = len(RUNGS) - counted.total()
    parts = [f"{count} {status}" for status, count in counted.items()] + [f"{untried} not tried"] * bool(untried)
    print(f"\n{arguments.attention} on {device} in {arguments.dtype}: {', '.join(parts)}")
    return 1 if counted["failed"] else 0


def described(outcome: Outcome) -> str:
    """A line for a rung, with the reason where it was not asked; and the explanation below one that failed."""
    line = f"{LABELS.get(outcome.status, outcome.status):<13}  {outcome.rung.name}"
    if outcome.status != "failed":
        return f"{line}: {outcome.text}" if outcome.text else line
    told = {"tests": outcome.rung.tests, "found": outcome.text, "usually": outcome.cause}
    return "\n".join([line, *(_paragraph(name, text) for name, text in told.items() if text)])


def _paragraph(name: str, text: str) -> str:
    """A text under a line, its own lines kept, indented behind its name."""
    first, rest = f"    {name:<9}", " " * 13
    lines = [
        textwrap.fill(line, _WIDTH, initial_indent=rest, subsequent_indent=rest, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return first + "\n".join(lines).removeprefix(rest)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("attention", help=f"module:attribute, or one of ours: {', '.join(NAMES)}")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--all", action="store_true", help="go on after a rung that failed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

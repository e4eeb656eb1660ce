#!/usr/bin/env python3
"""Find the fastest tiles of the FlashAttention kernels on this machine's GPU, and keep them.

    python scripts/tune_kernels.py                       head dimensions, precisions, lengths and heads of the workbook
    python scripts/tune_kernels.py --head-dim 64 --dtype bf16

What was found before is not measured again; delete .cache/flash_tiles to begin anew. Meant to take less than three
minutes from empty caches; whatever was found until it is stopped is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd
import torch

from cs336_systems.bench.progress import Progress
from cs336_systems.bench.report import Column, Table, plural, seconds_in_words
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.repository import shown_path

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp32": torch.float32})
HEAD_DIMS = (16, 32, 64, 128)
NO_MASK_HEAD_DIMS = (64, 128)
"""Where attention without a mask is measured, in 16 bits."""
LENGTHS = MappingProxyType({"bf16": (512, 4096, 16384), "fp32": (512, 4096)})
"""One per class of lengths; in float32 the longest would take as long as all the others together."""
HEADS = (1, 16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Inputs to tune for."""

    head_dim: int
    dtype: str
    precision: Literal["ieee", "tf32"]
    is_causal: bool
    length: int
    heads: int

    def __str__(self) -> str:
        precision = self.dtype if self.dtype == "bf16" else self.precision
        return f"{self.head_dim}, {precision}, {self.length}, {plural(self.heads, 'head')}"


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    found = settings(arguments.head_dim, arguments.dtype)
    if not torch.cuda.is_available():
        raise UserError(
            "tiles are timed on a CUDA device, and there is none: run this where the kernels are to be used; "
            "without it they take tiles chosen with the compiler's report"
        )
    from cs336_systems.attention import flash_tuning

    began = time.monotonic()
    rows = []
    with Progress(len(found), "tuning") as progress:
        for setting in found:
            progress.label(str(setting))
            rows += tuned(setting)
            progress.advance()
    print(table(pd.DataFrame(rows)))
    new = sum(row["new"] for row in rows)
    taken = seconds_in_words(time.monotonic() - began)
    where = shown_path(flash_tuning.winners_file(torch.device("cuda")))
    print(f"\n{plural(len(rows), 'winner')}, {new} of them new, in {taken}; kept in {where}")
    return 0


def settings(head_dims: list[int], dtypes: list[str]) -> list[Setting]:
    """What is tuned, the longest last."""
    found = []
    for dtype, head_dim in itertools.product(dtypes, head_dims):
        precisions: tuple[Literal["ieee", "tf32"], ...] = ("ieee",) if dtype == "bf16" else ("ieee", "tf32")
        masks = (True, False) if dtype == "bf16" and head_dim in NO_MASK_HEAD_DIMS else (True,)
        axes = itertools.product(precisions, masks, LENGTHS[dtype], HEADS)
        found += [Setting(head_dim, dtype, *rest) for rest in axes]
    return sorted(found, key=lambda setting: setting.length)


def tuned(setting: Setting) -> list[dict[str, Any]]:
    """Tune for one setting: a row per kernel."""
    from cs336_systems.attention import flash_tuning
    from cs336_systems.attention.flash_launch import Problem
    from cs336_systems.attention.flash_tiles import KERNELS

    problem = Problem(
        batch=1,
        heads=setting.heads,
        key_heads=setting.heads,
        queries=setting.length,
        keys=setting.length,
        head_dim=setting.head_dim,
        dtype=DTYPES[setting.dtype],
        offset=0 if setting.is_causal else None,
        precision=setting.precision,
        device=torch.device("cuda", torch.cuda.current_device()),
    )
    new = flash_tuning.tune(problem)
    rows = []
    for kernel in KERNELS:
        choice, known = flash_tuning.chosen(kernel, problem), flash_tuning.known_tiles(kernel, problem)
        rows.append(
            dataclasses.asdict(setting)
            | {
                "kernel": kernel,
                "winner": str(choice.tiles),
                "candidate": f"{1 + known.index(choice.tiles)} of {len(known)}",
                "new": flash_tuning.key_of(kernel, problem) in new,
            }
        )
    return rows


def table(rows: pd.DataFrame) -> Table:
    numbers = ("head_dim", "length", "heads")
    texts = ("kernel", "dtype", "precision", "is_causal", "winner", "candidate")
    columns = [
        Column(name.replace("_", " "), partial(_cell, name=name), "right" if name in numbers else "left")
        for name in ("kernel", *numbers, *texts[1:])
    ]
    return Table.of(rows, columns, caption="The fastest tiles on this GPU")


def _cell(row: Any, name: str) -> str:
    return str(getattr(row, name))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

#!/usr/bin/env python3
"""Compile the FlashAttention kernels for GPUs that need not be there, and print what the compiler says they need.

    python scripts/check_kernels.py                         every kernel, head dimension, precision, GPU and candidate
    python scripts/check_kernels.py --first                 of the candidates only the one that is taken untimed
    python scripts/check_kernels.py --head-dim 128 --capability 90

Registers, spilled bytes (stack) and shared memory come from the compiler's own report; a spill beyond what
`flash_tiles.STACK_CEILING` records, or shared memory beyond what the GPU has, is an error. Takes about half a second
each, a quarter of an hour in all, and seconds when Triton has compiled them before; nothing is run. The kernel that
sums dO · O is left out: it streams.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pandas as pd

from cs336_systems.attention import flash_kernels
from cs336_systems.attention.flash_tiles import (
    KERNELS,
    ROWS,
    SHARED_BYTES,
    STACK_CEILING,
    Kernel,
    Precision,
    Tiles,
    candidates,
)
from cs336_systems.bench.progress import Progress
from cs336_systems.bench.report import MISSING, Column, Table
from cs336_systems.errors import HelpFormatter, UserError, run_command, unknown_name

PRECISIONS: MappingProxyType[str, tuple[Precision, ...]] = MappingProxyType(
    {"fp16": ("half",), "bf16": ("half",), "fp32": ("ieee", "tf32")}
)
HEAD_DIMS = (16, 32, 64, 80, 128, 256)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as one GPU would be given it."""

    kernel: Kernel
    head_dim: int
    dtype: str
    precision: Precision
    is_causal: bool
    capability: int
    tiles: Tiles

    @property
    def may_spill(self) -> int:
        """Bytes of stack that are known of and borne; 0 with 16-bit inputs."""
        row = next(row for row in ROWS if row >= self.head_dim)
        return STACK_CEILING.get((self.kernel, row, self.precision), 0)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    for capability in arguments.capability:
        if capability not in SHARED_BYTES:
            raise unknown_name("capability", capability, map(str, SHARED_BYTES))
    if max(arguments.head_dim) > ROWS[-1]:
        raise UserError(f"the kernels take head dimensions up to {ROWS[-1]}, found {max(arguments.head_dim)}")
    variants = variants_of(arguments)
    rows = []
    with Progress(len(variants), "compiling") as progress:
        for variant in variants:
            progress.label(f"{variant.kernel}, {variant.head_dim}, {variant.dtype}, {variant.capability}")
            found = compiled(variant)
            told = {"tiles": str(variant.tiles), "fault": fault(variant, found)}
            rows.append(dataclasses.asdict(variant) | dataclasses.asdict(found) | told)
            progress.advance()
    print(table(pd.DataFrame(rows)))
    return 1 if any(row["fault"] for row in rows) else 0


def variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """Whatever the options leave: 16-bit precisions know no other, and every GPU has candidates of its own."""
    found = []
    axes = (KERNELS, arguments.head_dim, arguments.dtype, (True, False), arguments.capability)
    for kernel, head_dim, dtype, is_causal, capability in itertools.product(*axes):
        for precision in PRECISIONS[dtype]:
            if precision != "half" and precision not in arguments.precision:
                continue
            known = candidates(kernel, head_dim, precision, capability)
            found += [
                Variant(kernel, head_dim, dtype, precision, is_causal, capability, tiles)
                for tiles in (known[:1] if arguments.first else known)
            ]
    return found


def compiled(variant: Variant) -> Resources:
    """Compile one kernel with pointers and strides as dense tensors have them, and read the compiler's report.

    Raises:
        UserError: this Triton has no compiler for it, or its report cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(flash_kernels, f"{variant.kernel}_kernel")
    constants = {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(variant.head_dim)),
        "BLOCK_Q": variant.tiles.queries,
        "BLOCK_K": variant.tiles.keys,
        "IS_CAUSAL": variant.is_causal,
        "PRECISION": "ieee" if variant.precision == "half" else variant.precision,
    }
    types = {name: _type(name, variant.dtype) for name in kernel.arg_names if name not in constants}
    divisible = [name for name in types if types[name].startswith("*") or name.endswith(("_batch", "_head", "_row"))]
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": variant.tiles.warps, "num_stages": variant.tiles.stages}
    made = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)
    refused = {name: value for name, value in options.items() if getattr(made.metadata, name) != value}
    if refused:
        raise UserError(f"Triton ignored {refused} for {variant}")
    with tempfile.TemporaryDirectory(prefix="cs336-kernel-") as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(binary)]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", told)
    if found is None:
        raise UserError(f"cuobjdump says nothing of registers for {variant}: {told.strip() or 'no output'}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack, local, made.metadata.shared)


def _type(name: str, dtype: str) -> str:
    """Of a kernel's argument by its name: tensors are capitals, of which L and D are float32."""
    if name.isupper():
        return f"*{'fp32' if name in ('L', 'D') else dtype}"
    return "fp32" if name == "scale" else "i32"


def fault(variant: Variant, found: Resources) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    faults = []
    if found.stack_bytes + found.local_bytes > variant.may_spill:
        faults.append(f"spills {found.stack_bytes + found.local_bytes} B, {variant.may_spill} are known of")
    if found.shared_bytes > SHARED_BYTES[variant.capability]:
        faults.append(f"needs {found.shared_bytes} B shared, {SHARED_BYTES[variant.capability]} are there")
    return "; ".join(faults)


def table(rows: pd.DataFrame) -> Table:
    names = ("kernel", "head_dim", "dtype", "precision", "is_causal", "capability", "tiles")
    numbers = ("registers", "stack_bytes", "shared_bytes")
    columns = [
        *(Column(name.replace("_", " "), partial(_cell, name=name), "left") for name in names),
        *(Column(name.replace("_", " "), partial(_cell, name=name)) for name in numbers),
        Column("fault", partial(_cell, name="fault"), "left"),
    ]
    return Table.of(rows, columns, caption="What the compiler says the kernels need")


def _cell(row: Any, name: str) -> str:
    return str(getattr(row, name)) or MISSING


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    of_float32 = [name for name in get_args(Precision) if name != "half"]
    told = "of products of fp32 inputs"
    parser.add_argument("--precision", nargs="+", choices=of_float32, default=of_float32, help=told)
    parser.add_argument("--capability", nargs="+", type=int, default=list(SHARED_BYTES), help="90 for 9.0")
    parser.add_argument("--first", action="store_true", help="leave out the candidates that only tuning would take")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

#!/usr/bin/env python3
"""Compile the FlashAttention kernels for GPUs that need not be there, and print what the compiler says they need.

    python scripts/check_kernels.py                         every kernel, head dimension, precision and GPU
    python scripts/check_kernels.py --head-dim 128 --capability 90

Registers, spilled bytes (stack) and shared memory come from the compiler's own report; a spill beyond what
`flash_tiles.STACK_CEILING` records, or shared memory beyond what the GPU has, is an error. Takes about half a second
each; nothing is run.
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
from typing import Any

import pandas as pd

from cs336_systems.attention import flash_kernels
from cs336_systems.attention.flash_tiles import KERNELS, ROWS, SHARED_BYTES, STACK_CEILING, Kernel, tiles_for
from cs336_systems.bench.progress import Progress
from cs336_systems.bench.report import MISSING, Column, Table
from cs336_systems.errors import HelpFormatter, UserError, run_command, unknown_name

ITEMSIZES = MappingProxyType({"fp16": 2, "bf16": 2, "fp32": 4})
HEAD_DIMS = (16, 32, 64, 80, 128, 256)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as one GPU would be given it."""

    kernel: Kernel
    head_dim: int
    dtype: str
    is_causal: bool
    capability: int
    precision: str = "ieee"

    @property
    def may_spill(self) -> int:
        """Bytes of stack that are known of and borne; 0 in 16-bit precisions up to head dimension 128."""
        precision = "half" if ITEMSIZES[self.dtype] == 2 else self.precision
        row = next(row for row in ROWS if row >= self.head_dim)
        return STACK_CEILING.get((self.kernel, row, precision), 0)  # type: ignore[arg-type]


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
    axes = (KERNELS, arguments.head_dim, arguments.dtype, (True, False), arguments.capability)
    variants = [Variant(*values) for values in itertools.product(*axes)]
    rows = []
    with Progress(len(variants), "compiling") as progress:
        for variant in variants:
            progress.label(f"{variant.kernel}, {variant.head_dim}, {variant.dtype}, {variant.capability}")
            found = compiled(variant)
            rows.append(dataclasses.asdict(variant) | dataclasses.asdict(found) | {"fault": fault(variant, found)})
            progress.advance()
    print(table(pd.DataFrame(rows)))
    return 1 if any(row["fault"] for row in rows) else 0


def compiled(variant: Variant) -> Resources:
    """Compile one kernel with pointers and strides as dense tensors have them, and read the compiler's report.

    Raises:
        UserError: this Triton has no compiler for it, or its report cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(flash_kernels, f"{variant.kernel}_kernel")
    tiles = tiles_for(variant.kernel, variant.head_dim, ITEMSIZES[variant.dtype], variant.capability)
    constants = {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(variant.head_dim)),
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "IS_CAUSAL": variant.is_causal,
        "PRECISION": variant.precision,
    }
    types = {name: _type(name, variant.dtype) for name in kernel.arg_names if name not in constants}
    divisible = [name for name in types if types[name].startswith("*") or name.endswith(("_batch", "_head", "_row"))]
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
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
    names = ("kernel", "head_dim", "dtype", "is_causal", "capability")
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
    parser.add_argument("--dtype", nargs="+", choices=list(ITEMSIZES), default=list(ITEMSIZES))
    parser.add_argument("--capability", nargs="+", type=int, default=list(SHARED_BYTES), help="90 for 9.0")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

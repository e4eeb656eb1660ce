"""torch.compile of a model, whole or block by block.

Whole, one graph is compiled of all blocks: Inductor may fuse across them, and compiles for as long as the model is
deep. Block by block, every block is compiled by itself; blocks of one shape share their code, so that the time does not
grow with the depth.

Source: CS336 assignment 2, torch_compile; PyTorch's "Reducing torch.compile cold start compilation time with regional
compilation".
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from cs336_systems.errors import UserError, unknown_name

CompileMode = Literal["none", "model", "blocks"]
MODES: tuple[CompileMode, ...] = get_args(CompileMode)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that keeps them in a list called `layers`, as the course's does; else none."""
    blocks = getattr(model, "layers", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []


def compile_model(model: nn.Module, mode: str) -> None:
    """Have `model`, or each of its blocks, compiled when it is first called. In place: its parameters stay its own.

    Raises:
        UserError: an unknown mode; "blocks" of a model whose blocks are not in a list called `layers`.
    """
    if mode not in MODES:
        raise unknown_name("compile", mode, MODES)
    if mode == "model":
        model.compile()
    if mode == "blocks":
        blocks = blocks_of(model)
        if not blocks:
            raise UserError(
                f"{type(model).__name__} keeps no blocks in a ModuleList called `layers`, so they cannot be compiled "
                "one by one: compile the whole model"
            )
        for block in blocks:
            block.compile()

"""The figures that the handout quotes of compiled blocks come out of the compiler, to the last byte."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cs336_systems.analysis.activations import residual_bytes, saved_by_block
from cs336_systems.analysis.residuals import compiled_residuals
from cs336_systems.bench.records import Store
from cs336_systems.bench.report import MIB
from cs336_systems.errors import UserError
from cs336_systems.model import TransformerConfig

pytestmark = pytest.mark.problem("gradient_checkpointing")

HANDOUT = TransformerConfig(d_model=2560, d_ff=10_240, num_layers=1, num_heads=16)
SMALL = TransformerConfig(d_model=32, d_ff=80, num_layers=1, num_heads=2)


def mebibytes(config: TransformerConfig = HANDOUT, **arguments: Any) -> float:
    return sum(residual.bytes for residual in compiled_residuals(config, 4, 2048, **arguments)) / MIB


@pytest.mark.parametrize("place", range(3))
def test_the_published_figures_come_out_to_their_last_digit(place: int, store: Store) -> None:
    row = store.reference("checkpointing_residuals").iloc[place]
    group = None if row["group"] == 0 else int(row["group"])
    found = mebibytes(rope="2026", blocks=int(row["blocks"]), group=group)
    assert f"{found:.2f}" == f"{row['residuals_mib']:.2f}"


def test_however_the_model_is_written_the_compiler_keeps_the_same_of_the_handouts_block() -> None:
    found = {
        tuple(sorted(each.bytes for each in compiled_residuals(HANDOUT, 4, 2048, rope=rope, formulation=formulation)))
        for rope, formulation in itertools.product(("2025", "2026"), ("reference", "fused"))
    }
    assert len(found) == 1


@pytest.mark.parametrize(("blocks", "group"), [(4, 1), (4, 2), (4, 3), (4, 4), (1, 1)])
def test_a_checkpoint_saves_its_input_alone(blocks: int, group: int) -> None:
    found = compiled_residuals(SMALL, 2, 24, blocks=blocks, group=group)
    assert [residual.bytes for residual in found] == [residual_bytes(SMALL, 2, 24)] * -(-blocks // group)


def test_without_checkpoints_each_block_saves_as_much() -> None:
    one, three = (compiled_residuals(SMALL, 2, 24, blocks=blocks) for blocks in (1, 3))
    assert 3 * sum(residual.bytes for residual in one) == sum(residual.bytes for residual in three)


def test_the_compiler_keeps_less_than_eager_operators_do() -> None:
    compiled = sum(residual.bytes for residual in compiled_residuals(SMALL, 2, 24))
    assert compiled < sum(saved_by_block(SMALL, 2, 24, device="cpu").values())


@pytest.mark.parametrize("group", [0, 3, -1])
def test_a_group_that_cannot_be_is_an_error(group: int) -> None:
    with pytest.raises(UserError, match="from 1 to 2 blocks"):
        compiled_residuals(SMALL, 2, 24, blocks=2, group=group)

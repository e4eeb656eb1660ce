"""A step's operators agree with the accounting on paper, and a deep model's with those of a model that deep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cs336_systems.analysis import step_operators
from cs336_systems.analysis.flops import phase_work, total
from cs336_systems.analysis.step_operators import Stage, stages_of
from cs336_systems.errors import UserError
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.step import PHASES, Phase, StepConfig

pytestmark = pytest.mark.problem("benchmarking_script")

SMALL = StepConfig(32, 64, 4, 2, 16, "cuda", vocab_size=50, batch_size=2)
CHOICES: list[dict[str, Any]] = [
    {},
    {"autocast": "bfloat16"},
    {"formulation": "fused", "optimizer": "fused"},
    {"dtype": "bfloat16", "rope": "2026"},
    {"device": "cpu", "autocast": "bfloat16"},
    {"compile": "model"},
    {"compile": "blocks", "autocast": "float16"},
]


def step(**changes: Any) -> StepConfig:
    return dataclasses.replace(SMALL, **changes)


def flops_of(stages: tuple[Stage, ...]) -> int:
    return sum(stage.flops for stage in stages)


def bytes_of(stages: tuple[Stage, ...]) -> int:
    return sum(stage.bytes for stage in stages)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_counted_flops_are_the_accounted_ones_in_every_phase(phase: Phase, choice: dict[str, Any]) -> None:
    chosen = step(phase=phase, **choice)
    work = total(phase_work(chosen.config, phase, chosen.batch_size, chosen.context_length).values())
    assert flops_of(stages_of(chosen)) == work.flops


@pytest.mark.parametrize("phase", ["inference", "step"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_deep_model_is_counted_from_its_first_two_depths_as_if_it_were_followed(
    phase: str, choice: dict[str, Any]
) -> None:
    chosen = step(phase=phase, **choice)
    extrapolated = stages_of(chosen)
    directly = step_operators._trace(dataclasses.replace(chosen, compile="none", float32_matmul="highest"))
    traced = directly if chosen.compile == "none" else step_operators._compiled(directly)
    assert step_operators._stages([stage.name for stage in extrapolated], traced) == extrapolated


def test_the_phases_of_training_are_parts_of_one_another() -> None:
    forward, both, whole = (stages_of(step(phase=phase)) for phase in ("forward", "forward-backward", "step"))
    assert [stage.name for stage in whole] == ["forward", "loss", "backward", "optimizer"]
    assert whole[:3] == both
    assert both[:1] == forward


def test_inference_launches_what_forward_does_and_the_host_records_nothing() -> None:
    (inference,), (forward,) = (stages_of(step(phase=phase)) for phase in ("inference", "forward"))
    assert inference.launches == forward.launches
    assert inference.bytes == forward.bytes
    assert inference.host_steps < forward.host_steps <= 2 * inference.host_steps


@pytest.mark.parametrize("phase", PHASES)
def test_compiled_the_model_launches_less_and_moves_less_and_computes_the_same(phase: str) -> None:
    eager, compiled = stages_of(step(phase=phase)), stages_of(step(phase=phase, compile="model"))
    assert flops_of(compiled) == flops_of(eager)
    assert bytes_of(compiled) < bytes_of(eager)
    for before, after in zip(eager, compiled, strict=True):
        assert after.launches <= before.launches
        assert after.host_steps <= before.host_steps
        if before.name in ("loss", "optimizer"):  # called as they are written
            assert after == before


def test_autocast_halves_what_products_move_and_launches_casts() -> None:
    plain, mixed = stages_of(step(phase="forward"))[0], stages_of(step(phase="forward", autocast="bfloat16"))[0]

    def of_products(stage: Stage) -> int:
        return sum(kind.bytes * times for kind, times in stage.operators.items() if kind.flops)

    assert 2 * of_products(mixed) == of_products(plain)
    assert {kind.precision for kind in mixed.operators if kind.flops} == {"bfloat16"}
    assert mixed.launches > plain.launches


def test_what_is_counted_does_not_decrease_with_the_context_and_the_batch() -> None:
    for longer in ({"context_length": 24}, {"batch_size": 3}):
        for before, after in zip(stages_of(step()), stages_of(step(**longer)), strict=True):
            assert after.launches == before.launches
            assert after.host_steps == before.host_steps
            assert after.bytes > before.bytes or before.name == "optimizer"
            assert after.flops >= before.flops


def test_how_float32_products_round_changes_nothing_that_is_counted() -> None:
    assert stages_of(step(float32_matmul="high")) == stages_of(step())


def test_a_case_of_an_experiment_is_counted_as_its_step() -> None:
    assert stages_of(Case(**dataclasses.asdict(SMALL), warmup=1, steps=1)) == stages_of(SMALL)


@pytest.mark.parametrize("attention", ["flash", "sdpa", "my_module:attention"])
def test_an_attention_whose_kernels_are_the_devices_is_an_error(attention: str) -> None:
    with pytest.raises(UserError, match="cannot be counted without it: expected reference"):
        stages_of(step(attention=attention))

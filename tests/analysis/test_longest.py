"""The longest context and the largest batch, against plans of single lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs336_systems.analysis import longest
from cs336_systems.analysis.allocations import record_step
from cs336_systems.analysis.footprint import plan_step, replay
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.analysis.longest import Growth, largest_batch, longest_context
from cs336_systems.errors import UserError
from cs336_systems.model import TransformerConfig
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("memory_profiling")

SMALL = TransformerConfig(d_model=64, d_ff=128, num_layers=1, num_heads=2, vocab_size=120, context_length=16)
GPU = "a100-40gb"


def chosen(**changes: Any) -> StepConfig:
    return StepConfig(**dataclasses.asdict(SMALL) | {"device": "cpu", "batch_size": 2, "phase": "step"} | changes)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that can give 64 MiB, so that what fits is small."""
    small = dataclasses.replace(GPUS[GPU], usable_bytes=64 * 2**20)
    monkeypatch.setattr(longest, "gpu_peaks", lambda _: small)
    monkeypatch.setattr("cs336_systems.analysis.footprint.gpu_peaks", lambda _: small)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("phase", ["inference", "forward", "step"])
@pytest.mark.parametrize(("axis", "length"), [("context", 200), ("batch", 7)])
def test_allocations_at_any_length_are_those_of_a_step_of_that_length(
    axis: longest.Axis, length: int, phase: str, autocast: str
) -> None:
    step = chosen(phase=phase, autocast=autocast)
    direct = record_step(chosen(phase=phase, autocast=autocast, **{longest.FIELDS[axis]: length})).events
    grown = Growth(step, axis).at(length)
    assert replay(grown, "h200") == replay(direct, "h200")
    assert [(event.is_birth, event.mark) for event in grown] == [(event.is_birth, event.mark) for event in direct]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("phase", ["inference", "step"])
def test_the_longest_context_fits_and_the_next_does_not(phase: str) -> None:
    found = longest_context(chosen(phase=phase), GPU)
    assert found.value > 1
    here, after = (
        plan_step(chosen(phase=phase, context_length=length), GPU) for length in (found.value, found.value + 1)
    )
    assert (here.fits, after.fits) == (True, False)
    assert found.plan == here
    assert found.next_fails_at == after.fails_at


@pytest.mark.usefixtures("little_memory")
def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    found = largest_batch(chosen(context_length=64), GPU)
    assert found.axis == "batch"
    plans = [plan_step(chosen(context_length=64, batch_size=size), GPU) for size in (found.value, found.value + 1)]
    assert [plan.fits for plan in plans] == [True, False]


@pytest.mark.usefixtures("little_memory")
def test_a_training_step_fits_a_shorter_context_than_inference() -> None:
    contexts = [longest_context(chosen(phase=phase), GPU).value for phase in ("step", "forward", "inference")]
    assert contexts == sorted(contexts)
    assert contexts[0] < contexts[-1]


@pytest.mark.usefixtures("little_memory")
def test_what_was_not_to_be_looked_at_changes_nothing() -> None:
    assert longest_context(chosen(context_length=9), GPU) == longest_context(chosen(context_length=4000), GPU)


def test_where_nothing_fits_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(GPUS[GPU], usable_bytes=2**20)
    monkeypatch.setattr(longest, "gpu_peaks", lambda _: tiny)
    with pytest.raises(UserError, match=r"not even a context of 1 fits on a100-40gb.*Take a smaller size"):
        longest_context(chosen(), GPU)


def test_an_unknown_gpu_is_an_error_before_anything_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "record_step", None)
    with pytest.raises(UserError, match="unknown GPU 'v100'; known: a100-40gb"):
        longest_context(chosen(), "v100")


class ByLength(nn.Module):
    """Runs another operator from 100 tokens on."""

    def __init__(self, **course: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(course["vocab_size"], course["vocab_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.embedding(tokens)
        return torch.relu(logits) if tokens.shape[1] > 100 else logits


class Window(nn.Module):
    """Makes a tensor that stops to grow at 200 tokens, by the same operators at every length."""

    def __init__(self, **course: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(course["vocab_size"], course["vocab_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.embedding(tokens)
        seen = logits[:, -200:].exp()
        return logits + seen.sum()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["ByLength", "Window"])
def test_a_model_that_decides_by_the_length_is_told_apart(name: str) -> None:
    with pytest.raises(UserError, match="what is allocated is no polynomial of the context"):
        longest_context(chosen(model=f"{__name__}:{name}", phase="inference"), GPU)

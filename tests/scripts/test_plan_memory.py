"""The command that plans memory: its two formats, its searches, and what it says of a mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from source_files import load_script, status_of

from cs336_systems.analysis import longest
from cs336_systems.analysis.footprint import plan_step
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("memory_profiling")

SMALLEST = ["--d-model", "16", "--d-ff", "32", "--num-layers", "1", "--num-heads", "2", "--vocab-size", "50"]
STEP = [*SMALLEST, "--context", "8", "--batch", "2"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("plan_memory")


def planned(script: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert status_of(script, *options, "--format", "json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_json_gives_the_plan_in_bytes_for_every_gpu_that_is_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = planned(script, capsys, *STEP, "--phase", "step", "--gpu", "a100-40gb", "h200")
    chosen = StepConfig(16, 32, 1, 2, 8, "cpu", vocab_size=50, batch_size=2, phase="step")
    for plan, gpu in zip(plans, ("a100-40gb", "h200"), strict=True):
        expected = plan_step(chosen, gpu)
        assert plan["device"] == gpu
        assert plan["peak_allocated_bytes"] == expected.peak_allocated_bytes
        assert plan["peak_reserved_bytes"] == expected.peak_reserved_bytes
        assert plan["by_kind"] == dict(expected.by_kind)
        assert plan["fits"] is True
        assert plan["step"]["phase"] == "step"


def test_markdown_says_the_verdict_and_what_makes_up_the_peak(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *STEP, "--phase", "forward", "--gpu", "h200") == 0
    text = capsys.readouterr().out
    assert "fits on h200" in text
    assert "| parameters " in text
    assert "| activations " in text
    assert "forward with autograd on of custom, context 8, batch 2, float32" in text


def test_a_step_that_does_not_fit_says_so_and_exits_with_1(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *SMALLEST, "--context", "1000000", "--gpu", "h200") == 1
    text = capsys.readouterr().out
    assert "does not fit on h200" in text
    assert "--find max-context" in text


@pytest.mark.parametrize("short", ["bf16", "bfloat16"])
def test_autocast_goes_by_its_short_name_too(
    script: ModuleType, capsys: pytest.CaptureFixture[str], short: str
) -> None:
    (plan,) = planned(script, capsys, *STEP, "--autocast", short)
    assert plan["step"]["autocast"] == "bfloat16"
    assert plan["by_kind"]["casts of parameters"] > 0


@pytest.mark.parametrize(("find", "field"), [("max-context", "context_length"), ("max-batch", "batch_size")])
def test_the_largest_is_found_with_its_plan(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, find: str, field: str
) -> None:
    little = dataclasses.replace(GPUS["h200"], usable_bytes=2**27)
    monkeypatch.setattr(longest, "gpu_peaks", lambda _: little)
    monkeypatch.setattr("cs336_systems.analysis.footprint.gpu_peaks", lambda _: little)
    (found,) = planned(script, capsys, *STEP, "--find", find)
    assert found["find"] == find
    assert found["step"][field] == found["value"] > 1
    assert found["peak_reserved_bytes"] <= 2**27
    assert found["next_fails_at"]
    assert status_of(script, *STEP, "--find", find) == 0
    assert f"**{found['value']:,}**" in capsys.readouterr().out


def test_where_nothing_fits_is_an_answer_that_takes_no_other_with_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    little = {"a100-40gb": dataclasses.replace(GPUS["a100-40gb"], usable_bytes=2**10)}
    of_name = {**GPUS, **little}
    monkeypatch.setattr(longest, "gpu_peaks", of_name.__getitem__)
    options = [*STEP, "--find", "max-batch", "--gpu", "a100-40gb"]
    assert status_of(script, *options) == 1
    assert "not even a batch of 1 fits on a100-40gb" in capsys.readouterr().out
    assert status_of(script, *options, "--format", "json") == 1
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["value"], answer["fits"]) == (0, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "h20"], "unknown GPU 'h20': did you mean 'h200'?"),
        (["--size", "smal"], "unknown size 'smal': did you mean 'small'?"),
        ([*STEP, "--phase", "train"], "unknown phase 'train'; known: inference, forward"),
        ([*STEP, "--autocast", "bf15"], "unknown autocast 'bf15'"),
        ([*STEP, "--attention", "sdpa"], "what attention 'sdpa' allocates is decided by its kernels"),
        ([*STEP, "--batch", "0"], "batch_size must be a whole number of at least 1"),
        ([*SMALLEST, "--context", "10000000000"], "a tensor has more bytes than can be counted"),
    ],
)
def test_a_mistake_is_one_clear_sentence(
    script: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    defaults = [] if "--size" in options or "--d-model" in options else ["--size", "tiny"]
    assert status_of(script, *defaults, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


DATA_DEPENDENT = """
import torch
class Theirs(torch.nn.Module):
    def __init__(self, vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, vocab_size)
    def forward(self, tokens):
        logits = self.embedding(tokens)
        return logits * 2 if logits.sum().item() > 0 else logits
"""


def test_a_model_that_looks_at_values_is_told_so(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_that_looks.py").write_text(DATA_DEPENDENT)
    monkeypatch.syspath_prepend(tmp_path)
    assert status_of(script, *STEP, "--model", "model_that_looks:Theirs") == 2
    assert "depends on the values of tensors" in capsys.readouterr().err

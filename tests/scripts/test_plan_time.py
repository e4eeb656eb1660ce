"""The command that plans the time of a step: its two formats, and what it says of a mistake."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from source_files import load_script, status_of

from cs336_systems.analysis import published_times
from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.analysis.published_times import PublishedTable
from cs336_systems.analysis.step_time import Constants, TimedStep, estimate_seconds, floor_seconds
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("benchmarking_script")

SMALLEST = ["--d-model", "16", "--d-ff", "32", "--num-layers", "1", "--num-heads", "2", "--vocab-size", "50"]
STEP = [*SMALLEST, "--context", "8", "--batch", "2"]
CHOSEN = StepConfig(16, 32, 1, 2, 8, "cuda", vocab_size=50, batch_size=2)
CONSTANTS = Constants(0.5, 0.5, 8e-6)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a table of small models in the place of the published ones, which take their time to count."""
    sizes = [StepConfig(16, 32, layers, 2, 8, "cuda", vocab_size=50, batch_size=2) for layers in (1, 2, 3)]
    peaks = gpu_peaks("h100-sxm")
    rows = tuple(TimedStep(each, estimate_seconds(each, peaks, CONSTANTS)) for each in sizes)
    loaded = load_script("plan_time")
    monkeypatch.setattr(loaded, "published_tables", lambda _: (PublishedTable("h100-sxm", "toy", "seconds", rows),))
    assert published_times.published_tables is not loaded.published_tables
    return loaded


def test_json_gives_floor_estimate_and_constants_for_every_gpu_that_is_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *STEP, "--gpu", "h100-sxm", "h200", "--format", "json") == 0
    known, unknown = json.loads(capsys.readouterr().out)
    assert (known["label"], unknown["label"]) == ("estimate", "extrapolated")
    assert unknown["differs_in"] == ["GPU"]
    assert known["floor_ms"] == pytest.approx(1e3 * floor_seconds(CHOSEN, gpu_peaks("h100-sxm")), rel=1e-12)
    expected = 1e3 * estimate_seconds(CHOSEN, gpu_peaks("h100-sxm"), CONSTANTS)
    assert known["estimate_ms"] == pytest.approx(expected, rel=0.01)
    assert known["table"]["gpu"] == unknown["table"]["gpu"] == "h100-sxm"
    assert known["constants"] == unknown["constants"]
    assert known["step"]["context_length"] == 8


def test_markdown_names_the_table_and_says_where_it_is_extrapolated(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *STEP, "--gpu", "h100-sxm") == 0
    text = capsys.readouterr().out
    assert "estimated from the published times of H100 80 GB (step)" in text
    assert "extrapolated" not in text
    assert status_of(script, *STEP, "--gpu", "h200", "--phase", "forward") == 0
    text = capsys.readouterr().out
    assert "**extrapolated** from the published times of H100 80 GB (step), which differ in GPU and phase" in text
    assert "| extrapolated |" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h3"], "unknown GPU 'h3'"),
        (["--size", "xxl"], "unknown size 'xxl': did you mean 'xl'? Known: tiny"),
        (["--phase", "backwards"], "unknown phase 'backwards'"),
        (["--compile", "all"], "unknown compile 'all'"),
        (["--attention", "sdpa"], "expected reference"),
        (["--gpu", "h100-pcie", "--autocast", "bf15"], "unknown autocast 'bf15'"),
    ],
)
def test_a_mistake_is_an_error_that_lists_the_known(
    script: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert status_of(script, *STEP, *options) == 2
    assert message in capsys.readouterr().err

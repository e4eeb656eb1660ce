"""scripts/measure.py measures without notebooks, goes on where it stopped, and tells a user's mistakes in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
from source_files import load_script, status_of

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Store
from cs336_systems.experiments import experiment_names, load_experiment, machine_peaks, transformer_step
from cs336_systems.presentation import load_presentation
from cs336_systems.repository import repository_root

SCRIPT = repository_root() / "scripts" / "measure.py"
TINY: dict[str, Any] = {
    "contexts": {"tiny": [8]},
    "phases": ["forward"],
    "batch_size": 1,
    "warmup": 0,
    "steps": 2,
    "device": "cpu",
}
# Measuring the real ceilings takes seconds.
PEAKS = Peaks("made", MappingProxyType({"float32": 1e12}), 1e11, 2**20, 2**30, "made up")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("measure")


@pytest.fixture
def tiny(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile's grid has a single case that takes milliseconds."""
    monkeypatch.setattr(script, "experiments_of", lambda *_: {"transformer_step": [TINY]})
    monkeypatch.setattr(machine_peaks, "ensure_peaks", lambda *_: PEAKS)


@pytest.fixture
def asked(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been measured, had this machine the device: experiment, arguments of its grids, whether again."""
    found: list[tuple[Any, ...]] = []
    failures = {"transformer_step": 2}

    def pretend(name: str, grids: list[dict[str, Any]], remeasure: bool, store: Store) -> int:
        del store
        found.append((name, grids, remeasure))
        return failures.get(name, 0)

    def not_laid_out(name: str, grids: list[dict[str, Any]], *, here: bool) -> list[dict[str, Any]]:
        load_experiment(name)
        assert here
        return grids

    monkeypatch.setattr(script, "measure", pretend)
    monkeypatch.setattr(script, "lay_out_all", not_laid_out)
    return found


def run_files() -> list[Path]:
    folder = Path(os.environ["CS336_DATA"]) / this_machine("cpu").name / "transformer_step"
    return sorted(folder.glob("*.jsonl"))


# Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["transformer_stp"], "unknown experiment 'transformer_stp': did you mean 'transformer_step'? Known: "),
        (["warmup", "transformer_stp"], "unknown experiment 'transformer_stp'"),
        ([], f"name experiments to measure ({', '.join(experiment_names())}), or give --all"),
        (["warmup", "--all"], "--all is everything the profile names: leave it out, or the names of experiments"),
        (["--all", "--profile", "h200"], "device 'cuda' was asked for, but PyTorch finds no CUDA device here"),
        (["warmup", "--profile", "h20"], "unknown profile 'h20': did you mean 'h200'? Known: laptop, a100-40gb"),
        (["warmup", "--device", "gpu"], "unknown device 'gpu': did you mean 'cpu'? Known: cpu, cuda, auto"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert status_of(script, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}")
    assert len(captured.err.splitlines()) == 1
    assert not Path(os.environ["CS336_DATA"]).exists()


def test_a_mistake_ends_the_process_with_2_and_without_a_traceback() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "warmpu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: unknown experiment 'warmpu': did you mean 'warmup'?")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.usefixtures("tiny")
def test_a_folder_that_cannot_be_written_is_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    assert status_of(script, "transformer_step", "--data-dir", str(tmp_path / "file")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ")
    assert "--data-dir" in error
    assert len(error.splitlines()) == 1


# What is measured ----------------------------------------------------------------------------------------------


def test_the_list_is_every_experiment(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "--list") == 0
    assert capsys.readouterr().out.split() == experiment_names()


def test_all_is_everything_the_profile_names_and_the_ceilings_first(
    script: ModuleType, asked: list[tuple[Any, ...]]
) -> None:
    status_of(script, "--all", "--profile", "h200")
    of_steps, of_precision = ["transformer_step", "warmup", "step_profile"], ["mixed_precision_accumulation"]
    of_precision += ["autocast_dtypes", "layernorm_precision"]
    of_memory, of_attention = ["memory_profile", "longest_context", "checkpointing"], ["pytorch_attention"]
    names = ["machine_peaks", *of_steps, *of_precision, *of_memory, *of_attention, "model_compile"]
    names += ["flash_benchmarking", "collectives", "data_parallel"]
    assert [name for name, *_ in asked] == names
    assert [{each["device"] for each in grids} for _, grids, _ in asked] == [{"cuda"}] * len(names)
    assert asked[1][1][0]["steps"] == 10


def test_experiments_that_are_named_are_measured_in_that_order_with_the_profiles_arguments(
    script: ModuleType, asked: list[tuple[Any, ...]]
) -> None:
    status_of(script, "warmup", "machine_peaks", "--profile", "smoke", "--device", "cpu", "--remeasure")
    assert [name for name, *_ in asked] == ["warmup", "machine_peaks"]
    assert asked[0][1][0]["warmup_counts"] == [0, 1]
    assert [({each["device"] for each in grids}, again) for _, grids, again in asked] == [({"cpu"}, True)] * 2


def test_a_device_that_is_asked_for_is_that_of_every_grid_and_an_experiment_no_profile_names_has_its_own_values(
    script: ModuleType, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [{"steps": 1}, {"steps": 2, "device": "cuda"}]
    monkeypatch.setattr(script, "experiments_of", lambda *_: {"transformer_step": grids})
    status_of(script, "transformer_step", "warmup", "--device", "cpu")
    assert asked[0][1] == [{"steps": 1, "device": "cpu"}, {"steps": 2, "device": "cpu"}]
    assert asked[1][1] == [{"device": "cpu"}]
    assert grids == [{"steps": 1}, {"steps": 2, "device": "cuda"}]


@pytest.mark.usefixtures("asked")
def test_the_exit_status_tells_whether_a_case_failed(script: ModuleType) -> None:
    assert status_of(script, "transformer_step") == 1
    assert status_of(script, "warmup") == 0


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_a_second_call_reuses_the_record_of_the_first(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "transformer_step") == 0
    first = capsys.readouterr().out
    assert "transformer_step: 1 ok; records in" in first
    files = run_files()
    contents = [path.read_bytes() for path in files]
    assert len(files) == 1
    assert status_of(script, "transformer_step") == 0
    second = capsys.readouterr().out
    assert "transformer_step: 1 reused; records in" in second
    assert run_files() == files
    assert [path.read_bytes() for path in files] == contents
    # The same record makes the same table.
    assert second.partition("transformer_step: 1")[0] == first.partition("transformer_step: 1")[0]


@pytest.mark.parametrize("more", [[], ["--remeasure"]], ids=["what is missing", "again"])
@pytest.mark.usefixtures("tiny")
def test_of_two_grids_every_case_is_measured_and_one_that_is_in_both_once(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    grids = [TINY, TINY | {"contexts": {"tiny": [8, 16]}}]
    monkeypatch.setattr(script, "experiments_of", lambda *_: {"transformer_step": grids})
    assert status_of(script, "transformer_step", *more) == 0
    text = capsys.readouterr().out
    assert "transformer_step: 2 ok; records in" in text
    assert len([line for line in text.splitlines() if line.startswith("| tiny")]) == 2
    (path,) = run_files()
    cases = [record.case["context_length"] for record in Store.default().all_local_records(*path.parts[-3:-1])]
    assert cases == [8, 16]


@pytest.mark.usefixtures("tiny")
def test_a_mistake_in_the_second_grid_ends_the_run_before_the_first_is_measured(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [TINY, TINY | {"contexts": {"tinny": [8]}}]
    monkeypatch.setattr(script, "experiments_of", lambda *_: {"transformer_step": grids})
    assert status_of(script, "transformer_step") == 2
    assert capsys.readouterr().err.startswith("error: unknown size 'tinny': did you mean 'tiny'?")
    assert run_files() == []


@pytest.mark.usefixtures("tiny")
def test_remeasuring_measures_what_has_a_fresh_record(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "transformer_step") == 0
    assert status_of(script, "transformer_step", "--remeasure") == 0
    assert capsys.readouterr().out.count("transformer_step: 1 ok") == 2
    assert len(run_files()) == 2


@pytest.mark.usefixtures("tiny")
def test_the_table_shows_the_time_beside_its_floor(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "transformer_step") == 0
    headings = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| size"))
    assert "mean ± std (ms)" in headings
    assert "floor (ms)" in headings


@pytest.mark.usefixtures("tiny")
def test_records_go_where_the_option_says(script: ModuleType, tmp_path: Path) -> None:
    before = os.environ["CS336_DATA"]
    folder = tmp_path / "elsewhere"
    assert status_of(script, "transformer_step", "--data-dir", str(folder)) == 0
    assert list(folder.rglob("transformer_step/*.jsonl"))
    assert not Path(before).exists()


@pytest.mark.usefixtures("tiny")
def test_a_case_that_failed_is_told_with_its_reason_and_ends_with_1(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: transformer_step.Case) -> None:
        raise RuntimeError(f"no step for {case}")

    monkeypatch.setattr(transformer_step, "build_step", broken)
    assert status_of(script, "transformer_step") == 1
    text = capsys.readouterr().out
    assert "transformer_step: 1 failed" in text
    assert "RuntimeError: no step for tiny, context 8, forward" in text.splitlines()[-1]


@pytest.mark.usefixtures("tiny")
def test_measuring_at_smoke_size_keeps_no_records_unless_told_where(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scripts/run.py does, and as the profile's description says."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.environ["CS336_DATA"]
    assert status_of(script, "transformer_step", "--profile", "smoke") == 0
    assert not Path(before).exists()
    assert list(tmp_path.glob("cs336-*")) == []


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_has_a_table_to_print_when_it_is_measured(name: str) -> None:
    assert callable(load_presentation(name).table)

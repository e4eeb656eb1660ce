"""scripts/benchmark_step.py times a step of any model it can build, and says in a sentence what it cannot."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from source_files import load_script, status_of

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Record, Store
from cs336_systems.experiments import machine_peaks
from cs336_systems.profiling import ranges
from cs336_systems.repository import repository_root

pytestmark = pytest.mark.problem("benchmarking_script")

SCRIPT = repository_root() / "scripts" / "benchmark_step.py"
# Measuring the real ceilings takes seconds.
PEAKS = Peaks("made", MappingProxyType({"float32": 1e12, "bfloat16": 2e12}), 1e11, 2**20, 2**30, "made up")
SMALLEST = ["--vocab-size", "50", "--context", "8", "--batch", "2", "--warmup", "0", "--steps", "2", "--device", "cpu"]
DIMENSIONS = ["--d-model", "16", "--d-ff", "32", "--num-layers", "1", "--num-heads", "2", *SMALLEST]
# Somebody else's model, with the course's constructor.
THEIRS = """
import torch
class Theirs(torch.nn.Module):
    def __init__(self, vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, d_model)
        self.head = torch.nn.Linear(d_model, vocab_size)
    def forward(self, tokens):
        return self.head(self.embedding(tokens))
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmark_step")


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_peaks, "ensure_peaks", lambda *_: PEAKS)


def records() -> list[Record]:
    return list(Store.default().local_records(this_machine("cpu").name, "transformer_step").values())


def table_of(text: str) -> list[dict[str, str]]:
    """The rows of the one table in what was printed."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "smal"], "unknown size 'smal': did you mean 'small'? Known: tiny, mini, small, medium"),
        (["--size", "tiny", "--context", "-1"], "context_length must be a positive whole number, found -1"),
        (["--size", "tiny", "--context", "0"], "context_length must be a positive whole number, found 0"),
        (["--size", "tiny", "--num-heads", "3"], "num_heads must divide d_model: 3 heads do not divide d_model 128"),
        (["--size", "tiny", "--num-heads", "128"], "d_model / num_heads must be even"),
        (["--size", "tiny", "--num-layers", "0"], "num_layers must be a positive whole number, found 0"),
        (["--size", "tiny", "--rope-theta", "-1"], "rope_theta must be a positive finite number, found -1.0"),
        (["--size", "tiny", "--rope-theta", "nan"], "rope_theta must be a positive finite number, found nan"),
        (["--size", "tiny", "--rope-theta", "inf"], "rope_theta must be a positive finite number, found inf"),
        (["--size", "tiny", "--phase", "backward"], "unknown phase 'backward': did you mean 'forward-backward'?"),
        (
            ["--size", "tiny", "--phase", "step", "setp"],
            "unknown phase 'setp': did you mean 'step'? Known: inference, forward,",
        ),
        (["--size", "tiny", "--batch", "0"], "batch_size must be a whole number of at least 1, found 0"),
        (["--size", "tiny", "--steps", "0"], "steps must be a whole number of at least 1, found 0"),
        (["--size", "tiny", "--warmup", "-1"], "warmup must be a whole number of at least 0, found -1"),
        (["--size", "tiny", "--seed", "-1"], "seed must be a whole number of at least 0, found -1"),
        (["--size", "tiny", "--dtype", "float64"], "unknown dtype 'float64': did you mean 'float"),
        (["--size", "tiny", "--autocast", "bf17"], "unknown autocast 'bf17'; known"),
        (["--size", "tiny", "--float32-matmul", "tf32"], "unknown float32_matmul 'tf32'; known: highest, high"),
        (["--size", "tiny", "--formulation", "fuse"], "unknown formulation 'fuse': did you mean 'fused'?"),
        (["--size", "tiny", "--rope", "2024"], "unknown rope"),
        (["--size", "tiny", "--device", "gpu"], "unknown device 'gpu': did you mean 'cpu'? Known: cpu, cuda, auto"),
        ([], "give a --size (tiny, mini, small"),
        (["--d-model", "16", "--num-heads", "2"], "give a --size (tiny, mini, small"),
        ([*DIMENSIONS, "--attention", "flsh"], "unknown attention"),
        ([*DIMENSIONS, "--optimizer", "adam"], "unknown optimizer"),
        ([*DIMENSIONS, "--model", "nowhere_to_be_found:Model"], "cannot import 'nowhere_to_be_found' for "),
        ([*DIMENSIONS, "--model", "torch.nn:Modul"], "unknown attribute 'Modul' of 'torch.nn': did you mean 'Module'?"),
        ([*DIMENSIONS, "--model", "torch.nn"], "expected an object reference like 'my_package.my_module:MyModel'"),
        ([*DIMENSIONS, "--attention", "nowhere_to_be_found:attend"], "cannot import 'nowhere_to_be_found' for "),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_sentence(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert status_of(script, *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"error: {told}")
    # Where a case began before the mistake was found, its progress may stand above; no record may remain.
    assert [line for line in error[:-1] if not line.startswith("transformer_step")] == []
    assert records() == []


def test_missing_dimensions_are_named_as_the_options_that_give_them(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--d-model", "16", "--num-heads", "2") == 2
    error = capsys.readouterr().err
    assert "--d-ff, --num-layers missing" in error


def test_cuda_where_there_is_none_is_an_error_and_no_silent_change_to_the_cpu(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    this_machine.cache_clear()  # of a machine that has a GPU
    try:
        assert status_of(script, *DIMENSIONS, "--device", "cuda") == 2
    finally:
        this_machine.cache_clear()
    assert capsys.readouterr().err.startswith("error: device 'cuda' was asked for, but PyTorch finds no CUDA device")


def test_a_mistake_ends_the_process_with_2_and_without_a_traceback() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--size", "smal"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: unknown size 'smal': did you mean 'small'?")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["environment", "option"])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    file = tmp_path / "file"
    file.write_text("in the folder's place")
    monkeypatch.setenv("CS336_DATA", str(file))
    option = ["--data-dir", str(file)] if place == "option" else []
    assert status_of(script, *DIMENSIONS, *option) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {file}")
    assert len(error.splitlines()) == 1
    assert file.read_text() == "in the folder's place"


def test_a_word_where_a_number_belongs_ends_with_2_and_names_the_option(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--size", "tiny", "--context", "long") == 2
    assert "argument --context: invalid int value: 'long'" in capsys.readouterr().err


# What cannot be measured ---------------------------------------------------------------------------------------


def test_a_size_beyond_the_memory_is_refused_before_it_is_built(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cs336_systems.experiments.transformer_step.available_bytes", lambda _: 2**33)

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("cs336_systems.step.build_model", build)
    assert status_of(script, "--size", "10b", "--phase", "step", "--device", "cpu") == 1
    captured = capsys.readouterr()
    (record,) = records()
    assert record.status == "oom"
    # Weights, gradients and two moments of AdamW, 4 bytes each, of 12.8 thousand million parameters: 191 GiB.
    assert re.search(r"need at least 19\d GiB, and 8\.00 GiB are available", str(record.reason))
    assert str(record.reason) in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_of_several_phases_the_one_that_does_not_fit_takes_no_other_with_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(script, *DIMENSIONS, "--phase", "forward") == 0
    (forward,) = records()
    needed = forward.measurement.values["planned_allocated_bytes"]
    monkeypatch.setattr("cs336_systems.experiments.transformer_step.available_bytes", lambda _: needed)
    assert status_of(script, *DIMENSIONS, "--phase", "forward", "step") == 1
    assert {str(record.case["phase"]): record.status for record in records()} == {"forward": "ok", "step": "oom"}
    shown = capsys.readouterr().out
    assert [row["phase"] for row in table_of(shown)][-2:] == ["forward", "step"]
    assert "are available" in shown


def test_a_model_that_fails_in_its_step_is_recorded_as_failed_with_its_error(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = THEIRS.replace("return self.head", "raise RuntimeError('their defect')\n        return self.head")
    (tmp_path / "model_that_fails.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert status_of(script, *DIMENSIONS, "--model", "model_that_fails:Theirs") == 1
    (record,) = records()
    assert record.status == "failed"
    assert record.reason == "RuntimeError: their defect"
    captured = capsys.readouterr()
    assert "RuntimeError: their defect" in captured.out
    assert "Traceback" not in captured.out + captured.err


# Measuring -----------------------------------------------------------------------------------------------------


def test_a_model_of_given_dimensions_is_timed_in_every_phase_beside_its_floor(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = ["forward", "forward-backward", "step"]
    assert status_of(script, *DIMENSIONS, "--phase", *phases) == 0
    captured = capsys.readouterr()
    rows = table_of(captured.out)
    assert [row["phase"] for row in rows] == phases
    assert all(float(row["floor (ms)"].replace(",", "")) > 0 for row in rows)
    assert all(row["mean ± std (ms)"] for row in rows)
    found = records()
    assert {record.status for record in found} == {"ok"}
    assert all(len(record.measurement.samples["step_ms"]) == 2 for record in found)
    assert all(record.case["d_model"] == 16 and record.case["vocab_size"] == 50 for record in found)


def test_a_size_by_name_can_be_changed_in_single_dimensions(script: ModuleType) -> None:
    assert status_of(script, "--size", "tiny", "--num-layers", "1", "--phase", "forward", *SMALLEST) == 0
    (record,) = records()
    expected = {"d_model": 128, "d_ff": 512, "num_layers": 1, "num_heads": 2, "vocab_size": 50, "context_length": 8}
    assert {name: record.case[name] for name in expected} == expected


def test_every_option_reaches_the_case(script: ModuleType) -> None:
    options = {
        "--dtype": "bfloat16",
        "--autocast": "none",
        "--float32-matmul": "high",
        "--attention": "sdpa",
        "--formulation": "fused",
        "--optimizer": "fused",
        "--rope": "2026",
        "--rope-theta": "5000",
        "--seed": "3",
    }
    assert status_of(script, *DIMENSIONS, *(word for option in options.items() for word in option)) == 0
    (record,) = records()
    expected = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
    assert {name: record.case[name] for name in expected} == expected | {"seed": 3, "rope_theta": 5000.0}


def test_a_step_asked_for_again_is_timed_again(script: ModuleType) -> None:
    folder = Path(os.environ["CS336_DATA"])
    for count in (1, 2):
        assert status_of(script, *DIMENSIONS) == 0
        assert len(list(folder.rglob("transformer_step/*.jsonl"))) == count


def test_a_fresh_record_is_shown_instead_where_that_is_asked_for(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *DIMENSIONS) == 0
    first = table_of(capsys.readouterr().out)
    assert status_of(script, *DIMENSIONS, "--reuse") == 0
    assert table_of(capsys.readouterr().out) == first
    assert len(list(Path(os.environ["CS336_DATA"]).rglob("transformer_step/*.jsonl"))) == 1


def test_the_records_are_where_the_last_line_says(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status_of(script, *DIMENSIONS, "--data-dir", str(tmp_path / "mine")) == 0
    said = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("records: "))
    assert said.is_relative_to(tmp_path / "mine")
    assert len(list(said.glob("*.jsonl"))) == 1


def run_apart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, started in `folder`, with ceilings that need no measuring."""
    call = (
        f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}; sys.path[0] = {str(SCRIPT.parent)!r}\n"
        "from cs336_systems.experiments import machine_peaks\n"
        "from cs336_systems.analysis.hardware import GPUS\n"
        "machine_peaks.ensure_peaks = lambda *_: GPUS['h200']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", call, *DIMENSIONS, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", "blocks"])
def test_a_compiled_step_is_timed_and_its_record_says_how_it_was_compiled(tmp_path: Path, mode: str) -> None:
    """By a process of its own: the types that tests check at every call are more than the compiler can trace."""
    ended = run_apart(tmp_path, "--compile", mode, "--phase", "forward-backward")
    assert ended.returncode == 0, ended.stderr
    assert f"compile {mode}" in ended.stdout
    (record,) = records()
    assert (record.status, record.case["compile"]) == ("ok", mode)


def test_a_step_that_cannot_be_compiled_as_asked_fails_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "somebody.py").write_text(THEIRS)
    ended = run_apart(tmp_path, "--model", "somebody:Theirs", "--compile", "blocks")
    assert ended.returncode == 2
    assert "Theirs keeps no blocks in a ModuleList called `layers`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_somebody_elses_model_beside_the_caller_is_measured(tmp_path: Path) -> None:
    """By a process of its own: what is importable depends on how Python was started and where."""
    (tmp_path / "somebody.py").write_text(THEIRS)
    data = Path(os.environ["CS336_DATA"])
    ended = run_apart(tmp_path, "--model", "somebody:Theirs")
    assert ended.returncode == 0, ended.stderr
    (record,) = (
        Store(local=data, published=tmp_path).local_records(this_machine("cpu").name, "transformer_step").values()
    )
    assert record.case["model"] == "somebody:Theirs"
    # A record of somebody's model is stale when their file changes.
    assert "somebody:Theirs" in record.fingerprint["source"]


# With named ranges ---------------------------------------------------------------------------------------------


class Listener:
    """Stands for NVTX."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def push_range(self, name: str) -> None:
        self.heard.append(name)

    def pop_range(self) -> None:
        pass


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    made = Listener()
    monkeypatch.setattr(ranges, "_nvtx", lambda: made)
    return made


def test_with_ranges_every_step_names_its_parts_and_without_none_does(
    script: ModuleType, listener: Listener, tmp_path: Path
) -> None:
    assert status_of(script, *DIMENSIONS, "--data-dir", tmp_path) == 0
    assert listener.heard == []
    assert status_of(script, *DIMENSIONS, "--warmup", "1", "--ranges", "--data-dir", tmp_path) == 0
    counts = {name: listener.heard.count(name) for name in ("warm-up", "measured", "step", "forward", "optimizer")}
    assert counts == {"warm-up": 1, "measured": 1, "step": 3, "forward": 3, "optimizer": 3}


@pytest.mark.usefixtures("listener")
def test_what_was_run_with_ranges_never_stands_for_a_timing(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status_of(script, *DIMENSIONS, "--ranges", "--data-dir", tmp_path) == 0
    told = capsys.readouterr().out
    assert "custom, context 8, step: 2 steps with named ranges, median" in told
    assert table_of(told) == []
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.parent == Path(told.splitlines()[-1].removeprefix("records: "))
    assert records() == []
    # Nor where the same folder is asked for a record of the same case.
    assert status_of(script, *DIMENSIONS, "--reuse", "--data-dir", tmp_path) == 0
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2


@pytest.mark.usefixtures("listener")
def test_with_ranges_no_ceiling_is_measured(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(machine_peaks, "ensure_peaks")
    assert status_of(script, *DIMENSIONS, "--ranges", "--data-dir", tmp_path) == 0


@pytest.mark.usefixtures("listener")
def test_with_ranges_too_a_step_that_does_not_fit_says_so_and_fails(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cs336_systems.experiments.transformer_step.available_bytes", lambda _: 1)
    assert status_of(script, *DIMENSIONS, "--ranges", "--data-dir", tmp_path) == 1
    assert "custom, context 8, step: oom: weights, gradients and optimizer state need" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranges"], "--ranges takes time, so that what it records is no timing: name a folder"),
        (["--ranges", "--reuse", "--data-dir", "x"], "--reuse shows a record instead of running the step"),
    ],
)
def test_ranges_need_a_folder_of_their_own_and_a_step_that_runs(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert status_of(script, *DIMENSIONS, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert records() == []


def test_every_option_says_what_it_is_for(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []
    parse_args = argparse.ArgumentParser.parse_args

    def remember(parser: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> Any:
        parsers.append(parser)
        return parse_args(parser, *arguments, **keywords)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    script.parse(["--size", "tiny"])
    (parser,) = parsers
    assert [action.option_strings for action in parser._actions if not action.help] == []
    assert len(parser._actions) > 20


def test_help_describes_the_script_and_every_option(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "--help") == 0
    text = capsys.readouterr().out
    for word in ("benchmarking_script", "--size", "--model", "module:Class", "forward-backward", "gpt2-xl", "default"):
        assert word in text

"""scripts/profile_step.py makes one profile per case, keeps account of them, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_nsys import VERSION, calls_of, install
from source_files import load_script, status_of
from step_records import record_of

from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Record
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.profiling import nsys_capture
from cs336_systems.profiling.catalogue import Profile, profiles
from cs336_systems.step_options import ranged_store

pytestmark = [
    pytest.mark.problem("nsys_profile"),
    pytest.mark.skipif(os.name == "nt", reason="the nsys of these tests is a script that begins with #!"),
]

TOY = ["--d-model", "16", "--d-ff", "32", "--num-layers", "1", "--num-heads", "2", "--vocab-size", "50"]
SMALLEST = [*TOY, "--context", "8", "--device", "cpu"]

# Stands for scripts/benchmark_step.py, whose imports take seconds: it leaves the record that the test prepared for the
# phase it is asked for, says what the test wants said, and ends so.
STUB = """
import json, pathlib, sys
told = json.loads(pathlib.Path({told!r}).read_text())
(phase,) = (word.removeprefix("--phase=") for word in sys.argv if word.startswith("--phase="))
folder = pathlib.Path(sys.argv[sys.argv.index("--data-dir") + 1]) / told["folder"]
folder.mkdir(parents=True)
record = told["records"].get(phase, told["records"].get("any"))
if record is not None:
    (folder / "run.jsonl").write_text(json.dumps(record) + "\\n")
print(told["says"], file=sys.stderr)
sys.exit(told["status"] if record is None or record["status"] != "ok" else 0)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("profile_step")


@pytest.fixture(autouse=True)
def _only_the_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CS336_NSYS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(nsys_capture, "INSTALLED", ())


@pytest.fixture
def nsys(tmp_path: Path) -> Path:
    return install(tmp_path / "bin", "without kernels")


@dataclasses.dataclass
class Steps:
    """What the stub does."""

    path: Path

    def leave(self, *, status: int = 0, says: str = "", **records: Record | None) -> None:
        """By phase, or for `any`, the record that is left; the status where it is none or no good one."""
        folder = ranged_store(Path("x")).local.relative_to(Path("x").absolute())
        lines = {name: None if each is None else line_of(each) for name, each in records.items()}
        told = {
            "folder": str(folder / this_machine("cpu").name / "transformer_step"),
            "records": lines,
            "says": says,
            "status": status,
        }
        self.path.write_text(json.dumps(told))


def line_of(record: Record) -> dict[str, Any]:
    return {"schema": 1, "kind": "case", **dataclasses.asdict(record)}


def good_record(**changes: Any) -> Record:
    case = Case(16, 32, 1, 2, 8, "cpu")
    return record_of(case, fingerprint=fingerprint(transformer_step, this_machine("cpu")), **changes)


@pytest.fixture
def steps(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    told = tmp_path / "told.json"
    stub = tmp_path / "benchmark_step.py"
    stub.write_text(STUB.format(told=str(told)))
    monkeypatch.setattr(script, "PROGRAM", stub)
    made = Steps(told)
    made.leave(any=good_record())
    return made


def kept() -> list[Profile]:
    return profiles(Path(os.environ["CS336_DATA"]) / this_machine("cpu").name / "profiles")


def profiled(nsys: Path) -> int:
    """How often nsys was told to profile."""
    return sum(call["switch"] == "profile" for call in calls_of(nsys))


def table_of(text: str) -> list[dict[str, str]]:
    """The rows of the one table in what was printed."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# Profiles ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("steps")
def test_each_context_and_phase_has_a_profile_that_says_which_case_it_is_of(script: ModuleType, nsys: Path) -> None:
    options = [*TOY, "--context", "8", "16", "--phase", "forward", "step", "--autocast", "bfloat16", "--batch", "2"]
    assert status_of(script, *options, "--device", "cpu", "--warmup", "1") == 0
    found = kept()
    asked = {(8, "forward"), (8, "step"), (16, "forward"), (16, "step")}
    assert {(each.case["context_length"], each.case["phase"]) for each in found} == asked
    for each in found:
        case = Case(**each.case)
        assert (case.batch_size, case.autocast, case.warmup, case.d_model) == (2, "bfloat16", 1, 16)
        assert each.name.startswith(f"custom-{case.context_length}-{case.phase}-bfloat16-")
        assert each.title == str(case)
        assert each.samples == good_record().measurement.samples
        assert (each.nsys, each.torch, each.ranges) == (VERSION, torch.__version__, ["forward", "measured"])
        assert each.report.stat().st_size == each.file_bytes[".nsys-rep"]
    assert profiled(nsys) == 4


@pytest.mark.usefixtures("steps")
def test_the_step_is_told_its_case_in_full_and_keeps_its_records_in_a_folder_that_is_gone(
    script: ModuleType, nsys: Path, tmp_path: Path
) -> None:
    assert status_of(script, *SMALLEST, "--compile=model") == 0
    call = calls_of(nsys)[0]
    assert call["command"][:2] == [sys.executable, str(tmp_path / "benchmark_step.py")]
    words = call["command"][2:]
    *options, name, folder = words
    assert name == "--data-dir"
    assert not Path(folder).exists()
    benchmark = load_script("benchmark_step").parse(words)
    assert benchmark.ranges
    assert benchmark.compile == "model"
    (made,) = kept()
    assert made.command[made.command.index("--ranges") - len(options) + 1 :] == [*options, "--data-dir", "FOLDER"]
    assert not any(str(tmp_path) in word for word in made.command if not word.endswith("benchmark_step.py"))
    assert "local" not in {path.name for path in tmp_path.rglob("transformer_step")}


@pytest.mark.usefixtures("steps", "nsys")
def test_every_profile_is_shown_with_what_to_type_to_read_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path / "bin", "well")
    monkeypatch.chdir(tmp_path)
    assert status_of(script, *SMALLEST, "--output-dir", "mine") == 0
    told = capsys.readouterr().out
    (row,) = table_of(told)
    assert row["case"] == "custom, context 8, step"
    python, reader, export, *options = shlex.split(row["to read it"].strip("`"))
    assert (python, reader, options) == ("python", "scripts/kernel_summary.py", ["--range", "forward"])
    assert status_of(load_script("kernel_summary"), export, *options) == 0
    assert "gemm" in capsys.readouterr().out
    for part in (".nsys-rep", "NVTX", "Filter and Zoom in", "Stats System View", "CUDA GPU Kernel Summary"):
        assert part in told


@pytest.mark.usefixtures("steps", "nsys")
def test_a_cpus_profile_is_said_to_have_no_kernels_and_no_command_is_given_that_would_fail(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *SMALLEST) == 0
    told = capsys.readouterr().out
    assert "profiles of a CPU: they have the ranges, and no kernels" in told
    assert "kernel_summary" not in told


@pytest.mark.usefixtures("steps")
def test_what_is_recorded_beside_kernels_is_passed_on_and_makes_another_profile(script: ModuleType, nsys: Path) -> None:
    assert status_of(script, *SMALLEST) == 0
    assert status_of(script, *SMALLEST, "--cuda-memory-usage") == 0
    assert status_of(script, *SMALLEST, "--python-backtrace") == 0
    _, memory, lines = (call["options"] for call in calls_of(nsys) if call["switch"] == "profile")
    assert "--cuda-memory-usage=true" in memory
    assert "--python-backtrace=cuda" in lines
    extras = [name for each in kept() for name, value in each.extras.items() if value]
    assert sorted(extras) == ["cuda_memory_usage", "python_backtrace"]
    assert len(kept()) == 3


def test_the_steps_own_script_is_profiled_with_its_ranges_on(
    script: ModuleType, nsys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but nsys is real."""
    assert status_of(script, *SMALLEST, "--warmup", "1", "--steps", "2") == 0
    (made,) = kept()
    assert {name: len(values) for name, values in made.samples.items()} == {"step_ms": 2, "warmup_ms": 1}
    assert made.fingerprint == fingerprint(transformer_step, this_machine("cpu"))
    told = capsys.readouterr()
    assert "another source" not in told.out
    # The bar moves while the program runs, and the program's own lines stay out of it.
    assert "profiles: custom, context 8, step" in told.err
    assert "transformer_step:" not in told.err
    assert status_of(script, *SMALLEST, "--warmup", "1", "--steps", "2") == 0
    assert profiled(nsys) == 1


# Going on ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("steps")
def test_a_whole_profile_is_not_made_again_nor_is_nsys_needed_for_it(
    script: ModuleType, nsys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *SMALLEST) == 0
    first = capsys.readouterr().out
    (before,) = kept()
    nsys.unlink()
    assert status_of(script, *SMALLEST) == 0
    assert table_of(capsys.readouterr().out) == table_of(first)
    assert kept() == [before]
    assert profiled(nsys) == 1


@pytest.mark.usefixtures("steps")
def test_only_what_is_missing_is_made_and_again_makes_it_anew(script: ModuleType, nsys: Path) -> None:
    assert status_of(script, *SMALLEST, "--phase", "step") == 0
    assert status_of(script, *SMALLEST, "--phase", "step", "forward") == 0
    assert profiled(nsys) == 2
    assert status_of(script, *SMALLEST, "--phase", "step", "forward", "--again") == 0
    assert profiled(nsys) == 4
    assert len(kept()) == 2


@pytest.mark.filterwarnings("always::cs336_systems.errors.WorkbookWarning")
@pytest.mark.usefixtures("steps")
def test_a_profile_that_lost_a_file_is_named_and_made_again(
    script: ModuleType, nsys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *SMALLEST) == 0
    (before,) = kept()
    before.export.unlink()
    assert status_of(script, *SMALLEST) == 0
    assert f"{before.export.name} is missing; it was skipped" in capsys.readouterr().err
    assert profiled(nsys) == 2
    assert [each.name for each in kept()] == [before.name]


@pytest.mark.usefixtures("nsys")
def test_a_profile_of_another_source_is_shown_and_said_to_be_one(
    script: ModuleType, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    now = good_record()
    steps.leave(any=dataclasses.replace(now, fingerprint=now.fingerprint | {"torch": "1.0"}))
    assert status_of(script, *SMALLEST) == 0
    assert status_of(script, *SMALLEST) == 0
    assert f"another source or PyTorch than today's: {kept()[0].name}" in capsys.readouterr().out


@pytest.mark.usefixtures("steps", "nsys")
def test_ctrl_c_says_what_is_kept(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return nsys_capture.capture(*arguments, **keywords)

    monkeypatch.setattr(script, "capture", interrupted)
    assert status_of(script, *SMALLEST, "--phase", "forward", "step") == 130
    assert "interrupted: 1 of 2 profiles were made and are kept in " in capsys.readouterr().err
    assert [each.case["phase"] for each in kept()] == ["forward"]
    assert status_of(script, *SMALLEST, "--phase", "forward", "step") == 0
    assert len(calls) == 3


# Failures ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nsys")
def test_a_case_that_does_not_fit_is_told_and_the_others_are_profiled(
    script: ModuleType, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.leave(any=good_record(), step=good_record(status="oom", reason="weights need 1 TiB"), status=1)
    assert status_of(script, *SMALLEST, "--phase", "step", "forward") == 1
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == "failed: custom, context 8, step: oom: weights need 1 TiB"
    assert [row["case"] for row in table_of(told)] == ["custom, context 8, forward"]
    assert [each.case["phase"] for each in kept()] == ["forward"]


@pytest.mark.usefixtures("nsys")
def test_a_mistake_that_only_the_step_finds_is_told_in_its_words(
    script: ModuleType, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.leave(any=None, status=2, says="error: cannot import 'nowhere' for 'nowhere:Model'")
    assert status_of(script, *SMALLEST, "--model", "nowhere:Model") == 2
    assert "ended with 2: cannot import 'nowhere' for 'nowhere:Model'" in capsys.readouterr().err
    assert kept() == []


@pytest.mark.usefixtures("nsys")
def test_a_step_that_records_nothing_has_no_profile(
    script: ModuleType, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.leave(any=None)
    assert status_of(script, *SMALLEST) == 2
    assert "ended well and recorded nothing of custom, context 8, step" in capsys.readouterr().err
    assert kept() == []


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("mode", ["never opened", "export fails", "broken"])
def test_a_profile_that_is_not_whole_ends_the_run_with_a_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    install(tmp_path / "bin", mode)
    assert status_of(script, *SMALLEST, "--phase", "forward", "step") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert kept() == []


@pytest.mark.usefixtures("steps")
def test_without_nsys_nothing_runs_and_the_way_around_is_told(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, *SMALLEST) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("error: Nsight Systems is needed")
    assert "notebook 02" in told.err


@pytest.mark.usefixtures("steps")
def test_a_cpu_is_profiled_only_where_it_was_asked_for_by_name(
    script: ModuleType, nsys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--device", "auto"]):
        assert status_of(script, *TOY, "--context", "8", *options) == 2
        assert "would have the ranges but no kernels: give --device cpu" in capsys.readouterr().err
    assert profiled(nsys) == 0
    assert status_of(script, *SMALLEST) == 0


@pytest.mark.usefixtures("steps", "nsys")
def test_a_folder_that_cannot_be_written_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    assert status_of(script, *SMALLEST, "--output-dir", tmp_path / "file") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'file'}")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "smal"], "unknown size 'smal': did you mean 'small'?"),
        ([*SMALLEST, "--phase", "step", "setp"], "unknown phase 'setp': did you mean 'step'?"),
        ([*TOY, "--context", "8", "0"], "context_length must be a positive whole number, found 0"),
        ([], "give a --size (tiny, mini, small"),
    ],
)
def test_a_mistake_in_the_last_case_is_told_before_the_first_is_run(
    script: ModuleType, nsys: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert status_of(script, *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert calls_of(nsys) == []


# Listing -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("always::cs336_systems.errors.WorkbookWarning")
@pytest.mark.usefixtures("steps", "nsys")
def test_profiles_of_every_machine_are_listed_and_what_is_damaged_is_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status_of(script, *SMALLEST, "--phase", "forward", "step", "--batch", "3") == 0
    install(tmp_path / "bin", "well")
    elsewhere = Path(os.environ["CS336_DATA"]) / "h200-x1" / "profiles"
    assert status_of(script, *SMALLEST, "--output-dir", elsewhere) == 0
    (elsewhere / "damaged.json").write_text("{")
    capsys.readouterr()
    assert status_of(script, "--list") == 0
    told = capsys.readouterr()
    assert told.err.endswith("damaged.json is no description of a profile; it was skipped\n")
    rows = table_of(told.out)
    assert [row["case"].removeprefix("custom, context 8, ") for row in rows] == ["forward", "step", "step"]
    assert ["batch_size 3" in row["beside"] for row in rows] == [True, True, False]
    assert ["kernel_summary" in row["to read it"] for row in rows] == [False, False, True]
    assert all(row["nsys"] == VERSION for row in rows)


@pytest.mark.usefixtures("steps")
def test_a_list_of_none_says_what_makes_one(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status_of(script, "--list") == 0
    assert "No profiles in " in capsys.readouterr().out
    assert status_of(script, "--list", "--output-dir", tmp_path / "nowhere") == 0
    assert "scripts/profile_step.py --size" in capsys.readouterr().out


def test_its_options_of_a_step_are_those_of_the_benchmark(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    helps = []
    for each in (script, load_script("benchmark_step")):
        assert status_of(each, "--help") == 0
        helps.append({line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")})
    profiling, timing = helps
    assert timing - profiling == {"--reuse", "--data-dir", "--ranges"}
    assert profiling - timing == {"--cuda-memory-usage", "--python-backtrace", "--output-dir", "--again", "--list"}

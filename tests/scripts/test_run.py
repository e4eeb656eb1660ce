"""scripts/run.py executes notebooks, renders the writeup, leaves the checkout as it was, tells mistakes in one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from source_files import load_script, status_of
from step_records import record_of
from writeup_records import laptop_case, record_here

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.repository import cache_folder, repository_root
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import Notebook, load_index
from cs336_systems.workbook.profiles import profile_names
from cs336_systems.workbook.run import NotebookRun

SCRIPT = repository_root() / "scripts" / "run.py"
TIMING = "01_end_to_end_timing"
# No bound on speed: a hang is a failure, and this is how long nothing may take.
LIMIT_S = 480
pytestmark = pytest.mark.timeout(LIMIT_S + 20)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("run")


def make_checkout(root: Path, cells: Mapping[str, list[str]]) -> Path:
    """A checkout of notebooks with these code cells, without experiments, and a profile that names none of them."""
    (root / "notebooks").mkdir(parents=True)
    (root / "configs" / "profiles" / "empty").mkdir(parents=True)
    (root / "configs" / "profiles" / "empty" / "profile.yaml").write_text("description: names no notebook\n")
    index = ["[notebooks]", *(f'{name} = {{ title = "Made" }}' for name in cells), "[problems]"]
    (root / "problems.toml").write_text("\n".join(index) + "\n")
    for name, sources in cells.items():
        content = {
            "cells": [
                {
                    "cell_type": "code",
                    "execution_count": None,
                    "id": f"cell-{number}",
                    "metadata": {"tags": ["parameters"]} if number == 0 else {},
                    "outputs": [],
                    "source": source,
                }
                for number, source in enumerate(["word = 'laptop'", *sources])
            ],
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(content))
    return root


# Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["99"], f"unknown notebook '99'; known: {TIMING}"),
        (["01_end_to_end_timin"], f"unknown notebook '01_end_to_end_timin': did you mean '{TIMING}'?"),
        (["--profile", "smok"], "unknown profile 'smok': did you mean 'smoke'? Known: laptop, a100-40gb, h100"),
        (
            ["01", "-p", "stps", "3"],
            f"unknown parameter 'stps' of {TIMING} given with -p: did you mean 'steps'? Known:",
        ),
        (
            ["01", "06", "-p", "stps", "3"],
            "unknown parameter 'stps' of 2 notebooks given with -p: did you mean 'steps'?",
        ),
        (["-p", "steps", "[1"], "the value of -p steps is not YAML"),
        (["--dry-run", "-p", "contexts", "{smal: [8]}"], "unknown size 'smal': did you mean 'small'? Known: tiny,"),
        (["--dry-run", "-p", "steps", "0"], "steps must be a whole number of at least 1, found 0"),
        (["--dry-run", "-p", "contexts", "3"], "contexts must map size names to lists of context lengths, found 3"),
    ],
)
def test_a_mistake_is_one_line_that_lists_what_is_known(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert status_of(script, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_a_mistake_ends_the_process_with_2_and_without_a_traceback() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--profile", "h20"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: unknown profile 'h20'")
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    assert status_of(script, "01", "--data-dir", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.startswith("error: cannot write executed notebooks to ")


def test_a_profile_that_names_no_notebook_is_an_error_and_not_an_empty_success(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CS336_ROOT", str(make_checkout(tmp_path / "checkout", {"01_made": []})))
    assert status_of(script, "--profile", "empty") == 2
    assert "empty" in capsys.readouterr().err


# Looking -------------------------------------------------------------------------------------------------------


def test_the_list_has_every_notebook_and_profile_and_says_which_are_planned(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    index = load_index()
    for notebook in index.notebooks.values():
        (line,) = (line for line in lines if line.split()[:1] == [notebook.name])
        assert line.endswith("(planned)") == (not notebook.path.is_file())
    for profile in profile_names():
        assert any(line.split()[:1] == [profile] for line in lines), profile


def dry_run(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The rows of the plan by experiment, and all that was printed."""
    assert status_of(script, "--dry-run", *arguments) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}, text


def test_a_dry_run_prints_the_cases_and_the_minutes_and_measures_nothing(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = dry_run(script, capsys, "--profile", "h200")
    experiments = {"transformer_step", "warmup", "step_profile", "memory_profile"}
    experiments |= {"mixed_precision_accumulation", "autocast_dtypes", "layernorm_precision"}
    experiments |= {"longest_context", "checkpointing", "pytorch_attention", "model_compile"}
    of_ranks = {"collectives", "data_parallel"}
    assert set(plan) == experiments | {"flash_benchmarking"} | of_ranks
    # Five sizes at four contexts and one at two, three phases, with and without autocast.
    assert plan["transformer_step"]["cases"] == str((5 * 4 + 2) * 3 * 2)
    assert plan["warmup"]["cases"] == str(3 * 4)
    # Both rules in both half precisions; of a GPU's tensors a CPU's are skipped, and counted all the same.
    assert plan["autocast_dtypes"]["cases"] == str(2 * 2)
    # Two sizes at three contexts and the published one, forward and step.
    assert plan["step_profile"]["cases"] == str((2 * 3 + 1) * 2)
    # Two sizes at three contexts, forward and step, with and without autocast.
    assert plan["memory_profile"]["cases"] == str(2 * 3 * 2 * 2)
    # One model under eight policies, and from 2 to 64 blocks under four.
    assert plan["checkpointing"]["cases"] == str(8 + 6 * 4)
    # Five lengths in four dimensions, with and without TF32.
    assert plan["pytorch_attention"]["cases"] == str(5 * 4 * 2)
    # Five sizes at three contexts, with and without TF32; a case has all phases and forms.
    assert plan["model_compile"]["cases"] == str(5 * 3 * 2)
    # The handout's ten lengths in four dimensions and two precisions; training's three in two, causal and not.
    assert plan["flash_benchmarking"]["cases"] == str(10 * 4 * 2 + 3 * 2 * 2)
    # Without two GPUs there is nothing to be measured on several ranks.
    assert all(float(plan[name]["minutes"].replace(",", "")) > 0 for name in plan.keys() - of_ranks)
    assert not Path(os.environ["CS336_DATA"]).exists()


def test_a_dry_run_counts_with_the_parameters_given_by_hand(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = dry_run(script, capsys, "01", "-p", "contexts", "{tiny: [8, 16]}", "-p", "warmup_counts", "[0]")
    assert [row["cases"] for row in plan.values()] == ["6", "1"]


def test_a_parameter_given_by_hand_is_of_the_notebooks_that_have_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = dry_run(script, capsys, "01", "06", "07", "-p", "head_dims", "[16]", "-p", "seq_lens", "[32]")
    plain, _ = dry_run(script, capsys, "01")
    assert {name: row["cases"] for name, row in plan.items()} == {
        **{name: row["cases"] for name, row in plain.items()},
        "pytorch_attention": "1",
        "model_compile": "2",
        "flash_benchmarking": "1",
    }


def test_a_dry_run_that_cannot_predict_minutes_says_what_measures_the_ceilings(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = dry_run(script, capsys, "01", "-p", "device", "cpu")
    assert "machine_peaks" in text


def test_a_dry_run_of_the_smoke_profile_leaves_no_folder(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan, _ = dry_run(script, capsys, "--profile", "smoke")
    assert {name: row["cases"] for name, row in plan.items()} == {
        "transformer_step": "4",  # of notebook 03, which asks last: forward and step, with and without autocast
        "warmup": "2",
        "step_profile": "2",
        "mixed_precision_accumulation": "6",
        "autocast_dtypes": "4",
        "layernorm_precision": "6",
        "memory_profile": "4",
        "longest_context": "1",
        "checkpointing": "8",
        "pytorch_attention": "2",
        "model_compile": "1",
        "flash_benchmarking": "2",
        "collectives": "2",
        "data_parallel": "1",
    }
    assert list(tmp_path.iterdir()) == []


# Running, with notebooks that are not executed -------------------------------------------------------------------


@pytest.fixture
def executed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The names and parameters of what would have been executed; of two notebooks the first fails."""
    monkeypatch.setenv("CS336_ROOT", str(make_checkout(tmp_path / "checkout", {"01_a": [], "02_b": []})))
    found: list[tuple[str, dict[str, Any]]] = []

    def pretend(notebook: Notebook, parameters: dict[str, Any], folder: Path) -> NotebookRun:
        found.append((notebook.name, parameters))
        error = "ValueError: because" if notebook.name == "01_a" else None
        output = folder / f"{notebook.name}.ipynb"
        return NotebookRun(notebook, error, 100.0, output, Counter(ok=3), [f"table of {notebook.name}"])

    monkeypatch.setattr(script, "execute", pretend)
    return found


def test_a_notebook_that_fails_does_not_keep_the_next_from_running(
    script: ModuleType, capsys: pytest.CaptureFixture[str], executed: list[tuple[str, dict[str, Any]]]
) -> None:
    assert status_of(script, "--no-writeup") == 1
    assert [name for name, _ in executed] == ["01_a", "02_b"]
    text = capsys.readouterr().out
    assert "failed: ValueError: because" in text
    assert "table of 01_a" in text
    assert "table of 02_b" in text


def test_with_fail_fast_the_first_failure_is_the_last_notebook(
    script: ModuleType, executed: list[tuple[str, dict[str, Any]]]
) -> None:
    assert status_of(script, "--fail-fast", "--no-writeup") == 1
    assert [name for name, _ in executed] == ["01_a"]


def test_only_the_notebooks_named_run_with_the_parameters_given(
    script: ModuleType, executed: list[tuple[str, dict[str, Any]]]
) -> None:
    assert status_of(script, "2", "--no-writeup", "-p", "word", "[given, by hand]") == 0
    assert executed == [("02_b", {"word": ["given", "by hand"]})]


def test_a_misspelt_notebook_among_several_ends_the_run_before_any_is_executed(
    script: ModuleType, executed: list[tuple[str, dict[str, Any]]]
) -> None:
    assert status_of(script, "1", "2", "3", "--no-writeup") == 2
    assert executed == []


def test_remeasuring_reaches_into_the_kernels_by_their_environment(
    script: ModuleType, executed: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CS336_REMEASURE", "0")
    assert status_of(script, "2", "--remeasure", "--no-writeup") == 0
    assert executed
    assert os.environ["CS336_REMEASURE"] == "1"


# The writeup at the end ------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been rendered, in the place of rendering it."""
    found: list[dict[str, Any]] = []

    def pretend(archive: Archive, **options: Any) -> list[Path]:
        found.append({"archive": archive, **options})
        return [options["folder"] / "writeup.md"]

    monkeypatch.setattr(script, "build", pretend)
    return found


def test_the_writeup_is_rendered_from_the_notebooks_that_ended_well(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    executed: list[tuple[str, dict[str, Any]]],
    rendered: list[dict[str, Any]],
) -> None:
    assert status_of(script) == 1  # the first notebook failed
    assert len(executed) == 2
    (options,) = rendered
    assert set(options["executed"]) == {"02_b"}
    assert f"writeup: {Path('writeup', 'build', 'writeup.md')}" in capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("executed")
def test_a_run_is_not_rendered_where_nobody_wants_it(script: ModuleType, rendered: list[dict[str, Any]]) -> None:
    assert status_of(script, "2", "--no-writeup") == 0
    assert rendered == []


@pytest.mark.usefixtures("executed")
def test_a_writeup_that_cannot_be_rendered_ends_with_1_and_says_that_the_records_are_safe(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> list[Path]:
        raise UserError("writeup.md, line 3: 'nothing' is undefined")

    monkeypatch.setattr(script, "build", refuse)
    assert status_of(script, "2") == 1
    lines = capsys.readouterr().out.splitlines()
    told = "the writeup was not rendered: writeup.md, line 3: 'nothing' is undefined. Every record is saved."
    assert lines[-1] == told
    assert "table of 02_b" in lines


@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("is_kept", [True, False])
def test_ctrl_c_while_rendering_ends_with_130_and_says_whether_the_records_are_saved(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    is_kept: bool,
) -> None:
    profile = tmp_path / "checkout" / "configs" / "profiles" / "smoke"
    profile.mkdir()
    for name, content in (("profile", "description: small"), ("02_b", "word: small")):
        (profile / f"{name}.yaml").write_text(f"{content}\n")

    def interrupted(*_: Any, **__: Any) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "build", interrupted)
    options: list[str | Path] = ["--data-dir", tmp_path / "kept"] if is_kept else []
    assert status_of(script, "2", "--profile", "smoke", *options) == 130
    shown = capsys.readouterr()
    safe = " Every record is saved." if is_kept else ""
    assert shown.err == f"\ninterrupted: the writeup was not rendered.{safe}\n"
    assert "Cases by notebook" in shown.out
    assert ("That folder was temporary" in shown.out) != is_kept


@pytest.mark.usefixtures("executed")
def test_where_the_records_are_is_said_before_the_writeup_is_rendered(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Store(local=tmp_path / "kept", published=tmp_path)
    machine = record_here(store, [record_of(laptop_case())])
    before: list[str] = []

    def look(*_: Any, **__: Any) -> list[Path]:
        before.append(capsys.readouterr().out)
        return []

    monkeypatch.setattr(script, "build", look)
    assert status_of(script, "2", "--data-dir", store.local) == 0
    assert f"records of {machine}: {store.local / machine} (transformer_step)\n" in before[0]


def test_the_writeup_asks_this_checkout_for_the_grids_of_the_run_and_names_its_command(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, rendered: list[dict[str, Any]], tmp_path: Path
) -> None:
    def pretend(notebook: Notebook, _: dict[str, Any], folder: Path) -> NotebookRun:
        return NotebookRun(notebook, None, 100.0, folder / f"{notebook.name}.ipynb", Counter(ok=3), [])

    monkeypatch.setattr(script, "execute", pretend)
    store = Store(local=tmp_path / "kept", published=tmp_path)
    record_here(store, [record_of(laptop_case("mini", 32))])
    given = ["1", "-p", "contexts", "{mini: [32, 64]}", "-p", "device", "cpu", "--data-dir", str(store.local)]
    monkeypatch.setattr(sys, "argv", ["scripts/run.py", *given])
    assert status_of(script, *given) == 0
    (options,) = rendered
    own = options["archive"].machines("transformer_step")[0]
    assert own.origin == "this checkout"
    assert set(own.summary["context_length"]) == {32, 64}
    assert own.what_to_run == f"run `{shlex.join(['python', 'scripts/run.py', *given])}`"


def test_tools_that_are_missing_are_told_before_any_notebook_is_executed(
    script: ModuleType, executed: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UserError("the writeup needs its tools")

    monkeypatch.setattr(script, "require_tools", refuse)
    assert status_of(script, "2") == 2
    assert executed == []
    assert status_of(script, "2", "--no-writeup") == 0


# Running for real ----------------------------------------------------------------------------------------------


def copy_of_checkout(target: Path) -> Path:
    """What a run reads, under version control of its own: others may be working on the checkout itself."""
    root = repository_root()
    target.mkdir()
    for name in ("problems.toml", ".gitignore"):
        shutil.copy(root / name, target / name)
    # The writeup links to code and tests, and what it links to must be there.
    for name in ("notebooks", "configs", "data/reference", "writeup/templates", "cs336_systems", "scripts", "tests"):
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    # The source is the same, so what was computed from it is too; what was compiled is large and not asked for.
    compiled = shutil.ignore_patterns("inductor", "triton")
    if cache_folder().is_dir():
        shutil.copytree(cache_folder(), target / ".cache", ignore=compiled)
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "-c", "user.name=Test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", "All")
    return target


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, to see what changed")
def test_the_smoke_run_prints_its_tables_renders_the_writeup_and_leaves_no_changes_and_no_temporary_folders(
    tmp_path: Path,
) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"CS336_ROOT": str(checkout), "TMPDIR": str(temporary)}
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "01", "--profile", "smoke"],  # CI runs them all
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    captions = ("**Time per step", "**Warm-ups", "**Cases by notebook**")
    assert [caption for caption in captions if caption not in ended.stdout] == []
    # Three phases and two warm-ups; the ceilings come on top on a CPU.
    (row,) = (line for line in ended.stdout.splitlines() if line.startswith(f"| {TIMING} "))
    ok, reused, oom, _, failed = (int(cell) for cell in row.split("|")[2:7])
    assert (ok >= 5, reused, oom, failed) == (True, 0, 0, 0)
    (printed,) = (line for line in ended.stdout.splitlines() if line.startswith("writeup: "))
    documents = [f"writeup/build/smoke/writeup.{kind}" for kind in ("md", "html", "pdf")]
    assert sorted(printed.removeprefix("writeup: ").split(", ")) == sorted(documents)
    assert [path for path in documents if not (checkout / path).stat().st_size] == []
    assert "(this checkout)" in (checkout / documents[0]).read_text(encoding="utf-8")
    # What it rendered is ignored, and is all that it left.
    assert git(checkout, "status", "--porcelain", "--ignored").splitlines() == ["!! .cache/", "!! writeup/build/"]
    assert [path.name for path in temporary.glob("cs336-*")] == []
    # The folder the caller's environment names is for runs that are kept.
    assert not Path(os.environ["CS336_DATA"]).exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_ctrl_c_ends_a_run_with_130_one_sentence_and_no_kernel_left_behind(tmp_path: Path) -> None:
    started = tmp_path / "started"
    checkout = make_checkout(
        tmp_path / "checkout", {"01_sleep": [f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(3600)"]}
    )
    # In a session of its own, so that the signal reaches the runner alone and it must see to its kernel.
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "01", "--no-writeup"],
        env=os.environ | {"CS336_ROOT": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as runner:
        kernels: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + LIMIT_S
            while not started.exists():
                assert runner.poll() is None, "the run ended before its notebook began"
                assert time.monotonic() < deadline, "the notebook never began"
                time.sleep(0.05)
            kernels = psutil.Process(runner.pid).children(recursive=True)
            assert kernels, "there was no kernel to leave behind"
            runner.send_signal(signal.SIGINT)
            _, errors = runner.communicate(timeout=LIMIT_S)
            assert runner.returncode == 130
            assert errors.splitlines()[-1] == "interrupted: 01_sleep was stopped; its finished cases are saved"
            _, alive = psutil.wait_procs(kernels, timeout=LIMIT_S / 4)
            assert alive == []
        finally:
            if runner.poll() is None:
                runner.kill()
            for kernel in kernels:
                if kernel.is_running():
                    kernel.kill()
    left = [path.name for path in Path(os.environ["CS336_DATA"]).rglob("*") if path.is_file()]
    assert left == [], "a partial copy remained"

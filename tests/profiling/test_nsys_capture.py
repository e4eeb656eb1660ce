"""A profile is captured whole or not at all, every failure is told in a sentence, and no process is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from fake_nsys import VERSION, calls_of, install, wait_for

from cs336_systems.bench.timing import time_steps
from cs336_systems.errors import UserError, WorkbookWarning
from cs336_systems.profiling import nsys_capture, ranges
from cs336_systems.profiling.nsys_capture import Captured, Extras, ProgramFailed, capture, find_nsys
from cs336_systems.profiling.ranges import record_ranges
from cs336_systems.profiling.recordings import read_recording
from cs336_systems.repository import repository_root

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the nsys of these tests is a script that begins with #!")

WELL = [sys.executable, "-S", "-c", "print('done')"]


@pytest.fixture(autouse=True)
def _no_other_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None that this machine has is found, and temporary files are where a test can count them."""
    monkeypatch.delenv("CS336_NSYS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(nsys_capture, "INSTALLED", (str(tmp_path / "opt" / "*" / "bin" / "nsys"),))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "small-128-step"


def captured(target: Path, mode: str = "well", command: Sequence[str] = WELL, **changes: object) -> Captured:
    install(target.parents[1] / "bin", mode)
    return capture(find_nsys(), command, target, **changes)  # type: ignore[arg-type]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def is_running(number: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent to notice."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Which nsys ----------------------------------------------------------------------------------------------------


def test_the_nsys_of_path_is_found_with_its_version(tmp_path: Path) -> None:
    path = install(tmp_path / "bin")
    assert find_nsys() == nsys_capture.Nsys(path, VERSION)


def test_the_nsys_that_is_named_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "bin")
    named = install(tmp_path / "named")
    monkeypatch.setenv("CS336_NSYS", str(named))
    assert find_nsys().path == named


def test_a_named_nsys_that_is_not_there_is_an_error_and_no_other_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "bin")
    monkeypatch.setenv("CS336_NSYS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"CS336_NSYS is .*nowhere.*which is no program"):
        find_nsys()


def test_of_the_installed_ones_the_newest_is_found_after_path(tmp_path: Path) -> None:
    older, newer = (install(tmp_path / "opt" / version / "bin") for version in ("2024.6.1", "2024.10.0"))
    assert find_nsys().path == newer
    newer.chmod(0o644)
    assert find_nsys().path == older
    assert find_nsys().path != install(tmp_path / "bin")
    assert find_nsys().path == tmp_path / "bin" / "nsys"


def test_without_any_it_is_said_what_is_needed_where_to_get_it_and_what_to_do_instead() -> None:
    with pytest.raises(UserError) as told:
        find_nsys()
    for part in (
        "nsys was not found",
        "PATH",
        "CUDA toolkit",
        "https://",
        "CS336_NSYS",
        "notebook 02",
        "kernel_summary",
    ):
        assert part in str(told.value)


def test_a_program_of_that_name_that_is_no_nsys_is_an_error_with_what_it_says(tmp_path: Path) -> None:
    install(tmp_path / "bin", "mute")
    with pytest.raises(UserError, match=r"tells no version of Nsight Systems \(usage: something else\)"):
        find_nsys()
    (tmp_path / "bin" / "nsys").write_text("no program at all")
    with pytest.raises(UserError, match="cannot be run"):
        find_nsys()


# A whole profile -----------------------------------------------------------------------------------------------


def test_report_and_readable_export_are_kept_under_the_targets_name_and_nothing_else(target: Path) -> None:
    made = captured(target)
    assert files_in(target.parent) == {"small-128-step.nsys-rep", "small-128-step.sqlite"}
    assert (made.report, made.export) == (Path(f"{target}.nsys-rep"), Path(f"{target}.sqlite"))
    assert made.contents.ranges == {"measured", "forward"}
    assert made.contents.kernels == len(read_recording(made.export).work) == 1
    assert files_in(target.parents[1] / "temporary") == set()


class Listener:
    """Stands for NVTX, and says in which ranges every step ran."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.steps: list[tuple[str, ...]] = []

    def push_range(self, name: str) -> None:
        self.open.append(name)

    def pop_range(self) -> None:
        self.open.pop()


def test_the_range_that_is_recorded_holds_every_measured_step_and_no_warm_up(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    monkeypatch.setattr(ranges, "_nvtx", lambda: listener)
    with record_ranges():
        time_steps(lambda: listener.steps.append(tuple(listener.open)), warmup=3, steps=2, device="cpu")
    (recorded,) = (
        option.removeprefix("--nvtx-capture=")
        for option in captured(target).arguments
        if option.startswith("--nvtx-capture=")
    )
    assert [recorded in opened for opened in listener.steps] == [False] * 3 + [True] * 2
    assert {"--capture-range=nvtx", "--capture-range-end=stop"} < set(captured(target).arguments)


def test_the_program_and_its_words_come_unchanged_behind_the_options(target: Path) -> None:
    captured(target, command=[*WELL, "--trace=mine", "a b", ""])
    profile, _ = calls_of(target.parents[1] / "bin" / "nsys")
    assert profile["command"] == [*WELL, "--trace=mine", "a b", ""]


def test_names_that_are_not_registered_are_heard_and_the_callers_variables_reach_the_program(target: Path) -> None:
    captured(target, environment={"MINE": "1"})
    profile, _ = calls_of(target.parents[1] / "bin" / "nsys")
    assert profile["environment"]["NSYS_NVTX_PROFILER_REGISTER_ONLY"] == "0"
    assert profile["environment"]["MINE"] == "1"
    assert profile["environment"]["PATH"] == os.environ["PATH"]


def test_only_cuda_and_nvtx_are_recorded_unless_more_is_asked_for(target: Path) -> None:
    plain = set(captured(target).arguments)
    assert {"--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"} < plain
    memory = set(captured(target, extras=Extras(cuda_memory_usage=True)).arguments)
    assert memory - plain == {"--cuda-memory-usage=true"}
    lines = set(captured(target, extras=Extras(python_backtrace=True)).arguments)
    assert lines - plain == {"--sample=process-tree", "--cudabacktrace=kernel", "--python-backtrace=cuda"}
    assert plain - lines == {"--sample=none"}


def test_a_percent_sign_in_a_folders_name_stays_one(tmp_path: Path) -> None:
    install(tmp_path / "bin")
    made = capture(find_nsys(), WELL, tmp_path / "100%p" / "step")
    assert made.report == tmp_path / "100%p" / "step.nsys-rep"
    (output,) = (word for word in calls_of(tmp_path / "bin" / "nsys")[0]["options"] if word.startswith("--output"))
    assert "100%%p" in output


def test_the_caller_hears_that_it_goes_on_while_the_program_runs(target: Path) -> None:
    heard: list[float] = []
    slow = [sys.executable, "-S", "-c", "import time; time.sleep(1)"]
    captured(target, command=slow, while_running=lambda: heard.append(time.monotonic()))
    assert len(heard) >= 3


def test_what_nsys_leaves_out_of_what_was_asked_for_is_passed_on(target: Path) -> None:
    with pytest.warns(WorkbookWarning, match="nsys: CUDA backtraces will not be collected"):
        captured(target, "warns", extras=Extras(python_backtrace=True))


def test_what_the_program_leaves_running_is_ended_with_it(target: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    inner = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-S', '-c', {inner!r}], start_new_session=True)\n"
        f"while not pathlib.Path({str(started)!r}).exists(): time.sleep(0.01)\n"
        "time.sleep(0.1)"
    )
    captured(target, command=[sys.executable, "-S", "-c", code])
    assert not is_running(int(started.read_text()))


# Failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("never opened", r"recorded nothing: it never saw the range 'measured' open.*nvtx"),
        ("no room", r"could not write the report into .*profiles: Failed to create .*No space left on device"),
        ("export fails", r"`nsys export` of small-128-step.nsys-rep ended with 1: Exportation error: Section Table"),
        ("export cut", r"wrote no whole file \(\[message\] = database or disk is full\); is the disk full\?"),
        ("without the range", r"lacks the range 'measured'"),
        ("without kernels", r"has ranges and not one kernel: .*could not trace CUDA"),
        ("broken", rf"under nsys {VERSION} ended with 1: Failed to probe the process"),
    ],
)
def test_a_profile_that_is_not_whole_is_a_sentence_and_leaves_nothing(target: Path, mode: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        captured(target, mode)
    assert files_in(target.parent) == set()
    assert files_in(target.parents[1] / "temporary") == set()


def test_a_profile_without_kernels_is_whole_where_none_are_expected(target: Path) -> None:
    made = captured(target, "without kernels", needs_kernels=False)
    assert made.contents.kernels == 0
    assert made.contents.ranges == {"measured", "forward"}


@pytest.mark.parametrize("mode", ["never opened", "no room", "export fails", "export cut", "broken"])
def test_a_profile_that_was_whole_stays_when_another_fails(target: Path, mode: str) -> None:
    whole = captured(target)
    before = [path.read_bytes() for path in (whole.report, whole.export)]
    with pytest.raises(UserError):
        captured(target, mode)
    assert [path.read_bytes() for path in (whole.report, whole.export)] == before


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; print('progress', file=sys.stderr); sys.exit('error: no such size')", "with 1: no such size"),
        ("import sys; sys.exit(3)", "ended with 3: it does not say why"),
        ("raise RuntimeError('their defect')", "ended with 1: RuntimeError: their defect"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
    ],
)
def test_a_program_that_fails_has_its_own_message_passed_on_and_no_profile(target: Path, code: str, told: str) -> None:
    with pytest.raises(ProgramFailed, match=told):
        captured(target, command=[sys.executable, "-S", "-c", code])
    assert files_in(target.parent) == set()


def test_an_option_that_this_nsys_does_not_know_is_told_in_its_words(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Extras, "arguments", property(lambda _: ["--from-the-future=true"]))
    with pytest.raises(UserError, match=rf"under nsys {VERSION} ended with 1: unrecognised option '--from-the-future"):
        captured(target)


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    install(tmp_path / "bin")
    (tmp_path / "profiles").write_text("in the folder's place")
    with pytest.raises(UserError, match=r"cannot write .*profiles"):
        capture(find_nsys(), WELL, tmp_path / "profiles" / "step")
    assert calls_of(tmp_path / "bin" / "nsys") == []


@pytest.mark.parametrize("full", ["profiles", "temporary"])
def test_a_disk_that_is_full_already_is_told_before_anything_runs(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    usage = shutil.disk_usage
    little = type(usage(tmp_path))(2**30, 2**30 - 2**21, 2**21)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little if full in Path(path).parts else usage(path))
    with pytest.raises(UserError, match=f"2 MiB are free in {tmp_path / full}, and a profile may take more"):
        captured(target)
    assert calls_of(tmp_path / "bin" / "nsys") == []
    assert files_in(target.parent) == set()


def test_a_folder_in_a_files_place_is_told(target: Path) -> None:
    Path(f"{target}.sqlite").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        captured(target)


def test_what_a_killed_capture_left_is_removed_after_a_day_and_not_before(target: Path) -> None:
    old, young = (target.with_name(f".{name}.partial") for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half.nsys-rep").touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    captured(target)
    assert not old.exists()
    assert young.exists()


# Interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "number"), [("well", signal.SIGINT), ("deaf", signal.SIGINT), ("well", signal.SIGTERM)]
)
def test_an_interrupted_capture_leaves_no_process_and_no_file(
    tmp_path: Path, target: Path, mode: str, number: signal.Signals
) -> None:
    """nsys, the program and the agent have sessions of their own, and the agent another parent."""
    started = tmp_path / "started"
    inner = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    nsys = install(tmp_path / "bin", mode)
    code = (
        "import sys, pathlib\n"
        "from cs336_systems.profiling import nsys_capture\n"
        "nsys_capture._GRACE_S = 1.0\n"
        f"command = [sys.executable, '-S', '-c', {inner!r}]\n"
        f"nsys_capture.capture(nsys_capture.find_nsys(), command, pathlib.Path({str(target)!r}))\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(repository_root())}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as runner:
        wait_for(started)
        runner.send_signal(number)
        _, errors = runner.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    (call,) = calls_of(nsys)
    assert set(call["processes"]) == {"nsys", "agent", "program"}
    assert [name for name, process in call["processes"].items() if is_running(process)] == []
    assert files_in(target.parent) == set()
    assert files_in(tmp_path / "temporary") == set()

"""A case in a fresh process: its answer, and every way it can die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import toy_experiment

from cs336_systems.bench.isolation import measure_in_fresh_process
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.repository import repository_root


@pytest.fixture(autouse=True)
def _importable_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository_root() / "tests" / "support"))


def test_the_answer_is_what_the_experiment_measures_here() -> None:
    case = toy_experiment.Case(4)
    assert measure_in_fresh_process(toy_experiment, case) == toy_experiment.measure(case, lambda _: None)


def test_an_exception_in_the_child_is_told_with_its_type() -> None:
    with pytest.raises(RuntimeError, match="RuntimeError: this case"):
        measure_in_fresh_process(toy_experiment, toy_experiment.Case(1, "raise"))


def test_running_out_of_memory_in_the_child_is_out_of_memory_here() -> None:
    with pytest.raises(OutOfMemory, match="allocate memory"):
        measure_in_fresh_process(toy_experiment, toy_experiment.Case(1, "out of memory"))


def test_a_child_that_the_system_kills_is_taken_to_have_run_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="killed by the system"):
        measure_in_fresh_process(toy_experiment, toy_experiment.Case(1, "killed"))


def test_a_child_that_hangs_is_killed_after_its_time_and_leaves_no_process() -> None:
    before = psutil.Process().children(recursive=True)  # the server that forks ranks, where a test has launched some
    with pytest.raises(TimeoutError, match="killed after 4 s"):
        measure_in_fresh_process(toy_experiment, toy_experiment.Case(1, "hang"), timeout_s=4)
    assert set(psutil.Process().children(recursive=True)) <= set(before)


@pytest.mark.skipif(os.name == "nt", reason="a parent's death is seen through the process table of POSIX")
def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import toy_experiment\n"
        "from cs336_systems.bench.isolation import measure_in_fresh_process\n"
        "measure_in_fresh_process(toy_experiment, toy_experiment.Case(1, 'hang'))\n"
    )
    with subprocess.Popen([sys.executable, str(program)]) as parent:
        children = _wait_for(lambda: psutil.Process(parent.pid).children())
        parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == len(children)
    assert alive == []


def _wait_for(condition: Callable[[], list[psutil.Process]], bound_s: float = 60.0) -> list[psutil.Process]:
    deadline = time.monotonic() + bound_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("what was waited for did not come")

"""Measure one case in a fresh process, for what a warm process hides.

The first step of a process pays for loading kernels, creating handles and touching memory for the first time; a second
case in the same process does not. The child is this module run by the same Python: it reads a case as JSON, measures it
with the named experiment and answers with JSON. It is always reaped, and how it died is told.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from cs336_systems.bench.allocator import is_out_of_memory, memory_cap
from cs336_systems.bench.progress import EVENTS_VARIABLE
from cs336_systems.bench.records import Measurement
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.errors import first_line


def measure_in_fresh_process(experiment: ModuleType, case: Any, *, timeout_s: float = 3600.0) -> Measurement:
    """What `experiment.measure(case)` gives in a process of its own.

    Raises:
        OutOfMemory: the child ran out of memory, or the system killed it.
        RuntimeError: the child failed; the message has its error.
        TimeoutError: it took longer than `timeout_s` and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="cs336-case-") as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "experiment": experiment.__name__,
            "case": dataclasses.asdict(case),
            "answer": str(answer),
            "parent": os.getpid(),
        }
        environment = {name: value for name, value in os.environ.items() if name != EVENTS_VARIABLE}
        with subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        ) as child:
            try:
                _, errors = child.communicate(json.dumps(request), timeout=timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                raise TimeoutError(f"a fresh process was killed after {timeout_s:.0f} s without a result") from None
            except BaseException:  # Ctrl-C: never leave the child behind
                child.kill()
                raise
        if os.name != "nt" and child.returncode == -signal.SIGKILL:
            raise OutOfMemory("the fresh process was killed by the system, which is what running out of memory does")
        if child.returncode < 0:
            raise RuntimeError(f"the fresh process died of {signal.Signals(-child.returncode).name}: {errors[-2000:]}")
        if child.returncode != 0 or not answer.is_file():
            raise RuntimeError(f"the fresh process ended with {child.returncode}: {errors[-2000:]}")
        content = json.loads(answer.read_text(encoding="utf-8"))
    if "oom" in content:
        raise OutOfMemory(content["oom"])
    if "error" in content:
        raise RuntimeError(content["error"])
    return Measurement(**content["measurement"])


def _die_with(parent: int) -> None:
    """End this process when its parent is gone, even before it began: nothing would read its answer."""

    def watch() -> None:
        # On Windows a virtual environment's Python has a launcher between itself and its parent.
        while psutil.pid_exists(parent) and (os.name == "nt" or os.getppid() == parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _child() -> None:
    request = json.loads(sys.stdin.read())
    _die_with(request["parent"])
    experiment = importlib.import_module(request["experiment"])
    case = experiment.Case(**request["case"])
    try:
        with memory_cap(case.device):
            measurement = experiment.measure(case, lambda _: None)
        content: dict[str, Any] = {"measurement": dataclasses.asdict(measurement)}
    except Exception as error:
        out_of_memory = isinstance(error, OutOfMemory) or is_out_of_memory(error)
        content = {"oom" if out_of_memory else "error": first_line(error)}
    Path(request["answer"]).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    _child()

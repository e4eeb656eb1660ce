"""The circumstances of a run: the first line of its file.

Commit, time, parameters, versions, threads and clocks, as far as the system tells; nothing names a host or a person.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from cs336_systems.bench.fingerprint import fingerprint, version_of
from cs336_systems.bench.machine import Machine
from cs336_systems.repository import repository_root


def utc_now() -> str:
    """The time in UTC to the microsecond, in a form whose text order is its time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def run_context(experiment: ModuleType, machine: Machine, parameters: dict[str, Any]) -> dict[str, Any]:
    """The first line of a run's file."""
    commit = _output("git", "-C", str(repository_root()), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(repository_root()), "status", "--porcelain")
    return {
        "commit": commit,
        "dirty": bool(changes) if commit is not None else None,
        "started_utc": utc_now(),
        "command": Path(sys.argv[0]).name,
        "parameters": parameters,
        "fingerprint": fingerprint(experiment, machine),
        "device": machine.description,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "ptxas": _ptxas_version(),
            "cuda": torch.version.cuda,
            "driver": nvidia_smi("driver_version") if machine.device == "cuda" else None,
            "compiler": (_output("cc", "--version") or "").partition("\n")[0] or None,
            "system": platform.system(),
        },
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "clocks": clocks(machine.device),
    }


def clocks(device: str) -> dict[str, Any]:
    """Clock rates and power as far as the system tells."""
    if device == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
        return {name: nvidia_smi(name) for name in names}
    try:
        frequency = psutil.cpu_freq()
    except (NotImplementedError, OSError, RuntimeError):
        frequency = None
    return {
        "current_mhz": frequency.current if frequency else None,
        "max_mhz": frequency.max if frequency else None,
    }


def _ptxas_version() -> str | None:
    """That of the assembler in Triton's wheel, which is the one that compiles its kernels."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    ptxas = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    text = _output(str(ptxas), "--version") if ptxas.is_file() else None
    return text.strip().splitlines()[-1] if text else None


def nvidia_smi(query: str) -> str | None:
    """One property of this process's first GPU as `nvidia-smi --query-gpu` prints it; None where it does not."""
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # CUDA_VISIBLE_DEVICES renumbers, nvidia-smi does not
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={gpu}")


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or takes longer than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None

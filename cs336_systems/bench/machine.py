"""Which machine this is, by its hardware.

Records are kept per machine, and a machine is named after what it is (`h200-x1`, `xeon-sapphire-rapids-2c`), never
after a host or a person: two of a kind share a name, and that is the point. `describe` also gives what is written to a
machine.json and compared ever after.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from cs336_systems.analysis.hardware import identify_gpu
from cs336_systems.errors import UserError, unknown_name

# (vendor, family, first model, last model): family and model as in /proc/cpuinfo. A virtual machine often hides the
# brand ("AMD EPYC") but not these. Sources: Intel SDM volume 4, table 2-1; AMD processor programming references.
_MICROARCHITECTURES = (
    ("GenuineIntel", 6, 85, 85, "xeon-skylake"),
    ("GenuineIntel", 6, 106, 108, "xeon-ice-lake"),
    ("GenuineIntel", 6, 143, 143, "xeon-sapphire-rapids"),
    ("GenuineIntel", 6, 207, 207, "xeon-emerald-rapids"),
    ("GenuineIntel", 6, 173, 174, "xeon-granite-rapids"),
    ("AuthenticAMD", 23, 49, 49, "epyc-rome"),
    ("AuthenticAMD", 25, 0, 1, "epyc-milan"),
    ("AuthenticAMD", 25, 16, 17, "epyc-genoa"),
    ("AuthenticAMD", 26, 0, 17, "epyc-turin"),
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device of this machine as records know it."""

    name: str
    device: str
    """"cpu" or "cuda"."""
    description: dict[str, Any]
    """What machine.json holds."""

    @property
    def device_name(self) -> str:
        return str(self.description["device_name"])


def resolve_device(device: str) -> str:
    """ "auto" to "cuda" where there is one, else "cpu"; the others stay themselves, there or not.

    A grid can so be laid out for a device that this machine lacks; `this_machine` is what insists on it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise unknown_name("device", device, ("cpu", "cuda", "auto"))
    return device


@functools.cache
def this_machine(device: str) -> Machine:
    """The machine that `device` ("cpu", "cuda" or "auto") of this process belongs to.

    Raises:
        UserError: CUDA is asked for explicitly where there is none.
    """
    device = resolve_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but PyTorch finds no CUDA device here: use 'cpu' or 'auto'")
    if device == "cuda":
        count = torch.cuda.device_count()
        gpu = torch.cuda.get_device_name()
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            name=f"{identify_gpu(gpu) or slug(gpu.removeprefix('NVIDIA '))}-x{count}",
            device=device,
            description={
                "device_name": gpu,
                "device_count": count,
                # Rounded: drivers differ in what they keep for themselves.
                "device_memory_gib": round(properties.total_memory / 2**30),
                "multiprocessors": properties.multi_processor_count,
                "l2_cache_bytes": properties.L2_cache_size,
            },
        )
    model = cpu_model()
    cores = usable_cores()
    return Machine(
        name=f"{model['slug']}-{cores}c",
        device=device,
        description={
            "device_name": model["name"],
            "device_count": 1,
            "cores": cores,
            "cache_bytes": last_level_cache_bytes(),
            "instruction_sets": instruction_sets(),
        },
    )


def usable_cores() -> int:
    """Cores this process may use: a container or a batch system may give fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, without trademarks, core counts and clock rates."""
    text = re.sub(r"\((R|TM)\)|\bCPU\b|\b\d+-Core\b|\bProcessor\b|@.*$", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def cpu_model() -> dict[str, str]:
    """The processor's own name, and the slug of its microarchitecture, or of its name where that is not known."""
    info = _cpuinfo()
    name = info.get("model name") or _macos_brand() or platform.processor() or platform.machine()
    vendor, family, model = info.get("vendor_id"), info.get("cpu family"), info.get("model")
    for known_vendor, known_family, first, last, known in _MICROARCHITECTURES:
        same = vendor == known_vendor and family == str(known_family)
        if same and model is not None and first <= int(model) <= last:
            return {"name": name, "slug": known}
    return {"name": name, "slug": slug(name)}


def instruction_sets() -> list[str]:
    """The vector extensions that decide the matrix rate, of those the processor reports."""
    flags = set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())
    known = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve"}
    return sorted(flags & known)


def last_level_cache_bytes() -> int:
    """Bytes of the last level of cache, summed over its parts; 0 where the system does not say."""
    levels: dict[int, dict[str, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared_by = (index / "shared_cpu_list").read_text().strip()
            match = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
        except OSError:
            continue
        if match:
            levels.setdefault(level, {})[shared_by] = int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]]
    return sum(levels[max(levels)].values()) if levels else 0


def available_memory_bytes() -> int:
    """Memory that can still be allocated: what the system has free, or what is left of a container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            available = min(available, max(0, int(text) - int(used.read_text()) + _reclaimable_bytes()))
    return available


def _reclaimable_bytes() -> int:
    """Files' pages that count as a container's memory and are given up when it is needed."""
    statistics = Path("/sys/fs/cgroup/memory.stat")
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _macos_brand() -> str | None:
    if platform.system() != "Darwin":
        return None
    answer = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False, timeout=10
    )
    return answer.stdout.strip() or None

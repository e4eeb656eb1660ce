"""Reads what a profiler or an allocator wrote by what is in the file, whatever it is called."""

from __future__ import annotations

from pathlib import Path

from cs336_systems.errors import UserError
from cs336_systems.profiling import nsys, trace
from cs336_systems.profiling.kernels import Recording
from cs336_systems.profiling.memory_history import Device, MemoryHistory
from cs336_systems.profiling.snapshot import read_snapshot
from cs336_systems.profiling.trace_memory import read_trace_memory

PICKLE = b"\x80"
"""What a pickle of protocol 2 or later begins with."""


def read_recording(path: Path) -> Recording:
    """The kernels and ranges of an SQLite export of Nsight Systems or of a Chrome trace of PyTorch's profiler.

    Raises:
        UserError: there is no such file, it is neither, it is damaged, or it lacks what the figures need.
    """
    beginning = _beginning(path)
    if beginning.startswith(nsys.MAGIC):
        return nsys.read_export(path)
    if _may_be_trace(beginning):
        return trace.read_trace(path)
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise UserError(
            f"{path} is a report as Nsight Systems keeps it: export it with `nsys export --type sqlite {path.name}`, "
            "and give the .sqlite file"
        )
    raise UserError(
        f"{path} is neither an SQLite export of Nsight Systems nor a Chrome trace: expected a file that "
        "`nsys export --type sqlite` or torch.profiler's export_chrome_trace wrote, and whole"
    )


def read_memory(path: Path, device: Device | None = None) -> MemoryHistory:
    """The allocations of a CUDA memory snapshot or of a Chrome trace, of `device` or of the one with most events.

    Raises:
        UserError: there is no such file, it is neither, it is damaged or refused, or tells nothing of that device.
    """
    beginning = _beginning(path)
    if _may_be_trace(beginning):
        return read_trace_memory(path, device)
    if not beginning.startswith(PICKLE):
        raise UserError(
            f"{path} is neither a memory snapshot nor a Chrome trace: expected a file that "
            "torch.cuda.memory._dump_snapshot or torch.profiler's export_chrome_trace wrote, and whole"
        )
    if device == "cpu":
        raise UserError(f"{path} is a memory snapshot, which tells of GPUs alone; a trace tells of the CPU")
    return read_snapshot(path, device)


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not beginning:
        raise UserError(f"{path} is empty: write it anew")
    return beginning


def _may_be_trace(beginning: bytes) -> bool:
    return beginning.startswith(trace.GZIP_MAGIC) or beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")

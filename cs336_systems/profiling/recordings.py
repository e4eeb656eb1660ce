"""Reads a profile by what is in the file, whatever it is called."""

from __future__ import annotations

from pathlib import Path

from cs336_systems.errors import UserError
from cs336_systems.profiling import nsys, trace
from cs336_systems.profiling.kernels import Recording


def read_recording(path: Path) -> Recording:
    """The kernels and ranges of an SQLite export of Nsight Systems or of a Chrome trace of PyTorch's profiler.

    Raises:
        UserError: there is no such file, it is neither, it is damaged, or it lacks what the figures need.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not beginning:
        raise UserError(f"{path} is empty: write the export or the trace anew")
    if beginning.startswith(nsys.MAGIC):
        return nsys.read_export(path)
    if beginning.startswith(trace.GZIP_MAGIC) or beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
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

"""An nsys that records nothing: it takes the options of the real one, runs the program and writes made-up profiles.

nsys = install(tmp_path / "bin")      # an executable of that name; put its folder on PATH
install(tmp_path / "bin", "deaf")     # one that misbehaves as MODES say
calls_of(nsys)                        # what it was told

How it ends, what it leaves behind and where it writes is as seen of Nsight Systems 2022.4, 2023.4 and 2024.2.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nsys_exports import Export

VERSION = "2024.6.1.90"
MODES = {
    "well": "",
    "without kernels": "the profile has ranges only",
    "without the range": "the profile lacks what was to be recorded",
    "never opened": "the program never opens the range",
    "no room": "the report cannot be written",
    "export fails": "the report cannot be exported",
    "export cut": "the disk is full while exporting",
    "warns": "says that it leaves out what was asked for",
    "deaf": "an order to end is not heard",
    "mute": "tells no version",
    "broken": "ends before it does anything",
}
SWITCHES = {
    "--trace=cuda,nvtx",
    "--sample=none",
    "--sample=process-tree",
    "--cpuctxsw=none",
    "--cuda-memory-usage=true",
    "--cudabacktrace=kernel",
    "--python-backtrace=cuda",
    "--capture-range=nvtx",
    "--nvtx-capture=measured",
    "--capture-range-end=stop",
    "--wait=primary",
    "--force-overwrite=true",
    "--type=sqlite",
    "--quiet=true",
}
"""What it understands, which the real one was seen to understand."""


def install(folder: Path, mode: str = "well") -> Path:
    """Write an executable `nsys` into a folder."""
    assert mode in MODES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nsys"
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport fake_nsys\n"
    path.write_text(f"#!{sys.executable}\n{program}fake_nsys.main({mode!r}, {str(folder / 'calls.jsonl')!r})\n")
    path.chmod(0o755)
    return path


def calls_of(nsys: Path) -> list[dict[str, Any]]:
    """Each call after `--version`: its switch, options, the command behind them, its environment, and who ran."""
    path = nsys.with_name("calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# What runs in the process of the fake --------------------------------------------------------------------------


def main(mode: str, calls: str) -> None:
    words = sys.argv[1:]
    if words == ["--version"]:
        print("usage: something else" if mode == "mute" else f"NVIDIA Nsight Systems version {VERSION}-2461v0")
        sys.exit(0)
    options, command = [], []
    for index, word in enumerate(words[1:], start=1):
        if not word.startswith("--"):
            command = words[index:]
            break
        options.append(word)
    told = {"switch": words[0], "options": options, "command": command, "environment": dict(os.environ)}
    for option in options:
        if option not in SWITCHES and not option.startswith("--output="):
            _fail(f"unrecognised option '{option}'\n\nusage: nsys {words[0]} [<args>]")
    (output,) = (option.removeprefix("--output=").replace("%%", "%") for option in options if "--output=" in option)
    if mode == "broken":
        _fail("Failed to probe the process (sync)")
    if words[0] == "profile":
        _profile(mode, Path(calls), told, Path(output))
    else:
        _log(Path(calls), told)
        _export(mode, Path(output), Path(command[0]))


def _fail(text: str) -> None:
    print(text, file=sys.stderr)
    sys.exit(1)


def _log(calls: Path, told: dict[str, Any]) -> None:
    with calls.open("a") as file:
        file.write(json.dumps(told) + "\n")


def _profile(mode: str, calls: Path, told: dict[str, Any], report: Path) -> None:
    agent = _start_agent()
    program = subprocess.Popen(told["command"], start_new_session=True)
    _log(calls, told | {"processes": {"nsys": os.getpid(), "agent": agent, "program": program.pid}})

    def end(number: int, _: object) -> None:
        program.kill()
        program.wait()
        os.kill(agent, signal.SIGKILL)
        report.write_bytes(b"half a report")
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else end)
    status = program.wait()
    os.kill(agent, signal.SIGKILL)
    temporary = Path(os.environ["TMPDIR"])
    if mode == "no room":
        (temporary / "nsys-report-1.qdstrm").write_bytes(b"a stream")
        for line in ("Importer error status: Importation failed.", "Dynamic exception type: Exception", "what: it"):
            print(line, file=sys.stderr)
        print(f"Failed to create '{report}': No space left on device.", file=sys.stderr)
    elif mode != "never opened":
        if mode == "warns":
            print("WARNING: CUDA backtraces will not be collected.", file=sys.stderr)
        report.write_bytes(b"a report")
    print("Generated:")
    sys.exit(status if status >= 0 else 128 - status)


def _start_agent() -> int:
    """A daemon in a session of its own, whose parent is not nsys."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writing, str(os.getpid()).encode())
            os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        os._exit(0)
    os.wait()
    return int(os.read(reading, 20))


def _export(mode: str, output: Path, report: Path) -> None:
    if report.read_bytes() != b"a report" or mode == "export fails":
        _fail("Exportation error: Section Table Reference magic number mismatch.")
    export = Export()
    export.range("elsewhere" if mode == "without the range" else "measured", 0, 1000)
    export.range("forward", 100, 500)
    if mode != "without kernels":
        export.kernel("gemm", launched=200, start=300, end=400)
    export.write(output)
    if mode == "export cut":
        output.write_bytes(output.read_bytes()[: output.stat().st_size // 2])
        print("Failed to close database connection: Throw in function", "x" * 1000, file=sys.stderr)
        print("[message] = database or disk is full", file=sys.stderr)


def wait_for(path: Path, bound_s: float = 60.0) -> None:
    """Until a file is there, which a program makes when it has begun."""
    deadline = time.monotonic() + bound_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)

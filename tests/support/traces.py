"""Chrome traces with known answers, as PyTorch's profiler would export them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAIN, AUTOGRAD = 10, 11
"""Threads."""

CPU: dict[str, Any] = {"Device Type": 0, "Device Id": -1}


def event(category: str, name: str, start: float, duration: float, thread: Any = MAIN, **told: Any) -> dict[str, Any]:
    """An event as Kineto writes it, in microseconds; what is on a GPU has the device for its process."""
    on_gpu = category.startswith(("kernel", "gpu"))
    place = {"pid": 0, "tid": 7} if on_gpu else {"pid": MAIN, "tid": thread}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": told, **place}


def written(path: Path, events: list[Any], **more: Any) -> Path:
    """A trace of these events in `path`."""
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events, **more}), encoding="utf-8")
    return path


def operator(name: str, start: float, duration: float, thread: Any = MAIN, **told: Any) -> dict[str, Any]:
    return event("cpu_op", name, start, duration, thread, **told)


def forward(name: str, start: float, duration: float, sequence: int, thread: Any = MAIN) -> dict[str, Any]:
    """An operator of the forward pass; the next node of the graph will have the number."""
    return operator(name, start, duration, thread, **{"Sequence number": sequence, "Fwd thread id": 0})


def node(name: str, start: float, duration: float, sequence: int, thread: Any = MAIN) -> dict[str, Any]:
    """The evaluation of a node of the graph."""
    told = {"Sequence number": sequence, "Fwd thread id": 1}
    return operator(f"autograd::engine::evaluate_function: {name}", start, duration, thread, **told)


def function(name: str, start: float, duration: float, thread: Any = MAIN, parent: int | None = 1) -> dict[str, Any]:
    """A function of Python's, as `file(line): function`."""
    return event("python_function", name, start, duration, thread, **{"Python parent id": parent, "Python id": 2})


def named(name: str, start: float, duration: float, thread: Any = MAIN) -> dict[str, Any]:
    """A named range."""
    return event("user_annotation", name, start, duration, thread)


def change(size: int, time: float, address: int = 64, thread: Any = MAIN, **told: Any) -> dict[str, Any]:
    """Bytes that came or went, of the CPU unless told otherwise."""
    found = {"Bytes": size, "Addr": address, "Total Allocated": 0, "Total Reserved": 0, **CPU, **told}
    return {
        "ph": "i",
        "cat": "cpu_instant_event",
        "s": "t",
        "name": "[memory]",
        "pid": MAIN,
        "tid": thread,
        "ts": time,
        "args": found,
    }

"""Memory snapshots with known answers, as PyTorch would pickle them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs336_systems.repository import repository_root

A100_SNAPSHOT = repository_root() / "tests" / "data" / "memory_snapshot_gpt2xl_forward_ctx128_fp32_a100.pickle"
"""From a real GPU; tests/data/README.md says what was run."""

Frames = list[dict[str, Any]]


def frame(name: str, line: int, filename: str = "/project/model.py") -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line}


def event(action: str, address: int, size: int, frames: Sequence[Any] = (), time_us: int = 0) -> dict[str, Any]:
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": 0,
        "time_us": time_us,
        "frames": list(frames),
    }


def allocated(address: int, size: int, frames: Sequence[Any] = (), time_us: int = 0) -> dict[str, Any]:
    return event("alloc", address, size, frames, time_us)


def freed(address: int, size: int, time_us: int = 0) -> list[dict[str, Any]]:
    """What the allocator notes when a tensor dies."""
    return [event(action, address, size, (), time_us) for action in ("free_requested", "free_completed")]


def segment(total: int, used: int, device: int = 0) -> dict[str, Any]:
    """A segment with one block in use and one that is not."""
    blocks = [
        {"address": 0, "size": used, "requested_size": used, "state": "active_allocated", "frames": []},
        {"address": used, "size": total - used, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    return {
        "device": device,
        "address": 0,
        "total_size": total,
        "allocated_size": used,
        "active_size": used,
        "stream": 0,
        "segment_type": "large",
        "blocks": blocks,
    }


def snapshot(
    *traces: list[dict[str, Any]],
    segments: Sequence[dict[str, Any]] = (),
    annotations: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    return {
        "segments": list(segments),
        "device_traces": list(traces),
        "allocator_settings": {"expandable_segments": False, "garbage_collection_threshold": 0.0},
        "external_annotations": list(annotations),
    }


def annotation(name: str, stage: str, time_us: int, device: int = 0) -> dict[str, Any]:
    return {"device": device, "name": name, "stage": stage, "time_us": time_us}


def written(path: Path, content: object, protocol: int = 4) -> Path:
    """`content` as a pickle in `path`."""
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path

"""Results that follow from source alone, kept on the disk so that the next process need not find them again.

    shapes = kept("shapes", {"size": "xl"}, find_shapes)        # computes once per checkout, PyTorch and source

They lie in `.cache/` of the checkout, a folder per room and state of the source: of this package every file counts, so
that whoever changes a line sees what the new line gives. A file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cs336_systems.errors import UserError
from cs336_systems.files import write_atomically
from cs336_systems.repository import cache_folder


def kept(room: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """`compute()`, or what it once gave for the same key, the same source of this package and the same PyTorch.

    Args:
        room: a folder's name, one for each kind of result.
        key: all that the result depends on beside the source; like the result, of what JSON knows.
    """
    folder = cache_folder() / room / _state()
    path = folder / f"{_digest(json.dumps(key, sort_keys=True).encode())}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            return content["result"]
    result = compute()
    with contextlib.suppress(UserError, OSError):  # a checkout that cannot be written to computes every time
        if not folder.is_dir():
            _remove_others(folder)
        write_atomically(path, json.dumps({"key": key, "result": result}).encode())
    return result


def _remove_others(folder: Path) -> None:
    """The results of other states of the source, which nobody will ask for again."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        shutil.rmtree(other, ignore_errors=True)


@functools.cache
def _state() -> str:
    """A digest of the package's source, as it was when this process first asked, and of PyTorch's version."""
    package = Path(__file__).resolve().parent
    files = {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}
    parts = [torch.__version__.encode(), *(part for name in sorted(files) for part in (name.encode(), files[name]))]
    return _digest(b"\0".join(parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

"""Files that are replaced whole: whoever reads one finds the old content or the new, never half of either.

Standard library only, so that a git hook may use it before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from cs336_systems.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step, its folder made where it is missing.

    Raises:
        UserError: the folder or the file cannot be written; the old file is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; what was there is untouched") from error

"""Checkouts that tests may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cs336_systems.repository import cache_folder, repository_root

_LINKED = ("cs336_systems", "scripts", "tests", "notebooks", "configs")


def changeable_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose documents, templates and data can be changed; its code is this one's."""
    real, made = repository_root(), (folder / "checkout").resolve()
    made.mkdir()
    for name in _LINKED:
        (made / name).symlink_to(real / name)
    cache_folder().mkdir(exist_ok=True)
    (made / ".cache").symlink_to(cache_folder())  # the code is the same, so what was computed from it is too
    for name in ("problems.toml", "README.md"):
        shutil.copy(real / name, made)
    shutil.copytree(real / "writeup", made / "writeup", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(real / "data", made / "data", ignore=shutil.ignore_patterns("local"))
    monkeypatch.setenv("CS336_ROOT", str(made))
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

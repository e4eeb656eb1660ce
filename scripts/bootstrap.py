#!/usr/bin/env python3
"""Make `.venv` and install the workbook into it, unless that has been done for these very files.

Needs nothing but Python: `make run`, `make test` and `make lab` call it first. PyTorch is installed on its own before
the rest, at the version in constraints.txt, so that no other package can pull in a different build of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "installed-for"
"""Where the environment is and with which Python, then what is installed: one of the two words, or a hash."""
UNFINISHED, EMPTY = "unfinished", "empty"
EXTRAS = "notebooks,writeup,gpu,dev"
OLDEST, NEWEST = (3, 11), (3, 13)


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found, wanted = ".".join(map(str, sys.version_info[:3])), "3.11, 3.12 or 3.13"
        print(f"error: expected Python {wanted}, found {found}: make PYTHON=python3.12 …", file=sys.stderr)
        return 2
    place, dependencies = fingerprints()
    installed_for = STAMP.read_text().split() if STAMP.is_file() else []
    if installed_for == [place, dependencies]:
        return 0
    if VENV.exists() and not STAMP.is_file():
        print(f"error: {VENV} was not made by this script, so it is not touched: move it away", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        # An environment of another Python, of a checkout that was moved, or that was never finished cannot be mended.
        if installed_for[:1] != [place] or installed_for[1:] == [UNFINISHED] or not environment_python().is_file():
            make_environment(place)
        install()
    except subprocess.CalledProcessError as error:
        print(f"error: `{' '.join(map(str, error.cmd))}` failed, its message is above", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the installation is incomplete and goes on with the next call", file=sys.stderr)
        return 130
    STAMP.write_text(f"{place} {dependencies}\n")
    print(f"installed into {VENV.name} in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def fingerprints() -> tuple[str, str]:
    """What an installation depends on: Python and the checkout's place; the declared dependencies and this script."""
    dependencies = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "scripts/bootstrap.py"):
        dependencies.update((ROOT / name).read_bytes())
    return hashlib.sha256(f"{sys.version} {ROOT}".encode()).hexdigest(), dependencies.hexdigest()


def environment_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(place: str) -> None:
    """An environment with pip and nothing else, in the place of one of ours that is no longer of use."""
    print(f"making {VENV.name} with Python {sys.version.split()[0]}", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STAMP.write_text(f"{place} {UNFINISHED}\n")
    venv.create(VENV, with_pip=True)
    STAMP.write_text(f"{place} {EMPTY}\n")


def install() -> None:
    constraints = ROOT / "constraints.txt"
    pinned = re.search(r"^torch==\S+", constraints.read_text(), flags=re.MULTILINE)
    if pinned is None:
        raise SystemExit(f"error: expected a line torch==… in {constraints}, found none")
    pip = [str(environment_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print(f"installing {pinned[0]}", flush=True)
    subprocess.run([*pip, pinned[0]], check=True)
    print(f"installing the workbook with its extras {EXTRAS}", flush=True)
    subprocess.run([*pip, "--constraint", str(constraints), "--editable", f"{ROOT}[{EXTRAS}]"], check=True)


if __name__ == "__main__":
    sys.exit(main())

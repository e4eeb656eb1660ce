"""Which profile is of which case: a folder of profiles, each with a file beside it that says what was profiled.

    <name>.nsys-rep   what Nsight Systems' own viewer opens
    <name>.sqlite     what `nsys.py` reads
    <name>.json       the case and its circumstances, written last: without it a profile is not whole

A profile that is copied to another machine with its three files is listed there as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from cs336_systems.errors import UserError, WorkbookWarning
from cs336_systems.files import write_atomically
from cs336_systems.profiling.nsys_capture import EXPORT, REPORT

SCHEMA = 1
SIDECAR = ".json"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A whole profile and what it is of."""

    folder: Path
    name: str
    title: str
    """The case in words."""
    experiment: str
    machine: str
    case: dict[str, Any]
    """Every field of the case."""
    extras: dict[str, Any]
    """What was recorded beside kernels and ranges."""
    command: list[str]
    """What was run, `nsys profile` in front."""
    nsys: str
    torch: str
    finished_utc: str
    samples: dict[str, list[float]]
    """What the program measured meanwhile, by name in milliseconds; the profiler's own time is in it."""
    fingerprint: dict[str, Any]
    """Of the source that was profiled."""
    ranges: list[str]
    kernels: int
    file_bytes: dict[str, int]
    """The size of each of its files, by its suffix."""

    @property
    def report(self) -> Path:
        return self.folder / f"{self.name}{REPORT}"

    @property
    def export(self) -> Path:
        return self.folder / f"{self.name}{EXPORT}"


def profile_name(words: list[str], case: dict[str, Any], extras: dict[str, Any]) -> str:
    """A file's name that can be read, and that no other case has: the words, and a hash of all that was asked for."""
    asked = json.dumps({"case": case, "extras": extras}, sort_keys=True, allow_nan=False)
    return "-".join([*words, hashlib.sha256(asked.encode()).hexdigest()[:8]])


def keep(profile: Profile) -> None:
    """Write down what a profile is of, its other files being there; with that it is whole.

    Raises:
        UserError: it cannot be written.
    """
    content = dataclasses.asdict(profile) | {"schema": SCHEMA}
    del content["folder"], content["name"]  # which the file has already, and which copying may change
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(profile.folder / f"{profile.name}{SIDECAR}", text.encode())


def profiles(folder: Path) -> list[Profile]:
    """The whole profiles of a folder by their names; one that is damaged or lacks a file is skipped with a warning."""
    found = []
    for path in sorted(folder.glob(f"*{SIDECAR}")):
        try:
            found.append(_read(path))
        except UserError as error:
            warnings.warn(f"{error}; it was skipped", WorkbookWarning, stacklevel=2)
    return found


def _read(path: Path) -> Profile:
    """The profile that a sidecar is of.

    Raises:
        UserError: the sidecar cannot be read, is damaged or of a newer version, or a file is not as it says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = int(content.pop("schema"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no description of a profile") from error
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}, and this version of the workbook reads up to {SCHEMA}")
    # The annotations are texts, such as dict[str, Any].
    types = {field.name: str(field.type).partition("[")[0] for field in dataclasses.fields(Profile)}
    del types["folder"], types["name"]
    wrong = [name for name, kind in types.items() if type(content.get(name)).__name__ != kind]
    if not wrong and not all(_are_numbers(values) for values in content["samples"].values()):
        wrong = ["samples"]
    if wrong:
        raise UserError(f"{path} is damaged: {', '.join(wrong)} missing, or not of its type")
    known = {name: content[name] for name in types}
    profile = Profile(folder=path.parent, name=path.name.removesuffix(SIDECAR), **known)
    for file in (profile.report, profile.export):
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != profile.file_bytes.get(file.suffix):
            raise UserError(f"{path} is of a profile whose {file.name} is {'missing' if size is None else 'another'}")
    return profile


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)

"""A folder of profiles tells which is of which case; what is not whole is named and skipped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cs336_systems.errors import WorkbookWarning
from cs336_systems.files import write_atomically
from cs336_systems.profiling.catalogue import SCHEMA, Profile, keep, profile_name, profiles

CASE: dict[str, Any] = {"d_model": 16, "context_length": 128, "phase": "step", "compile": "none", "model": None}
EXTRAS: dict[str, Any] = {"cuda_memory_usage": False}


def profile(folder: Path, name: str) -> Profile:
    """One whose files are there, and whose sidecar is not."""
    made = Profile(
        folder=folder,
        name=name,
        title="custom, context 128, step",
        experiment="transformer_step",
        machine="toy-1c",
        case=CASE,
        extras=EXTRAS,
        command=["nsys", "profile", "python", "a b.py"],
        nsys="2024.6.1.90",
        torch="2.13.0",
        finished_utc="2026-01-01T00:00:00Z",
        samples={"step_ms": [2.5, 3], "warmup_ms": []},
        fingerprint={"source": {"measure": "0"}},
        ranges=["forward", "measured"],
        kernels=7,
        file_bytes={".nsys-rep": 6, ".sqlite": 7},
    )
    write_atomically(made.report, b"report")
    write_atomically(made.export, b"content")
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole profiles."""
    for name in ("first", "second"):
        keep(profile(tmp_path / "profiles", name))
    return tmp_path / "profiles"


def test_what_is_kept_is_found_again_as_it_was(folder: Path) -> None:
    assert profiles(folder) == [profile(folder, "first"), profile(folder, "second")]


def test_a_profile_is_not_whole_before_its_sidecar(tmp_path: Path) -> None:
    made = profile(tmp_path, "first")
    assert profiles(tmp_path) == []
    keep(made)
    assert profiles(tmp_path) == [made]


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert profiles(tmp_path / "nowhere") == []


def test_profiles_can_be_copied_and_renamed(folder: Path, tmp_path: Path) -> None:
    for suffix in (".nsys-rep", ".sqlite", ".json"):
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(folder / f"first{suffix}", tmp_path / "other" / f"mine{suffix}")
    (found,) = profiles(tmp_path / "other")
    assert found.report == tmp_path / "other" / "mine.nsys-rep"
    assert found.case == CASE


def changed(content: dict[str, Any], **fields: Any) -> str:
    return json.dumps({name: value for name, value in (content | fields).items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (lambda _: "{", "no description of a profile"),
        (lambda _: "[1]", "no description of a profile"),
        (lambda _: "null", "no description of a profile"),
        (lambda _: "[" * 100_000, "no description of a profile"),
        (lambda content: changed(content, schema="one"), "no description of a profile"),
        (lambda content: changed(content, schema=SCHEMA + 1), f"has schema {SCHEMA + 1}, .* reads up to {SCHEMA}"),
        (lambda content: changed(content, case=...), "is damaged: case missing"),
        (lambda content: changed(content, case="small"), "is damaged: case missing, or not of its type"),
        (lambda content: changed(content, kernels=True, nsys=3), "is damaged: nsys, kernels missing"),
        (lambda content: changed(content, samples={"step_ms": ["fast"]}), "is damaged: samples"),
        (lambda content: changed(content, samples={"step_ms": None}), "is damaged: samples"),
        (lambda content: changed(content, file_bytes={}), r"whose first.nsys-rep is another"),
    ],
)
def test_a_damaged_description_is_named_and_the_others_are_found(folder: Path, text: Any, told: str) -> None:
    sidecar = folder / "first.json"
    sidecar.write_text(text(json.loads(sidecar.read_text())))
    with pytest.warns(WorkbookWarning, match=f"first.json .*{told}.*; it was skipped"):
        assert [each.name for each in profiles(folder)] == ["second"]


def test_a_sidecar_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "first.json").unlink()
    (folder / "first.json").mkdir()
    with pytest.warns(WorkbookWarning, match="cannot read .*first.json"):
        assert [each.name for each in profiles(folder)] == ["second"]


@pytest.mark.parametrize("suffix", [".nsys-rep", ".sqlite"])
def test_a_file_that_is_missing_or_another_is_named(folder: Path, suffix: str) -> None:
    (folder / f"first{suffix}").write_bytes(b"cut")
    with pytest.warns(WorkbookWarning, match=rf"first{suffix} is another"):
        assert len(profiles(folder)) == 1
    (folder / f"first{suffix}").unlink()
    with pytest.warns(WorkbookWarning, match=rf"first{suffix} is missing"):
        assert len(profiles(folder)) == 1


def test_a_name_says_the_case_and_is_of_no_other() -> None:
    words = ["small", "128", "step"]
    name = profile_name(words, CASE, EXTRAS)
    assert name.startswith("small-128-step-")
    assert name == profile_name(words, dict(reversed(CASE.items())), EXTRAS)
    others = [profile_name(words, CASE | {field: "another"}, EXTRAS) for field in CASE]
    others.append(profile_name(words, CASE, {"cuda_memory_usage": True}))
    assert len({name, *others}) == 2 + len(CASE)


def test_no_field_of_a_profile_is_lost_in_its_sidecar(folder: Path) -> None:
    content = json.loads((folder / "first.json").read_text())
    fields = {field.name for field in dataclasses.fields(Profile)}
    assert set(content) == fields - {"folder", "name"} | {"schema"}

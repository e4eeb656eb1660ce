"""What was computed once is not computed again, unless anything it follows from is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cs336_systems import kept as kept_module
from cs336_systems.analysis import step_operators
from cs336_systems.analysis.residuals import compiled_residuals
from cs336_systems.analysis.step_operators import stages_of
from cs336_systems.kept import kept
from cs336_systems.model import TransformerConfig
from cs336_systems.step import StepConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def never() -> Any:
    raise AssertionError("computed again")


def of_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "_state", lambda: "another")


def test_what_was_computed_is_given_again_as_it_was() -> None:
    result = {"shape": [1, 2], "large": 2**60, "share": 0.1}
    assert kept("room", {"size": "xl"}, lambda: result) == result
    assert kept("room", {"size": "xl"}, never) == result


@pytest.mark.parametrize(("room", "key"), [("room", {"size": "small"}), ("other", {"size": "xl"})])
def test_another_key_or_room_has_a_result_of_its_own(room: str, key: dict[str, str]) -> None:
    kept("room", {"size": "xl"}, lambda: 1)
    assert kept(room, key, lambda: 2) == 2
    assert kept("room", {"size": "xl"}, never) == 1


def test_another_source_computes_anew_and_leaves_nothing_of_the_old(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept("room", {}, lambda: 1)
    (old,) = (cache / "room").iterdir()
    of_another_source(monkeypatch)
    assert kept("room", {}, lambda: 2) == 2
    assert not old.exists()
    assert kept("room", {}, never) == 2


@pytest.mark.parametrize(
    "content", ["", "[1]", "null", '{"key": {}}', '{"key": {"size": "of a collision"}, "result": 3}']
)
def test_a_file_that_is_not_as_it_was_written_is_as_good_as_none(cache: Path, content: str) -> None:
    kept("room", {}, lambda: 1)
    (file,) = cache.glob("room/*/*.json")
    file.write_text(content)
    assert kept("room", {}, lambda: 2) == 2
    assert json.loads(file.read_text())["result"] == 2


def test_a_folder_that_cannot_be_written_to_costs_time_and_nothing_else(cache: Path) -> None:
    cache.write_text("a file in the folder's place")
    assert kept("room", {}, lambda: 1) == 1
    assert kept("room", {}, lambda: 2) == 2


def test_what_a_computation_raises_is_raised_and_not_kept() -> None:
    with pytest.raises(AssertionError, match="computed again"):
        kept("room", {}, never)
    assert kept("room", {}, lambda: 1) == 1


# What is kept ------------------------------------------------------------------------------------------------


def test_operators_and_residuals_from_the_disk_are_those_that_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = StepConfig(32, 64, 2, 2, 16, "cuda", vocab_size=50, autocast="bfloat16")

    def asked() -> tuple[Any, ...]:
        step_operators._counted.cache_clear()
        return stages_of(chosen), compiled_residuals(TransformerConfig(32, 64, 2, 2, 16), 2, 16)

    counted = asked()
    monkeypatch.setattr(step_operators, "_count", lambda _: never())
    monkeypatch.setattr("cs336_systems.analysis.residuals._saved", lambda *_: never())
    assert asked() == counted

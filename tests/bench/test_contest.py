"""An implementation that falls out of a case says why, and leaves the others as if it had not been there."""

from __future__ import annotations

import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cs336_systems.bench import contest
from cs336_systems.bench.allocator import available_bytes
from cs336_systems.bench.contest import Contender, measurement_of
from cs336_systems.bench.records import Status, case_key
from cs336_systems.bench.sweep import AVAILABLE, OutOfMemory
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


FALLS = [
    (UserError("takes no float16"), "skipped", "takes no float16"),
    (OutOfMemory("needs 9 GiB"), "oom", "needs 9 GiB"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nand more"), "oom", "CUDA out of memory. Tried"),
    (RuntimeError("can't allocate memory: you tried"), "oom", "can't allocate memory: you tried"),
    (MemoryError(), "oom", ""),
    (RuntimeError("shapes differ\nby a lot"), "failed", "RuntimeError: shapes differ"),
    (ZeroDivisionError(), "failed", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("error", "status", "reason"), FALLS)
def test_an_error_ends_the_part_of_its_contender_alone_with_a_reason_in_one_line(
    error: Exception, status: Status, reason: str
) -> None:
    one, other = Contender("one", "cpu"), Contender("other", "cpu")
    ran: list[str] = []
    one.attempt(raising(error))
    for contender in (one, other):
        contender.attempt(partial(ran.append, contender.name))
    assert (one.status, one.reason) == (status, reason)
    assert (other.status, other.reason) == ("ok", None)
    assert ran == ["other"]


def test_only_the_first_error_counts() -> None:
    contender = Contender("one", "cpu")
    contender.attempt(raising(UserError("first")))
    contender.attempt(raising(MemoryError("second")))
    assert contender.report() == {"status": "skipped", "reason": "first"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_what_is_to_end_the_program_ends_it(error: BaseException) -> None:
    contender = Contender("one", "cpu")
    with pytest.raises(type(error)):
        contender.attempt(raising(error))
    assert contender.status == "ok"


def test_what_was_noted_before_the_fall_stays_in_the_report() -> None:
    contender = Contender("one", "cpu")
    contender.attempt(lambda: contender.values.update(bytes=5))
    contender.attempt(raising(UserError("enough")))
    assert contender.report() == {"status": "skipped", "reason": "enough", "bytes": 5}


@pytest.mark.parametrize("folder", [str(repository_root()), sys.prefix, str(Path.home())])
@pytest.mark.parametrize("kind", [UserError, OutOfMemory, RuntimeError])
def test_a_reason_names_no_folder_of_this_machine(kind: type[Exception], folder: str) -> None:
    contender = Contender("one", "cpu")
    contender.attempt(raising(kind(f"cannot read {folder}/inner/file.py")))
    assert contender.reason is not None
    assert folder not in contender.reason
    assert "inner/file.py" in contender.reason


class Holder(Contender):
    """Holds something between its actions."""

    def __init__(self) -> None:
        super().__init__("holder", "cpu")
        self.held: object = object()

    def let_go(self) -> None:
        self.held = None


def test_what_is_held_between_actions_is_dropped_by_a_fall_and_not_before() -> None:
    contender = Holder()
    contender.attempt(lambda: None)
    assert contender.held is not None
    contender.attempt(raising(UserError("no")))
    assert contender.held is None


class Block:
    """Memory that a function holds in a variable."""


def test_what_the_failed_call_held_is_gone_when_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception holds the variables of the frames it passed, so it has to be let go first."""
    blocks: list[weakref.ref[Block]] = []
    alive: list[bool] = []

    def exhaust() -> None:
        block = Block()
        blocks.append(weakref.ref(block))
        raise MemoryError

    monkeypatch.setattr(contest, "release_free_memory", lambda _: alive.append(blocks[0]() is not None))
    Contender("one", "cpu").attempt(exhaust)
    assert alive
    assert alive[-1] is False


# The record of a contest ---------------------------------------------------------------------------------------

PAIRS = [("reference", "reference+compile"), ("flash", "flash-triton")]


def fallen(name: str, status: Status = "failed") -> Contender:
    contender = Contender(name, "cpu")
    errors: dict[Status, Exception] = {
        "failed": RuntimeError("x"),
        "oom": MemoryError("x"),
        "skipped": UserError("x"),
    }
    contender.attempt(raising(errors[status]))
    assert contender.status == status
    return contender


@pytest.mark.parametrize("names", [*PAIRS, *(pair[::-1] for pair in PAIRS)])
def test_the_samples_of_one_that_fell_out_are_dropped_and_those_of_a_namesake_kept(names: tuple[str, str]) -> None:
    out, still_in = names
    contenders = [fallen(out), Contender(still_in, "cpu")]
    samples = {f"{name} {part}_ms": [1.0, 2.0] for name in names for part in ("forward", "backward")}
    measurement = measurement_of(contenders, samples)
    assert sorted(measurement.samples) == [f"{still_in} backward_ms", f"{still_in} forward_ms"]
    assert {name: values["status"] for name, values in measurement.values.items()} == {out: "failed", still_in: "ok"}


def test_of_several_that_fell_out_none_has_samples_and_of_none_all_have() -> None:
    names = ["a", "ab", "abc"]
    samples = {f"{name} forward_ms": (1.0,) for name in names}
    everybody = measurement_of([Contender(name, "cpu") for name in names], samples)
    nobody = measurement_of([fallen(name) for name in names], samples)
    assert everybody.samples == {f"{name} forward_ms": [1.0] for name in names}
    assert nobody.samples == {}
    assert list(nobody.values) == names


@pytest.mark.parametrize("status", ["failed", "skipped", "oom"])
def test_how_much_memory_there_was_is_told_where_it_did_not_suffice_for_one_and_only_there(status: Status) -> None:
    measurement = measurement_of([Contender("in", "cpu"), fallen("out", status)], {})
    assert (AVAILABLE in measurement.values) == (status == "oom")
    if status == "oom":
        assert 0 < measurement.values[AVAILABLE] <= 2 * available_bytes("cpu")


def test_the_record_is_what_json_can_hold() -> None:
    ways: list[tuple[str, Status]] = [("a", "failed"), ("b", "oom"), ("c", "skipped")]
    contenders = [fallen(name, status) for name, status in ways]
    measurement = measurement_of([*contenders, Contender("d", "cpu")], {"d forward_ms": (1.0, 2.0)})
    assert json.loads(case_key(measurement.values)) == measurement.values
    assert measurement.samples["d forward_ms"] == [1.0, 2.0]


class CachingGpu:
    """A GPU of which PyTorch's allocator keeps blocks that nobody uses any more."""

    def __init__(self, total: int, cached: int) -> None:
        self.total, self.cached = total, cached

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (self.total - self.cached, self.total))
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty)

    def _empty(self) -> None:
        self.cached = 0


def test_blocks_that_the_allocator_only_keeps_count_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do when the next sweep asks whether there is more than there was: else there always is."""
    CachingGpu(total=1000, cached=600).install(monkeypatch)
    out = Contender("out", "cuda")
    out.attempt(raising(MemoryError("x")))
    CachingGpu(total=1000, cached=600).install(monkeypatch)  # what others ran after it
    assert measurement_of([out, Contender("in", "cuda")], {}).values[AVAILABLE] == 1000

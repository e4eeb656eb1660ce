"""Tuning keeps the fastest tiles, once per kind of GPU, and trusts no file it cannot: none of it needs a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cs336_systems.errors import UserError
from cs336_systems.repository import MARKER, repository_root

pytest.importorskip("triton", reason="Triton is for Linux only")
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from cs336_systems.attention import flash_tuning
from cs336_systems.attention.flash_launch import Problem
from cs336_systems.attention.flash_tiles import KERNELS, Kernel, Tiles
from cs336_systems.attention.flash_tuning import chosen, find, key_of, known_tiles, representative, tune, winners_file

pytestmark = pytest.mark.problem("flash_forward")

GPU = torch.device("cuda")
PROBLEM = Problem(1, 16, 16, 512, 512, 64, torch.bfloat16, 0, "ieee", GPU)


class Machine:
    """A checkout of its own on a machine whose GPU is called what a test says."""

    name = "NVIDIA H200"

    def forget(self) -> None:
        """What another process, or the next one, knows: only what lies on the disk."""
        flash_tuning.winners.cache_clear()

    def swap(self, name: str) -> None:
        self.name = name
        self.forget()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    shutil.copy(repository_root() / MARKER, tmp_path)
    monkeypatch.setenv("CS336_ROOT", str(tmp_path))
    found = Machine()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: found.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found.forget()
    yield found
    found.forget()


class Stopwatch:
    """Launches that only tell which tiles they were given, and a timer by which the one at `best` is the fastest."""

    def __init__(self, best: int = -1, refuses: Callable[[Tiles], Exception | None] = lambda _: None) -> None:
        self.best, self.refuses = best, refuses
        self.timed: list[tuple[Kernel, Tiles]] = []

    def launches(self, problem: Problem) -> Mapping[Kernel, Callable[[Tiles], object]]:
        def launch(kernel: Kernel) -> Callable[[Tiles], object]:
            def run(tiles: Tiles) -> float:
                error = self.refuses(tiles)
                if error is not None:
                    raise error
                self.timed.append((kernel, tiles))
                return 1.0 if tiles == known_tiles(kernel, problem)[self.best] else 2.0

            return run

        return {kernel: launch(kernel) for kernel in KERNELS}

    def find(self, problem: Problem = PROBLEM) -> dict[str, Tiles]:
        def timer(call: Callable[[], Any]) -> float:
            return float(call())

        return find(problem, self.launches(problem), timer)


@pytest.mark.parametrize("best", [0, 1, -1])
def test_the_candidate_with_the_least_time_wins_and_every_candidate_is_timed(machine: Machine, best: int) -> None:
    del machine
    watch = Stopwatch(best)
    found = watch.find()
    for kernel in KERNELS:
        assert found[key_of(kernel, PROBLEM)] == known_tiles(kernel, PROBLEM)[best]
        assert chosen(kernel, PROBLEM).tiles == known_tiles(kernel, PROBLEM)[best]
        assert chosen(kernel, PROBLEM).tuned
        assert [tiles for which, tiles in watch.timed if which == kernel] == list(known_tiles(kernel, PROBLEM))


def test_a_second_time_measures_nothing_and_so_does_another_process(machine: Machine) -> None:
    Stopwatch(1).find()
    for forget in (lambda: None, machine.forget):
        forget()
        again = Stopwatch(0)
        assert again.find() == {}
        assert again.timed == []
        assert chosen("forward", PROBLEM).tiles == known_tiles("forward", PROBLEM)[1]


def test_what_another_process_found_meanwhile_is_not_looked_for_again(machine: Machine) -> None:
    assert not chosen("forward", PROBLEM).tuned  # this process has read that there is nothing
    path = winners_file(GPU)
    Stopwatch(1).find()
    written = path.read_bytes()
    path.unlink()
    machine.forget()
    assert not chosen("forward", PROBLEM).tuned
    path.write_bytes(written)
    again = Stopwatch(0)
    assert again.find() == {}
    assert again.timed == []


def test_before_anything_is_tuned_a_kernel_takes_its_first_candidate(machine: Machine) -> None:
    del machine
    for kernel in KERNELS:
        assert chosen(kernel, PROBLEM) == flash_tuning.Choice(known_tiles(kernel, PROBLEM)[0], tuned=False)


def test_outside_a_checkout_a_kernel_takes_its_first_candidate(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CS336_ROOT", str(tmp_path / "nowhere"))
    machine.forget()
    assert not chosen("forward", PROBLEM).tuned
    with pytest.raises(UserError, match="CS336_ROOT"):
        Stopwatch().find()


def test_winners_of_one_gpu_are_not_those_of_another(machine: Machine) -> None:
    Stopwatch(1).find()
    machine.swap("NVIDIA H100 PCIe")
    assert not chosen("forward", PROBLEM).tuned
    Stopwatch(2).find()
    machine.swap("NVIDIA H200")
    assert chosen("forward", PROBLEM).tiles == known_tiles("forward", PROBLEM)[1]


def test_winners_for_other_inputs_are_kept_beside_those_that_are_there(machine: Machine) -> None:
    other = dataclasses.replace(PROBLEM, head_dim=128)
    Stopwatch(1).find()
    Stopwatch(2).find(other)
    machine.forget()
    assert chosen("forward", PROBLEM).tiles == known_tiles("forward", PROBLEM)[1]
    assert chosen("forward", other).tiles == known_tiles("forward", other)[2]


def of_other_kernels(content: dict[str, Any]) -> str:
    return json.dumps(content | {"kernels": "0" * 16})


def of_no_candidates(content: dict[str, Any]) -> str:
    tiles = {"queries": 16, "keys": 48, "warps": 3, "stages": 9}
    return json.dumps(content | {"winners": dict.fromkeys(content["winners"], tiles)})


def of_other_fields(content: dict[str, Any]) -> str:
    return json.dumps(content | {"winners": {key: {"rows": 16} for key in content["winners"]}})


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(of_other_kernels, id="of other kernels"),
        pytest.param(of_no_candidates, id="tiles that are no candidates"),
        pytest.param(of_other_fields, id="tiles of other fields"),
        pytest.param(lambda content: json.dumps(content)[:-40], id="torn"),
        pytest.param(lambda _: "", id="empty"),
        pytest.param(lambda _: "no JSON", id="no JSON"),
        pytest.param(lambda _: "\ufeff\x00", id="no text"),
        pytest.param(lambda _: "[1, 2]", id="no mapping"),
        pytest.param(lambda _: "{}", id="an empty mapping"),
        pytest.param(lambda content: json.dumps(content | {"winners": [1]}), id="winners that are no mapping"),
        pytest.param(lambda content: json.dumps(content | {"winners": {"forward": 1}}), id="winners that are no tiles"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_as_good_as_none_and_is_replaced(
    machine: Machine, damaged: Callable[[dict[str, Any]], str]
) -> None:
    Stopwatch(1).find()
    path = winners_file(GPU)
    path.write_text(damaged(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    machine.forget()
    assert chosen("forward", PROBLEM) == flash_tuning.Choice(known_tiles("forward", PROBLEM)[0], tuned=False)
    assert len(Stopwatch(2).find()) == len(KERNELS)
    machine.forget()
    assert chosen("forward", PROBLEM).tiles == known_tiles("forward", PROBLEM)[2]


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError("source", None, "no such layout"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_a_candidate_that_the_compiler_or_the_gpu_refuses_is_out(machine: Machine, error: Exception) -> None:
    del machine
    fastest_but_refused = known_tiles("forward", PROBLEM)[1]
    found = Stopwatch(1, lambda tiles: error if tiles == fastest_but_refused else None).find()
    assert found[key_of("forward", PROBLEM)] == known_tiles("forward", PROBLEM)[0]


def test_when_all_are_refused_the_error_names_them_and_what_was_found_before_is_kept(machine: Machine) -> None:
    refused = set(known_tiles("grad_query", PROBLEM)) - set(known_tiles("forward", PROBLEM))
    refused |= set(known_tiles("grad_key_value", PROBLEM))
    watch = Stopwatch(0, lambda tiles: OutOfResources(9, 8, "shared memory") if tiles in refused else None)
    with pytest.raises(UserError, match="none of the tiles of grad_key_value runs on this GPU") as raised:
        watch.find()
    for tiles in known_tiles("grad_key_value", PROBLEM):
        assert f"{tiles} (OutOfResources: out of resource: shared memory" in str(raised.value)
    machine.forget()
    assert chosen("forward", PROBLEM).tuned
    assert not chosen("grad_key_value", PROBLEM).tuned


def test_memory_that_does_not_suffice_is_no_fault_of_the_tiles(machine: Machine) -> None:
    del machine
    with pytest.raises(torch.OutOfMemoryError):
        Stopwatch(0, lambda _: torch.OutOfMemoryError("out of memory")).find()


@pytest.mark.parametrize(
    "other",
    [
        {"head_dim": 128},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "precision": "tf32"},
        {"offset": None},
        {"queries": 513},
        {"keys": 5000},
        {"heads": 4, "key_heads": 4},
    ],
    ids=str,
)
def test_another_class_of_problem_has_a_winner_of_its_own(machine: Machine, other: dict[str, Any]) -> None:
    del machine
    Stopwatch(1).find()
    different = dataclasses.replace(PROBLEM, **other)
    for kernel in KERNELS:
        assert key_of(kernel, different) != key_of(kernel, PROBLEM)
        assert not chosen(kernel, different).tuned
    assert key_of("forward", dataclasses.replace(PROBLEM, precision="tf32")) == key_of("forward", PROBLEM)


@pytest.mark.parametrize(
    "near",
    [{"queries": 100, "keys": 200}, {"batch": 2, "heads": 4, "key_heads": 2}, {"offset": 7}],
    ids=str,
)
def test_problems_of_one_class_share_a_winner(machine: Machine, near: dict[str, Any]) -> None:
    del machine
    Stopwatch(1).find()
    assert chosen("forward", dataclasses.replace(PROBLEM, **near)).tuned


def test_tiles_are_not_timed_on_a_cpu() -> None:
    with pytest.raises(UserError, match="timed on a CUDA device, found inputs on cpu"):
        tune(dataclasses.replace(PROBLEM, device=torch.device("cpu")), timer=lambda _: 1.0)


def test_what_is_timed_stands_for_its_class_and_is_of_it() -> None:
    for queries, keys, heads in itertools.product((1, 128, 512, 513, 4096, 4097, 65_536), (7, 5000), (1, 7, 8, 33)):
        problem = dataclasses.replace(PROBLEM, queries=queries, keys=keys, heads=heads, key_heads=1, batch=1)
        stands = representative(problem)
        assert key_of("forward", stands) == key_of("forward", problem)
        assert representative(stands) == stands
        assert stands.queries == stands.keys <= 16_384


def test_a_fault_of_a_kernel_is_no_refusal_of_its_tiles() -> None:
    def at_fault(_: object) -> float:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        flash_tuning.fastest("forward", lambda _: None, (Tiles(64, 64, 4, 2),), at_fault)


@pytest.mark.gpu
def test_on_a_gpu_tuning_finds_winners_that_give_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cs336_systems.attention.flash_triton import attention

    shutil.copy(repository_root() / MARKER, tmp_path)
    monkeypatch.setenv("CS336_ROOT", str(tmp_path))
    flash_tuning.winners.cache_clear()
    query, key, value = torch.randn(3, 1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    before, state = attention(query, key, value, is_causal=True), torch.cuda.get_rng_state()
    attention.tune(query, key, value, is_causal=True)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(each["tuned"] for each in attention.configuration(query, key, is_causal=True).values())
    torch.testing.assert_close(attention(query, key, value, is_causal=True), before, rtol=2e-2, atol=2e-2)
    flash_tuning.winners.cache_clear()

"""A plan counts the cases of a run and predicts its minutes, for this machine or one that is elsewhere."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from cs336_systems.analysis.hardware import GPUS, gpu_peaks
from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import load_experiment, machine_peaks, transformer_step
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.plan import ASSUMED_SLOWDOWN, Plan, lay_out, lay_out_all, plan_experiment
from cs336_systems.workbook.profiles import LAPTOP, Profile, experiments_of, load_profile, profile_names

HERE = Profile(LAPTOP, "this machine")
ELSEWHERE = Profile("made", "a GPU this machine need not have", gpu="h200")
TINY: dict[str, Any] = {"contexts": {"tiny": [16, 32]}, "phases": ["forward"], "device": "cpu"}


def write(store: Store, experiment: str, case: dict[str, Any], samples: dict[str, list[float]], **changes: Any) -> None:
    """A record of this machine's CPU."""
    machine = this_machine("cpu")
    with store.begin_run(machine, experiment, {}) as writer:
        content: dict[str, Any] = {
            "experiment": experiment,
            "machine": machine.name,
            "run": writer.run,
            "case": case,
            "status": "ok",
            "reason": None,
            "measurement": Measurement(samples, {"flops": 10**9} if experiment == "machine_peaks" else {}),
            "noise": {},
            "fingerprint": fingerprint(machine_peaks, machine),
            "finished_utc": "2026-01-01T00:00:00.000000Z",
            "seconds": 1.0,
        }
        writer.append(Record(**(content | changes)))


def write_ceilings(store: Store) -> None:
    case = {"side": 1, "device": "cpu", "precision": "float32"}
    write(store, "machine_peaks", {**case, "operation": "matmul"}, {"operation_ms": [10.0]})
    stream = Measurement({"operation_ms": [10.0]}, {"bytes": 10**9})
    write(store, "machine_peaks", {**case, "operation": "copy"}, {}, measurement=stream)


def write_step(store: Store, slowdown: float, context: int = 16, **changes: Any) -> None:
    """A record of the first case of TINY whose steps took `slowdown` times their floor."""
    case = transformer_step.grid(**(TINY | {"contexts": {"tiny": [context]}}))[0].case
    floor_ms, _ = transformer_step.bound_ms(case, machine_peaks.peaks_of(this_machine("cpu"), store))
    write(store, "transformer_step", dataclasses.asdict(case), {"step_ms": [slowdown * floor_ms] * 3}, **changes)


def plan(store: Store, profile: Profile = HERE, name: str = "transformer_step", **arguments: Any) -> Plan:
    return plan_experiment(name, TINY | arguments, profile, store)


def test_without_records_every_case_is_to_be_measured(store: Store) -> None:
    found = plan(store)
    assert (found.experiment, found.cases, found.skipped, found.recorded) == ("transformer_step", 2, 0, 0)


def test_without_ceilings_no_time_is_predicted(store: Store) -> None:
    assert math.isnan(plan(store).minutes)


def test_the_time_is_that_of_the_steps_at_a_multiple_of_their_floor(store: Store) -> None:
    write_ceilings(store)
    peaks = machine_peaks.peaks_of(this_machine("cpu"), store)
    floors_ms = [transformer_step.bound_ms(cell.case, peaks)[0] for cell in transformer_step.grid(**TINY)]
    steps = 2 + 3
    assert plan(store).minutes == pytest.approx(ASSUMED_SLOWDOWN * steps * sum(floors_ms) / 1e3 / 60)


def test_the_multiple_is_what_the_records_of_this_machine_say(store: Store) -> None:
    write_ceilings(store)
    assumed = plan(store, contexts={"tiny": [64]}).minutes
    write_step(store, slowdown=7.0)
    assert plan(store, contexts={"tiny": [64]}).minutes == pytest.approx(assumed / ASSUMED_SLOWDOWN * 7.0)


def test_a_case_with_a_good_record_is_not_predicted_again(store: Store) -> None:
    write_ceilings(store)
    write_step(store, ASSUMED_SLOWDOWN, context=16)
    found = plan(store)
    alone = plan(store, contexts={"tiny": [32]})
    assert (found.cases, found.recorded) == (2, 1)
    assert found.minutes == pytest.approx(alone.minutes)


def test_a_case_that_failed_counts_as_not_recorded(store: Store) -> None:
    write_ceilings(store)
    write_step(store, 1.0, status="failed", reason="because", measurement=Measurement())
    assert plan(store).recorded == 0


def test_a_case_that_ran_out_of_memory_counts_as_recorded(store: Store) -> None:
    write_ceilings(store)
    write_step(store, 1.0, status="oom", reason="because", measurement=Measurement())
    assert plan(store).recorded == 1


def test_skipped_cases_are_counted_and_take_no_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ceilings(store)
    cells = transformer_step.grid(**TINY)
    whole = plan(store).minutes
    skipped = [dataclasses.replace(cells[0], skip_reason="because"), cells[1]]
    monkeypatch.setattr(transformer_step, "grid", lambda **_: skipped)
    found = plan(store)
    assert (found.cases, found.skipped, found.recorded) == (2, 1, 0)
    assert 0 < found.minutes < whole


@pytest.mark.parametrize("name", [name for name in profile_names() if load_profile(name).gpu is not None])
def test_a_profile_for_a_gpu_is_planned_on_a_machine_without_one(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Otherwise a machine with a GPU would be remembered from an earlier call.
    this_machine.cache_clear()
    profile = load_profile(name)
    try:
        found = experiments_of(name, load_index())
        assert {"machine_peaks", "transformer_step", "warmup"} <= set(found)
        for experiment, arguments in ((experiment, each) for experiment, grids in found.items() for each in grids):
            planned = plan_experiment(experiment, arguments, profile, store)
            assert planned.cases == len(load_experiment(experiment).grid(**arguments)) > 0
            # Several ranks need several GPUs, and whatever machine this is has less than all profiles ask for.
            assert (planned.minutes > 0) != (planned.skipped == planned.cases), experiment
    finally:
        this_machine.cache_clear()


def test_the_gpu_that_a_profile_names_sets_the_ceilings(store: Store) -> None:
    write_ceilings(store)  # of this machine, which the profile is not for
    case = transformer_step.grid(**(TINY | {"device": "cuda", "contexts": {"small": [128]}}))[0].case
    seconds = transformer_step.predicted_seconds(case, gpu_peaks("h200"), ASSUMED_SLOWDOWN)
    assert "h200" in GPUS
    found = plan(store, ELSEWHERE, device="cuda", contexts={"small": [128]})
    assert found.minutes == pytest.approx(seconds / 60)


def test_planning_measures_and_writes_nothing(store: Store) -> None:
    plan(store, ELSEWHERE, device="cuda")
    plan(store)
    assert not store.local.exists()


def test_an_impossible_grid_is_an_error_before_anything_runs(store: Store) -> None:
    with pytest.raises(UserError, match=r"unknown size 'tinny': did you mean 'tiny'"):
        plan(store, contexts={"tinny": [16]})


def test_an_unknown_experiment_is_an_error_that_lists_the_known_ones(store: Store) -> None:
    with pytest.raises(UserError, match=r"unknown experiment 'transformer_stp': did you mean 'transformer_step'"):
        plan(store, name="transformer_stp")


# Several grids of one experiment -------------------------------------------------------------------------------


def contexts_of(*grids: list[int]) -> list[int]:
    """The contexts of the cases of several grids laid out together."""
    cells = lay_out_all("transformer_step", [TINY | {"contexts": {"tiny": contexts}} for contexts in grids])
    return [cell.case.context_length for cell in cells]


def test_one_grid_is_laid_out_as_it_stands() -> None:
    assert lay_out_all("transformer_step", [TINY]) == lay_out("transformer_step", TINY)
    assert lay_out_all("transformer_step", []) == []


@pytest.mark.parametrize(
    ("grids", "union"),
    [
        (([8, 16], [32, 64]), [8, 16, 32, 64]),
        (([32, 8], [16]), [32, 8, 16]),
        (([8, 16], [8, 16]), [8, 16]),
        (([8, 16, 32], [32, 64]), [8, 16, 32, 64]),
        (([8, 16, 32], [16, 64]), [8, 16, 32, 64]),
        (([8, 16, 32], [8]), [8, 16, 32]),
        (([8], [16, 8]), [8, 16]),
    ],
    ids=["apart", "unsorted", "the same", "at the end", "in the middle", "at the start", "the other way round"],
)
def test_several_grids_are_laid_out_one_after_the_other_and_a_case_stands_where_it_came_first(
    grids: tuple[list[int], ...], union: list[int]
) -> None:
    assert contexts_of(*grids) == union


def test_cases_that_differ_in_anything_stay_apart() -> None:
    cells = lay_out_all("transformer_step", [TINY, TINY | {"steps": 7}, TINY | {"autocast": "bfloat16"}])
    assert [cell.case.steps for cell in cells] == [3, 3, 7, 7, 3, 3]
    assert [cell.case.autocast for cell in cells] == ["none"] * 4 + ["bfloat16"] * 2


def test_a_mistake_in_any_of_several_grids_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown size 'tinny'"):
        lay_out_all("transformer_step", [TINY, TINY | {"contexts": {"tinny": [16]}}])
    with pytest.raises(UserError, match=r"the parameters of transformer_step do not fit its grid: .*'contxts'"):
        lay_out_all("transformer_step", [TINY, {"contxts": {}}])

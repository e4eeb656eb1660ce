"""A sweep measures what is missing, and no case harms another."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_experiment

from cs336_systems.bench import allocator, fingerprint, sweep
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Measurement, Store
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root

SUPPORT = repository_root() / "tests" / "support"
CASES = 800
"""More than twenty killed sweeps get through."""


def cases(*behaviours: str) -> list[Cell[toy_experiment.Case]]:
    return [Cell(toy_experiment.Case(number, behaviour)) for number, behaviour in enumerate(behaviours)]


def run(cells: list[Cell[toy_experiment.Case]], store: Store, *, remeasure: bool | None = None) -> sweep.Outcome:
    return sweep.run(toy_experiment, cells, store=store, remeasure=remeasure)


def statuses(outcome: sweep.Outcome) -> list[str]:
    return [record.status for record in outcome.records]


def support(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/support in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=SUPPORT)


def test_the_records_come_in_the_order_of_the_grid_with_samples_and_values(store: Store) -> None:
    outcome = run(toy_experiment.grid(numbers=[3, 1, 2]), store)
    assert [record.case["number"] for record in outcome.records] == [3, 1, 2]
    assert outcome.records[0].measurement.samples["toy_ms"] == [3.0, 3.0, 3.0]
    assert outcome.records[0].measurement.values == {"square": 9}
    assert outcome.counts == {"ok": 3, "reused": 0}


def test_a_second_run_measures_nothing_and_writes_no_file(store: Store) -> None:
    run(cases("ok", "ok"), store)
    files = sorted(store.local.rglob("*.jsonl"))
    outcome = run(cases("ok", "ok"), store)
    assert outcome.counts == {"reused": 2}
    assert sorted(store.local.rglob("*.jsonl")) == files


def test_remeasuring_measures_again_and_the_newest_record_wins(store: Store) -> None:
    first = run(cases("ok"), store).records[0]
    second = run(cases("ok"), store, remeasure=True).records[0]
    assert second.finished_utc > first.finished_utc
    assert store.local_records(first.machine, "toy_experiment")[first.key] == second


def test_the_environment_asks_for_remeasuring_where_the_caller_says_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cases("ok"), store)
    monkeypatch.setenv("CS336_REMEASURE", "1")
    assert run(cases("ok"), store).counts == {"ok": 1, "reused": 0}


def test_a_changed_source_makes_the_record_stale_and_it_is_measured_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cases("ok"), store)
    original = fingerprint.fingerprint

    def changed(*arguments: Any) -> dict[str, Any]:
        now = original(*arguments)
        return {**now, "source": {**now["source"], "measure": "something else"}}

    monkeypatch.setattr(sweep, "fingerprint", changed)
    assert run(cases("ok"), store).counts == {"ok": 1, "reused": 0}


def test_a_case_that_raises_is_failed_with_its_traceback_and_the_others_are_measured(store: Store) -> None:
    outcome = run(cases("ok", "raise", "ok"), store)
    assert statuses(outcome) == ["ok", "failed", "ok"]
    (failed,) = outcome.failed
    assert failed.reason == "RuntimeError: this case"
    assert failed.traceback is not None
    assert "has two lines" in failed.traceback


def test_a_failed_case_is_tried_again_by_the_next_run_and_a_good_one_is_not(store: Store) -> None:
    run(cases("ok", "raise"), store)
    assert run(cases("ok", "raise"), store).counts == {"reused": 1, "failed": 1}


def test_running_out_of_memory_is_an_answer_and_loses_no_finished_record(store: Store) -> None:
    outcome = run(cases("ok", "out of memory", "ok"), store)
    assert statuses(outcome) == ["ok", "oom", "ok"]
    assert statuses(run(cases("ok", "out of memory", "ok"), store)) == ["ok", "oom", "ok"]
    records = store.local_records(this_machine("cpu").name, "toy_experiment")
    assert sorted(record.status for record in records.values()) == ["ok", "ok", "oom"]


@pytest.mark.skipif(sys.platform != "linux", reason="the cap is Linux's")
def test_an_allocation_beyond_the_available_memory_is_an_error_not_a_kill(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The toy allocates 512 MiB, which this machine has; with 64 MiB left the system would grant it and kill later.
    monkeypatch.setattr(allocator, "available_memory_bytes", lambda: 2**26)
    assert statuses(run(cases("ok", "allocate", "ok"), store)) == ["ok", "oom", "ok"]


def test_an_out_of_memory_case_is_tried_again_only_when_there_is_more_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"available": 2**30}
    monkeypatch.setattr(sweep, "available_bytes", lambda _: memory["available"])
    run(cases("out of memory"), store)
    assert run(cases("out of memory"), store).counts == {"reused": 1}
    memory["available"] *= 2
    assert run(cases("out of memory"), store).counts == {"reused": 0, "oom": 1}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How much memory the sweep finds, which a test may change."""
    found = {"available": 2**30}
    monkeypatch.setattr(sweep, "available_bytes", lambda _: found["available"])
    return found


def measuring_in_part(monkeypatch: pytest.MonkeyPatch, memory: dict[str, int]) -> None:
    """The toy measures part of its case and says for which memory the rest did not suffice."""
    values = {"toy": 1, sweep.AVAILABLE: memory["available"]}
    monkeypatch.setattr(toy_experiment, "measure", lambda *_: Measurement({"toy_ms": [1.0]}, values))


def test_a_case_of_which_a_part_ran_out_of_memory_is_measured_again_only_when_there_is_more(
    store: Store, monkeypatch: pytest.MonkeyPatch, memory: dict[str, int]
) -> None:
    measuring_in_part(monkeypatch, memory)
    assert run(cases("ok"), store).counts == {"ok": 1, "reused": 0}
    for available in (2**30, 2**29, 1.05 * 2**30):  # free memory is never twice the same
        memory["available"] = int(available)
        assert run(cases("ok"), store).counts == {"reused": 1}
    memory["available"] = 2**31
    measuring_in_part(monkeypatch, memory)
    outcome = run(cases("ok"), store)
    assert outcome.counts == {"ok": 1, "reused": 0}
    assert outcome.records[0].measurement.values[sweep.AVAILABLE] == 2**31
    assert run(cases("ok"), store).counts == {"reused": 1}


def test_a_case_whose_every_part_fitted_is_never_measured_again_for_more_memory(
    store: Store, memory: dict[str, int]
) -> None:
    run(cases("ok"), store)
    memory["available"] *= 1000
    assert run(cases("ok"), store).counts == {"reused": 1}


def test_a_case_that_fits_whole_with_more_memory_is_settled_from_then_on(
    store: Store, monkeypatch: pytest.MonkeyPatch, memory: dict[str, int]
) -> None:
    with monkeypatch.context() as patch:
        measuring_in_part(patch, memory)
        run(cases("ok"), store)
    memory["available"] *= 2
    outcome = run(cases("ok"), store)
    assert outcome.counts == {"ok": 1, "reused": 0}
    assert sweep.AVAILABLE not in outcome.records[0].measurement.values
    memory["available"] *= 2
    assert run(cases("ok"), store).counts == {"reused": 1}


def test_a_case_of_which_a_part_failed_is_told_as_failed_and_measured_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"one": {"status": "ok", "reason": None}, "other": {"status": "failed", "reason": "ValueError: x"}}
    with monkeypatch.context() as patch:
        patch.setattr(toy_experiment, "measure", lambda *_: Measurement({"toy_ms": [1.0]}, dict(parts)))
        outcome = run(cases("ok"), store)
        assert [record.failures for record in outcome.failed] == [["other: ValueError: x"]]
        assert outcome.records[0].measurement.samples == {"toy_ms": [1.0]}
    outcome = run(cases("ok"), store)
    assert outcome.counts == {"ok": 1, "reused": 0}
    assert outcome.failed == []
    assert run(cases("ok"), store).counts == {"reused": 1}


def test_the_memory_of_the_case_before_is_given_back_before_the_next_asks_how_much_there_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(sweep, "release_free_memory", lambda _: order.append("release"))
    measure = toy_experiment.measure

    def noted(*arguments: Any) -> Any:
        order.append("measure")
        return measure(*arguments)

    monkeypatch.setattr(toy_experiment, "measure", noted)
    run(cases("ok", "raise", "ok"), store)
    first = order.index("measure")
    assert order[first - 1 :] == ["release", "measure"] * 3


def test_what_a_capped_case_would_have_imported_is_whole_for_the_next() -> None:
    program = (
        "import sys, torch\n"
        "from cs336_systems.bench.allocator import memory_cap\n"
        "with memory_cap('cpu', headroom_bytes=2**20):\n"
        "    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.step()\n"
        "print('whole')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "whole\n", ended.stderr


def test_a_published_failure_names_no_folder_of_this_machine(store: Store) -> None:
    record = run(cases("raise"), store).records[0]
    assert record.traceback is not None
    for folder in (repository_root(), Path.home(), Path(sys.prefix)):
        assert str(folder) not in record.traceback
    path, _ = store.publish(record.machine, "toy_experiment")
    assert "Traceback" not in path.read_text()


def test_ctrl_c_while_the_first_record_is_synced_leaves_the_record(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([Cell(toy_experiment.Case(9))], store)  # writes machine.json, so that only the run's file is synced below
    sync, calls = os.fsync, []

    def interrupted(descriptor: int) -> None:
        sync(descriptor)
        calls.append(descriptor)
        if calls.count(descriptor) == 2:  # after the context, the record
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cases("ok"), store)
    monkeypatch.undo()
    assert len(store.local_records(this_machine("cpu").name, "toy_experiment")) == 2


def test_a_measurement_that_is_not_a_number_is_a_failure_and_never_a_silent_hole(store: Store) -> None:
    outcome = run(cases("not a number", "ok"), store)
    assert statuses(outcome) == ["failed", "ok"]


def test_a_skipped_case_keeps_its_reason_and_is_recorded_once(store: Store) -> None:
    cells = [Cell(toy_experiment.Case(1), "too large for a toy"), Cell(toy_experiment.Case(2))]
    outcome = run(cells, store)
    assert statuses(outcome) == ["skipped", "ok"]
    assert outcome.records[0].reason == "too large for a toy"
    assert run(cells, store).counts == {"reused": 2}


def test_a_case_that_is_no_longer_skipped_is_measured(store: Store) -> None:
    run([Cell(toy_experiment.Case(1), "for now")], store)
    assert statuses(run([Cell(toy_experiment.Case(1))], store)) == ["ok"]


def test_ctrl_c_keeps_what_is_finished_says_so_and_the_next_run_measures_the_rest(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt, match="2 of 4 cases of toy_experiment were measured and are saved"):
        run(cases("ok", "ok", "interrupt", "ok"), store)
    records = store.local_records(this_machine("cpu").name, "toy_experiment")
    assert [record.case["number"] for record in records.values()] == [0, 1]
    # Case 2 no longer interrupts, so that it is a new case; 0 and 1 are not measured again.
    assert run(cases("ok", "ok", "ok", "ok"), store).counts == {"reused": 2, "ok": 2}


def test_a_full_disk_ends_the_run_in_one_sentence_keeps_finished_records_and_the_next_run_goes_on(
    tmp_path: Path,
) -> None:
    program = tmp_path / "full_disk.py"
    program.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import toy_experiment\n"
        "from cs336_systems.bench import sweep\n"
        "from cs336_systems.bench.records import Store\n"
        "from cs336_systems.errors import run_command\n"
        "def main(argv):\n"
        "    store = Store(Path(sys.argv[1]), Path(sys.argv[1]))\n"
        "    limit = int(sys.argv[2])\n"
        "    if limit:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "    outcome = sweep.run(toy_experiment, toy_experiment.grid(numbers=range(8)), store=store)\n"
        "    print(dict(outcome.counts))\n"
        "    return 0\n"
        "run_command(main)\n"
    )
    folder = tmp_path / "data"
    full = support(str(program), folder, 6000)
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    (message,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert "Every record finished before is safe" in message
    records = Store(folder, folder).local_records(this_machine("cpu").name, "toy_experiment")
    assert 1 <= len(records) < 8
    after = support(str(program), folder, 0)
    assert after.returncode == 0, after.stderr
    assert f"'reused': {len(records)}" in after.stdout
    assert f"'ok': {8 - len(records)}" in after.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the sweeps it kills")
def test_killing_a_sweep_twenty_times_at_random_moments_loses_no_finished_case(tmp_path: Path) -> None:
    finished = support("killed_sweeps.py", tmp_path, 20, 7, CASES)
    assert finished.returncode == 0, finished.stderr
    *kills, last = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(kills) == 20
    for kill in kills:
        assert kill["lost"] == 0
        assert kill["new"] >= kill["announced"]
    # Unless most kills struck in the middle of the measuring, the test has shown nothing.
    assert sum(kill["new"] > 0 for kill in kills) >= 10
    saved = sum(kill["new"] for kill in kills)
    assert last == {"records": CASES, "counts": {"reused": saved, "ok": CASES - saved}}


def test_two_sweeps_at_once_write_two_files_and_both_are_read(store: Store) -> None:
    run(cases("ok"), store)
    run([Cell(toy_experiment.Case(7))], store)
    machine = this_machine("cpu").name
    assert len(list((store.local / machine / "toy_experiment").glob("*.jsonl"))) == 2
    assert len(store.local_records(machine, "toy_experiment")) == 2


def test_cases_of_several_devices_are_an_error(store: Store) -> None:
    cells = [Cell(toy_experiment.Case(1)), Cell(toy_experiment.Case(1, device="cuda"))]
    with pytest.raises(UserError, match="one device, found cpu, cuda"):
        run(cells, store)


def test_a_data_folder_that_cannot_be_written_is_an_error_before_anything_is_measured(store: Store) -> None:
    store.local.write_text("a file in the place of the folder")
    with pytest.raises(UserError, match="cannot write"):
        run(cases("ok"), store)


def test_a_record_carries_a_noise_flag_for_a_wide_spread(store: Store) -> None:
    quiet = run(cases("ok"), store).records[0]
    assert not any("spread" in flag for flag in quiet.noise["flags"])
    assert quiet.noise["spread"] == 0.0


def test_every_record_line_says_itself_what_it_measured(store: Store) -> None:
    record = run(cases("ok"), store).records[0]
    (path,) = (store.local / record.machine / "toy_experiment").glob("*.jsonl")
    context, line = [json.loads(text) for text in path.read_text().splitlines()]
    assert context["kind"] == "context"
    assert context["parameters"] == {"number": [0], "behaviour": ["ok"], "device": ["cpu"], "seconds": [0.0]}
    assert line["case"] == dataclasses.asdict(toy_experiment.Case(0))
    assert line["fingerprint"] == context["fingerprint"]

"""Records survive damage, merge by the newest good one, and publish deterministically."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cs336_systems.bench.machine import Machine
from cs336_systems.bench.records import (
    Measurement,
    Record,
    Store,
    case_key,
    newest_good,
    read_lines,
)
from cs336_systems.errors import UserError, WorkbookWarning

MACHINE = Machine("toy-1c", "cpu", {"device_name": "Toy", "cores": 1})
FINGERPRINT = {"source": {"measure": "abc"}, "torch": "2.13.0", "triton": None, "device": "Toy"}


def record(
    number: int = 0, status: Any = "ok", finished: str = "2026-01-01T00:00:00.000000Z", **changes: Any
) -> Record:
    content = {
        "experiment": "toy",
        "machine": MACHINE.name,
        "run": "run",
        "case": {"number": number},
        "status": status,
        "reason": None if status == "ok" else "because",
        "measurement": Measurement({"toy_ms": [1.0, 2.5]}, {"bytes": 3}),
        "noise": {"flags": []},
        "fingerprint": FINGERPRINT,
        "finished_utc": finished,
        "seconds": 0.5,
    }
    return Record(**(content | changes))


def written(store: Store, *records: Record) -> Path:
    """A run's file with these records."""
    with store.begin_run(MACHINE, "toy", {"commit": "c0ffee", "dirty": False}) as writer:
        for each in records:
            writer.append(dataclasses.replace(each, run=writer.run))
        return writer.path


def test_what_is_written_is_what_is_read(store: Store) -> None:
    original = record(3)
    path = written(store, original)
    contexts, records = read_lines(path)
    assert [dataclasses.replace(each, run="run") for each in records] == [original]
    assert next(iter(contexts.values()))["commit"] == "c0ffee"


def test_a_torn_last_line_is_skipped_with_a_warning_and_the_rest_is_read(store: Store) -> None:
    path = written(store, record(0), record(1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(WorkbookWarning, match=r":3 is damaged"):
        _, records = read_lines(path)
    assert [each.case["number"] for each in records] == [0]


def test_garbage_bytes_in_the_middle_lose_one_line_only(store: Store) -> None:
    path = written(store, record(0), record(1), record(2))
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\xff\xfe\x00 garbage \x80"
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(WorkbookWarning, match=r":3 is damaged"):
        _, records = read_lines(path)
    assert [each.case["number"] for each in records] == [0, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b"null",
        b'"text"',
        b'{"kind": "case"}',
        b'{"schema": 1, "kind": "case"}',
        b'{"schema": 1, "kind": "case", "measurement": 3}',
        b'{"schema": 1}',
        b'{"schema": "one", "kind": "case"}',
        b"[" * 200_000,
        json.dumps({"schema": 1, "kind": "case", **dataclasses.asdict(record(finished=None))}).encode(),  # type: ignore[arg-type]
        json.dumps({"schema": 1, "kind": "case", **dataclasses.asdict(record(case={"a": float("nan")}))}).encode(),
    ],
)
def test_a_line_that_is_json_but_no_record_is_skipped_with_a_warning(store: Store, line: bytes) -> None:
    path = written(store, record(0))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.warns(WorkbookWarning, match="damaged"):
        _, records = read_lines(path)
    assert len(records) == 1


def test_records_survive_the_loss_of_their_context(store: Store) -> None:
    path = written(store, record(5))
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    contexts, records = read_lines(path)
    assert contexts == {}
    assert records[0].stale_reasons(FINGERPRINT) == []


def test_a_newer_schema_is_an_error_that_names_the_line(store: Store) -> None:
    path = written(store, record(0))
    path.write_text(path.read_text() + json.dumps({"schema": 99, "kind": "case"}) + "\n")
    with pytest.raises(UserError, match=r"\.jsonl:3 has schema 99.*update the checkout"):
        read_lines(path)


def test_nan_is_refused_when_written(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        written(store, record(measurement=Measurement({"toy_ms": [float("nan")]})))


def test_a_run_without_records_leaves_no_file(store: Store) -> None:
    with store.begin_run(MACHINE, "toy", {}) as writer:
        path = writer.path
        assert path.is_file()
    assert not path.exists()


def test_of_a_case_the_newest_good_record_wins_whatever_the_order() -> None:
    old, new = record(finished="2026-01-01"), record(finished="2026-01-02")
    failed = record(status="failed", finished="2026-01-03")
    out_of_memory = record(status="oom", finished="2026-01-02T12")
    key = old.key
    assert newest_good([new, old])[key] is new
    assert newest_good([old, failed, new])[key] is new
    assert newest_good([failed])[key] is failed
    # What fitted with this very source fits; with another source the newest answer counts.
    assert newest_good([out_of_memory, old, failed])[key] is old
    other = record(status="oom", finished="2026-01-02T12", fingerprint={"source": {}})
    assert newest_good([other, new, failed])[key] is other


def test_the_key_of_a_case_does_not_depend_on_the_order_of_its_fields() -> None:
    assert case_key({"a": 1, "b": None}) == case_key({"b": None, "a": 1})
    assert case_key({"a": 1}) != case_key({"a": 2})


def test_staleness_names_what_changed() -> None:
    current = {"source": {"measure": "abd", "model": "x"}, "torch": "2.14.0", "triton": None, "device": "Toy"}
    assert record().stale_reasons(current) == ["measure changed", "model changed", "torch 2.13.0 → 2.14.0"]
    assert record().stale_reasons({"source": current["source"]}) == ["measure changed", "model changed"]
    assert record().stale_reasons(FINGERPRINT) == []


def test_a_machine_json_of_other_hardware_is_an_error_that_names_the_difference(store: Store) -> None:
    written(store, record())
    other = dataclasses.replace(MACHINE, description={"device_name": "Toy", "cores": 8})
    with pytest.raises(UserError, match="describes another machine: cores is 1 there and 8 here"):
        store.begin_run(other, "toy", {})


def test_a_machine_json_that_is_not_json_is_an_error_that_says_what_to_do(store: Store) -> None:
    written(store, record())
    (store.local / MACHINE.name / "machine.json").write_text("{not json")
    with pytest.raises(UserError, match=r"is not JSON.*remove it"):
        store.begin_run(MACHINE, "toy", {})


def test_publishing_twice_gives_the_same_bytes(store: Store) -> None:
    written(store, record(1), record(0))
    path, count = store.publish(MACHINE.name, "toy")
    first = path.read_bytes()
    assert count == 2
    assert store.publish(MACHINE.name, "toy") == (path, 2)
    assert path.read_bytes() == first


def test_publishing_keeps_what_was_published_and_replaces_what_is_older(store: Store) -> None:
    first = written(store, record(0, finished="2026-01-01"), record(1, finished="2026-01-01"))
    store.publish(MACHINE.name, "toy")
    first.unlink()
    written(store, record(1, finished="2026-02-01"), record(2, finished="2026-02-01"))
    store.publish(MACHINE.name, "toy")
    published = store.published_records("toy")[MACHINE.name]
    assert {each.case["number"]: each.finished_utc for each in published.values()} == {
        0: "2026-01-01",
        1: "2026-02-01",
        2: "2026-02-01",
    }
    assert {each.run for each in published.values()} == set(store.published_context(MACHINE.name, "toy"))


def test_only_the_chosen_runs_are_published_and_an_unknown_run_is_an_error(store: Store) -> None:
    chosen = written(store, record(0)).stem
    written(store, record(1))
    store.publish(MACHINE.name, "toy", [chosen])
    assert [each.case["number"] for each in store.published_records("toy")[MACHINE.name].values()] == [0]
    with pytest.raises(UserError, match="unknown run 'yesterday' of toy"):
        store.publish(MACHINE.name, "toy", ["yesterday"])


def test_publishing_without_records_is_an_error(store: Store) -> None:
    with pytest.raises(UserError, match="no records of toy"):
        store.publish(MACHINE.name, "toy")


def test_local_records_and_reference_figures_are_no_published_machines(store: Store) -> None:
    written(store, record())
    assert store.published_records("toy") == {}


def test_an_unknown_reference_table_lists_the_known_ones(store: Store) -> None:
    assert len(store.reference("e2e_forward_a100")) == 15
    with pytest.raises(UserError, match="did you mean 'e2e_forward_a100'"):
        store.reference("e2e_forward_a10")


def test_the_environment_moves_the_local_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "elsewhere"))
    assert Store.default().local == tmp_path / "elsewhere"
    monkeypatch.delenv("CS336_DATA")
    assert Store.default().local == Store.default().published / "local"

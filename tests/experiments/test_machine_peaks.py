"""The ceilings of a machine come from a datasheet or from its own records."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.bench import sweep
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Table
from cs336_systems.errors import UserError
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.presentation import machine_peaks as presentation


def record(
    operation: str, precision: str, milliseconds: list[float], device: str = "NVIDIA H200", **values: Any
) -> Record:
    return Record(
        experiment="machine_peaks",
        machine="toy",
        run="run",
        case={"operation": operation, "precision": precision, "side": 8, "device": "cpu"},
        status="ok",
        reason=None,
        measurement=Measurement({"operation_ms": milliseconds, "warmup_ms": [0.001]}, values),
        noise={"flags": []},
        fingerprint={"device": device, "source": {}},
        finished_utc="2026-01-01",
        seconds=1.0,
    )


RECORDS = [
    record("matmul", "float32", [2.0, 1.0, 3.0], flops=10**9),
    record("matmul", "float32", [5.0], flops=10**9),
    record("matmul", "bfloat16", [0.5], flops=10**9),
    record("copy", "float32", [1.0, 2.0], bytes=10**8),
    record("sum", "float32", [0.5], bytes=10**8),
]


def test_the_fastest_sample_over_all_sizes_is_the_ceiling_and_warm_ups_do_not_count() -> None:
    peaks = machine_peaks.measured_peaks(RECORDS, Machine("toy", "cpu", {"cache_bytes": 7}))
    assert dict(peaks.matmul_flops_per_s) == {"float32": 1e12, "bfloat16": 2e12}
    assert peaks.bandwidth_bytes_per_s == 2e11
    assert peaks.cache_bytes == 7


TOY = Machine("toy", "cpu", {"cache_bytes": 7})


def lacking(operation: str, precision: str) -> Record:
    """What stands for the record of a further size that nobody measured."""
    case = {"operation": operation, "precision": precision, "side": 16, "device": "cpu"}
    return missing_record("machine_peaks", "toy", case, "run `what measures it`")


@pytest.mark.parametrize("first", [True, False], ids=["before the others", "after them"])
def test_a_precision_that_lacks_the_record_of_a_size_is_unknown_and_the_others_stay(first: bool) -> None:
    hole = lacking("matmul", "bfloat16")
    peaks = machine_peaks.measured_peaks([hole, *RECORDS] if first else [*RECORDS, hole], TOY)
    whole = machine_peaks.measured_peaks(RECORDS, TOY)
    assert dict(peaks.matmul_flops_per_s) == {"float32": whole.rate("float32")}
    assert peaks.bandwidth_bytes_per_s == whole.bandwidth_bytes_per_s


def test_a_size_that_was_skipped_is_not_missed() -> None:
    skipped = dataclasses.replace(lacking("matmul", "bfloat16"), status="skipped", reason="no instructions")
    assert machine_peaks.measured_peaks([*RECORDS, skipped], TOY) == machine_peaks.measured_peaks(RECORDS, TOY)


@pytest.mark.parametrize("stream", ["copy", "sum"])
def test_without_the_record_of_one_stream_the_bandwidth_is_unknown_and_with_it_every_floor(stream: str) -> None:
    peaks = machine_peaks.measured_peaks([*RECORDS, lacking(stream, "float32")], TOY)
    assert math.isnan(peaks.bandwidth_bytes_per_s)
    assert dict(peaks.matmul_flops_per_s) == {"float32": 1e12, "bfloat16": 2e12}
    (cell,) = transformer_step.grid(contexts={"tiny": [8]}, phases=["forward"], device="cpu")
    floor, limit = transformer_step.bound_ms(cell.case, peaks)
    assert math.isnan(floor)
    assert limit == ""
    known, _ = transformer_step.bound_ms(cell.case, machine_peaks.measured_peaks(RECORDS, TOY))
    assert known > 0


def test_without_the_record_of_a_size_only_floors_of_that_precision_are_unknown() -> None:
    peaks = machine_peaks.measured_peaks([*RECORDS, lacking("matmul", "bfloat16")], TOY)
    cells = transformer_step.grid(
        contexts={"tiny": [8]}, phases=["forward"], autocast=["none", "bfloat16"], device="cpu"
    )
    floors = {cell.case.autocast: transformer_step.bound_ms(cell.case, peaks)[0] for cell in cells}
    assert {autocast: math.isnan(floor) for autocast, floor in floors.items()} == {"none": False, "bfloat16": True}


def test_an_unknown_ceiling_is_a_dash_in_the_table_beside_the_datasheets() -> None:
    text = str(presentation.table(machine_peaks.summarise([*RECORDS, lacking("matmul", "float32")])))
    (row,) = (line for line in text.splitlines() if line.startswith("| float32 products"))
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["–", "66.9 TFLOP/s"]


def test_a_machine_with_nothing_but_missing_records_has_no_ceiling_that_is_wrong() -> None:
    records = [lacking("matmul", "float32"), lacking("copy", "float32"), lacking("sum", "float32")]
    peaks = machine_peaks.measured_peaks(records, TOY)
    assert dict(peaks.matmul_flops_per_s) == {}
    assert math.isnan(peaks.bandwidth_bytes_per_s)
    assert "What toy reaches at best" in str(presentation.table(machine_peaks.summarise(records)))


def test_a_measured_ceiling_stands_beside_the_datasheets() -> None:
    text = str(presentation.table(machine_peaks.summarise(RECORDS)))
    assert "4.80 TB/s" in text
    assert "66.9 TFLOP/s" in text
    assert "1.00 TFLOP/s" in text


def test_a_known_gpu_has_the_datasheets_ceilings_without_any_record(store: Store) -> None:
    machine = Machine("h200-x1", "cuda", {"device_name": "NVIDIA H200"})
    assert machine_peaks.peaks_of(machine, store) is gpu_peaks("h200")


def test_a_machine_without_records_is_an_error_that_says_how_to_get_them(store: Store) -> None:
    with pytest.raises(UserError, match=r"not measured: run scripts/measure.py machine_peaks"):
        machine_peaks.peaks_of(this_machine("cpu"), store)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags that every measurement gets, whatever this machine is doing meanwhile."""
    flags: list[str] = []
    # How large the operations are is of no matter here.
    monkeypatch.setattr(machine_peaks, "_SIDES", {"cpu": (32, 64)})
    monkeypatch.setattr(machine_peaks, "_STREAM_BYTES", {"cpu": 2**16})
    monkeypatch.setattr("cs336_systems.bench.noise.NoiseMonitor.report", lambda *_: {"flags": list(flags)})
    return flags


def test_ceilings_are_measured_once_and_kept(store: Store, noise: list[str]) -> None:
    assert noise == []
    first = machine_peaks.ensure_peaks("cpu", store)
    files = list(store.local.rglob("*.jsonl"))
    assert machine_peaks.ensure_peaks("cpu", store) == first
    assert list(store.local.rglob("*.jsonl")) == files
    assert first.bandwidth_bytes_per_s > 0
    assert first.rate("float32") > 0


def test_ceilings_that_were_disturbed_are_measured_again_and_then_kept(store: Store, noise: list[str]) -> None:
    noise.append("something else had the cores")
    sweep.run(machine_peaks, machine_peaks.grid(device="cpu"), store=store)
    noise.clear()
    machine_peaks.ensure_peaks("cpu", store)
    records = store.local_records(this_machine("cpu").name, "machine_peaks").values()
    assert all(not record.noise["flags"] for record in records)


def test_products_that_a_cpu_would_emulate_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without = Machine("toy", "cpu", {"instruction_sets": ["avx2"]})
    monkeypatch.setattr(machine_peaks, "this_machine", lambda _: without)
    skipped = {cell.case.precision for cell in machine_peaks.grid(device="cpu") if cell.skip_reason}
    assert skipped == {"bfloat16", "float16"}
    # Another machine's grid is that of its own instructions.
    theirs = machine_peaks.grid(device="cpu", instruction_sets=["avx2", "amx_bf16"])
    assert {cell.case.precision for cell in theirs if cell.skip_reason} == {"float16"}


def test_a_summary_tells_what_a_ceiling_lacks_and_what_is_stale() -> None:
    records = [*RECORDS, lacking("matmul", "bfloat16")]
    summary = machine_peaks.summarise(records, fingerprint={"device": "NVIDIA H200", "source": {}})
    assert summary.set_index("what")["lacks"].loc["bfloat16 products"] == "run `what measures it`"
    assert (summary["lacks"] != "").sum() == 1
    assert set(summary["stale"]) == {""}
    changed = machine_peaks.summarise(records, fingerprint={"device": "another", "source": {}}).set_index("what")[
        "stale"
    ]
    assert changed.loc["bfloat16 products"] == ""  # nobody measured it, so it is not stale
    assert all("device" in reason for reason in changed.drop("bfloat16 products"))
    assert list(machine_peaks.summarise([]).columns) == list(summary.columns)


# The table of ceilings -----------------------------------------------------------------------------------------


def cells_of(table: Table, ceiling: str) -> list[str]:
    """The row of a ceiling, without the blanks that align its numbers."""
    (row,) = (row for row in table.rows if row[0] == ceiling)
    return [re.sub("[\u2007\u2008]", "", cell).strip() for cell in row[1:]]


def test_a_gpu_with_a_datasheet_and_no_records_shows_its_bounds_and_nothing_reached() -> None:
    cells = machine_peaks.grid(device="cuda")
    records = [
        missing_record("machine_peaks", "h200-x1", dataclasses.asdict(cell.case), "run `what measures it`")
        for cell in cells
    ]
    for summary in (machine_peaks.summarise(records), machine_peaks.summarise([])):
        table = presentation.ceilings(summary, gpu_peaks("h200"), "h200-x1")
        assert table.caption == "The ceilings of h200-x1"
        assert table.headings == ("ceiling", "bounds with")  # a column of dashes is left out
        assert cells_of(table, "memory") == ["4.80 TB/s"]
        assert cells_of(table, "float32 products") == ["66.9 TFLOP/s"]
        precisions = [row[0] for row in table.rows]
        assert precisions == [*(f"{name} products" for name in gpu_peaks("h200").matmul_flops_per_s), "memory"]
        assert gpu_peaks("h200").source in table.notes[0]
        unknown = [note for note in table.notes if "run `what measures it`" in note]
        assert len(unknown) == bool(len(summary))


def test_a_gpu_with_a_datasheet_is_bounded_by_it_and_not_by_what_it_reached() -> None:
    table = presentation.ceilings(machine_peaks.summarise(RECORDS), gpu_peaks("h200"), "toy")
    assert table.headings == ("ceiling", "bounds with", "reached here")
    assert cells_of(table, "float32 products") == ["66.9 TFLOP/s", "1.00 TFLOP/s"]
    assert cells_of(table, "memory") == ["4.80 TB/s", "200 GB/s"]


def test_a_cpu_with_a_hole_has_a_dash_there_and_a_note_of_what_to_run() -> None:
    records = [*RECORDS, lacking("matmul", "bfloat16")]
    table = presentation.ceilings(machine_peaks.summarise(records), machine_peaks.measured_peaks(records, TOY), "toy")
    assert cells_of(table, "float32 products") == ["1.00 TFLOP/s", "1.00 TFLOP/s"]
    assert cells_of(table, "bfloat16 products") == ["–", "–"]
    assert table.rows[-1][0] == "memory"
    assert "Not known: bfloat16 products; run `what measures it`." in table.notes
    assert table.notes[0].startswith("Last-level cache: 7 B. Bounds: measured here")


def test_without_one_stream_neither_the_bound_of_memory_nor_what_was_reached_is_known() -> None:
    records = [*RECORDS, lacking("copy", "float32")]
    table = presentation.ceilings(machine_peaks.summarise(records), machine_peaks.measured_peaks(records, TOY), "toy")
    assert cells_of(table, "memory") == ["–", "–"]
    assert "Not known: memory; run `what measures it`." in table.notes


def test_what_a_stale_record_reached_is_marked_and_the_note_says_why() -> None:
    old = record("matmul", "bfloat16", [0.5], device="another", flops=10**9)
    records = [each for each in RECORDS if each.case["precision"] != "bfloat16"] + [old]
    summary = machine_peaks.summarise(records, fingerprint={"device": "NVIDIA H200", "source": {}})
    (reason,) = old.stale_reasons({"device": "NVIDIA H200", "source": {}})
    table = presentation.ceilings(summary, machine_peaks.measured_peaks(records, TOY), "toy")
    assert cells_of(table, "bfloat16 products")[-1] == "2.00 TFLOP/s †"
    assert cells_of(table, "float32 products")[-1] == "1.00 TFLOP/s"
    assert f"† stale: {reason}" in table.notes
    assert "2.00 TFLOP/s †" in str(presentation.table(summary))


@pytest.mark.gpu
def test_a_gpus_measured_ceilings_do_not_exceed_its_datasheet(store: Store) -> None:
    outcome = sweep.run(machine_peaks, machine_peaks.grid(device="cuda"), store=store)
    summary = machine_peaks.summarise(outcome.records)
    known = summary[summary["published"].notna()]
    assert (known["rate"] <= known["published"]).all()

"""The ceilings of a machine come from a datasheet or from its own records."""

from __future__ import annotations

from typing import Any

import pytest

from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.bench import sweep
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import machine_peaks
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
        fingerprint={"device": device},
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


@pytest.mark.gpu
def test_a_gpus_measured_ceilings_do_not_exceed_its_datasheet(store: Store) -> None:
    outcome = sweep.run(machine_peaks, machine_peaks.grid(device="cuda"), store=store)
    summary = machine_peaks.summarise(outcome.records)
    known = summary[summary["published"].notna()]
    assert (known["rate"] <= known["published"]).all()

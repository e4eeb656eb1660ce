"""The Transformer's step is timed as asked, beside its floor and what others published."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from step_records import record_of

from cs336_systems.analysis.footprint import plan_step
from cs336_systems.analysis.hardware import Peaks, gpu_peaks
from cs336_systems.analysis.step_time import Constants, estimate_seconds
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Measurement, Record, Status, Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.model import model_size
from cs336_systems.step import build_step

pytestmark = pytest.mark.problem("benchmarking_script")

PEAKS = Peaks("toy-1c", {"float32": 1e11, "bfloat16": 2e11}, 1e10, 0, 2**33, "made up for a test")


def tiny(**changes: Any) -> Case:
    content: dict[str, Any] = {
        "d_model": 16,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "context_length": 8,
        "vocab_size": 50,
        "device": "cpu",
        "batch_size": 2,
        "warmup": 1,
        "steps": 3,
    }
    return Case(**(content | changes))


def small(**changes: Any) -> Case:
    size = model_size("small")
    return Case(**dataclasses.asdict(dataclasses.replace(size, context_length=128)), device="cpu", **changes)


@pytest.mark.parametrize("phase", ["forward", "forward-backward", "step"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_every_phase_is_measured_with_its_warm_ups_apart(phase: str, autocast: str) -> None:
    parts: list[float] = []
    measurement = transformer_step.measure(tiny(phase=phase, autocast=autocast), parts.append)
    assert len(measurement.samples["step_ms"]) == 3
    assert len(measurement.samples["warmup_ms"]) == 1
    assert all(sample > 0 for sample in measurement.samples["step_ms"])
    assert parts == [0.25, 0.5, 0.75, 1.0]
    assert measurement.values["peak_resident_bytes"] > 0


@pytest.mark.parametrize(
    "choice",
    [{"attention": "sdpa"}, {"formulation": "fused"}, {"optimizer": "fused"}, {"rope": "2026"}, {"dtype": "bfloat16"}],
)
def test_every_choice_runs(choice: dict[str, str]) -> None:
    measurement = transformer_step.measure(tiny(**choice), lambda _: None)
    assert len(measurement.samples["step_ms"]) == 3


def test_a_forward_is_with_autograd_and_changes_no_weight_and_a_step_changes_them_all() -> None:
    for phase, changes in (("forward", False), ("forward-backward", False), ("step", True)):
        torch.manual_seed(0)
        step = build_step(tiny(phase=phase))
        parameters = list(step.model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        step()
        changed = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        assert all(changed) if changes else not any(changed)
        assert all((parameter.grad is not None) == (phase != "forward") for parameter in parameters)


def test_the_same_seed_gives_the_same_model_and_batch() -> None:
    outputs = []
    for seed in (1, 1, 2):
        case = tiny(phase="forward", seed=seed)
        torch.manual_seed(case.seed)
        outputs.append(build_step(case)())
    assert torch.equal(outputs[0], outputs[1])  # type: ignore[arg-type]
    assert not torch.equal(outputs[0], outputs[2])  # type: ignore[arg-type]


def test_a_size_that_cannot_fit_is_out_of_memory_at_once_and_says_how_much_it_needs(store: Store) -> None:
    cells = transformer_step.grid(contexts={"10b": [128]}, phases=["step"], device="cpu")
    (record,) = sweep.run(transformer_step, cells, store=store).records
    assert record.status == "oom"
    assert record.reason is not None
    assert "need at least" in record.reason
    assert "GiB" in record.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "backward"}, "unknown phase 'backward': did you mean"),
        ({"dtype": "float31"}, "unknown dtype 'float31': did you mean 'float32'"),
        ({"autocast": "int8"}, "unknown autocast"),
        ({"float32_matmul": "low"}, "unknown float32_matmul"),
        ({"rope": "2024"}, "unknown rope"),
        ({"formulation": "fuzed"}, "unknown formulation 'fuzed': did you mean 'fused'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, found 0"),
        ({"steps": 0}, "steps must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"context_length": -5}, "context_length must be a positive whole number, found -5"),
        ({"num_heads": 3}, "3 heads do not divide d_model 16"),
    ],
)
def test_a_case_that_cannot_be_is_an_error_that_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**change)


def test_a_misspelt_size_in_a_grid_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown size 'smal': did you mean 'small'"):
        transformer_step.grid(contexts={"smal": [128]})


@pytest.mark.parametrize("contexts", [[128], {}, "small"])
def test_contexts_must_map_sizes_to_lengths(contexts: Any) -> None:
    with pytest.raises(UserError, match="contexts must map"):
        transformer_step.grid(contexts=contexts)


def test_the_grid_is_sizes_times_contexts_times_phases_times_whatever_has_several_values() -> None:
    cells = transformer_step.grid(
        contexts={"small": [128, 256], "xl": [128]}, phases=["forward", "step"], autocast=["none", "bfloat16"]
    )
    assert len(cells) == (2 + 1) * 2 * 2
    assert {cell.case.size for cell in cells} == {"small", "xl"}


def test_a_size_has_its_name_at_any_context_and_another_is_custom() -> None:
    assert small().size == "small"
    assert tiny().size == "custom"


def test_a_record_becomes_a_row_with_its_statistics_floor_and_published_times(store: Store) -> None:
    summary = transformer_step.summarise([record_of(small(phase="forward"))], PEAKS, store=store)
    (row,) = summary.itertuples()
    assert (row.mean_ms, row.median_ms, row.std_ms) == (3.0, 3.0, 1.0)
    # 2 FLOPs per parameter and token without the embedding, and 4·B·T²·D per layer of attention
    products = 2 * (128_625_408 - 7_680_000 - 25 * 768) * 4 * 128 + 12 * 4 * 4 * 128**2 * 768
    assert row.flops == products
    assert row.bound_ms == pytest.approx(1e3 * products / 1e11)
    assert row.times_bound == pytest.approx(3.0 / row.bound_ms)
    assert (row.a100_ms, row.a100_std_ms) == pytest.approx((40.4, 0.3))
    assert math.isnan(row.h100_ms)
    assert row.peak_bytes == 2**20


def test_a_full_step_stands_beside_both_published_machines(store: Store) -> None:
    (row,) = transformer_step.summarise([record_of(small(phase="step"))], PEAKS, store=store).itertuples()
    assert (row.a100_ms, row.h100_ms) == pytest.approx((68.9, 73.0))


def test_out_of_memory_is_a_row_without_times_that_keeps_its_floor_and_reason(store: Store) -> None:
    record = record_of(small(), status="oom", reason="too large", measurement=Measurement())
    (row,) = transformer_step.summarise([record], PEAKS, store=store).itertuples()
    assert math.isnan(row.mean_ms)
    assert row.bound_ms > 0
    assert (row.status, row.reason) == ("oom", "too large")


def test_a_precision_without_a_known_ceiling_has_no_floor_instead_of_a_wrong_one(store: Store) -> None:
    (row,) = transformer_step.summarise([record_of(small(autocast="float16"))], PEAKS, store=store).itertuples()
    assert math.isnan(row.bound_ms)


def test_the_floor_of_an_attention_that_may_skip_masked_tiles_is_lower() -> None:
    materialised, _ = transformer_step.bound_ms(small(), PEAKS)
    skipping, _ = transformer_step.bound_ms(small(attention="sdpa"), PEAKS)
    assert skipping < materialised


def test_the_prediction_needs_no_device_and_counts_what_the_summary_counts(store: Store) -> None:
    case = dataclasses.replace(small(phase="step"), device="cuda")
    (predicted,) = transformer_step.predict([case], gpu_peaks("h200")).itertuples()
    (summary,) = transformer_step.summarise([record_of(case)], gpu_peaks("h200"), store=store).itertuples()
    assert predicted.flops == summary.flops
    assert predicted.bound_ms == summary.bound_ms
    assert predicted.parameters == 128_625_408
    assert predicted.planned_bytes == plan_step(case, "h200").peak_allocated_bytes


def records_of_sizes(status_of_last: Status = "ok") -> list[Record]:
    """Of three sizes, with times that a machine at half its ceilings would have."""
    cases = [
        tiny(**size, context_length=context, phase=phase)
        for size in ({}, {"num_layers": 2}, {"d_model": 64, "d_ff": 256})
        for context in (8, 64)
        for phase in ("forward", "step")
    ]
    seconds = [estimate_seconds(case, PEAKS, Constants(0.5, 0.5, 1e-5)) for case in cases]
    records = [
        record_of(case, measurement=Measurement({"step_ms": [1e3 * each]}, {}))
        for case, each in zip(cases, seconds, strict=True)
    ]
    return [*records[:-1], dataclasses.replace(records[-1], status=status_of_last)]


def test_steps_are_predicted_by_the_records_of_other_sizes_with_constants_of_all(store: Store) -> None:
    summary = transformer_step.summarise(records_of_sizes(), PEAKS, store=store)
    assert (summary["predicted_ms"] / summary["median_ms"] - 1).abs().mean() < 0.05
    assert (summary["predicted_ms"] >= summary["bound_ms"]).all()
    for name in ("matrix_fraction", "bandwidth_fraction", "host_step_us"):
        assert summary[name].nunique() == 1
    assert summary["host_step_us"].iloc[0] == pytest.approx(10.0, rel=0.05)


def test_with_a_record_missing_no_step_of_its_family_is_predicted(store: Store) -> None:
    summary = transformer_step.summarise(records_of_sizes("missing"), PEAKS, store=store)
    assert summary["predicted_ms"].isna().all()


def test_on_a_machine_without_records_and_published_times_nothing_is_predicted() -> None:
    for peaks in (PEAKS, gpu_peaks("h200")):
        assert transformer_step.predict([tiny()], peaks)["predicted_ms"].isna().all()


def test_published_records_of_another_machine_get_that_machines_floor(store: Store) -> None:
    from cs336_systems.bench.machine import Machine
    from cs336_systems.workbook.evidence import published_rows
    from cs336_systems.workbook.index import load_index
    from cs336_systems.workbook.profiles import experiments_of

    machine = Machine("h200-x1", "cuda", {"device_name": "NVIDIA H200", "multiprocessors": 132})
    asked = [cell.case for cell in transformer_step.grid(**experiments_of("h200", load_index())["transformer_step"][0])]
    with store.begin_run(machine, "transformer_step", {}) as writer:
        writer.append(record_of(asked[0], machine="h200-x1", run=writer.run))
    assert not len(published_rows("transformer_step", store))
    store.publish("h200-x1", "transformer_step")
    rows = published_rows("transformer_step", store)
    assert len(rows) == len(asked)
    assert set(rows["machine"]) == {"h200-x1"}
    (row,) = rows[rows["status"] != "missing"].itertuples()
    assert row.bound_ms == transformer_step.bound_ms(asked[0], gpu_peaks("h200"))[0]


@pytest.mark.gpu
def test_on_a_gpu_the_devices_own_times_stand_beside_the_wall_clocks() -> None:
    measurement = transformer_step.measure(tiny(device="cuda"), lambda _: None)
    assert len(measurement.samples["device_ms"]) == len(measurement.samples["step_ms"]) == 3
    assert measurement.values["peak_allocated_bytes"] > 0


class Course(torch.nn.Module):
    """A model of one product, with the course's constructor."""

    def __init__(self, vocab_size: int, d_model: int, **_: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, d_model)
        self.head = torch.nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


class Headless(Course):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"theirs:Course": Course, "theirs:Headless": Headless}
    monkeypatch.setattr("cs336_systems.model.load_object", classes.__getitem__)


@pytest.mark.usefixtures("theirs")
def test_the_floor_of_somebody_elses_model_is_that_of_the_products_it_does(store: Store) -> None:
    case = tiny(model="theirs:Course", phase="forward-backward")
    measurement = transformer_step.measure(case, lambda _: None)
    # 2·tokens·d_model·vocabulary forward, and both gradients of the same product
    assert measurement.values["flops"] == 3 * 2 * (2 * 8) * 16 * 50
    (row,) = transformer_step.summarise([record_of(case, measurement=measurement)], PEAKS, store=store).itertuples()
    assert row.bound_ms == pytest.approx(1e3 * measurement.values["flops"] / 1e11)


@pytest.mark.usefixtures("theirs")
def test_somebody_elses_model_without_logits_is_an_error_that_gives_both_shapes() -> None:
    with pytest.raises(UserError, match=r"must map tokens \(2, 8\) to logits \(2, 8, 50\), found shape \(2, 8, 16\)"):
        transformer_step.measure(tiny(model="theirs:Headless"), lambda _: None)

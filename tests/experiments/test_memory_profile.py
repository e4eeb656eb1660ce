"""One step's memory is recorded to the byte, and stands beside what the architecture says must be there."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from profile_records import FINGERPRINT, PEAKS, case_of, memory_record, record_of

from cs336_systems.analysis.activations import residual_bytes
from cs336_systems.bench import sweep
from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.bench.records import Measurement, Store, missing_record
from cs336_systems.compilation import blocks_of
from cs336_systems.experiments import memory_profile
from cs336_systems.experiments.memory_profile import accounted, bytes_of
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.profiling.outline import Outline
from cs336_systems.step import build_step

pytestmark = pytest.mark.problem("memory_profiling")


def tiny(**changes: Any) -> Case:
    return case_of("tiny", 16, **{"batch_size": 2, **changes})


def measured(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = memory_profile.measure(tiny(**changes), lambda _: None).values
    return values


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["forward", "forward-backward", "step"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_peak_is_what_the_allocator_counts_on_top_of_what_was_there(phase: str, autocast: str) -> None:
    case = tiny(phase=phase, autocast=autocast)
    values = memory_profile.measure(case, lambda _: None).values
    step = build_step(case)
    step()
    step.optimizer.zero_grad(set_to_none=True)
    peak, _ = allocated_bytes(step, "cpu")
    if phase == "step":
        # What the optimizer frees of its earlier moments that count does not see, so it may be too high there.
        assert values["peak_bytes"] - values["before_bytes"] <= peak
    else:
        assert values["peak_bytes"] - values["before_bytes"] == peak


def test_before_a_step_are_the_weights_the_batch_and_the_moments() -> None:
    step = build_step(tiny())
    weights = bytes_of(step.model.parameters())
    held = bytes_of([*step.model.parameters(), *step.model.buffers(), step.batch])
    assert measured(phase="forward")["before_bytes"] == held
    assert measured(phase="step")["before_bytes"] == held + 2 * weights


def test_bytes_of_counts_what_is_shared_once() -> None:
    tensor = torch.zeros(10)
    assert bytes_of([tensor, tensor[:5], tensor.view(2, 5)]) == 40


def test_backward_leaves_a_gradient_for_each_parameter_and_one_block_its_own() -> None:
    step = build_step(tiny())
    for phase in ("forward-backward", "step"):
        values = measured(phase=phase)
        assert values["gradient_bytes"] == bytes_of(step.model.parameters())
        block = blocks_of(step.model)[1]
        assert values["block_gradient_bytes"] == bytes_of(block.parameters())


def test_residual_activations_are_counted_at_the_peak() -> None:
    case = tiny()
    one = residual_bytes(case.config, case.batch_size, case.context_length)
    values = memory_profile.measure(case, lambda _: None).values
    assert values["residual_count"] >= 2 * case.num_layers
    sizes = {group["bytes"]: group["count"] for group in values["by_size"]}
    assert sizes.get(one, values["residual_count"]) == values["residual_count"]


def test_what_is_live_at_the_peak_is_told_with_where_it_comes_from() -> None:
    values = measured()
    first = values["largest"][0]
    assert any("model.py" in frame for frame in first["trace"])
    assert first["bytes"] * first["count"] == first["total_bytes"]
    total = values["peak_bytes"] - values["before_bytes"]
    assert sum(group["total_bytes"] for group in values["by_place"]) <= total


def test_the_peak_of_a_step_lies_within_one_of_its_phases() -> None:
    assert measured(phase="step")["peak_phases"][0] in ("forward", "loss", "backward", "optimizer")


def test_a_record_survives_the_way_to_a_file_and_back_and_stays_small(store: Store) -> None:
    cells = memory_profile.grid(contexts={"tiny": [16]}, phases=["step"], autocast="none")
    (record,) = sweep.run(memory_profile, cells, store=store).records
    assert record.status == "ok"
    (kept,) = store.local_records(record.machine, "memory_profile").values()
    assert kept.measurement.values == json.loads(json.dumps(record.measurement.values))
    assert len(json.dumps(record.measurement.values)) < 40_000
    drawn = Outline.from_json(record.measurement.values["outline"])
    assert drawn.peak_bytes == record.measurement.values["peak_bytes"]


def test_flash_attention_saves_less_than_the_reference_at_long_lengths() -> None:
    long = {"context_length": 256, "attention": "flash"}
    flash = memory_profile.measure(tiny(**long), lambda _: None).values
    reference = memory_profile.measure(tiny(**long | {"attention": "reference"}), lambda _: None).values
    assert flash["saved"]["total_bytes"] < reference["saved"]["total_bytes"]
    assert flash["peak_bytes"] < reference["peak_bytes"]


class Foreign(torch.nn.Module):
    """Somebody else's model, whose blocks give tuples and are in no list called layers."""

    def __init__(self, vocab_size: int, context_length: int, d_model: int, **_: Any) -> None:
        super().__init__()
        del context_length
        self.embedding = torch.nn.Embedding(vocab_size, d_model)
        self.head = torch.nn.Linear(d_model, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(tokens))
        return logits


@pytest.mark.parametrize("phase", ["forward", "step"])
def test_of_a_model_without_known_blocks_the_peak_is_measured_and_what_is_not_known_is_left_out(phase: str) -> None:
    case = tiny(phase=phase, model=f"{__name__}:Foreign")
    values = memory_profile.measure(case, lambda _: None).values
    assert values["peak_bytes"] > values["before_bytes"]
    if phase == "forward":
        assert "layers" in values["saved"]["reason"]
    else:
        assert values["gradient_bytes"] > 0
        assert "block_gradient_bytes" not in values


def test_blocks_are_found_in_either_kind_of_list() -> None:
    model = torch.nn.Module()
    assert blocks_of(model) == []
    for kind in (torch.nn.ModuleList, torch.nn.Sequential):
        blocks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        model.layers = kind()
        for block in blocks:
            model.layers.append(block)
        assert blocks_of(model) == blocks


@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_another_attention_can_be_recorded_under_autocast(attention: str) -> None:
    assert measured(attention=attention, autocast="bfloat16")["saved"]["total_bytes"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["forward", "step"])
def test_on_a_gpu_the_peak_is_near_the_allocators_own(phase: str) -> None:
    case = case_of("small", 128, phase, device="cuda")
    values = memory_profile.measure(case, lambda _: None).values
    # Events carry what was asked for, the allocator counts blocks of 512 bytes.
    assert values["peak_bytes"] == pytest.approx(values["allocator_peak_bytes"], rel=0.01)
    assert values["peak_reserved_bytes"] >= values["peak_bytes"]
    assert values["peak_bytes"] >= accounted(case)["accounted_bytes"]
    if phase == "step":
        block = accounted(case)["accounted_gradient_bytes"]
        assert values["block_gradient_bytes"] == block
    else:
        assert values["saved"]["total_bytes"] == sum(accounted(case)["saved_accounted"].values())


# The accounting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [16, 64])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("phase", ["forward", "step"])
def test_no_peak_is_below_the_least_that_is_accounted(context: int, autocast: str, phase: str) -> None:
    case = tiny(context_length=context, autocast=autocast, phase=phase)
    assert memory_profile.measure(case, lambda _: None).values["peak_bytes"] >= accounted(case)["accounted_bytes"]


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("choice", [{}, {"rope": "2026"}, {"formulation": "fused"}])
def test_one_block_saves_what_is_accounted_item_by_item(autocast: str, choice: dict[str, str]) -> None:
    case = tiny(autocast=autocast, **choice)
    saved = memory_profile.measure(case, lambda _: None).values["saved"]
    known = accounted(case)["saved_accounted"]
    assert saved["total_bytes"] == sum(known.values())
    named = memory_profile.named_items(saved["items"], known)
    assert all(known[item["name"]] == item["bytes"] for item in named)
    assert [item["bytes"] for item in named] == sorted(known.values(), reverse=True)


def test_where_the_accounting_has_other_sizes_nothing_gets_a_name() -> None:
    items = [{"bytes": 4, "place": "a"}, {"bytes": 8, "place": "b"}]
    assert [item["name"] for item in memory_profile.named_items(items, {"x": 4, "y": 4})] == ["", ""]
    assert [item["name"] for item in memory_profile.named_items(items, {"x": 4, "y": 8})] == ["y", "x"]


def test_what_is_not_known_of_other_models_and_attention_is_not_made_up() -> None:
    for case in (tiny(attention="flash"), tiny(model="somebody:Model"), tiny(compile="model")):
        found = accounted(case)
        assert found["saved_accounted"] == found["held_after_forward"] == {}
        assert math.isnan(found["accounted_bytes"])
        assert found["residual_bytes"] > 0
    others = accounted(tiny(model="somebody:Model"))
    assert math.isnan(others["weights_bytes"])
    assert math.isnan(others["accounted_gradient_bytes"])
    assert others["known_sizes"] == {}


def test_sizes_that_are_alike_share_a_name() -> None:
    case = tiny(context_length=256)  # heads · length = d_ff
    assert "a matrix of scores or a hidden activation of the feed-forward" in accounted(case)["known_sizes"]
    assert len(set(accounted(case)["known_sizes"].values())) == len(accounted(case)["known_sizes"])


def test_predictions_have_a_row_per_case() -> None:
    predicted = memory_profile.predict([case_of(), case_of(phase="step")], PEAKS)
    forward, step = predicted["accounted_bytes"]
    assert forward < step
    assert predicted["moments_bytes"].tolist() == [0, 2 * predicted["weights_bytes"][0]]


# Summarising ---------------------------------------------------------------------------------------------------


def summary(store: Store, *records: Any, **options: Any) -> pd.DataFrame:
    return memory_profile.summarise(records, PEAKS, store=store, **options)


def test_a_row_has_the_record_beside_the_accounting_and_the_device(store: Store) -> None:
    (row,) = summary(store, memory_record(case_of())).to_dict("records")
    assert row["peak_bytes"] >= row["accounted_bytes"]
    assert row["saved_bytes"] == row["saved_accounted_bytes"]
    assert row["memory_bytes"] == PEAKS.memory_bytes
    assert isinstance(row["outline"], Outline)
    assert math.isnan(row["a100_peak_at_least_bytes"])


def test_published_peaks_stand_beside_the_same_work_alone(store: Store) -> None:
    rows = summary(store, *[memory_record(case_of("gpt2-xl", context)) for context in (128, 1024)])
    published = rows["a100_peak_at_least_bytes"]
    assert published[0] == 13e9
    assert math.isnan(published[1])


def test_a_record_without_a_peak_keeps_what_is_accounted(store: Store) -> None:
    case = case_of()
    missing = missing_record("memory_profile", "toy-1c", memory_record(case).case, "run it")
    oom = record_of("memory_profile", case, Measurement(values={"available_bytes": 1}), status="oom", reason="large")
    for record in (missing, oom):
        (row,) = summary(store, record).to_dict("records")
        assert math.isnan(row["peak_bytes"])
        assert row["outline"] is None
        assert row["accounted_bytes"] > 0
        assert row["saved"] == row["largest"] == ()


def test_noise_marks_no_bytes_and_stale_records_are_marked(store: Store) -> None:
    record = memory_record(case_of(), noise={"flags": ["spread 40 %"]})
    (row,) = summary(store, record, fingerprint={**FINGERPRINT, "torch": "3.0"}).to_dict("records")
    assert row["noise"] == ""
    assert "torch" in row["stale"]


def test_published_peaks_are_no_less_than_the_least(store: Store) -> None:
    rows = memory_profile.published_peaks(store)
    sound = rows[rows["remark"] == ""]
    assert len(sound) == len(rows) - 1
    assert (sound["accounted_bytes"] < sound["below_bytes"]).all()
    # Of a forward the least is the peak, but for what is temporary.
    forward = sound[sound["phase"] == "forward"]
    assert (forward["accounted_bytes"] >= forward["at_least_bytes"]).all()


def test_the_predicted_time_grows_with_the_model() -> None:
    small, large = (memory_profile.predicted_seconds(case_of(size), PEAKS, 2.0) for size in ("tiny", "small"))
    assert small < large

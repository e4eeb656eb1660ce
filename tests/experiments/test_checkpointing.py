"""Policies are timed and counted on real steps, and stand beside what their plans say, and beside no policy."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from checkpointing_records import case_of, record_for
from profile_records import FINGERPRINT, PEAKS

from cs336_systems.bench import sweep
from cs336_systems.bench.records import Store, missing_record
from cs336_systems.bench.sweep import OutOfMemory
from cs336_systems.errors import UserError
from cs336_systems.experiments import checkpointing
from cs336_systems.experiments.checkpointing import NARROW, Case, accounted, is_of_depth

pytestmark = pytest.mark.problem("gradient_checkpointing")

POLICIES = ("none", "every-1", "every-2", "nested", "from-start", "selective")


def measured(policy: str, **changes: Any) -> dict[str, Any]:
    case = case_of(policy, **{"num_layers": 4, "context_length": 16, "warmup": 0, "steps": 1, **changes})
    values: dict[str, Any] = checkpointing.measure(case, lambda _: None).values
    return values


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_measured_step_does_what_is_counted_and_holds_no_less(policy: str) -> None:
    values = measured(policy)
    counted = accounted(case_of(policy, num_layers=4, context_length=16))
    assert values["flops"] == counted["accounted_flops"]
    assert sum(values["block_runs"]) == 4 * counted["accounted_block_runs"]
    assert values["peak_bytes"] >= counted["accounted_step_bytes"]
    # But for √d, which autograd keeps once per run of a block.
    assert 0 <= values["peak_bytes"] - values["planned_bytes"] <= 8 * 2 * 4


def test_what_is_there_before_is_counted_apart_and_the_same_under_every_policy() -> None:
    one, other = (measured(policy, context_length=128) for policy in ("none", "every-1"))
    assert one["before_bytes"] == other["before_bytes"] > 0
    assert other["peak_bytes"] < one["peak_bytes"]


def test_times_are_kept_apart_from_warmups_and_parts_end_with_the_whole() -> None:
    parts: list[float] = []
    case = case_of("every-2", num_layers=2, context_length=16, warmup=1, steps=2)
    samples = checkpointing.measure(case, parts.append).samples
    assert {name: len(values) for name, values in samples.items()} == {"step_ms": 2, "warmup_ms": 1}
    assert parts == sorted(parts)
    assert len(parts) == 4


def test_what_cannot_fit_is_told_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("every-1")
    needed = accounted(case)["accounted_step_bytes"]
    monkeypatch.setattr(checkpointing, "available_bytes", lambda _: needed)
    with pytest.raises(OutOfMemory, match="smaller groups"):
        checkpointing.measure(case, lambda _: None)


def test_a_sweep_of_the_smallest_grid_is_kept_whole(store: Store) -> None:
    cells = checkpointing.grid(
        contexts={"tiny": [16]}, layers=2, policies=["none", "every-2"], depths=[2], depth_policies=["nested"],
        device="cpu", warmup=0, steps=1,
    )  # fmt: skip
    records = sweep.run(checkpointing, cells, store=store).records
    assert [record.status for record in records] == ["ok"] * 3
    assert json.loads(json.dumps(records[0].measurement.values)) == records[0].measurement.values


THEIRS = """
from torch import nn

class Model(nn.Module):
    def __init__(self, vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, d_ff), nn.Tanh(), nn.Linear(d_ff, d_model)) for _ in range(num_layers)
        )
    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
"""


def test_somebody_elses_model_is_measured_and_not_accounted(write_module: Callable[[str], str]) -> None:
    model = f"{write_module(THEIRS)}:Model"
    one, other = (measured(policy, model=model, context_length=512) for policy in ("none", "every-1"))
    assert other["flops"] > one["flops"]
    assert other["peak_bytes"] < one["peak_bytes"]
    assert one["block_runs"] == []  # what is called is not what runs
    assert all(math.isnan(value) for value in accounted(case_of("every-1", model=model)).values())


# The grid ------------------------------------------------------------------------------------------------------


def test_the_grid_has_policies_on_sizes_and_then_on_depths() -> None:
    cases = [cell.case for cell in checkpointing.grid(device="cpu")]
    split = [is_of_depth(case) for case in cases]
    assert split == sorted(split)
    assert {case.num_layers for case in cases if not is_of_depth(case)} == {8}
    assert [case.num_layers for case in cases if is_of_depth(case)][:: len(checkpointing.DEPTH_POLICIES)] == [
        2, 4, 8, 16, 32,
    ]  # fmt: skip
    assert {case.phase for case in cases} == {"forward-backward"}


def test_without_a_number_of_layers_a_size_has_its_own() -> None:
    cells = checkpointing.grid(contexts={"xl": [2048]}, layers=None, policies=["every-32"], depths=[], device="cpu")
    assert [(cell.case.num_layers, cell.case.size) for cell in cells] == [(32, "xl")]


def test_a_case_is_called_by_the_size_whose_width_it_has() -> None:
    assert case_of("none", num_layers=7).size == "tiny"
    assert dataclasses.replace(case_of("none"), d_ff=24).size == "custom"
    narrow = Case(**dataclasses.asdict(NARROW), device="cpu")
    assert narrow.size == "narrow"
    assert "every-1" in str(dataclasses.replace(narrow, checkpointing="every-1"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policies": ["every-9"]}, "from 1 to 8"),
        ({"policies": ["nestd"]}, "did you mean 'nested'"),
        ({"depth_policies": ["every-4"]}, "from 1 to 2"),
        ({"contexts": {"tini": [16]}}, "did you mean 'tiny'"),
    ],
)
def test_what_no_grid_can_have_is_an_error(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        checkpointing.grid(device="cpu", **changes)


# Predictions ---------------------------------------------------------------------------------------------------


def test_predictions_have_a_row_per_case_and_know_that_reruns_take_time() -> None:
    cases = [case_of("none"), case_of("from-start")]
    predicted = checkpointing.predict(cases, PEAKS)
    assert predicted["accounted_work"].tolist()[0] == 1
    plain, rerun = (checkpointing.predicted_seconds(case, PEAKS, 2.0) for case in cases)
    assert plain < rerun


def test_groups_of_xl_are_answered_without_a_gpu() -> None:
    groups = checkpointing.group_sizes("xl", 2048, 4)
    assert groups["group"].tolist() == [0.5, *range(1, 33)]
    best = groups.loc[groups["activation_bytes"].idxmin()]
    assert best["group"] == 1
    assert groups["compiled_bytes"].idxmin() == best.name
    assert (groups["compiled_bytes"].dropna() < groups["activation_bytes"][1:]).all()


# Summarising ---------------------------------------------------------------------------------------------------


def summary(store: Store, *records: Any, **options: Any) -> pd.DataFrame:
    return checkpointing.summarise(records, PEAKS, store=store, **options)


def test_times_and_peaks_are_multiples_of_those_without_a_policy(store: Store) -> None:
    records = [record_for(case_of(policy), ms=ms) for policy, ms in (("none", 10.0), ("every-1", 13.0))]
    rows = summary(store, *records)
    assert rows["times_none"].tolist() == [1.0, 1.3]
    assert rows["peak_of_none"][1] == rows["peak_bytes"][1] / rows["peak_bytes"][0]


def test_models_that_differ_are_not_compared(store: Store) -> None:
    records = [record_for(case_of("none")), record_for(case_of("every-1", context_length=64))]
    assert summary(store, *records)["times_none"].isna().tolist() == [False, True]


def test_a_record_without_a_time_keeps_what_is_accounted(store: Store) -> None:
    record = record_for(case_of("every-1"))
    (row,) = summary(store, missing_record("checkpointing", "toy-1c", record.case, "run it")).to_dict("records")
    assert math.isnan(row["peak_bytes"])
    assert row["accounted_step_bytes"] > 0


def test_stale_records_are_marked(store: Store) -> None:
    (row,) = summary(store, record_for(case_of()), fingerprint={**FINGERPRINT, "torch": "3.0"}).to_dict("records")
    assert "torch" in row["stale"]

"""Published times are predicted by the other sizes, by operators and three constants, and better than without them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.analysis.published_times import (
    PublishedTable,
    linear_left_out,
    plan_time,
    predict_table,
    published_estimate,
    published_tables,
)
from cs336_systems.analysis.step_time import Constants, TimedStep, calibrate, estimate_seconds, floor_seconds
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("benchmarking_script")

TABLES = published_tables(Store(local=Path("none"), published=repository_root() / "data").reference)
IDS = [f"{table.gpu}, {table.title}" for table in TABLES]
EAGER_ERROR, COMPILED_ERROR = 0.10, 0.15


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES, ids=IDS)
def test_a_left_out_size_is_predicted_by_three_constants_and_better_than_by_a_linear_fit(table: PublishedTable) -> None:
    prediction = predict_table(table)
    assert len(dataclasses.fields(Constants)) == 3
    assert prediction.error < (EAGER_ERROR if table.chosen.compile == "none" else COMPILED_ERROR)
    assert prediction.error < prediction.linear_error
    assert len(prediction.left_out_s) == len(table.rows)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES, ids=IDS)
def test_the_constants_are_physical_and_no_estimate_is_below_its_floor(table: PublishedTable) -> None:
    prediction = predict_table(table)
    constants = prediction.constants
    assert 0 < constants.matrix_fraction <= 1
    assert 0 < constants.bandwidth_fraction <= 1
    assert 1 <= constants.host_step_us <= 100
    for row, left_out_s in zip(table.rows, prediction.left_out_s, strict=True):
        assert left_out_s >= floor_seconds(row.chosen, gpu_peaks(table.gpu)) * (1 - 1e-12)


def test_every_published_time_is_in_a_table_once() -> None:
    reference = repository_root() / "data" / "reference"
    files = {table.file for table in TABLES}
    # Those after few warm-ups are times of the warm-up, not of the step.
    assert files == {
        path.stem
        for path in [*reference.glob("e2e_*.csv"), reference / "transformer_train_step_h100.csv"]
        if not path.stem.endswith(("_no_warmup_a100", "_one_warmup_a100"))
    }
    assert len({(table.file, table.column) for table in TABLES}) == len(TABLES)
    for table in TABLES:
        lines = (reference / f"{table.file}.csv").read_text().strip().splitlines()
        assert len(table.rows) == len(lines) - 1
        assert {row.chosen.batch_size for row in table.rows} == {4}
        assert {row.chosen.device for row in table.rows} == {"cuda"}


def test_the_linear_fit_is_exact_where_times_are_linear_and_leaves_the_size_out() -> None:
    table = TABLES[0]

    def linear(chosen: StepConfig) -> float:
        return 0.004 * chosen.num_layers + 1e-9 * chosen.num_layers * chosen.context_length * chosen.d_model

    timed = [TimedStep(row.chosen, linear(row.chosen)) for row in table.rows]
    assert linear_left_out(timed) == pytest.approx([each.seconds for each in timed], rel=1e-6)
    own = timed[0].model
    wrong = [dataclasses.replace(each, seconds=2 * each.seconds) if each.model == own else each for each in timed]
    same = np.isclose(linear_left_out(wrong), linear_left_out(timed), rtol=1e-9)
    assert [bool(each) for each in same] == [each.model == own for each in timed]


# Plans, on tables that are small and quickly counted -----------------------------------------------------------

SMALL = StepConfig(32, 64, 2, 2, 16, "cuda", vocab_size=50, batch_size=2)
SIZES: tuple[dict[str, Any], ...] = ({"num_layers": 1}, {"num_layers": 2}, {"d_model": 64, "d_ff": 256})


def toy_table(gpu: str, **kind: Any) -> PublishedTable:
    """Times that a GPU with known constants would have."""
    rows = []
    for size in SIZES:
        for context in (16, 64):
            chosen = dataclasses.replace(SMALL, **size, **kind, context_length=context)
            seconds = estimate_seconds(chosen, gpu_peaks(gpu), Constants(0.5, 0.5, 8e-6))
            rows.append(TimedStep(chosen, seconds))
    return PublishedTable(gpu, "toy", "seconds", tuple(rows))


TOYS = (
    toy_table("a100-40gb", phase="forward"),
    toy_table("a100-40gb", phase="step"),
    toy_table("a100-40gb", phase="step", autocast="bfloat16"),
    toy_table("h100-sxm", phase="step"),
    toy_table("h100-sxm", phase="step", compile="model"),
)


@pytest.mark.parametrize("table", TOYS, ids=lambda table: f"{table.gpu}, {table.title}")
def test_a_step_of_a_tables_kind_is_planned_with_its_constants(table: PublishedTable) -> None:
    chosen = dataclasses.replace(table.chosen, num_layers=4, context_length=32)
    plan = plan_time(chosen, table.gpu, TOYS)
    peaks = gpu_peaks(table.gpu)
    assert plan.prediction.table == table
    assert not plan.is_extrapolated
    assert plan.estimate_s == estimate_seconds(chosen, peaks, calibrate(table.rows, peaks))
    assert plan.estimate_s >= plan.floor_s == floor_seconds(chosen, peaks)


@pytest.mark.parametrize(
    ("gpu", "kind", "expected", "differs_in"),
    [
        ("h200", {"phase": "step"}, TOYS[3], ("GPU",)),  # whose matrix rate is the H100's
        ("a100-80gb", {"phase": "forward"}, TOYS[0], ("GPU",)),
        ("h100-sxm", {"phase": "forward"}, TOYS[3], ("phase",)),
        ("h200", {"phase": "step", "compile": "model"}, TOYS[4], ("GPU",)),
        ("h100-sxm", {"phase": "step", "autocast": "bfloat16"}, TOYS[2], ("GPU",)),
        ("h100-sxm", {"phase": "step", "compile": "blocks"}, TOYS[4], ("compile",)),
        ("a100-40gb", {"phase": "step", "formulation": "fused"}, TOYS[1], ("formulation",)),
        ("b200", {"phase": "inference"}, TOYS[3], ("GPU", "phase")),
    ],
)
def test_a_step_that_no_table_has_is_extrapolated_from_the_nearest(
    gpu: str, kind: dict[str, Any], expected: PublishedTable, differs_in: tuple[str, ...]
) -> None:
    plan = plan_time(dataclasses.replace(SMALL, **kind), gpu, TOYS)
    assert plan.prediction.table == expected
    assert plan.differs_in == differs_in
    assert plan.is_extrapolated


def test_an_unknown_gpu_and_attention_are_errors_that_list_the_known() -> None:
    with pytest.raises(UserError, match="unknown GPU 'h3'; known: a100-40gb, a100-80gb, h100-sxm"):
        plan_time(SMALL, "h3", TOYS)
    with pytest.raises(UserError, match="expected reference"):
        plan_time(dataclasses.replace(SMALL, attention="sdpa"), "h200", TOYS)


def test_without_a_table_of_such_steps_on_such_a_gpu_there_is_no_estimate(store: Store) -> None:
    for gpu, chosen in (
        ("h200", SMALL),
        ("h100-sxm", dataclasses.replace(SMALL, phase="forward")),
        ("a100-40gb", dataclasses.replace(SMALL, attention="sdpa")),
    ):
        assert math.isnan(published_estimate(chosen, gpu, store.reference))

"""LayerNorm by steps is LayerNorm, and a step in half precision costs what its range and its digits say."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from profile_records import PEAKS

from cs336_systems.analysis.rounding import format_of
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Store, missing_record
from cs336_systems.errors import UserError
from cs336_systems.experiments import layernorm_precision as experiment
from cs336_systems.experiments.layernorm_precision import (
    ALL,
    ALL_SUMMED_IN_FLOAT32,
    EPS,
    LOST,
    REFERENCE,
    REFERENCE_FLOAT32,
    ROWS,
    STEPS,
    VARIANTS,
    Case,
)

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

every_half = pytest.mark.parametrize("precision", experiment.HALVES)


def case(precision: str = "float16", scale: float = 1.0, **changes: Any) -> Case:
    return Case(**{"precision": precision, "scale": scale, "device": "cpu", "width": 128, "rows": 8, **changes})


def measured(of: Case) -> dict[str, Any]:
    values: dict[str, Any] = experiment.measure(of, lambda _: None).values
    return values


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_without_a_step_in_half_precision_it_is_pytorchs_layer_norm_in_float64(scale: float) -> None:
    x, weight, bias = experiment.inputs(case(scale=scale))
    expected = torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, EPS)
    torch.testing.assert_close(experiment.layer_norm(x, weight, bias), expected, rtol=1e-11, atol=1e-11)


def test_a_step_in_float64_costs_nothing_whichever_it_is() -> None:
    x, weight, bias = experiment.inputs(case())
    exact = experiment.layer_norm(x, weight, bias)
    for steps in VARIANTS.values():
        # Where sums are said to be in float32 they are.
        tolerance = 1e-12 if not any("float32" in step for step in steps) else 1e-6
        found = experiment.layer_norm(x, weight, bias, in_half=steps, half=torch.float64)
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@every_half
def test_a_step_that_rounds_once_loses_about_a_roundoff_and_a_sum_more(precision: str) -> None:
    errors, roundoff = measured(case(precision, width=1024))["errors"], format_of(precision).unit_roundoff
    for step in ("input", "mean, summed in float32", "centre", "rsqrt", "scale"):
        assert 0.1 * roundoff < errors[step] < 2 * roundoff
    for one_by_one in ("mean", "variance"):
        assert errors[one_by_one] > 4 * errors[f"{one_by_one}, summed in float32"]
    assert errors[ALL] > max(errors[step] for step in STEPS) / 2


@every_half
def test_pytorchs_own_in_half_precision_has_the_error_of_its_input_and_output_alone(precision: str) -> None:
    errors, roundoff = measured(case(precision))["errors"], format_of(precision).unit_roundoff
    assert errors[REFERENCE] < 2 * roundoff
    assert errors[REFERENCE_FLOAT32] < 2 * format_of("float32").unit_roundoff
    assert errors[ALL_SUMMED_IN_FLOAT32] < 4 * errors[REFERENCE]


@every_half
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 10.0, 30.0, 1e3, 1e4])
def test_a_step_is_lost_where_its_largest_number_is_too_large_and_only_there(precision: str, scale: float) -> None:
    values, most = measured(case(precision, scale, width=1024)), float(format_of(precision).largest)
    too_large = {name for name in VARIANTS if values["extremes"][name] > most}
    lost = {name for name in VARIANTS if values["errors"].get(name, math.inf) >= LOST}
    assert lost == too_large
    assert not lost or precision == "float16"


def test_the_mean_one_by_one_rounds_every_sum_and_in_float32_once() -> None:
    x = torch.full((1, 1000), 0.01, dtype=torch.bfloat16)
    assert experiment.mean_one_by_one(x).item() == torch.tensor(4.0 / 1000, dtype=torch.bfloat16).item()
    assert experiment.mean_in_float32(x).item() == x[0, 0].item()
    assert experiment.mean_in_float32(x).dtype == experiment.mean_one_by_one(x).dtype == torch.bfloat16


def test_inputs_have_the_scale_that_is_asked_for_and_are_the_same_each_time() -> None:
    x, *_ = experiment.inputs(case(scale=100.0, width=4096))
    assert x.std().item() == pytest.approx(100, rel=0.05)
    assert x.mean().item() == pytest.approx(100, rel=0.05)
    assert torch.equal(x, experiment.inputs(case(scale=100.0, width=4096))[0])


@pytest.mark.gpu
@every_half
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_gpu_loses_the_same_steps(precision: str, scale: float) -> None:
    on_gpu, on_cpu = (measured(case(precision, scale, device=device)) for device in ("cuda", "cpu"))
    assert on_gpu["not_finite"] == on_cpu["not_finite"]
    for name, error in on_cpu["errors"].items():
        assert on_gpu["errors"][name] == pytest.approx(error, rel=0.5, abs=1e-6)


# Summarising ---------------------------------------------------------------------------------------------------


def test_a_record_survives_the_way_to_a_file_and_a_summary_tells_what_is_not_finite(store: Store) -> None:
    cells = experiment.grid(scales=[1, 1000], width=128, device="cpu")
    records = sweep.run(experiment, cells, store=store).records
    assert {record.status for record in records} == {"ok"}
    json.dumps([record.measurement.values for record in records], allow_nan=False)
    rows = experiment.summarise(records, PEAKS, store=store)
    assert len(rows) == len(cells) * len(ROWS)
    assert rows["error"].map(math.isinf).tolist() == (rows["not_finite"] > 0).tolist()
    assert (rows["not_finite"] > 0).any()
    finite = rows[rows["not_finite"] == 0]
    assert (finite["roundoffs"] * finite["unit_roundoff"]).tolist() == pytest.approx(finite["error"].tolist())


def test_the_error_of_pytorchs_own_stands_beside_every_other(store: Store) -> None:
    rows = experiment.summarise(
        sweep.run(experiment, experiment.grid(scales=[1.0], width=64, device="cpu"), store=store).records, PEAKS
    )
    for _, group in rows.groupby("case"):
        (own,) = group[group["step"] == REFERENCE]["error"]
        assert (group["reference_error"] == own).all()


def test_a_missing_record_has_rows_without_errors() -> None:
    missing = missing_record("layernorm_precision", "toy-1c", dataclasses.asdict(case()), "run it")
    rows = experiment.summarise([missing], PEAKS)
    assert rows["step"].tolist() == list(ROWS)
    assert rows[["error", "roundoffs", "reference_error", "largest"]].isna().all(axis=None)


def test_a_whole_scale_is_the_same_case_as_its_decimal() -> None:
    one, other = (experiment.grid(scales=scales, device="cpu") for scales in ([1], [1.0]))
    assert [cell.case for cell in one] == [cell.case for cell in other]
    assert isinstance(one[0].case.scale, float)
    assert experiment.predicted_seconds(one[0].case, PEAKS, 2.0) > 0
    assert pd.Series([len(steps) for steps in VARIANTS.values()]).max() == len(STEPS) - 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float32"}, "unknown precision 'float32'.*float16, bfloat16"),
        ({"scale": 0.0}, "scale must be above 0 and finite, found 0.0"),
        ({"scale": math.inf}, "scale must be above 0"),
        ({"width": 1}, "at least 1 row of 2 elements, found 8 of 1"),
    ],
)
def test_what_cannot_be_computed_is_an_error_that_says_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        case(**changes)

"""The precisions of the small model are those that autocast's rules give, on CUDA and on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from profile_records import PEAKS

from cs336_systems.bench import sweep
from cs336_systems.bench.records import Store, missing_record
from cs336_systems.errors import UserError
from cs336_systems.experiments import autocast_dtypes as experiment
from cs336_systems.experiments.autocast_dtypes import GRADIENTS, LOSS, OBSERVED, PARAMETERS, Case, ToyModel
from cs336_systems.presentation.autocast_dtypes import expected

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

every_half = pytest.mark.parametrize("half", experiment.HALVES)


def observed(rules: str, half: str, device: str = "cpu") -> dict[str, str]:
    dtypes: dict[str, str] = experiment.measure(Case(rules, half, device), lambda _: None).values["dtypes"]
    return dtypes


@every_half
def test_on_cudas_rules_products_are_in_half_precision_and_norm_and_loss_in_float32(half: str) -> None:
    assert observed("cuda", half) == {
        PARAMETERS: "float32",
        "output of the first linear layer": half,
        "output of ReLU": half,
        "output of LayerNorm": "float32",
        "logits": half,
        LOSS: "float32",
        GRADIENTS: "float32",
    }


@every_half
def test_what_is_observed_is_what_the_operators_rules_say(half: str) -> None:
    assert observed("cuda", half) == {name: expected(name, half) for name in OBSERVED}


@every_half
def test_a_cpus_own_autocast_leaves_the_norm_in_half_precision(half: str) -> None:
    on_cuda, on_cpu = observed("cuda", half), observed("cpu", half)
    assert [name for name in OBSERVED if on_cuda[name] != on_cpu[name]] == ["output of LayerNorm"]
    assert on_cpu["output of LayerNorm"] == half


@pytest.mark.gpu
@every_half
def test_a_gpu_does_what_its_rules_do_on_a_cpu(half: str) -> None:
    assert observed("cuda", half, "cuda") == observed("cuda", half)


def test_no_hook_stays_on_the_model() -> None:
    model = ToyModel(4, 3)
    x, targets = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    experiment.observe(model, x, targets, "cpu", torch.bfloat16)
    assert not any(module._forward_hooks for module in model.modules())


def test_on_a_gpu_a_cpus_rules_are_skipped_with_the_reason() -> None:
    cells = experiment.grid(device="cuda")
    assert {cell.case.rules: cell.skip_reason for cell in cells} == {
        "cuda": None,
        "cpu": "a CPU's rules are those of tensors on a CPU",
    }
    assert all(cell.skip_reason is None for cell in experiment.grid(device="cpu"))


def test_a_summary_has_a_row_per_tensor_and_none_is_known_without_a_record(store: Store) -> None:
    cells = experiment.grid(device="cpu")
    records = sweep.run(experiment, cells, store=store).records
    missing = missing_record("autocast_dtypes", "toy-1c", dataclasses.asdict(cells[0].case), "run it")
    rows = experiment.summarise([*records, missing], PEAKS, store=store)
    assert len(rows) == 5 * len(OBSERVED)
    assert (rows["dtype"] == "").tolist() == (rows["status"] == "missing").tolist()
    assert rows["case"].nunique() == 4  # the missing one is of a case that is there
    assert experiment.predicted_seconds(cells[0].case, PEAKS, 2.0) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rules": "tpu"}, "unknown rules 'tpu'.*cuda, cpu"), ({"autocast": "fp16"}, "unknown autocast 'fp16'.*float16")],
)
def test_what_is_not_known_is_an_error_that_lists_the_known(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Case(**{"rules": "cuda", "autocast": "float16", "device": "cpu", **options})

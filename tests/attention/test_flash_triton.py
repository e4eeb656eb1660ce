"""The Triton kernels equal float64: on a CPU, interpreted in a process of its own, and on a GPU if there is one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cs336_systems.errors import UserError

pytest.importorskip("triton", reason="Triton is for Linux only")

import interpreted_flash
from interpreted_flash import Case, drawn, errors, failures, run, same_bits, table

from cs336_systems.attention.flash_triton import FlashAttentionTriton

pytestmark = [pytest.mark.problem("flash_forward"), pytest.mark.problem("flash_backward")]
CASES = [str(case) for case in table()]
FORMS = 40
"""Heads, head dimensions, masks and layouts that a thousand random shapes are drawn with."""
Report = dict[str, Any]


def report_of(device: str, **environment: str) -> Report:
    program = Path(interpreted_flash.__file__)
    paths = [str(program.parent), str(program.parents[2]), os.environ.get("PYTHONPATH", "")]
    known = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), device],
        env={**known, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=220 if device == "cpu" else 900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Report = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of("cpu", TRITON_INTERPRET="1")


def assert_within(found: Any) -> None:
    assert "raised" not in found, found["raised"]
    assert set(found) == {"output", "logsumexp", "grad_query", "grad_key", "grad_value"}
    too_large = {name: (error, bound) for name, (error, bound) in found.items() if not error <= bound}
    assert not too_large


def assert_all_true(found: Any) -> None:
    assert "raised" not in found, found["raised"]
    assert found
    assert all(found), found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_results_err_no_more_than_a_few_times_what_the_reference_errs(report: Report, case: str) -> None:
    assert_within(report[case])


@pytest.mark.slow
def test_every_candidate_that_tuning_may_choose_gives_the_same(report: Report) -> None:
    assert report["every candidate"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a second run", id="a second run gives the same bits"),
        pytest.param("other items", id="an item of the batch does not touch the others"),
        pytest.param("other heads", id="a head does not touch the others"),
        pytest.param("parts of the batch", id="a batch too large for a grid is computed in parts"),
        pytest.param("masked keys", id="masked keys and values may hold anything finite"),
        pytest.param("hidden rows", id="a row without a visible key gives nothing and takes no gradient"),
        pytest.param("the model's form", id="the form that the model calls is the same"),
        pytest.param("exact values", id="answers that are exact come out exact"),
        pytest.param("the operators", id="the operators do as their schemas and fake implementations say"),
        pytest.param("no graph break", id="torch.compile carries it without a graph break"),
        pytest.param("compiled equals plain", id="the compiled backward gives what the plain one gives"),
    ],
)
def test_what_holds_of_every_input_holds(report: Report, name: str) -> None:
    assert_all_true(report[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("refuses head dimension 257", ["up to 256", "found 257"]),
        ("refuses float64", ["float32, float16 or bfloat16", "torch.float64"]),
        ("refuses values of another width", ["one dimension", "found 16 and 8"]),
        ("refuses an unknown precision", ["unknown precision 'tf64'", "ieee", "tf32"]),
        ("refuses an unknown backward", ["unknown backward 'tritn'", "triton", "compiled"]),
        ("refuses an unknown alignment", ["unknown alignment 'middle'", "top-left", "lower-right"]),
    ],
)
def test_what_no_kernel_takes_is_told_with_what_was_expected_and_found(
    report: Report, name: str, told: list[str]
) -> None:
    assert not [part for part in told if part not in report[name]], report[name]


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 16, 16)
    with pytest.raises(UserError, match=r"CUDA device, found cpu.*PyTorch implementation.*TRITON_INTERPRET=1"):
        FlashAttentionTriton.apply(x, x, x)


# On a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_of_gpu() -> Report:
    return report_of("cuda")


@pytest.mark.gpu
@pytest.mark.timeout(1000)  # the first of them compiles for all
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_results_err_no_more_than_a_few_times_what_the_reference_errs(
    report_of_gpu: Report, case: str
) -> None:
    assert_within(report_of_gpu[case])


@pytest.mark.gpu
def test_on_a_gpu_every_candidate_that_tuning_may_choose_gives_the_same(report_of_gpu: Report) -> None:
    assert report_of_gpu["every candidate"] == []


@pytest.mark.gpu
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", ["exact values", "hidden rows", "masked keys", "no graph break", "other items"])
def test_on_a_gpu_what_holds_of_every_input_holds(report_of_gpu: Report, name: str) -> None:
    assert_all_true(report_of_gpu[name])


def random_case(seed: int, dtype: str) -> Case:
    chance = random.Random(seed)
    key_heads = chance.choice([1, 2, 3])
    return Case(
        (chance.randint(1, 700), chance.randint(1, 700)),
        chance.choice([*interpreted_flash.MASKS]),
        dtype,
        chance.choice([16, 24, 40, 64, 96, 128, 160, 256]),
        chance.choice([None, (key_heads * chance.choice([1, 2, 4]), key_heads)]),
        chance.choice([*interpreted_flash.LAYOUTS]),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(12))
def test_on_a_gpu_inputs_of_random_shapes_equal_float64(seed: int, dtype: str) -> None:
    assert_within(errors(random_case(seed, dtype), "cuda"))


def many_cases(dtype: str, count: int) -> list[Case]:
    """Random lengths; the rest is drawn from a few forms, for which alone the compiler is needed."""
    chance = random.Random(0)
    return [
        random_case(seed % FORMS, dtype)._replace(lengths=(chance.randint(1, 700), chance.randint(1, 700)))
        for seed in range(count)
    ]


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu_inputs_of_a_thousand_random_shapes_equal_float64(dtype: str) -> None:
    cases = many_cases(dtype, 1000)
    wrong = failures(errors, cases, "cuda")
    assert not wrong, f"{len(wrong)} of {len(cases)} cases: " + "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_gpu_a_second_run_gives_the_same_bits(seed: int, dtype: str) -> None:
    case = random_case(seed, dtype)
    inputs = drawn(case, "cuda")
    assert all(same_bits(run(inputs, case.mask), run(inputs, case.mask)))

"""A published figure stands beside exactly the work it was published for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cs336_systems.analysis.published import PublishedSteps
from cs336_systems.bench.records import Store
from cs336_systems.model import SIZES, TransformerConfig

NOTHING = {"a100_ms": math.nan, "a100_std_ms": math.nan, "h100_ms": math.nan}


@pytest.fixture
def published(store: Store) -> PublishedSteps:
    return PublishedSteps(store.reference)


def at(size: str, context: int) -> TransformerConfig:
    return dataclasses.replace(SIZES[size], context_length=context)


# Read off the tables in data/reference/.
@pytest.mark.parametrize(
    ("size", "context", "options", "a100_ms", "a100_std_ms", "h100_ms"),
    [
        ("small", 128, {"phase": "forward"}, 40.4, 0.3, math.nan),
        ("xl", 512, {"phase": "forward"}, 839.9, 0.1, math.nan),
        ("gpt2-xl", 256, {"phase": "forward-backward"}, 873.9, 0.4, math.nan),
        ("large", 128, {"phase": "forward-backward"}, 284.5, 27.4, math.nan),
        ("medium", 512, {"phase": "step"}, 460.5, 0.5, 210.1),
        ("xl", 128, {"phase": "step"}, math.nan, math.nan, 471.3),  # out of memory on the A100
        ("medium", 256, {"phase": "step", "autocast": "bfloat16"}, 160.4, 0.3, math.nan),
        ("medium", 256, {"phase": "step", "compiled": True}, math.nan, math.nan, 97.0),
        ("medium", 256, {"phase": "step", "compiled": True, "tf32": True}, math.nan, math.nan, 88.1),
        ("small", 512, {"phase": "forward", "warmup": 0}, 105.4, 176.0, math.nan),
        ("small", 512, {"phase": "forward", "warmup": 1}, 46.8, 3.3, math.nan),
    ],
)
def test_a_published_row_is_found(
    published: PublishedSteps,
    size: str,
    context: int,
    options: dict[str, Any],
    a100_ms: float,
    a100_std_ms: float,
    h100_ms: float,
) -> None:
    expected = {"a100_ms": a100_ms, "a100_std_ms": a100_std_ms, "h100_ms": h100_ms}
    found = published.beside(at(size, context), batch_size=4, **options)
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (at("small", 128), {"phase": "step", "batch_size": 8}),
        (at("small", 128), {"phase": "forward", "batch_size": 1}),
        (dataclasses.replace(at("small", 128), vocab_size=50_257), {"phase": "step", "batch_size": 4}),
        (at("small", 1024), {"phase": "step", "batch_size": 4}),
        (at("tiny", 128), {"phase": "step", "batch_size": 4}),
        (at("10b", 128), {"phase": "step", "batch_size": 4}),
        (dataclasses.replace(at("small", 128), num_heads=6), {"phase": "step", "batch_size": 4}),
        (dataclasses.replace(at("small", 128), d_ff=2048), {"phase": "step", "batch_size": 4}),
        (dataclasses.replace(at("small", 128), num_layers=6), {"phase": "step", "batch_size": 4}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_nothing_is_found_for_work_that_nobody_published(
    published: PublishedSteps, config: TransformerConfig, options: dict[str, Any], warmup: int
) -> None:
    assert published.beside(config, warmup=warmup, **options) == pytest.approx(NOTHING, nan_ok=True)


@pytest.mark.parametrize(
    "options",
    [
        {"phase": "forward", "compiled": True},
        {"phase": "forward", "tf32": True},
        {"phase": "forward", "autocast": "bfloat16"},
        {"phase": "forward-backward", "autocast": "bfloat16"},
        {"phase": "forward-backward", "compiled": True},
        {"phase": "step", "autocast": "float16"},
        {"phase": "step", "autocast": "bfloat16", "compiled": True},
        {"phase": "step", "tf32": True},  # TF32 was published compiled only
        {"phase": "forward", "warmup": 0, "compiled": True},
        {"phase": "forward-backward", "warmup": 0},
        {"phase": "forward-backward", "warmup": 1},
        {"phase": "step", "warmup": 1, "autocast": "bfloat16"},
    ],
)
def test_nothing_is_found_for_a_setting_that_nobody_published(
    published: PublishedSteps, options: dict[str, Any]
) -> None:
    assert published.beside(at("small", 128), batch_size=4, **options) == pytest.approx(NOTHING, nan_ok=True)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_step_with_few_warm_ups_has_no_published_a100_time(published: PublishedSteps, warmup: int) -> None:
    found = published.beside(at("small", 128), phase="step", batch_size=4, warmup=warmup)
    assert math.isnan(found["a100_ms"])
    assert math.isnan(found["a100_std_ms"])


def test_only_the_named_tables_are_read(store: Store) -> None:
    read: list[str] = []

    def reference(name: str) -> Any:
        read.append(name)
        return store.reference(name)

    PublishedSteps(reference)
    assert sorted(read) == [
        "e2e_forward_a100",
        "e2e_forward_backward_a100",
        "e2e_forward_no_warmup_a100",
        "e2e_forward_one_warmup_a100",
        "e2e_train_step_a100",
        "e2e_train_step_bf16_autocast_a100",
        "transformer_train_step_h100",
    ]

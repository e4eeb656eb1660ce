"""A published figure stands beside exactly the work it was published for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cs336_systems.analysis.attention import PHASES, AttentionShape
from cs336_systems.analysis.published import PublishedAttention, PublishedFlash, PublishedSteps
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


# Attention -----------------------------------------------------------------------------------------------------

NO_ATTENTION = {"h100_forward_ms": math.nan, "h100_backward_ms": math.nan, "h100_kept_bytes": math.nan}


def one_head(head_dim: int, seq_len: int, **changes: Any) -> AttentionShape:
    return dataclasses.replace(AttentionShape(8, 1, seq_len, head_dim, is_causal=True), **changes)


# Read off the tables: seconds of a hundred passes, and MiB of which 64 are the matrix library's.
@pytest.mark.parametrize(
    ("shape", "setting", "forward_ms", "backward_ms", "kept_mib"),
    [
        (one_head(16, 256), (False, False), 0.312, 0.898, 4.9614),
        (one_head(128, 16_384), (False, False), 63.116, 132.443, 17_089.5),
        (one_head(64, 8192), (True, False), 6.771, 13.774, math.nan),
        (one_head(64, 8192), (True, True), 4.756, 10.033, math.nan),
        (one_head(32, 1024), (True, True), 0.371, 0.576, math.nan),
    ],
)
def test_a_published_time_of_attention_is_found(
    store: Store,
    shape: AttentionShape,
    setting: tuple[bool, bool],
    forward_ms: float,
    backward_ms: float,
    kept_mib: float,
) -> None:
    compiled, tf32 = setting
    found = PublishedAttention(store.reference).beside(shape, compiled=compiled, tf32=tf32)
    expected = {"h100_forward_ms": forward_ms, "h100_backward_ms": backward_ms, "h100_kept_bytes": kept_mib * 2**20}
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("shape", "compiled", "tf32"),
    [
        (one_head(64, 8192), False, True),  # eager attention was published in float32 alone
        (one_head(64, 2048), False, False),
        (one_head(80, 8192), False, False),
        (one_head(64, 8192, batch_size=1), False, False),
        (one_head(64, 8192, heads=2), True, False),
        (one_head(64, 8192, is_causal=False), True, True),
        (one_head(64, 8192, itemsize=2), False, False),
    ],
)
def test_nothing_is_found_for_attention_that_nobody_published(
    store: Store, shape: AttentionShape, compiled: bool, tf32: bool
) -> None:
    found = PublishedAttention(store.reference).beside(shape, compiled=compiled, tf32=tf32)
    assert found == pytest.approx(NO_ATTENTION, nan_ok=True)


@pytest.mark.parametrize(
    ("seq_len", "head_dim", "dtype", "tile", "times"),
    [
        (128, 16, "bfloat16", (32, 64), (0.095, 0.008, 1.161, 2.4, 1.257, 2.408)),
        (65_536, 64, "bfloat16", (64, 128), (29.3, 6.297, 39.078, 44.382, 68.378, 50.679)),
        (65_536, 64, "float32", (128, 32), (39.567, 18.299, 52.878, 60.911, 92.444, 79.21)),
    ],
)
def test_a_published_row_of_flashattention_is_found(
    store: Store, seq_len: int, head_dim: int, dtype: str, tile: tuple[int, int], times: tuple[float, ...]
) -> None:
    found = PublishedFlash(store.reference).row(seq_len, head_dim, dtype)
    assert found is not None
    assert [found["q_tile"], found["k_tile"]] == list(tile)
    phases = [phase for phase in PHASES for _ in range(2)]
    names = [f"{phase}_{form}_ms" for phase, form in zip(phases, ("eager", "triton") * 3, strict=True)]
    assert [found[name] for name in names] == list(times)


@pytest.mark.parametrize(
    ("seq_len", "head_dim", "dtype"),
    [(128, 16, "float16"), (100, 16, "float32"), (512, 128, "float32"), (8192, 128, "bfloat16")],
)
def test_no_row_is_found_for_a_shape_of_which_nothing_was_published(
    store: Store, seq_len: int, head_dim: int, dtype: str
) -> None:
    assert PublishedFlash(store.reference).row(seq_len, head_dim, dtype) is None


def test_the_rows_of_flashattention_are_all_of_both_tables_each_under_its_own_shape(store: Store) -> None:
    published = PublishedFlash(store.reference)
    rows = list(published.rows())
    tables = {dtype: store.reference(f"flash_{dtype}_h100") for dtype in ("float32", "bfloat16")}
    assert len(rows) == sum(map(len, tables.values()))
    assert len({(dtype, seq_len, head_dim) for dtype, seq_len, head_dim, _ in rows}) == len(rows)
    for dtype, seq_len, head_dim, found in rows:
        table = tables[dtype]
        (row,) = table[(table["seq_len"] == seq_len) & (table["d_model"] == head_dim)].to_dict("records")
        assert found["forward-backward_triton_ms"] == row["end_to_end_triton_ms"]
        assert found == published.row(seq_len, head_dim, dtype)


@pytest.mark.parametrize(
    ("published_of", "tables"),
    [
        (PublishedAttention, ["attention_compile_h100", "attention_eager_h100"]),
        (PublishedFlash, ["flash_bfloat16_h100", "flash_float32_h100"]),
    ],
)
def test_only_the_tables_of_the_work_are_read(store: Store, published_of: Any, tables: list[str]) -> None:
    read: list[str] = []

    def reference(name: str) -> Any:
        read.append(name)
        return store.reference(name)

    published_of(reference)
    assert sorted(read) == tables


def test_both_tables_of_eager_attention_print_the_same_times(store: Store) -> None:
    """The compiled one repeats them, and either may be read."""
    names = ["d_model", "seq_len"]
    both = store.reference("attention_eager_h100").merge(store.reference("attention_compile_h100"), on=names)
    assert len(both) == 20
    for phase in ("forward", "backward"):
        assert both[f"{phase}_s_per_100"].equals(both[f"eager_{phase}_s_per_100"])
    assert both["memory_after_forward_mib_x"].equals(both["memory_after_forward_mib_y"])

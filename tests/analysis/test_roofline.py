"""A bound is the slower of arithmetic and memory, and no published time is below it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from cs336_systems.analysis.flops import Work, compulsory_bytes, phase_work, total
from cs336_systems.analysis.hardware import Peaks, gpu_peaks
from cs336_systems.analysis.roofline import IN_FLOAT32_UNDER_AUTOCAST, bound, operators_seconds, step_bound
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.model import SIZES, TransformerConfig
from cs336_systems.repository import repository_root
from cs336_systems.step import PHASES, Phase

# 100 FLOP/s, 10 B/s, 50 bytes of cache: seconds can be counted in the head.
TOY = Peaks("toy", {"float32": 100.0, "bfloat16": 400.0}, 10.0, cache_bytes=50, memory_bytes=1000, source="none")


@pytest.mark.parametrize(
    ("flops", "moved", "precision", "seconds", "limited_by"),
    [
        (1000, 60, "float32", 10.0, "compute"),  # 10 s of arithmetic, 1 s for the 10 bytes beyond the cache
        (1000, 60, "bfloat16", 2.5, "compute"),
        (1000, 250, "float32", 20.0, "memory"),
        (1000, 250, "bfloat16", 20.0, "memory"),
        (0, 51, "float32", 0.1, "memory"),
        (0, 50, "float32", 0.0, "compute"),  # all of it may have stayed in the cache
        (100, 10, "float32", 1.0, "compute"),
        (100, 0, "float32", 1.0, "compute"),
    ],
)
def test_a_bound_is_the_larger_of_arithmetic_and_of_the_bytes_beyond_the_cache(
    flops: int, moved: int, precision: str, seconds: float, limited_by: str
) -> None:
    found = bound(Work(flops, moved), TOY, precision)
    assert found.seconds == pytest.approx(seconds, rel=1e-12)
    assert found.limited_by == limited_by


def test_a_bound_never_decreases_when_work_grows_and_never_is_negative() -> None:
    draw = random.Random(0)
    for _ in range(300):
        work = Work(draw.randrange(2000), draw.randrange(300))
        more = work + Work(draw.randrange(500), draw.randrange(100))
        assert 0 <= bound(work, TOY, "float32").seconds <= bound(more, TOY, "float32").seconds


def test_a_bound_never_increases_with_faster_hardware() -> None:
    draw = random.Random(1)
    for _ in range(300):
        work = Work(draw.randrange(2000), draw.randrange(300))
        faster = dataclasses.replace(
            TOY,
            matmul_flops_per_s={"float32": draw.uniform(100.0, 200.0)},
            bandwidth_bytes_per_s=draw.uniform(10.0, 20.0),
            cache_bytes=draw.randrange(50, 100),
        )
        assert bound(work, faster, "float32").seconds <= bound(work, TOY, "float32").seconds


def test_a_precision_without_a_rate_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown precision 'float16' of toy"):
        bound(Work(1, 1), TOY, "float16")


@pytest.mark.parametrize("phase", PHASES)
def test_a_long_step_is_bound_by_its_products(phase: Phase) -> None:
    config, peaks = SIZES["small"], gpu_peaks("a100-40gb")
    found = step_bound(config, phase, 4, 512, peaks, "float32")
    flops = total(phase_work(config, phase, 4, 512).values()).flops
    assert found.limited_by == "compute"
    assert found.seconds == pytest.approx(flops / 19.5e12, rel=1e-12)


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_of_one_token_is_bound_by_its_weights(phase: Phase) -> None:
    config, peaks = SIZES["small"], gpu_peaks("a100-40gb")
    found = step_bound(config, phase, 1, 1, peaks, "bfloat16", itemsize=2, logits_itemsize=2)
    distinct = compulsory_bytes(config, phase, 1, 1, itemsize=2, logits_itemsize=2)
    assert found.limited_by == "memory"
    assert found.seconds == pytest.approx((distinct - 40 * 2**20) / 1.555e12, rel=1e-12)


def test_a_bound_is_lower_where_masked_products_are_skipped() -> None:
    config = SIZES["small"]
    dense, skipping = (
        step_bound(config, "step", 1, 4096, gpu_peaks("h200"), "float32", skips_masked=skips) for skips in (False, True)
    )
    assert 0 < skipping.seconds < dense.seconds


# Table, phase, precision of the products, bytes of a logit. A single cold step is no throughput, so the table without
# a warm-up is left out.
A100_TABLES: dict[str, tuple[Phase, str, int]] = {
    "e2e_forward_a100": ("forward", "float32", 4),
    "e2e_forward_one_warmup_a100": ("forward", "float32", 4),
    "e2e_forward_backward_a100": ("forward-backward", "float32", 4),
    "e2e_train_step_a100": ("step", "float32", 4),
    "e2e_train_step_bf16_autocast_a100": ("step", "bfloat16", 2),
}


def published_share_of_bound(
    store: Store, table: str, column: str, phase: Phase, gpu: str, precision: str, logits_itemsize: int
) -> list[float]:
    """Per row of a table, the bound divided by the published time; above 1 means that one of the two is wrong."""
    shares = []
    for row in store.reference(table).to_dict("records"):
        config = TransformerConfig(
            **{name: int(row[name]) for name in ("d_model", "d_ff", "num_layers", "num_heads", "context_length")}
        )
        floor = step_bound(
            config,
            phase,
            int(row.get("batch_size", 4)),
            config.context_length,
            gpu_peaks(gpu),
            precision,
            logits_itemsize=logits_itemsize,
        )
        shares.append(floor.seconds / float(row[column]))
    return shares


def test_the_published_a100_tables_are_all_known_here() -> None:
    found = {path.stem for path in (repository_root() / "data" / "reference").glob("e2e_*.csv")}
    assert found == {*A100_TABLES, "e2e_forward_no_warmup_a100"}


@pytest.mark.parametrize("table", list(A100_TABLES))
def test_no_time_published_for_an_a100_is_below_the_bound(store: Store, table: str) -> None:
    phase, precision, logits_itemsize = A100_TABLES[table]
    shares = published_share_of_bound(store, table, "mean_s", phase, "a100-40gb", precision, logits_itemsize)
    assert len(shares) >= 10
    assert 0 < max(shares) <= 1, f"{table}: {max(shares):.3f} of the bound"


@pytest.mark.parametrize(
    ("column", "precision"), [("eager_s", "float32"), ("compile_s", "float32"), ("compile_tf32_s", "tf32")]
)
def test_no_time_published_for_an_h100_is_below_the_bound(store: Store, column: str, precision: str) -> None:
    shares = published_share_of_bound(store, "transformer_train_step_h100", column, "step", "h100-sxm", precision, 4)
    assert len(shares) == 15
    assert 0 < max(shares) <= 1, f"{column}: {max(shares):.3f} of the bound"


@pytest.mark.parametrize("table", ["e2e_forward_a100", "e2e_forward_backward_a100"])
def test_the_bound_is_no_loose_one_where_products_dominate(store: Store, table: str) -> None:
    # The largest model in float32 is nearly all matrix products, and those of cuBLAS come close to the datasheet:
    # a bound that forgot some of the work would be far below.
    phase, precision, logits_itemsize = A100_TABLES[table]
    shares = published_share_of_bound(store, table, "mean_s", phase, "a100-40gb", precision, logits_itemsize)
    assert max(shares) > 0.8


# Operator by operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_operators_one_after_the_other_take_no_less_than_the_floor(phase: Phase) -> None:
    for name in ("small", "xl"):
        for precision, itemsize in (("float32", None), ("bfloat16", 2)):
            gpu = gpu_peaks("h200")
            one_by_one = operators_seconds(SIZES[name], phase, 4, 256, gpu, precision, autocast_itemsize=itemsize)
            assert one_by_one >= step_bound(SIZES[name], phase, 4, 256, gpu, precision).seconds


def test_under_autocast_the_traffic_of_half_precision_is_halved_and_the_rest_stays() -> None:
    """With products for nothing, time is traffic."""
    free = dataclasses.replace(TOY, matmul_flops_per_s={"float32": 1e30})
    works = phase_work(SIZES["small"], "step", 4, 128)
    assert works.keys() >= IN_FLOAT32_UNDER_AUTOCAST
    wide = sum(work.bytes for name, work in works.items() if name in IN_FLOAT32_UNDER_AUTOCAST)
    rest = sum(work.bytes for work in works.values()) - wide
    plain, mixed = (
        operators_seconds(SIZES["small"], "step", 4, 128, free, "float32", autocast_itemsize=itemsize)
        for itemsize in (None, 2)
    )
    assert plain == pytest.approx((wide + rest) / 10.0)
    assert mixed == pytest.approx((wide + rest / 2) / 10.0)

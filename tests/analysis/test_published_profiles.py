"""Published profiles stand beside exactly the work they were published for, and say no more than was printed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cs336_systems.analysis.attention import AttentionShape, traffic_by_part
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.analysis.published_profiles import PublishedKernels, PublishedPeaks, PublishedRanges
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.model import SIZES, TransformerConfig

of_profiles = pytest.mark.problem("nsys_profile")
of_memory = pytest.mark.problem("memory_profiling")


def at(context: int, size: str = "gpt2-xl", **changes: int) -> TransformerConfig:
    return dataclasses.replace(SIZES[size], context_length=context, **changes)


OTHER_MODELS = [at(256, "xl"), at(256, num_heads=20), at(256, d_ff=5120), at(256, vocab_size=50_257)]


# Kernels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(store: Store) -> PublishedKernels:
    return PublishedKernels(store.reference)


@of_profiles
def test_every_row_of_the_kernel_table_is_one_of_its_range(store: Store, kernels: PublishedKernels) -> None:
    table = store.reference("nsys_gpt2xl_ctx256_a100")
    assert set(kernels.ranges) == set(table["range"])
    for name in kernels.ranges:
        rows = kernels.kernels(name)
        assert [row.kernel for row in rows] == list(table[table["range"] == name]["kernel"])
        assert list(rows) == sorted(rows, key=lambda row: -row.total_ms)
        assert all("gemm" in row.kernel for row in rows if row.category == "matrix products")
        assert all("elementwise" in row.kernel for row in rows if row.category != "matrix products")


@of_profiles
def test_the_rows_of_a_range_agree_on_its_gpu_time(kernels: PublishedKernels) -> None:
    for name in kernels.ranges:
        least, most = kernels.gpu_ms(name)
        # Where only small shares are printed, their rounding is a larger part of them.
        assert 0 < least <= most < (1.05 if name == "forward_nonmatmul" else 1.01) * least
        for row in kernels.kernels(name):
            for total in (least, most):
                assert 100 * row.total_ms / total == pytest.approx(row.time_percent, abs=0.0501)


@of_profiles
def test_the_share_of_a_kind_is_at_least_that_of_its_printed_rows(kernels: PublishedKernels) -> None:
    for name in kernels.ranges:
        rows = kernels.kernels(name)
        kinds = {row.category for row in rows}
        shares = {kind: kernels.percent_at_least(name, kind) for kind in kinds}
        for kind, share in shares.items():
            printed = sum(row.time_percent for row in rows if row.category == kind)
            assert printed - 0.05 * len(rows) <= share <= printed + 0.05 * len(rows)
        assert sum(shares.values()) <= 100
        assert kernels.percent_at_least(name, "communication") == 0
    products = {name: kernels.percent_at_least(name) for name in ("forward", "train_step")}
    assert products["train_step"] < products["forward"]


@of_profiles
@pytest.mark.parametrize(
    ("phase", "gpu_ms", "percent", "kernel", "instances"),
    [
        ("forward", 174, 84.8, "ampere_sgemm_128x64_tn", 153),
        ("backward", 589, 82.1, "ampere_sgemm_128x32_sliced1x4_nn", 79),
        ("forward-backward", 763, 82.6, "ampere_sgemm_128x64_tn", 241),
        ("step", 1053, 68.8, "ampere_sgemm_128x64_tn", 241),
    ],
)
def test_a_published_kernel_summary_is_found(
    kernels: PublishedKernels, phase: str, gpu_ms: float, percent: float, kernel: str, instances: int
) -> None:
    found = kernels.beside(at(256), phase=phase, batch_size=4)
    assert (found["a100_kernel"], found["a100_kernel_instances"]) == (kernel, instances)
    assert found["a100_gpu_ms"] == pytest.approx(gpu_ms, rel=5e-3)
    assert found["a100_products_percent_at_least"] == pytest.approx(percent, abs=0.4)


@of_profiles
@pytest.mark.parametrize(
    ("config", "options"),
    [
        *((config, {}) for config in OTHER_MODELS),
        (at(128), {}),
        (at(256), {"batch_size": 8}),
        (at(256), {"autocast": "bfloat16"}),
        (at(256), {"tf32": True}),
        (at(256), {"compiled": True}),
    ],
)
def test_no_profile_is_found_for_work_that_nobody_published(
    store: Store, kernels: PublishedKernels, config: TransformerConfig, options: dict[str, Any]
) -> None:
    options = {"batch_size": 4, **options}
    found = kernels.beside(config, phase="forward", **options)
    assert found.pop("a100_kernel") == ""
    assert all(math.isnan(float(value)) for value in found.values())
    ranges = PublishedRanges(store.reference).beside(config, **options)
    assert all(math.isnan(value) for value in ranges.values())
    assert found.keys() | {"a100_kernel"} == kernels.beside(at(256), phase="forward", batch_size=4).keys()


@of_profiles
def test_a_phase_that_nobody_published_has_no_kernels(kernels: PublishedKernels) -> None:
    assert kernels.beside(at(256), phase="optimizer", batch_size=4)["a100_kernel"] == ""


@of_profiles
def test_unknown_ranges_and_kinds_are_errors_that_list_the_known(kernels: PublishedKernels) -> None:
    for call in (kernels.kernels, kernels.gpu_ms, kernels.percent_at_least):
        with pytest.raises(UserError, match="unknown published range 'forwards': did you mean 'forward'"):
            call("forwards")
    with pytest.raises(UserError, match="unknown category 'copy': did you mean 'copies'"):
        kernels.percent_at_least("forward", "copy")  # type: ignore[arg-type]


# Ranges of attention -------------------------------------------------------------------------------------------


@of_profiles
def test_the_published_ranges_of_attention_are_found(store: Store) -> None:
    found = PublishedRanges(store.reference).beside(at(256), batch_size=4)
    assert found == {"a100_attention_us": 2001, "a100_softmax_us": 122.885}


@of_profiles
def test_the_published_softmax_is_of_the_context_whose_traffic_takes_as_long(store: Store) -> None:
    """Its context is not printed; at all others it is off by more than a factor of two."""
    measured = PublishedRanges(store.reference).beside(at(256), batch_size=4)["a100_softmax_us"]
    bandwidth = GPUS["a100-40gb"].bandwidth_bytes_per_s
    off = {}
    for context in (128, 256, 512, 1024):
        shape = AttentionShape(4, SIZES["gpt2-xl"].num_heads, context, SIZES["gpt2-xl"].head_dim, is_causal=True)
        expected_us = 1e6 * traffic_by_part(shape, "forward")["softmax"] / bandwidth
        off[context] = max(expected_us / measured, measured / expected_us)
    assert off.pop(256) < 1.2
    assert min(off.values()) > 2


# Peaks of memory -----------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(store: Store) -> PublishedPeaks:
    return PublishedPeaks(store.reference)


@of_memory
def test_every_printed_peak_is_found_as_the_interval_that_was_cut(store: Store, peaks: PublishedPeaks) -> None:
    table = store.reference("peak_memory_gpt2xl_a100")
    assert len(peaks.rows()) == len(table)
    for row, peak in zip(table.itertuples(), peaks.rows(), strict=True):
        assert peak.at_least_bytes == 1e9 * row.peak_gb_truncated
        assert peak.below_bytes == peak.at_least_bytes + 1e9
        assert peak == peaks.peak(peak.phase, row.context_length, peak.autocast)
        found = peaks.beside(at(peak.context_length), phase=peak.phase, batch_size=4, autocast=peak.autocast)
        assert list(found.values()) == [peak.at_least_bytes, peak.below_bytes, peak.remark]


@of_memory
def test_thirteen_gigabytes_stand_for_what_was_read_off_as_13_58(peaks: PublishedPeaks) -> None:
    peak = peaks.peak("forward", 128)
    assert peak is not None
    assert peak.at_least_bytes <= 13.58e9 < peak.below_bytes


@of_memory
def test_only_the_last_row_is_doubted_and_keeps_what_is_printed(peaks: PublishedPeaks) -> None:
    (*sound, doubtful) = peaks.rows()
    assert not any(peak.remark for peak in sound)
    assert (doubtful.phase, doubtful.autocast, doubtful.context_length) == ("step", "bfloat16", 512)
    assert "probably 256" in doubtful.remark
    assert peaks.peak("step", 256, "bfloat16") is None


@of_memory
@pytest.mark.parametrize(
    ("config", "options"),
    [
        *((config, {}) for config in OTHER_MODELS),
        (at(1024), {}),
        (at(256), {"batch_size": 8}),
        (at(256), {"phase": "backward"}),
        (at(256), {"autocast": "float16"}),
        (at(256), {"compiled": True}),
        (at(512), {"phase": "step"}),
    ],
)
def test_no_peak_is_found_for_work_that_nobody_published(
    peaks: PublishedPeaks, config: TransformerConfig, options: dict[str, Any]
) -> None:
    found = peaks.beside(config, **{"phase": "forward", "batch_size": 4, **options})
    assert found.pop("a100_peak_remark") == ""
    assert all(math.isnan(float(value)) for value in found.values())

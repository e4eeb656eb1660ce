"""A GPU's ceilings come from its datasheet, and only a GPU that is known for certain has them."""

from __future__ import annotations

import pytest

from cs336_systems.analysis.hardware import GPUS, gpu_peaks, identify_gpu, product_precision
from cs336_systems.errors import UserError


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"),  # drivers before 2021 leave the vendor out
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_known_gpu_is_identified_by_the_name_cuda_gives_it(device_name: str, expected: str) -> None:
    assert identify_gpu(device_name) == expected
    assert gpu_peaks(expected).name == expected


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA B100",
        "NVIDIA GeForce RTX 4090",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
        "NVIDIA ",
        "",
    ],
)
def test_a_gpu_that_only_looks_like_a_known_one_has_no_figures(device_name: str) -> None:
    assert identify_gpu(device_name) is None


@pytest.mark.parametrize("name", list(GPUS))
def test_every_gpu_has_a_source_and_rates_that_rise_as_precision_falls(name: str) -> None:
    peaks = GPUS[name]
    assert peaks.name == name
    assert "NVIDIA" in peaks.source
    assert any(year in peaks.source for year in ("2020", "2021", "2022", "2023", "2024"))
    rates = [peaks.rate(precision) for precision in ("float32", "tf32", "bfloat16")]
    assert 1e13 < rates[0] < rates[1] < rates[2] < 1e16
    assert peaks.rate("float16") == peaks.rate("bfloat16")
    if "float8" in peaks.matmul_flops_per_s:
        assert peaks.rate("float8") > peaks.rate("bfloat16")
    # Dense rates halve from a precision to the next wider one; a sparse figure among them would break the ratio.
    assert peaks.rate("bfloat16") / peaks.rate("tf32") == pytest.approx(2.0, rel=0.03)
    assert peaks.cache_bytes < 1e9 < peaks.memory_bytes
    # The whole memory is read within a tenth of a second, and not within a hundredth: terabytes per second.
    assert 0.01 < peaks.memory_bytes / peaks.bandwidth_bytes_per_s < 0.1


def test_the_a100s_are_told_apart_by_memory_alone() -> None:
    small, large = gpu_peaks("a100-40gb"), gpu_peaks("a100-80gb")
    assert (
        small.matmul_flops_per_s
        == large.matmul_flops_per_s
        == {
            "float32": 19.5e12,
            "tf32": 156e12,
            "bfloat16": 312e12,
            "float16": 312e12,
        }
    )
    assert (small.memory_bytes, large.memory_bytes) == (40e9, 80e9)
    bandwidths = (small.bandwidth_bytes_per_s, large.bandwidth_bytes_per_s)
    assert bandwidths == pytest.approx((1.555e12, 2.039e12), rel=1e-12)


def test_an_unknown_gpu_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown GPU 'a100': did you mean 'a100-") as caught:
        gpu_peaks("a100")
    assert all(name in str(caught.value) for name in GPUS)


def test_a_precision_without_a_figure_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"unknown precision 'float8' of a100-40gb.*[Kk]nown: float32, tf32, bfloat16, fl"
    ):
        gpu_peaks("a100-40gb").rate("float8")


@pytest.mark.parametrize(
    ("dtype", "autocast", "float32_matmul", "expected"),
    [
        ("float32", "none", "highest", "float32"),
        ("float32", "none", "high", "tf32"),
        ("float32", "none", "medium", "tf32"),
        ("float32", "bfloat16", "highest", "bfloat16"),
        ("float32", "bfloat16", "high", "bfloat16"),
        ("float32", "float16", "high", "float16"),
        ("bfloat16", "none", "highest", "bfloat16"),
        ("bfloat16", "none", "high", "bfloat16"),
        ("float16", "none", "highest", "float16"),
        ("bfloat16", "float16", "highest", "float16"),
    ],
)
def test_products_run_in_the_precision_of_autocast_then_of_the_tensors(
    dtype: str, autocast: str, float32_matmul: str, expected: str
) -> None:
    found = product_precision(dtype, autocast, float32_matmul)
    assert found == expected
    assert gpu_peaks("a100-40gb").rate(found) > 0


@pytest.mark.parametrize(("dtype", "autocast"), [("float64", "none"), ("float32", "float64"), ("int8", "none")])
def test_a_precision_without_a_matrix_rate_is_an_error(dtype: str, autocast: str) -> None:
    with pytest.raises(UserError, match="no matrix rate is known for"):
        product_precision(dtype, autocast, "highest")

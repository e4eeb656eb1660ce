"""What hardware can do at best, each figure with its source.

Matrix rates are dense (no 2:4 sparsity) and at boost clock, as the vendor states them; units are FLOP/s, bytes and
bytes per second, with decimal prefixes. They are ceilings, not promises: the experiment `machine_peaks` measures what
a given machine reaches, and a CPU has no other source.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from cs336_systems.errors import UserError, unknown_name

GB = 10**9
TB = 10**12
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The ceilings of one device.

    `matmul_flops_per_s` has a key per precision of the products: float32 (no tensor cores), tf32, bfloat16, float16,
    float8. `cache_bytes` is the last level of cache: what may stay on the chip from one step to the next.
    """

    name: str
    matmul_flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    cache_bytes: int
    memory_bytes: int
    source: str
    usable_bytes: int = 0
    """Of a GPU's memory what CUDA reports as total, less what a process has before its first tensor."""
    cublas_workspace_bytes: int = 0
    """What PyTorch allocates with each handle of the matrix library: one per thread that multiplies matrices."""
    lacks: str = ""
    """What to run for the ceilings that are not known but could be."""

    def bounds(self, precision: str) -> bool:
        """Whether both ceilings are known that products in `precision` have."""
        return precision in self.matmul_flops_per_s and not math.isnan(self.bandwidth_bytes_per_s)

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products in `precision`; one the device has no figure for is an error."""
        if precision not in self.matmul_flops_per_s:
            raise unknown_name("precision", precision, self.matmul_flops_per_s, where=f"of {self.name}")
        return self.matmul_flops_per_s[precision]


GIB, MIB = 2**30, 2**20
_CONTEXT_BYTES = 600 * MIB
"""About what the CUDA context, the loaded kernels and libraries take: in messages of PyTorch, a process' memory in use
less what PyTorch has reserved is 0.4 to 0.65 GiB."""
_WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
"""cuBLAS' `:4096:2:16:8`; from Hopper on eight of 4 MiB. Source: aten/src/ATen/cuda/CublasHandlePool.cpp."""
_LARGE_WORKSPACE_BYTES = 8 * 4096 * 1024


def _usable(total_gib: float) -> int:
    """Of the total capacity that PyTorch prints when memory runs out."""
    return int(total_gib * GIB) - _CONTEXT_BYTES


def _tensor_core_rates(float32: float, tf32: float, half: float, float8: float | None = None) -> Mapping[str, float]:
    """Rates in TFLOP/s as datasheets list them, to FLOP/s per precision."""
    rates = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half, "float8": float8}
    return MappingProxyType({name: rate * TERA for name, rate in rates.items() if rate is not None})


_A100 = _tensor_core_rates(float32=19.5, tf32=156, half=312)
# The datasheet prints rates with sparsity; the architecture whitepaper gives the dense ones.
_HOPPER_SXM = _tensor_core_rates(float32=66.9, tf32=494.7, half=989.4, float8=1978.9)

GPUS: Mapping[str, Peaks] = MappingProxyType(
    {
        peaks.name: peaks
        for peaks in (
            Peaks(
                "a100-40gb",
                _A100,
                1.555 * TB,
                40 * 2**20,
                40 * GB,
                "NVIDIA A100 datasheet (2020), SXM4 40 GB",
                _usable(39.39),
                _WORKSPACE_BYTES,
            ),
            Peaks(
                "a100-80gb",
                _A100,
                2.039 * TB,
                40 * 2**20,
                80 * GB,
                "NVIDIA A100 datasheet (2021), SXM4 80 GB",
                _usable(79.18),
                _WORKSPACE_BYTES,
            ),
            Peaks(
                "h100-sxm",
                _HOPPER_SXM,
                3.35 * TB,
                50 * 2**20,
                80 * GB,
                "NVIDIA H100 datasheet (2023), SXM5; dense rates: NVIDIA H100 architecture whitepaper (2022)",
                _usable(79.11),
                _LARGE_WORKSPACE_BYTES,
            ),
            Peaks(
                "h100-pcie",
                _tensor_core_rates(float32=51.2, tf32=378, half=756, float8=1513),
                2.0 * TB,
                50 * 2**20,
                80 * GB,
                "NVIDIA H100 PCIe product brief PB-11133 (2022) and H100 datasheet (2023), halved to dense",
                _usable(79.11),
                _LARGE_WORKSPACE_BYTES,
            ),
            Peaks(
                "h200",
                _HOPPER_SXM,
                4.8 * TB,
                50 * 2**20,
                141 * GB,
                "NVIDIA H200 datasheet (2024), SXM",
                _usable(139.80),
                _LARGE_WORKSPACE_BYTES,
            ),
            Peaks(
                "b200",
                _tensor_core_rates(float32=80, tf32=1100, half=2250, float8=4500),
                8.0 * TB,
                126 * 2**20,
                180 * GB,
                "NVIDIA Blackwell architecture technical brief (2024), HGX B200 at 1,000 W",
                _usable(178.35),
                _LARGE_WORKSPACE_BYTES,
            ),
        )
    }
)

# What `torch.cuda.get_device_name` says after "NVIDIA ", matched whole: an H100 NVL or an A100 PCIe has other rates
# and must not pass for its relative.
_DEVICE_NAMES = (
    (r"A100-SXM4-40GB", "a100-40gb"),
    (r"A100-SXM4-80GB", "a100-80gb"),
    (r"H100 80GB HBM3", "h100-sxm"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H200", "h200"),
    (r"B200", "b200"),
)


def identify_gpu(device_name: str) -> str | None:
    """The key in `GPUS` of what CUDA calls `device_name`, or None for a GPU without figures here."""
    bare = device_name.removeprefix("NVIDIA ").strip()
    return next((key for pattern, key in _DEVICE_NAMES if re.fullmatch(pattern, bare)), None)


def gpu_peaks(name: str) -> Peaks:
    """The datasheet ceilings of a GPU by its key; an unknown one is an error that lists the known."""
    if name not in GPUS:
        raise unknown_name("GPU", name, GPUS)
    return GPUS[name]


def product_precision(dtype: str, autocast: str, float32_matmul: str) -> str:
    """The precision in which matrix products run, as a key of `Peaks.matmul_flops_per_s`.

    Autocast decides if it is on; float32 products run in TF32 when PyTorch's float32_matmul_precision is not
    "highest".
    """
    effective = dtype if autocast == "none" else autocast
    if effective == "float32" and float32_matmul != "highest":
        return "tf32"
    if effective not in ("float32", "bfloat16", "float16"):
        raise UserError(f"no matrix rate is known for {effective}: expected float32, bfloat16 or float16")
    return effective

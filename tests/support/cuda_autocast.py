"""CUDA's rules for what is saved, followed on a CPU: autocast's lists, and the norm that is one operator.

Autocast is a layer of kernels above PyTorch's operators, one set per device. `cuda_rules` gives a CPU's the kernels
that CUDA's has and it has not, as far as the workbook's model calls them, and the fused norm a kernel on the CPU. What
is then saved for backward is decided by autograd itself.

Source: aten/src/ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_LOWER_PRECISION_FP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

IN_FLOAT32: MappingProxyType[str, Any] = MappingProxyType(
    {
        "exp": aten.exp.default,
        "sum.dim_IntList": aten.sum.dim_IntList,
        "pow.Tensor_Scalar": aten.pow.Tensor_Scalar,
        "rsqrt": aten.rsqrt.default,
        "rms_norm": aten.rms_norm.default,
    }
)
IN_HALF: MappingProxyType[str, Any] = MappingProxyType({"einsum": aten.einsum.default})
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def has_autocast_kernel(name: str, device: str) -> bool:
    """Whether autocast treats an operator on "CUDA" or "CPU"; of CUDA any build of PyTorch knows."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{device}")


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Meanwhile what is on the CPU is cast and saved as if it were on a CUDA device."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, operator in IN_FLOAT32.items():
            library.impl(name, _cast(operator, lambda: torch.float32), "AutocastCPU")
        for name, operator in IN_HALF.items():
            library.impl(name, _cast(operator, lambda: torch.get_autocast_dtype("cpu")), "AutocastCPU")
        library.impl("_fused_rms_norm", _fused_rms_norm, "CPU")
        yield


def _cast(operator: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """`operator` without autocast, on its tensors in another precision; float64 stays, as there."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(each) for each in value]
        is_wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype()) if is_wide else value

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*map(cast, arguments), **options)

    return call


def _fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes in float32 at least, and returns the inverse rms in that precision."""
    del shape
    wide = x if x.dtype == torch.float64 else x.float()
    inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight).to(x.dtype), inverse_rms

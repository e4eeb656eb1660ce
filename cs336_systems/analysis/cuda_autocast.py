"""CUDA's rules of autocast, and of what is saved, followed on a CPU: of any module, on tensors with or without data.

    with cuda_rules(), torch.autocast("cpu", dtype=torch.float16):
        module(x)

Autocast is a layer of kernels above PyTorch's operators, one set per device, and the sets differ: a CPU's has no rule
for `exp` or `sum`, and has one for `cat`, which CUDA's has not. `cuda_rules` puts CUDA's set in the place of a CPU's.
What is then saved for backward is decided by autograd itself, as on CUDA. The rules, of a list of operators each:

    LOWER_PRECISION    floating-point arguments are cast to autocast's precision
    FLOAT32            they are cast to float32
    FLOAT32_BY_DTYPE   the argument `dtype` becomes float32 where it is not given
    FLOAT32_APPENDED   the overload that takes a `dtype` is called instead, with float32
    PROMOTED           they are cast to the widest precision among them
    BANNED             is an error under autocast

An operator of no list runs in the precision of its inputs. Tensors of float64 stay what they are everywhere. The cast
of a parameter is made once: kept until the outermost autocast ends, for a float32 leaf that requires a gradient and is
no view.

The fused RMSNorm is a single operator on CUDA, which saves its input and the inverse rms; a CPU has none, and is given
one as well. Not followed are the recurrent layers of cuDNN, each one operator there and composed of many on a CPU.

Operators are registered for the whole process: no other thread should use autocast on a CPU meanwhile.

Source: aten/src/ATen/autocast_mode.h and .cpp of PyTorch 2.13.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

LOWER_PRECISION = (
    *("_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d"),
    *("conv_transpose2d.input", "conv_transpose3d.input", "convolution", "cudnn_convolution"),
    *("cudnn_convolution_transpose", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv"),
    *("linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("_scaled_dot_product_flash_attention", "scaled_dot_product_attention"),
)
FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus"),
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity"),
    *("poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss"),
    *("soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits"),
    *("dist", "pdist", "cdist", "renorm", "logsumexp"),
    *("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    *("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
)
FLOAT32_BY_DTYPE = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)
FLOAT32_APPENDED = MappingProxyType(
    {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
)
"""The overload that is called, and the one with a `dtype`."""
PROMOTED = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
)
BANNED = ("binary_cross_entropy",)
RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lower precision": LOWER_PRECISION,
        "float32": FLOAT32,
        "float32 by dtype": FLOAT32_BY_DTYPE,
        "float32 appended": tuple(FLOAT32_APPENDED),
        "promoted": PROMOTED,
        "banned": BANNED,
    }
)
TREATED = frozenset(name for names in RULES.values() for name in names)
"""The operators that have a rule on CUDA, but for `_cudnn_rnn`, which no CPU runs."""

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_Kernel = Callable[..., Any]


def has_autocast_kernel(name: str, device: str) -> bool:
    """Whether autocast treats an operator on "CUDA" or "CPU"; of CUDA any build of PyTorch knows."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{device}")


def rule_of(name: str) -> str | None:
    """The rule of `RULES` that CUDA's autocast has for an operator, such as `softmax.int`; None if it has none.

    >>> rule_of("linear"), rule_of("layer_norm"), rule_of("relu")
    ('lower precision', 'float32', None)
    """
    return next((rule for rule, names in RULES.items() if name in names), None)


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Meanwhile what is on the CPU is cast and saved as if it were on a CUDA device."""
    casts = _Casts()
    kernels = _kernels(casts)
    of_cpu_alone = [name for name in _operators() if has_autocast_kernel(name, "CPU") and name not in kernels]
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        clear()
        casts.clear()

    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            # Said once per process, to whom it may concern: here it is meant.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, kernel in kernels.items():
                library.impl(name, kernel, "AutocastCPU")
            for name in of_cpu_alone:
                library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
            for name, kernel in _fused_rms_norm().items():
                library.impl(name, kernel, "CPU")
        # What the outermost autocast calls when it ends.
        torch.clear_autocast_cache = clear_both
        try:
            yield
        finally:
            torch.clear_autocast_cache = clear
            casts.clear()


def _operators() -> Iterator[str]:
    """Names of PyTorch's own operators, with the overload."""
    prefix = "aten::"
    names = torch._C._dispatch_get_all_op_names()
    return (name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernels(casts: _Casts) -> dict[str, _Kernel]:
    """What CUDA's autocast calls in the place of every operator that it treats."""
    kernels: dict[str, _Kernel] = {}
    for name in LOWER_PRECISION:
        kernels[name] = _casting(_overload(name), casts, lambda _: _half())
    for name in FLOAT32:
        kernels[name] = _casting(_overload(name), casts, lambda _: torch.float32)
    for name in PROMOTED:
        kernels[name] = _casting(_overload(name), casts, _widest)
    for name in FLOAT32_BY_DTYPE:
        kernels[name] = _with_dtype(_overload(name))
    for name, with_dtype in FLOAT32_APPENDED.items():
        kernels[name] = _appending_dtype(_overload(name), _overload(with_dtype))
    return kernels | {name: _banned(name) for name in BANNED}


# Casts ---------------------------------------------------------------------------------------------------------


def _half() -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _is_eligible(value: object) -> bool:
    """Floating-point tensors are cast, but never to or from float64."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return value.is_floating_point() and value.dtype != torch.float64


class _Casts:
    """Casts of tensors, those of parameters kept: one per parameter, whichever operators use it."""

    def __init__(self) -> None:
        # Keys do not keep a parameter alive, and no other tensor that comes to its address equals one that is dead.
        self._kept: dict[WeakIdRef, Tensor] = {}

    def clear(self) -> None:
        self._kept.clear()

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` in another precision, if it is a tensor that autocast casts; lists have each of theirs cast."""
        if isinstance(value, list):
            return [self.cast(each, dtype) for each in value]
        if not _is_eligible(value) or value.dtype == dtype:
            return value
        if not (dtype == _half() and _is_parameter(value) and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        key = WeakIdRef(value)
        if key not in self._kept:
            self._kept[key] = value.to(dtype)
        return self._kept[key]


def _is_parameter(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()


def _widest(arguments: list[Any]) -> torch.dtype:
    """The wider of autocast's own precision and float32 that is among the arguments.

    Raises:
        RuntimeError: the other half precision before any float32, as PyTorch raises too.
    """
    widest = _half()
    for value in filter(_is_eligible, _flat(arguments)):
        if torch.float32 in (widest, value.dtype):
            widest = torch.float32
        elif value.dtype != widest:
            raise RuntimeError(
                f"autocast to {widest} promotes tensors of {widest} and torch.float32, not {value.dtype}"
            )
    return widest


def _flat(arguments: list[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list):
            yield from argument
        else:
            yield argument


# Kernels of each rule ------------------------------------------------------------------------------------------


def _casting(operator: Any, casts: _Casts, dtype_for: Callable[[list[Any]], torch.dtype]) -> _Kernel:
    """`operator` without autocast, on its tensors in another precision."""

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            dtype = dtype_for([*arguments, *options.values()])
            cast = {name: casts.cast(value, dtype) for name, value in options.items()}
            return operator(*(casts.cast(value, dtype) for value in arguments), **cast)

    return call


def _with_dtype(operator: Any) -> _Kernel:
    """`operator` without autocast, with its result in float32 unless the caller says otherwise."""
    position = [argument.name for argument in operator._schema.arguments].index("dtype")

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            is_given = len(arguments) > position or options.get("dtype") is not None
            if not is_given and _is_eligible(arguments[0]):
                options["dtype"] = torch.float32
            return operator(*arguments, **options)

    return call


def _appending_dtype(operator: Any, with_dtype: Any) -> _Kernel:
    """`with_dtype` without autocast in the place of `operator`, whose arguments it takes."""
    # Arguments that have their default do not come.
    defaults = [argument.default_value for argument in operator._schema.arguments]

    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            x = arguments[0]
            dtype = torch.float32 if _is_eligible(x) else x.dtype
            return with_dtype(*arguments, *defaults[len(arguments) :], dtype=dtype)

    return call


def _banned(name: str) -> _Kernel:
    def call(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{name} is unsafe under autocast on CUDA: use {name}_with_logits on what sigmoid would take"
        )

    return call


# RMSNorm as one operator ---------------------------------------------------------------------------------------


def _fused_rms_norm() -> dict[str, _Kernel]:
    """The operator and its derivative as PyTorch decomposes them, which compute in float32 at least."""
    from torch._decomp import get_decompositions  # takes its time

    names = ("_fused_rms_norm", "_fused_rms_norm_backward")
    known = get_decompositions([_overload(name) for name in names])
    return {name: known[_overload(name)] for name in names}

"""What kind of work a kernel or an operator does, told by its name.

The names are those of PyTorch's own kernels, of the libraries it calls, of what `torch.compile` generates, of this
workbook's Triton kernels, and of PyTorch's operators, which stand for kernels on a CPU. The first pattern that occurs
in a name decides. A kernel that converts between precisions is a copy, as PyTorch names it; one that fuses several
steps is of the kind of its most demanding step: product before reduction before elementwise.

Source: names recorded with PyTorch 2.4 to 2.13 on A100 and H100; torch/_inductor/codegen/triton.py for `triton_…`.
"""

from __future__ import annotations

import functools
import re
from typing import Literal, get_args

Category = Literal[
    "matrix products",
    "softmax and other reductions",
    "elementwise",
    "copies",
    "attention kernels",
    "communication",
    "other",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

PATTERNS: tuple[tuple[Category, str], ...] = (
    # torch.compile: a template, a reduction, a persistent reduction, a split scan, pointwise, for each of a list.
    ("attention kernels", r"^triton_tem_.*attention"),
    ("matrix products", r"^triton_(tem|mm|bmm)"),
    ("softmax and other reductions", r"^triton_(red|per|spl)_"),
    ("elementwise", r"^triton_(poi|for)_"),
    # NCCL's kernels, PyTorch's collectives, and its symmetric memory.
    ("communication", r"nccl|^c10d::|^_c10d_functional::|^gloo|nvshmem|symm_mem|multimem|cross_device_reduce"),
    # PyTorch's and Dao's FlashAttention, xFormers' (fmha), cuDNN's (sdpa), and this workbook's.
    ("attention kernels", r"flash_(fwd|bwd)|flash::|fmha|attention|sdpa|attn_(fwd|bwd)"),
    ("attention kernels", r"^(forward|delta|grad_key_value|grad_query)_kernel$"),
    # cuBLAS, cuBLASLt (nvjet on Hopper, a reduction after a split of the inner dimension), CUTLASS, oneDNN.
    ("matrix products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul|mkldnn_linear|mkldnn::_linear"),
    ("matrix products", r"^aten::(mm|mv|bmm|dot|addmm|addmv|addbmm|baddbmm|linear|einsum|_scaled_mm|_grouped_mm)_?$"),
    ("copies", r"^\[CUDA mem|^mem(cpy|set)\b|copy_kernel|CatArrayBatchedCopy"),
    ("copies", r"^aten::(copy|_to_copy|to|clone|contiguous|cat|stack|_foreach_copy)_?$"),
    ("softmax and other reductions", r"softmax|logsumexp|nll_loss|cross_entropy"),
    ("softmax and other reductions", r"(layer|rms|batch|group)_?norm|lpnorm|vector_norm|RowwiseMoments|GammaBeta"),
    ("softmax and other reductions", r"reduce|reduction|cumsum|cumprod|\bscan|_scan_|arg(max|min)|topk|sort"),
    ("softmax and other reductions", r"^aten::(sum|mean|max|min|amax|amin|prod|var|std|norm|all|any|_foreach_norm)_?$"),
    ("elementwise", r"elementwise|multi_tensor_apply|unrolled_|dropout|^aten::_foreach_|fused_adam"),
    (
        "elementwise",
        r"^aten::(add|sub|rsub|mul|div|neg|abs|exp|log|log1p|pow|square|sqrt|rsqrt|reciprocal|sigmoid|silu|gelu|relu|"
        r"tanh|sin|cos|erf|where|masked_fill|fill|zero|lerp|addcmul|addcdiv|clamp|maximum|minimum|eq|ne|lt|le|gt|ge|"
        r"logical_\w+|bitwise_\w+|threshold_backward|(sigmoid|silu|gelu|tanh)_backward)_?$",
    ),
)
_COMPILED = tuple((category, re.compile(pattern, re.IGNORECASE)) for category, pattern in PATTERNS)


@functools.lru_cache(maxsize=65_536)
def category_of(name: str) -> Category:
    """The kind of a kernel or an operator.

    >>> category_of("ampere_sgemm_128x64_tn"), category_of("aten::mul_"), category_of("my_kernel")
    ('matrix products', 'elementwise', 'other')
    """
    return next((category for category, pattern in _COMPILED if pattern.search(name)), "other")

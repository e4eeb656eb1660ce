"""What one Transformer block keeps for its backward, tensor by tensor: which are saved follows from what is called.

    saved = saved_by_block(SIZES["xl"], batch_size=4, seq_len=2048)
    sum(saved.values()), max(saved, key=saved.get)

Symbols: B batch, T sequence length, D d_model, F d_ff, H heads; S = B·T·D elements, one activation of the residual
stream; A = B·H·T² elements, one matrix of scores. An operator saves what its derivative needs:

    x.pow(2)                  x: a norm's input as float32; S                 d = 2x
    rsqrt(m)                  its result, the inverse rms; B·T                d = −r³/2
    x · r                     both factors, which the two above have saved    dx = r, dr = x
    weight · n                n, the normalised input; S                      d weight = n
    einsum, linear            both operands: the input, and a parameter       dX = dY·W, dW = dYᵀ·X
    cos · even, sin · odd     cos and sin alone, since these need no gradient; T·D/H for both
    q kᵀ, p v                 both operands; S each, and A
    scores / √d               √d alone, as a number in the CPU's memory: SCALE_BYTES, on any device
    + x, stack, cat           nothing
    where(mask, …)            the mask; T² bytes
    x.max(…).values           the positions of the maxima, as int64; B·H·T
    a − max                   nothing
    exp(a)                    its result, the exponentials; A                 d = e
    e.sum(…)                  nothing but a shape
    e / sum                   both: the exponentials once more, and the sums; B·H·T
    sigmoid(a)                its result; B·T·F
    a · sigmoid, silu · c     both factors; B·T·F each
    silu(a), fused            a alone

So with operators in float32, ten activations of the stream, five of the hidden layer, and two matrices of scores. A
storage is counted once, however many operators save it or views of it. The block's input is counted where its first
norm saves it as it is; the block's output is not, as only the next block saves it; nor parameters, nor the rotary table
whose slice the rope of 2026 saves. An item is one storage of the device, where CUDA's allocator rounds it up to 512
bytes; autograd shows √d to no hook.

Under autocast the residual stream and the norms stay in float32, products take half precision, and

- the input of a product is cast for each of the products that it goes into, since only the casts of parameters are
  cached. Those are kept for backward as well: `cast_parameters_of_block`;
- exp and sum are computed in float32 on CUDA, in the precision of their input on a CPU. So on CUDA the exponentials
  and their sums take four bytes, and of the weights a copy in half precision is saved.

The fused norm is a single operator on CUDA, which saves its input and the inverse rms; on a CPU PyTorch composes it of
the operators above.

Source: PyTorch's tools/autograd/derivatives.yaml and aten/src/ATen/autocast_mode.h, of version 2.13;
Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4.1, counts the same
for GPT's block. CS336 assignment 2, memory_profiling.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Literal, get_args

from cs336_systems.analysis.attention import AttentionShape
from cs336_systems.analysis.flops import parameters
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.model import Formulation, RopeYear, TransformerConfig, check_choices

Device = Literal["cuda", "cpu"]
BLOCK_INPUT = "norm 1: input"
"""The item that was there before the block, where it is saved as it is."""
SCALE_BYTES = 8
"""√d, which no item is: what division by a number of Python's leaves in the CPU's memory."""

_FLOAT32, _INT64 = 4, 8
_AUTOCAST_ITEMSIZE = MappingProxyType({"none": None, "bfloat16": 2, "float16": 2})


def saved_by_block(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    *,
    rope: RopeYear = "2025",
    formulation: Formulation = "reference",
    attention: str = "reference",
    itemsize: int = 4,
    autocast: str = "none",
    device: Device = "cuda",
) -> dict[str, int]:
    """Bytes of every tensor that one block keeps for its backward, in the order of forward.

    `itemsize` is that of a parameter and of the residual stream; `device` decides autocast's rules and the fused norm.

    Raises:
        UserError: an unknown rope, formulation, autocast or device; autocast of parameters that are not float32; an
            attention other than the reference, whose operators are the only ones known here.
    """
    check_choices(rope, formulation)
    if device not in get_args(Device):
        raise unknown_name("device", device, get_args(Device))
    if attention != "reference":
        raise UserError(
            f"only what the reference attention saves is accounted for, found attention {attention!r}: measure it with "
            "profiling.saved_tensors"
        )
    is_fused = formulation == "fused"
    product = _product_itemsize(itemsize, autocast)
    exponential = _FLOAT32 if autocast != "none" and device == "cuda" else product
    tokens = batch_size * seq_len
    stream, hidden = tokens * config.d_model * product, tokens * config.d_ff * product
    scores = AttentionShape(batch_size, config.num_heads, seq_len, config.head_dim, is_causal=True, itemsize=product)
    norm = _saved_by_norm(tokens, config.d_model, itemsize, is_one_operator=is_fused and device == "cuda")

    saved = {f"norm 1: {item}": size for item, size in norm.items()}
    saved |= _inputs("norm 1", ("Q", "K", "V"), stream, autocast)
    if rope == "2025":  # gathered anew in every call
        gathered = seq_len * config.head_dim * itemsize
        saved |= {f"cosines and sines for {each}": gathered for each in ("Q", "K")}
    saved |= {
        "Q, rotated": stream,
        "K, rotated": stream,
        "causal mask": scores.mask_bytes,
        "positions of the row maxima": scores.rows * _INT64,
        "exponentials of softmax": scores.rows * seq_len * exponential,
        "row sums of softmax": scores.rows * exponential,
        "V": stream,
        "weights of softmax": scores.matrix_bytes,
        "output of the heads": stream,
    }
    saved |= {f"norm 2: {item}": size for item, size in norm.items()}
    of_w1, *of_w3 = _inputs("norm 2", ("w1", "w3"), stream, autocast).items()
    saved |= dict([of_w1]) | {"output of w1": hidden}
    if not is_fused:
        saved["sigmoid"] = hidden
    # The input of w3 is cast when w3 is called, after the sigmoid.
    return saved | dict(of_w3) | {"silu": hidden, "output of w3": hidden, "input of w2": hidden}


def _saved_by_norm(tokens: int, d_model: int, itemsize: int, *, is_one_operator: bool) -> dict[str, int]:
    """RMSNorm computes in float32 at least. As one operator it casts inside, else what it casts to is saved."""
    wide = max(itemsize, _FLOAT32)
    width = itemsize if is_one_operator else wide
    saved = {"input" if width == itemsize else "input as float32": tokens * d_model * width}
    saved["inverse rms"] = tokens * wide
    return saved if is_one_operator else saved | {"normalised input": tokens * d_model * wide}


def _inputs(norm: str, products: tuple[str, ...], size: int, autocast: str) -> dict[str, int]:
    """The input that several products share, or the cast that autocast makes of it for each of them."""
    if autocast == "none":
        return {f"{norm}: output": size}
    return {f"{norm}: output as {autocast}, for {product}": size for product in products}


def _product_itemsize(itemsize: int, autocast: str) -> int:
    """Bytes per element of what matrix products read and write."""
    if autocast not in _AUTOCAST_ITEMSIZE:
        raise unknown_name("autocast", autocast, _AUTOCAST_ITEMSIZE)
    half = _AUTOCAST_ITEMSIZE[autocast]
    if half is None:
        return itemsize
    if itemsize != _FLOAT32:
        raise UserError(
            f"autocast to {autocast} is accounted for parameters in float32, of 4 bytes, found {itemsize}: leave one "
            "of the two"
        )
    return half


def matrices_of_block(config: TransformerConfig) -> int:
    """Elements of one block's weight matrices: 4·D² + 3·D·F."""
    counts = parameters(dataclasses.replace(config, num_layers=1))
    return counts["attention"] + counts["ffn"]


def cast_parameters_of_block(config: TransformerConfig, autocast: str) -> int:
    """Bytes of the casts of one block's parameters that autocast keeps for backward: those of its weight matrices."""
    return 0 if autocast == "none" else matrices_of_block(config) * _product_itemsize(_FLOAT32, autocast)


def gradient_bytes_of_block(config: TransformerConfig, itemsize: int = 4) -> int:
    """Bytes of the gradients of one block's parameters, its two norms' included: (4·D² + 3·D·F + 2·D) · itemsize."""
    return (matrices_of_block(config) + 2 * config.d_model) * itemsize


def residual_bytes(config: TransformerConfig, batch_size: int, seq_len: int, itemsize: int = 4) -> int:
    """Bytes of one activation of the residual stream: B·T·D · itemsize."""
    return batch_size * seq_len * config.d_model * itemsize


def score_matrix_bytes(config: TransformerConfig, batch_size: int, seq_len: int, itemsize: int = 4) -> int:
    """Bytes of one matrix of attention's scores: B·H·T² · itemsize.

    >>> from cs336_systems.model import SIZES
    >>> score_matrix_bytes(SIZES["gpt2-xl"], batch_size=4, seq_len=512)
    104857600
    """
    return batch_size * config.num_heads * seq_len**2 * itemsize


def held_after_forward(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    *,
    rope: RopeYear = "2025",
    formulation: Formulation = "reference",
    itemsize: int = 4,
    autocast: str = "none",
    device: Device = "cuda",
) -> dict[str, int]:
    """Bytes that the whole model holds at the end of a forward whose backward is to come, by what they are.

    Close to the peak of that forward: within the last block more is held than it keeps, but its rest is not yet there.

    Raises:
        UserError: as `saved_by_block`.
    """
    saved = saved_by_block(
        config,
        batch_size,
        seq_len,
        rope=rope,
        formulation=formulation,
        itemsize=itemsize,
        autocast=autocast,
        device=device,
    )
    tokens, product = batch_size * seq_len, _product_itemsize(itemsize, autocast)
    is_one_operator = formulation == "fused" and device == "cuda"
    held = {
        "parameters": sum(parameters(config).values()) * itemsize,
        "rotary table": config.context_length * config.head_dim * itemsize,
        "tokens": tokens * _INT64,
        "blocks": config.num_layers * sum(saved.values()),
        "last norm": sum(_saved_by_norm(tokens, config.d_model, itemsize, is_one_operator=is_one_operator).values()),
        "input of the logits": tokens * config.d_model * product,
        "logits": tokens * config.vocab_size * product,
    }
    if autocast != "none":
        held["casts of parameters"] = (
            config.num_layers * cast_parameters_of_block(config, autocast) + parameters(config)["lm_head"] * product
        )
    return held

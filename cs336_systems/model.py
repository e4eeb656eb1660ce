"""The Transformer language model that everything in the workbook measures.

The course's decoder-only Transformer: token embedding, pre-norm blocks of causal self-attention and SwiGLU,
a final norm and an untied LM head; no biases. Two formulations of the same mathematics:

- `reference`: the operators of the course's model, which published time and memory figures used. Which operators
  are called decides what is stored for backward, so they are spelt out one by one.
- `fused`: PyTorch's `linear`, `rms_norm` and `silu`; the same function in fewer kernels.

Attention is chosen by name beside it (`attention/backends.py`).

Cost per forward pass, matrix products only: 2 FLOPs per parameter (embedding excepted) and token, plus
4·seq_len·d_model per token and layer for attention. `analysis/flops.py` has every component.

Source: CS336 assignment 1 (architecture, initialisation) and assignment 2, section 1.1.2 (sizes); RMSNorm: Zhang &
Sennrich 2019; SwiGLU: Shazeer 2020; RoPE: Su et al. 2021.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cs336_systems.attention.backends import resolve_attention
from cs336_systems.attention.inputs import in_autocast_precision
from cs336_systems.checkpointing import (
    checkpoint_layers,
    parse_policy,
    plan_of,
    rerun_but_for_attention,
    rerun_in_backward,
    run_plan,
)
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.object_reference import is_object_reference, load_object
from cs336_systems.profiling.ranges import named_range

RopeYear = Literal["2025", "2026"]
Formulation = Literal["reference", "fused"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The hyperparameters of the course's constructor, validated.

    Raises:
        UserError: a value is not positive, or num_heads does not divide d_model into even parts (RoPE rotates
            features in pairs).
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 10_000
    context_length: int = 512
    rope_theta: int | float = 10_000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed, kind = (int | float, "finite number") if field.name == "rope_theta" else (int, "whole number")
            is_number = isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value <= 0:
                raise UserError(f"{field.name} must be a positive {kind}, found {value!r}")
        if self.d_model % self.num_heads != 0:
            raise UserError(
                f"num_heads must divide d_model: {self.num_heads} heads do not divide d_model {self.d_model}"
            )
        if self.head_dim % 2 != 0:
            raise UserError(
                f"d_model / num_heads must be even, because RoPE rotates pairs of features: found {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def course_arguments(self) -> dict[str, int | float]:
        """The keyword arguments of the course's model constructor."""
        return dataclasses.asdict(self)


SIZES: MappingProxyType[str, TransformerConfig] = MappingProxyType(
    {
        # Reduced sizes of this workbook's own, for a laptop's CPU; head_dim 64 as in the real ones.
        "tiny": TransformerConfig(d_model=128, d_ff=512, num_layers=2, num_heads=2),
        "mini": TransformerConfig(d_model=256, d_ff=1024, num_layers=4, num_heads=4),
        # The handouts' sizes. 2025 calls gpt2-xl "xl" and xl "2.7B".
        "small": TransformerConfig(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        "medium": TransformerConfig(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
        "large": TransformerConfig(d_model=1280, d_ff=5120, num_layers=36, num_heads=20),
        "gpt2-xl": TransformerConfig(d_model=1600, d_ff=6400, num_layers=48, num_heads=25),
        "xl": TransformerConfig(d_model=2560, d_ff=10_240, num_layers=32, num_heads=32),
        "10b": TransformerConfig(d_model=4608, d_ff=12_288, num_layers=50, num_heads=36),
        "leaderboard": TransformerConfig(
            d_model=4096, d_ff=11_008, num_layers=34, num_heads=32, vocab_size=151_936, context_length=32_768
        ),
    }
)


def model_size(name: str, **given: int | float | None) -> TransformerConfig:
    """The size called `name`, with whatever is given and not None in the place of its own.

    Raises:
        UserError: a misspelt name, with those that there are; or a value that cannot be.
    """
    if name not in SIZES:
        raise unknown_name("size", name, SIZES)
    chosen: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    return dataclasses.replace(SIZES[name], **chosen)


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with a normal distribution cut at ±3 std, in place, by the inverse of its distribution function.

    One pass without a data-dependent loop: five times as fast as `nn.init.trunc_normal_` on a CPU, where it would
    take longer than the steps being timed, and possible on tensors without data.
    """
    with torch.no_grad():
        edge = math.erf(3.0 / math.sqrt(2.0))
        return tensor.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2.0)).clamp_(-3.0 * std, 3.0 * std)


class Linear(nn.Module):
    """y = x Wᵀ without bias; weight of shape (d_out, d_in)."""

    def __init__(self, d_in: int, d_out: int, formulation: Formulation = "reference") -> None:
        super().__init__()
        self.fused = formulation == "fused"
        self.weight = nn.Parameter(truncated_normal_(torch.empty(d_out, d_in), std=math.sqrt(2.0 / (d_in + d_out))))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        if self.fused:
            return F.linear(x, self.weight)
        return torch.einsum("...i,oi->...o", x, self.weight)


class Embedding(nn.Module):
    """A row of the weight (vocab_size, d_model) per token."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal_(torch.empty(vocab_size, d_model), std=1.0))

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        return self.weight[tokens]


class RMSNorm(nn.Module):
    """x / rms(x) · weight.

    The reference computes in float32 whatever the input's precision; the fused kernel accumulates in float32 too, but
    takes its weight rounded to the input's precision.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, formulation: Formulation = "reference") -> None:
        super().__init__()
        self.eps = eps
        self.fused = formulation == "fused"
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if self.fused:
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)
        in_dtype = x.dtype
        # Half precision overflows when squared. float64 stays itself: it is what the tests compare with.
        x = x if in_dtype == torch.float64 else x.to(torch.float32)
        inverse_rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        x = x * inverse_rms
        return (self.weight * x).to(in_dtype)


class RotaryEmbedding(nn.Module):
    """Rotates each pair of features (2i, 2i+1) at position t by the angle t·theta^(−2i/head_dim).

    - 2025: positions are an explicit range, cosines and sines are gathered in every call, and the rotated pairs
      are interleaved again.
    - 2026: the table is sliced, and the rotated halves are concatenated: a permutation of the features that
      queries and keys share, so that their products, and the logits, are the same.
    """

    table: Tensor

    def __init__(self, context_length: int, head_dim: int, theta: int | float, year: RopeYear = "2025") -> None:
        super().__init__()
        self.year = year
        # In float64, then rounded once: in float32 the angle of position 10,000 is off by up to 5e-4.
        # On the CPU, because not every accelerator has float64.
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64, device="cpu"), frequencies)
        table = torch.stack((angles.cos(), angles.sin()))  # (2, context_length, head_dim / 2)
        where = torch.get_default_device()
        self.register_buffer("table", table.to(torch.get_default_dtype()).to(where), persistent=False)

    def forward(self, x: Float[Tensor, "... seq head_dim"]) -> Float[Tensor, "... seq head_dim"]:
        seq_len = x.shape[-2]
        even, odd = x[..., 0::2], x[..., 1::2]
        if self.year == "2025":
            positions = torch.arange(seq_len, device=x.device)[None, None]  # (1, 1, seq), one per batch and head
            cos, sin = self.table[:, positions]
            rotated = (cos * even - sin * odd, sin * even + cos * odd)
            return torch.stack(rotated, dim=-1).flatten(-2).contiguous()
        cos, sin = self.table[:, :seq_len]
        return torch.cat((cos * even - sin * odd, sin * even + cos * odd), dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions."""

    def __init__(
        self, config: TransformerConfig, rope: RotaryEmbedding, attention: str, formulation: Formulation
    ) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope = rope
        self.attention = resolve_attention(attention)
        self.is_reference = attention == "reference"
        d_model = config.d_model
        self.q_proj = Linear(d_model, d_model, formulation)
        self.k_proj = Linear(d_model, d_model, formulation)
        self.v_proj = Linear(d_model, d_model, formulation)
        self.output_proj = Linear(d_model, d_model, formulation)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = self.rope(query)
        key = self.rope(key)
        if not self.is_reference:  # whose operators autocast knows, each by itself
            query, key, value = in_autocast_precision(query, key, value)
        heads = self.attention(query, key, value, is_causal=True)
        return self.output_proj(heads.transpose(1, 2).flatten(2))  # (batch, seq, d_model)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x)."""

    def __init__(self, d_model: int, d_ff: int, formulation: Formulation = "reference") -> None:
        super().__init__()
        self.fused = formulation == "fused"
        self.w1 = Linear(d_model, d_ff, formulation)
        self.w2 = Linear(d_ff, d_model, formulation)
        self.w3 = Linear(d_model, d_ff, formulation)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        a = self.w1(x)
        silu = F.silu(a) if self.fused else a * torch.sigmoid(a)
        return self.w2(silu * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then + ffn(norm(·))."""

    def __init__(
        self,
        config: TransformerConfig,
        rope: RotaryEmbedding,
        attention: str,
        formulation: Formulation,
        *,
        keeps_ends_alone: bool = False,
    ) -> None:
        """`keeps_ends_alone`: of either half the input alone is kept for backward; see `checkpointing`."""
        super().__init__()
        self.keeps_ends_alone = keeps_ends_alone
        self.draws_random_numbers = is_object_reference(attention)  # nobody knows
        self.ln1 = RMSNorm(config.d_model, formulation=formulation)
        self.attn = CausalSelfAttention(config, rope, attention, formulation)
        self.ln2 = RMSNorm(config.d_model, formulation=formulation)
        self.ffn = SwiGLU(config.d_model, config.d_ff, formulation)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        if not self.keeps_ends_alone:
            return self.with_feed_forward(self.with_attention(x))
        x = rerun_but_for_attention(self.with_attention, x, preserve_rng_state=self.draws_random_numbers)
        return rerun_in_backward(self.with_feed_forward, x)

    def with_attention(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        with named_range("attention"):
            return x + self.attn(self.ln1(x))

    def with_feed_forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        with named_range("feed-forward"):
            return x + self.ffn(self.ln2(x))


class TransformerLM(nn.Module):
    """Tokens (batch, seq) to logits (batch, seq, vocab_size).

    The constructor takes the course's arguments, then this workbook's choices by keyword. The parameters have the
    course's names, so that a checkpoint of the course's model loads. Built on the device and in the precision that
    are PyTorch's defaults at the time (`with torch.device("cuda"): …`).

    Raises:
        UserError: an invalid size, or an unknown rope, attention, formulation or checkpointing.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        rope_theta: int | float = 10_000.0,
        *,
        rope: RopeYear = "2025",
        attention: str = "reference",
        formulation: Formulation = "reference",
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        check_choices(rope, formulation)
        policy = parse_policy(checkpointing, num_layers)
        self.config = config = TransformerConfig(
            d_model, d_ff, num_layers, num_heads, vocab_size, context_length, rope_theta
        )
        self.token_embeddings = Embedding(vocab_size, d_model)
        rotary = RotaryEmbedding(context_length, config.head_dim, rope_theta, rope)
        self.layers = nn.ModuleList(
            TransformerBlock(config, rotary, attention, formulation, keeps_ends_alone=policy.name == "selective")
            for _ in range(num_layers)
        )
        self.plan = plan_of(policy, num_layers)
        self.draws_random_numbers = is_object_reference(attention)  # nobody knows
        self.ln_final = RMSNorm(d_model, formulation=formulation)
        self.lm_head = Linear(d_model, vocab_size, formulation)

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab_size"]:
        if tokens.shape[-1] > self.config.context_length:
            raise ValueError(
                f"{tokens.shape[-1]} tokens are more than the model's context_length {self.config.context_length}"
            )
        x = self.token_embeddings(tokens)
        blocks = [partial(self._run_block, index) for index in range(len(self.layers))]
        x = run_plan(self.plan, blocks, x, preserve_rng_state=self.draws_random_numbers)
        with named_range("logits"):
            return self.lm_head(self.ln_final(x))

    def _run_block(self, index: int, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        with named_range("block", index):
            return self.layers[index](x)


def check_choices(rope: str, formulation: str) -> None:
    """Raise a UserError for a rope or formulation that does not exist."""
    if rope not in get_args(RopeYear):
        raise unknown_name("rope", rope, get_args(RopeYear))
    if formulation not in get_args(Formulation):
        raise unknown_name("formulation", formulation, get_args(Formulation))


def build_model(
    config: TransformerConfig,
    *,
    model: str | None = None,
    rope: RopeYear = "2025",
    attention: str = "reference",
    formulation: Formulation = "reference",
    checkpointing: str = "none",
) -> nn.Module:
    """Ours, or the one that `model` names as `module:Class`, with the course's constructor arguments.

    `checkpointing` is of either, of somebody else's if it keeps its blocks as `checkpoint_layers` asks.

    Raises:
        UserError: somebody else's model together with a choice that only ours has; the class cannot be imported
            or does not take the course's arguments; a checkpointing that is unknown or not possible.
    """
    choices = {"rope": rope, "attention": attention, "formulation": formulation}
    if model is None:
        ours: dict[str, Any] = {**config.course_arguments(), **choices, "checkpointing": checkpointing}
        return TransformerLM(**ours)
    policy = parse_policy(checkpointing, config.num_layers)
    defaults = {"rope": "2025", "attention": "reference", "formulation": "reference"}
    changed = [name for name, value in choices.items() if value != defaults[name]]
    if changed:
        raise UserError(f"{', '.join(changed)} cannot be chosen for {model}: only the workbook's own model has it")
    model_class = load_object(model)
    try:
        built = model_class(**config.course_arguments())
    except TypeError as error:
        names = ", ".join(config.course_arguments())
        raise UserError(f"{model} does not take the course's arguments ({names}): {error}") from error
    if not isinstance(built, nn.Module):
        raise UserError(f"{model} must build a torch.nn.Module, found {type(built).__name__}")
    checkpoint_layers(built, policy)
    return built

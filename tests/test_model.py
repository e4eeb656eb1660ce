"""The model is the course's Transformer in every formulation, compared with an independent one in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cs336_systems.model import (
    Embedding,
    Formulation,
    Linear,
    RMSNorm,
    RopeYear,
    RotaryEmbedding,
    SwiGLU,
    TransformerConfig,
    TransformerLM,
    build_model,
    model_size,
)

# An unusual theta, a context longer than the sequence and a d_ff that is no multiple of d_model: none of them can be
# swapped for another unnoticed.
CONFIG = TransformerConfig(
    d_model=24, d_ff=40, num_layers=2, num_heads=3, vocab_size=29, context_length=13, rope_theta=70.0
)
SEQ_LEN = 9

ROPES: tuple[RopeYear, ...] = ("2025", "2026")
FORMULATIONS: tuple[Formulation, ...] = ("reference", "fused")
ATTENTIONS = ("reference", "sdpa")
every_formulation = pytest.mark.parametrize("formulation", FORMULATIONS)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
every_rope = pytest.mark.parametrize("rope", ROPES)


def course_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The course's parameters, as its handout lists them."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"token_embeddings.weight": (v, d)}
    for i in range(config.num_layers):
        shapes |= {
            f"layers.{i}.ln1.weight": (d,),
            f"layers.{i}.attn.q_proj.weight": (d, d),
            f"layers.{i}.attn.k_proj.weight": (d, d),
            f"layers.{i}.attn.v_proj.weight": (d, d),
            f"layers.{i}.attn.output_proj.weight": (d, d),
            f"layers.{i}.ln2.weight": (d,),
            f"layers.{i}.ffn.w1.weight": (f, d),
            f"layers.{i}.ffn.w2.weight": (d, f),
            f"layers.{i}.ffn.w3.weight": (f, d),
        }
    return shapes | {"ln_final.weight": (d,), "lm_head.weight": (v, d)}


def random_weights(config: TransformerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the course's names; the norms' weights are no ones, so that they matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if len(shape) == 2 else 1.0)
        for name, shape in course_shapes(config).items()
    }


def random_tokens(config: TransformerConfig, batch: int, seq_len: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-5) * weight


def plain_transformer(weights: Mapping[str, Tensor], tokens: Tensor, config: TransformerConfig) -> Tensor:
    """The same mathematics written another way: a head at a time, and RoPE as a product of complex numbers."""
    head_dim = config.d_model // config.num_heads
    seq_len = tokens.shape[1]
    angles = torch.tensor(
        [[t / config.rope_theta ** (2 * i / head_dim) for i in range(head_dim // 2)] for t in range(seq_len)],
        dtype=torch.float64,
    )
    turns = torch.exp(1j * angles)
    x = F.embedding(tokens, weights["token_embeddings.weight"])
    for layer in range(config.num_layers):
        w = {name: weights[f"layers.{layer}.{name}.weight"] for name in ("ln1", "ln2")}
        w |= {name: weights[f"layers.{layer}.attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")}
        w |= {name: weights[f"layers.{layer}.ffn.{name}.weight"] for name in ("w1", "w2", "w3")}
        normed = plain_rms_norm(x, w["ln1"])
        heads = []
        for head in range(config.num_heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query, key, value = (normed @ w[name][rows].T for name in ("q_proj", "k_proj", "v_proj"))
            turned_query = torch.complex(query[..., 0::2], query[..., 1::2]) * turns
            turned_key = torch.complex(key[..., 0::2], key[..., 1::2]) * turns
            # The real part of a·conj(b) is the scalar product of the pairs that a and b stand for.
            scores = (turned_query @ turned_key.conj().transpose(1, 2)).real / head_dim**0.5
            future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
            heads.append(torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ value)
        x = x + torch.cat(heads, dim=-1) @ weights[f"layers.{layer}.attn.output_proj.weight"].T
        normed = plain_rms_norm(x, w["ln2"])
        x = x + (F.silu(normed @ w["w1"].T) * (normed @ w["w3"].T)) @ w["w2"].T
    return plain_rms_norm(x, weights["ln_final.weight"]) @ weights["lm_head.weight"].T


def build_loaded(weights: Mapping[str, Tensor], config: TransformerConfig = CONFIG, **choices: Any) -> torch.nn.Module:
    model = build_model(config, **choices)
    model.load_state_dict(dict(weights), strict=True)
    return model


@pytest.mark.usefixtures("float64")
@every_rope
@every_formulation
@every_attention
def test_logits_and_every_gradient_equal_an_independent_formulation(
    rope: RopeYear, formulation: Formulation, attention: str
) -> None:
    weights = random_weights(CONFIG)
    tokens = random_tokens(CONFIG, 2, SEQ_LEN)
    direction = torch.randn(2, SEQ_LEN, CONFIG.vocab_size, generator=torch.Generator().manual_seed(2))
    model = build_loaded(weights, rope=rope, formulation=formulation, attention=attention)

    logits = model(tokens)
    (logits * direction).sum().backward()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    expected = plain_transformer(leaves, tokens, CONFIG)
    expected_gradients = dict(
        zip(leaves, torch.autograd.grad((expected * direction).sum(), list(leaves.values())), strict=True)
    )

    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        scale = expected_gradients[name].abs().max().item()
        assert scale > 0, f"nothing reaches {name}: the comparison would prove nothing"
        error = (gradient - expected_gradients[name]).abs().max().item()
        assert error <= 1e-11 * scale, f"{name}: off by {error} where the largest entry is {scale}"


@pytest.mark.usefixtures("float64")
@every_attention
def test_both_years_rope_give_the_same_logits(attention: str) -> None:
    weights = random_weights(CONFIG)
    tokens = random_tokens(CONFIG, 2, CONFIG.context_length)
    of_2025, of_2026 = (build_loaded(weights, rope=rope, attention=attention)(tokens) for rope in ROPES)
    torch.testing.assert_close(of_2025, of_2026, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_2025_interleaves_the_rotated_pairs_and_2026_concatenates_the_halves() -> None:
    head_dim, theta = 6, 50.0
    x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    turned = {rope: RotaryEmbedding(8, head_dim, theta, rope)(x) for rope in ROPES}
    for position, pair in itertools.product(range(5), range(head_dim // 2)):
        turn = complex(math.cos(position * theta ** (-2 * pair / head_dim)), 0)
        turn += 1j * math.sin(position * theta ** (-2 * pair / head_dim))
        expected = torch.complex(x[..., position, 2 * pair], x[..., position, 2 * pair + 1]) * turn
        interleaved = turned["2025"][..., position, :]
        halves = turned["2026"][..., position, :]
        for found in (
            torch.complex(interleaved[..., 2 * pair], interleaved[..., 2 * pair + 1]),
            torch.complex(halves[..., pair], halves[..., pair + head_dim // 2]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_the_angles_of_late_positions_are_exact_to_float32_rounding() -> None:
    # In float32 the angle itself would be off by 5e-4 here, thousands of times the rounding of a cosine.
    position, head_dim, theta = 9_999, 64, 10_000.0
    rope = RotaryEmbedding(position + 1, head_dim, theta)
    angles = [position * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    expected = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]], dtype=torch.float64)
    assert rope.table.dtype == torch.float32
    assert (rope.table[:, position].double() - expected).abs().max() < 1e-7


@every_rope
@every_formulation
@every_attention
def test_float32_logits_are_the_float64_ones_to_single_precision(
    rope: RopeYear, formulation: Formulation, attention: str
) -> None:
    weights = random_weights(CONFIG)
    tokens = random_tokens(CONFIG, 2, SEQ_LEN)
    logits = build_loaded(weights, rope=rope, formulation=formulation, attention=attention)(tokens)
    expected = plain_transformer(weights, tokens, CONFIG)
    assert logits.dtype == torch.float32
    assert (logits.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.usefixtures("float64")
def test_a_checkpoint_moves_between_formulations_with_the_same_logits() -> None:
    torch.manual_seed(0)
    saved = build_model(CONFIG)
    tokens = random_tokens(CONFIG, 1, SEQ_LEN)
    loaded = build_loaded(saved.state_dict(), rope="2026", formulation="fused", attention="sdpa")
    torch.testing.assert_close(loaded(tokens), saved(tokens), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length"),
    [
        ("small", 768, 3072, 12, 12, 10_000, 512),
        ("medium", 1024, 4096, 24, 16, 10_000, 512),
        ("large", 1280, 5120, 36, 20, 10_000, 512),
        ("gpt2-xl", 1600, 6400, 48, 25, 10_000, 512),
        ("xl", 2560, 10240, 32, 32, 10_000, 512),
        ("10b", 4608, 12288, 50, 36, 10_000, 512),
        ("leaderboard", 4096, 11008, 34, 32, 151_936, 32_768),
    ],
)
def test_the_sizes_are_the_handouts(
    name: str, d_model: int, d_ff: int, num_layers: int, num_heads: int, vocab_size: int, context_length: int
) -> None:
    found = model_size(name)
    assert (found.d_model, found.d_ff, found.num_layers, found.num_heads) == (d_model, d_ff, num_layers, num_heads)
    assert (found.vocab_size, found.context_length) == (vocab_size, context_length)


@every_formulation
def test_the_parameters_have_exactly_the_courses_names_and_shapes(formulation: Formulation) -> None:
    model = build_model(CONFIG, formulation=formulation)
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == course_shapes(CONFIG)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == course_shapes(CONFIG)


@pytest.mark.usefixtures("float64")
def test_a_state_dict_in_the_courses_names_loads_with_equal_logits() -> None:
    weights = random_weights(CONFIG, seed=5)
    tokens = random_tokens(CONFIG, 3, CONFIG.context_length)
    model = build_model(CONFIG)
    result = model.load_state_dict(weights, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(model(tokens), plain_transformer(weights, tokens, CONFIG), rtol=1e-11, atol=1e-12)


def test_the_head_is_not_tied_to_the_embedding() -> None:
    model = TransformerLM(**CONFIG.course_arguments())  # type: ignore[arg-type]
    embedding_before = model.token_embeddings.weight.detach().clone()
    assert not torch.equal(model.lm_head.weight, embedding_before)
    with torch.no_grad():
        model.lm_head.weight.fill_(7.0)
    assert torch.equal(model.token_embeddings.weight, embedding_before)


@every_rope
@every_formulation
@every_attention
@pytest.mark.parametrize("changed", [1, SEQ_LEN // 2, SEQ_LEN - 1])
def test_a_later_token_leaves_earlier_logits_bit_identical(
    rope: RopeYear, formulation: Formulation, attention: str, changed: int
) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG, rope=rope, formulation=formulation, attention=attention)
    tokens = random_tokens(CONFIG, 2, SEQ_LEN)
    others = tokens.clone()
    others[:, changed] = (others[:, changed] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(others)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).flatten(2).any(-1).all()


@pytest.mark.parametrize(
    ("build", "std"),
    [
        (lambda: Linear(300, 500).weight, math.sqrt(2 / 800)),
        (lambda: Embedding(500, 300).weight, 1.0),
    ],
    ids=["linear", "embedding"],
)
def test_weights_are_normal_and_cut_at_three_standard_deviations(build: Callable[[], Tensor], std: float) -> None:
    torch.manual_seed(0)
    z = build().detach().double().flatten() / std
    assert z.abs().max() <= 3 * (1 + 1e-6)
    # A cut that piles up what lies beyond it would put 400 of the 150,000 there.
    assert (z.abs() > 3 * (1 - 1e-5)).sum() < 5

    def cut_normal(point: float) -> float:
        """The distribution function of a standard normal that is redrawn beyond ±3."""
        return 0.5 + math.erf(point / math.sqrt(2)) / (2 * math.erf(3 / math.sqrt(2)))

    for point in (-2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 2.9):
        probability = cut_normal(point)
        deviation = math.sqrt(probability * (1 - probability) / z.numel())
        assert (z <= point).double().mean().item() == pytest.approx(probability, abs=5 * deviation)
    # Cutting at ±3 takes 1.34 % off the deviation; that of the estimate is 0.2 %.
    assert z.std().item() == pytest.approx(0.98658, rel=0.01)


def test_the_norms_start_at_one() -> None:
    norms = {name: value for name, value in build_model(CONFIG).state_dict().items() if "ln" in name}
    assert len(norms) == 2 * CONFIG.num_layers + 1
    assert all(torch.equal(value, torch.ones(CONFIG.d_model)) for value in norms.values())


def test_two_models_of_one_seed_are_equal_and_of_two_seeds_are_not() -> None:
    torch.manual_seed(3)
    first = build_model(CONFIG).state_dict()
    torch.manual_seed(3)
    again = build_model(CONFIG, rope="2026", formulation="fused", attention="sdpa").state_dict()
    torch.manual_seed(4)
    other = build_model(CONFIG).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@every_formulation
def test_rms_norm_of_bfloat16_is_computed_in_float32(formulation: Formulation) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(256, formulation=formulation)
    with torch.no_grad():
        # Powers of two are exact in bfloat16: the only rounding left is that of the result.
        norm.weight.copy_(2.0 ** torch.randint(-2, 3, (256,)))
    x = (3 * torch.randn(64, 256)).bfloat16()
    found = norm(x)
    expected = plain_rms_norm(x.double(), norm.weight.detach().double())
    in_bfloat16 = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight.bfloat16()

    def worst(y: Tensor) -> float:
        return ((y.double() - expected) / expected).abs().max().item()

    half_a_unit = 2.0**-8  # bfloat16 has 7 bits behind the leading one
    assert found.dtype == torch.bfloat16
    assert worst(found) <= half_a_unit * 1.001
    assert worst(in_bfloat16) > 1.5 * half_a_unit, "the input does not tell the two apart"


def test_the_reference_rms_norm_rounds_once_whatever_its_weight() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(256)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(64, 256).bfloat16()
    expected = plain_rms_norm(x.double(), norm.weight.detach().double())
    assert ((norm(x).double() - expected) / expected).abs().max() <= 2.0**-8 * 1.001


@every_formulation
def test_rms_norm_of_float16_does_not_overflow(formulation: Formulation) -> None:
    x = torch.full((2, 8), 30_000.0, dtype=torch.float16)
    found = RMSNorm(8, formulation=formulation)(x)
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.ones_like(x))


@every_formulation
def test_rms_norm_of_zeros_is_zero(formulation: Formulation) -> None:
    assert torch.equal(RMSNorm(8, formulation=formulation)(torch.zeros(2, 8)), torch.zeros(2, 8))


@every_formulation
def test_swiglu_does_not_overflow_for_large_inputs(formulation: Formulation) -> None:
    ffn = SwiGLU(2, 3, formulation)
    with torch.no_grad():
        for layer in (ffn.w1, ffn.w2, ffn.w3):
            layer.weight.fill_(1.0)
    # silu is the identity far above zero and zero far below: 3 · 2000², and nothing.
    found = ffn(torch.tensor([[1000.0, 1000.0], [-1000.0, -1000.0]]))
    assert found.tolist() == [[12e6, 12e6], [0.0, 0.0]]

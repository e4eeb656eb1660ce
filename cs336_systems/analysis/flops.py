"""Parameters, FLOPs and bytes of the Transformer, by component: what a step must do, on paper.

FLOPs count matrix products only, a multiply-add as two, which is what `torch.utils.flop_counter` counts: elementwise
work is bounded by its bytes, not its arithmetic. A product (M, K) × (K, N) costs 2MKN; its backward is two products of
the same cost, one per input.

Bytes count each component as if it were one perfect kernel: every input read once, every output written once, at
`itemsize` bytes an element. Real kernels move more.

Symbols: B batch, T sequence length, D d_model, F d_ff, H heads, L layers, V vocabulary.

Source: Kaplan et al. 2020, table 1 (2 FLOPs per parameter and token, backward twice forward); Korthikanti et al. 2022,
appendix A (attention's 4BT²D per layer); Ivanov et al. 2021, "Data movement is all you need" (bytes per operator).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from cs336_systems.errors import unknown_name
from cs336_systems.model import TransformerConfig
from cs336_systems.step import PHASES, Phase


@dataclasses.dataclass(frozen=True)
class Work:
    """Arithmetic and traffic: FLOPs of matrix products, and bytes moved."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.bytes * times)


def total(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def matmul(m: int, k: int, n: int, itemsize: int, times: int = 1) -> Work:
    """`times` products (m, k) × (k, n): 2mkn FLOPs; both inputs read and the output written once."""
    return Work(2 * m * k * n, (m * k + k * n + m * n) * itemsize) * times


def parameters(config: TransformerConfig) -> dict[str, int]:
    """Number of parameters per component: V·D, L·4D², L·3DF, (2L + 1)·D, V·D."""
    d, layers = config.d_model, config.num_layers
    return {
        "embedding": config.vocab_size * d,
        "attention": layers * 4 * d * d,
        "ffn": layers * 3 * d * config.d_ff,
        "norms": (2 * layers + 1) * d,
        "lm_head": config.vocab_size * d,
    }


def attended_pairs(num_queries: int, num_keys: int, *, skips_masked: bool) -> int:
    """(query, key) pairs that are computed: all of them, or only key ≤ query where masked tiles are skipped."""
    if not skips_masked:
        return num_queries * num_keys
    shorter = min(num_queries, num_keys)
    return shorter * (shorter + 1) // 2 + max(0, num_queries - num_keys) * num_keys


def forward_work(
    config: TransformerConfig, batch_size: int, seq_len: int, *, itemsize: int = 4, skips_masked: bool = False
) -> dict[str, Work]:
    """FLOPs and bytes of one forward pass per component.

    `skips_masked`: attention that never computes (nor stores) what the causal mask removes, as fused kernels do,
    instead of materialising the T×T scores.
    """
    tokens, d, layers = batch_size * seq_len, config.d_model, config.num_layers
    heads, head_dim = batch_size * config.num_heads, config.head_dim
    stream = tokens * d * itemsize  # one residual-stream activation
    hidden = tokens * config.d_ff * itemsize
    pairs = attended_pairs(seq_len, seq_len, skips_masked=skips_masked)
    scores = 0 if skips_masked else heads * seq_len * seq_len * itemsize  # a fused kernel stores none
    product = Work(2 * heads * pairs * head_dim)  # Q Kᵀ, and as much again for weights × V
    return {
        "embedding": Work(0, 2 * stream),
        "norms": Work(0, 2 * stream) * (2 * layers + 1),
        "qkv_projections": matmul(tokens, d, d, itemsize, times=3 * layers),
        "rope": Work(0, 2 * 2 * stream) * layers,  # queries and keys
        "attention_scores": (product + Work(0, 2 * stream + scores)) * layers,
        "softmax": Work(0, 2 * scores) * layers,
        "attention_values": (product + Work(0, 2 * stream + scores)) * layers,
        "output_projection": matmul(tokens, d, d, itemsize, times=layers),
        "residuals": Work(0, 3 * stream) * (2 * layers),
        "ffn": (matmul(tokens, d, config.d_ff, itemsize, times=2) + matmul(tokens, config.d_ff, d, itemsize)) * layers,
        "swiglu_gate": Work(0, 3 * hidden) * layers,
        "lm_head": matmul(tokens, d, config.vocab_size, itemsize),
    }


def backward_work(
    config: TransformerConfig, batch_size: int, seq_len: int, *, itemsize: int = 4, skips_masked: bool = False
) -> dict[str, Work]:
    """FLOPs and bytes of the loss and one backward pass per component.

    Products cost twice their forward: with dY given, dX = dY·W and dW = dYᵀ·X move the same three matrices each.
    The rest by the tensors its gradient formula reads and writes. What fused attention recomputes is its own overhead
    and is not counted: these are model FLOPs, as in Chowdhery et al. 2022, appendix B.
    """
    forward = forward_work(config, batch_size, seq_len, itemsize=itemsize, skips_masked=skips_masked)
    tokens, d, layers = batch_size * seq_len, config.d_model, config.num_layers
    stream = tokens * d * itemsize
    hidden = tokens * config.d_ff * itemsize
    scores = 0 if skips_masked else batch_size * config.num_heads * seq_len**2 * itemsize
    logits = tokens * config.vocab_size * itemsize
    return {
        "loss": Work(0, 3 * logits),  # read for the loss; read again, gradient written
        "lm_head": forward["lm_head"] * 2,
        "swiglu_gate": Work(0, 5 * hidden) * layers,  # read both factors and the gradient, write two gradients
        "ffn": forward["ffn"] * 2,
        "residuals": Work(0, 3 * stream) * (2 * layers),  # two gradient streams are added
        "output_projection": forward["output_projection"] * 2,
        "attention_values": forward["attention_values"] * 2,
        "softmax": Work(0, 3 * scores) * layers,  # read weights and their gradient, write the scores' gradient
        "attention_scores": forward["attention_scores"] * 2,
        "rope": forward["rope"],
        "qkv_projections": forward["qkv_projections"] * 2,
        "norms": Work(0, 3 * stream) * (2 * layers + 1),  # read input and gradient, write gradient
        "embedding": Work(0, stream + config.vocab_size * d * itemsize),  # a dense gradient, zeros included
    }


def optimizer_work(config: TransformerConfig, *, itemsize: int = 4) -> Work:
    """AdamW: no products; reads θ, g, m, v and writes θ, m, v, 7 values per parameter."""
    return Work(0, 7 * sum(parameters(config).values()) * itemsize)


def phase_work(
    config: TransformerConfig,
    phase: Phase,
    batch_size: int,
    seq_len: int,
    *,
    itemsize: int = 4,
    skips_masked: bool = False,
) -> dict[str, Work]:
    """Work per component of a whole phase; "step" is forward, backward and optimizer; "inference" is "forward".

    Raises:
        UserError: an unknown phase.
    """
    if phase not in PHASES:
        raise unknown_name("phase", phase, PHASES)
    works = forward_work(config, batch_size, seq_len, itemsize=itemsize, skips_masked=skips_masked)
    if phase in ("forward-backward", "step"):
        backward = backward_work(config, batch_size, seq_len, itemsize=itemsize, skips_masked=skips_masked)
        for component, work in backward.items():
            works[component] = works.get(component, Work()) + work
    if phase == "step":
        works["optimizer"] = optimizer_work(config, itemsize=itemsize)
    return works


def compulsory_bytes(
    config: TransformerConfig,
    phase: Phase,
    batch_size: int,
    seq_len: int,
    *,
    itemsize: int = 4,
    logits_itemsize: int = 4,
) -> int:
    """Bytes of *distinct* data a phase must read or write, however well everything else is fused.

    - inference, forward: the weights (of the embedding, the rows that can be looked up) are read, the logits written;
    - forward-backward: the weights are read, one gradient per parameter is written (activations and logits could be
      recomputed or stay on the chip);
    - step: weights and both moments are read and written as well: 7 values per parameter in all.

    `itemsize` is that of a parameter (4 under autocast too), `logits_itemsize` that of the output.
    """
    if phase not in PHASES:
        raise unknown_name("phase", phase, PHASES)
    counts = parameters(config)
    tokens = batch_size * seq_len
    looked_up = min(tokens, config.vocab_size) * config.d_model
    read = sum(counts.values()) - counts["embedding"] + looked_up
    if phase in ("inference", "forward"):
        return read * itemsize + tokens * config.vocab_size * logits_itemsize
    if phase == "forward-backward":
        return (read + sum(counts.values())) * itemsize
    return optimizer_work(config, itemsize=itemsize).bytes


def resident_bytes(config: TransformerConfig, phase: Phase, *, itemsize: int = 4) -> int:
    """Bytes that must be allocated at once before any activation: weights, then gradients, then two moments."""
    copies = {"inference": 1, "forward": 1, "forward-backward": 2, "step": 4}
    if phase not in copies:
        raise unknown_name("phase", phase, PHASES)
    return copies[phase] * sum(parameters(config).values()) * itemsize

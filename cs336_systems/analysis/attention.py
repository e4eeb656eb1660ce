"""What attention must do and hold, counted from its shape: products, bytes moved, and memory.

Symbols: B batch · heads, T length (queries = keys), d head_dim, i bytes per element, M = B·T²·i, one matrix of scores.

    products, forward      2 of 2·d FLOPs per visible pair of query and key: Q Kᵀ, P V
    products, backward     4 with stored weights: dV, dP, dQ, dK; FlashAttention recomputes Q Kᵀ, which makes 5
    causal                 query t sees t + 1 keys: T (T + 1) / 2 pairs per head
    bytes, any form        forward Q, K, V, O; backward Q, K, V, dO, dQ, dK, dV, each once: 4·B·T·d·i and 7·B·T·d·i
    bytes, materialised    on top, every operator between the products reads and writes matrices of M bytes
    softmax, materialised  5 per score: comparison for the maximum, subtraction, exp, addition to the sum, division

Of FLOPs per byte, the arithmetic intensity, the materialised form has about 4·d / (14·i) forward, whatever the length.
Where a tile of scores never leaves the chip it is T / i at most, if Q, K, V and O pass once; tiles of queries that read
K and V again, from cache or memory, have less.

Source: Dao et al. 2022, "FlashAttention", sections 2 and 3; CS336 assignment 2, pytorch_attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from cs336_systems.analysis.flops import Work, attended_pairs
from cs336_systems.errors import unknown_name

Phase = Literal["forward", "backward", "forward-backward"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_PRODUCTS = MappingProxyType({"forward": 2, "backward": 4})
_PRODUCTS_RECOMPUTED = MappingProxyType({"forward": 2, "backward": 5})
# Matrices of scores read and written by the operators of `attention/reference.py` and by their backward, as a test
# counts them: forward writes scores, scaled, masked, shifted, exponentials, weights, and reads one of them in each of
# division, where, maximum, subtraction, exp, sum, division and the product with V.
_MATRICES_MOVED: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "scores": MappingProxyType({"forward": 5, "backward": 6}),
        "softmax": MappingProxyType({"forward": 8, "backward": 27}),
        "value product": MappingProxyType({"forward": 1, "backward": 2}),
    }
)
# Of Q, K, V, O and their gradients, each once.
_TENSORS_MOVED: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "scores": MappingProxyType({"forward": 2, "backward": 4, "forward-backward": 4}),
        "softmax": MappingProxyType({"forward": 0, "backward": 0, "forward-backward": 0}),
        "value product": MappingProxyType({"forward": 2, "backward": 3, "forward-backward": 4}),
    }
)
_SOFTMAX_FLOPS_PER_SCORE = 5
_MATRICES_AT_PEAK = MappingProxyType({"forward": 4, "forward-backward": 6})
_MATRICES_AT_PEAK_COMPILED = MappingProxyType({"forward": 2, "forward-backward": 4})  # by PyTorch 2.13's compiler
_MATRICES_KEPT = 2  # exponentials and weights


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The shape of self-attention; `itemsize` is bytes per element."""

    batch_size: int
    heads: int
    seq_len: int
    head_dim: int
    is_causal: bool
    itemsize: int = 4

    @property
    def rows(self) -> int:
        """Rows of Q over batch and heads."""
        return self.batch_size * self.heads * self.seq_len

    @property
    def tensor_bytes(self) -> int:
        """One of Q, K, V, O and their gradients."""
        return self.rows * self.head_dim * self.itemsize

    @property
    def matrix_bytes(self) -> int:
        """One matrix of scores."""
        return self.rows * self.seq_len * self.itemsize

    @property
    def mask_bytes(self) -> int:
        """The causal mask of the materialised form: a byte per pair, shared by batch and heads."""
        return self.seq_len**2 if self.is_causal else 0

    @property
    def pairs(self) -> int:
        """Pairs of query and key that see one another."""
        per_head = attended_pairs(self.seq_len, self.seq_len, skips_masked=self.is_causal)
        return self.batch_size * self.heads * per_head


def checked_phase(phase: str) -> Phase:
    """`phase`, if it is one; else a UserError that lists them."""
    for known in PHASES:
        if phase == known:
            return known
    raise unknown_name("phase", phase, PHASES)


def least_work(shape: AttentionShape, phase: str) -> Work:
    """The products and distinct bytes that no implementation can do without."""
    tensors = {"forward": 4, "backward": 7, "forward-backward": 8}[checked_phase(phase)]
    products = sum(_PRODUCTS[part] for part in _parts(phase))
    return Work(2 * products * shape.head_dim * shape.pairs, tensors * shape.tensor_bytes)


def counted_flops(shape: AttentionShape, phase: str) -> int:
    """FLOPs as publications count them for a rate: backward with its recomputed product, 2.5 times forward.

    One count for all implementations, so that rates compare as times do; only visible pairs count.
    """
    products = sum(_PRODUCTS_RECOMPUTED[part] for part in _parts(checked_phase(phase)))
    return 2 * products * shape.head_dim * shape.pairs


def _parts(phase: str) -> tuple[str, ...]:
    return ("forward", "backward") if phase == "forward-backward" else (phase,)


# The materialised form -----------------------------------------------------------------------------------------


def traffic_by_part(shape: AttentionShape, phase: str) -> dict[str, int]:
    """Bytes that the operators of scores, softmax and value product read and write when each goes through memory.

    The parts are the named ranges of `attention/reference.py`; the scaling by √d and the mask belong to the scores.
    """
    passes, traffic = _parts(checked_phase(phase)), {}
    for part, matrices in _MATRICES_MOVED.items():
        moved = sum(matrices[one] for one in passes) * shape.matrix_bytes
        traffic[part] = moved + _TENSORS_MOVED[part][phase] * shape.tensor_bytes
    return traffic


def materialised_traffic(shape: AttentionShape, phase: str) -> int:
    """Bytes that the operators of the materialised form read and write when each goes through memory."""
    return sum(traffic_by_part(shape, phase).values())


def softmax_flops(shape: AttentionShape) -> int:
    """Operations of a forward softmax over the whole matrix of scores: 5 per score.

    For each a comparison for the maximum, a subtraction, an exponential, an addition to the sum and a division, all
    counted as one, whatever a processor takes for them.
    """
    return _SOFTMAX_FLOPS_PER_SCORE * shape.rows * shape.seq_len


def flops_by_part(shape: AttentionShape) -> dict[str, int]:
    """FLOPs of the materialised form's forward: 2·d per score in both products, 5 in softmax.

    The whole matrix, since what the mask removes is computed all the same.
    """
    product = 2 * shape.head_dim * shape.rows * shape.seq_len
    return {"scores": product, "softmax": softmax_flops(shape), "value product": product}


def intensity(shape: AttentionShape, phase: str, *, materialised: bool) -> float:
    """FLOPs per byte, of the whole matrix in either form: the materialised one, or one that moves the least."""
    work = least_work(dataclasses.replace(shape, is_causal=False), phase)
    return work.flops / (materialised_traffic(shape, phase) if materialised else work.bytes)


def kept_for_backward(shape: AttentionShape) -> dict[str, int]:
    """Bytes in use between forward and backward of the materialised form, by what they are.

    The gradients are an earlier backward's, which stay; the inputs are counted once, though backward keeps them too.
    """
    int64 = 8
    kept = {
        "queries, keys and values": 3 * shape.tensor_bytes,
        "their gradients": 3 * shape.tensor_bytes,
        "output": shape.tensor_bytes,
        "exponentials": shape.matrix_bytes,
        "weights": shape.matrix_bytes,
        "row sums": shape.rows * shape.itemsize,
        "positions of the row maxima": shape.rows * int64,
        "causal mask": shape.mask_bytes,
    }
    return {name: size for name, size in kept.items() if size}


def kept_by_flash(shape: AttentionShape) -> dict[str, int]:
    """The same of FlashAttention: of the scores only their logsumexp, in float32, is left."""
    return {
        "queries, keys and values": 3 * shape.tensor_bytes,
        "their gradients": 3 * shape.tensor_bytes,
        "output": shape.tensor_bytes,
        "logsumexp": shape.rows * 4,
    }


def materialised_peak(shape: AttentionShape, phase: str, *, compiled: bool = False) -> int:
    """The most bytes at once that the materialised form allocates on top of its inputs and their gradients.

    Forward is at its worst in the softmax's division: scores, shifted scores, exponentials and weights. Backward holds
    the two that were kept and four more. Compiled, what lies between two products is one kernel without a mask, and
    forward allocates nothing but the two that it keeps.
    """
    matrices = _MATRICES_AT_PEAK_COMPILED if compiled else _MATRICES_AT_PEAK
    if phase not in matrices:
        raise unknown_name("phase", phase, matrices)
    return matrices[phase] * shape.matrix_bytes + (0 if compiled else shape.mask_bytes)

"""The least time a piece of work can take on given hardware.

    time ≥ max(FLOPs / matrix rate, DRAM bytes / bandwidth)

A bound must hold for every implementation, so the bytes are the compulsory ones, and of those only what cannot
have stayed in the last-level cache since the step before: of B distinct bytes that each step touches, at least
B − cache must come from memory. Small models on a CPU live in its cache, and a bound without this term would be
broken by them.

The same for a step as it is written (`operators_floor`): every operator is a kernel of its own, which takes at least as
long as its FLOPs or its bytes, and the kernels run one after the other. What small tensors gain by staying in a cache
between two operators is not in it: it is a floor for tensors that are larger than the cache.

Source: Williams, Waterman & Patterson 2009, "Roofline".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cs336_systems.analysis.flops import Work, compulsory_bytes, phase_work, total
from cs336_systems.analysis.hardware import Peaks, product_precision
from cs336_systems.analysis.operators import Operator
from cs336_systems.model import TransformerConfig
from cs336_systems.step import Phase


@dataclasses.dataclass(frozen=True)
class Bound:
    """The floor of a time, and which ceiling sets it."""

    seconds: float
    limited_by: str
    """"compute" or "memory"."""


def bound(work: Work, peaks: Peaks, precision: str) -> Bound:
    """The floor of `work`, its products running in `precision` and its bytes being distinct."""
    compute_s = work.flops / peaks.rate(precision)
    memory_s = max(0, work.bytes - peaks.cache_bytes) / peaks.bandwidth_bytes_per_s
    return Bound(max(compute_s, memory_s), "memory" if memory_s > compute_s else "compute")


def operators_floor(operators: Mapping[Operator, int], peaks: Peaks, float32_matmul: str = "highest") -> float:
    """Seconds that operators, each so many times, take at the ceilings: Σ max(FLOPs / matrix rate, bytes / bandwidth).

    Raises:
        UserError: products of a precision that the device has no rate for.
    """
    return sum(max(operator_ceilings(kind, peaks, float32_matmul)) * times for kind, times in operators.items())


def operator_ceilings(operator: Operator, peaks: Peaks, float32_matmul: str = "highest") -> tuple[float, float]:
    """Seconds of one operator at the matrix rate of its precision, and at the bandwidth."""
    compute_s = 0.0
    if operator.flops:
        compute_s = operator.flops / peaks.rate(product_precision(operator.precision, "none", float32_matmul))
    return compute_s, operator.bytes / peaks.bandwidth_bytes_per_s


def step_bound(
    config: TransformerConfig,
    phase: Phase,
    batch_size: int,
    seq_len: int,
    peaks: Peaks,
    precision: str,
    *,
    itemsize: int = 4,
    logits_itemsize: int = 4,
    skips_masked: bool = False,
) -> Bound:
    """The floor of one phase of the Transformer: all its products at the matrix rate, or its compulsory bytes."""
    flops = total(phase_work(config, phase, batch_size, seq_len, skips_masked=skips_masked).values()).flops
    distinct = compulsory_bytes(config, phase, batch_size, seq_len, itemsize=itemsize, logits_itemsize=logits_itemsize)
    return bound(Work(flops, distinct), peaks, precision)


IN_FLOAT32_UNDER_AUTOCAST = frozenset({"embedding", "norms", "residuals", "loss", "optimizer"})
"""Components whose numbers stay in float32 under autocast; the others' are in half precision."""


def operators_seconds(
    config: TransformerConfig,
    phase: Phase,
    batch_size: int,
    seq_len: int,
    peaks: Peaks,
    precision: str,
    *,
    itemsize: int = 4,
    autocast_itemsize: int | None = None,
) -> float:
    """How long a phase takes if each of its components is one perfect kernel, one after the other.

    No floor, since fused kernels move less; but it tells how much of the time products are, and how much is traffic,
    of which autocast leaves the part in float32 as it is.

    Args:
        autocast_itemsize: bytes of a number in autocast's precision; without autocast None.
    """
    wide = phase_work(config, phase, batch_size, seq_len, itemsize=itemsize)
    half = phase_work(config, phase, batch_size, seq_len, itemsize=autocast_itemsize or itemsize)
    works = {name: wide[name] if name in IN_FLOAT32_UNDER_AUTOCAST else half[name] for name in wide}
    rate, bandwidth = peaks.rate(precision), peaks.bandwidth_bytes_per_s
    return sum(max(work.flops / rate, work.bytes / bandwidth) for work in works.values())

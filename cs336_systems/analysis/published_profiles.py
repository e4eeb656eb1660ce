"""What others published of profiles of GPT-2 XL on an A100: kernels, the ranges of attention, and peaks of memory.

The tables are in data/reference/, each with its source and hardware in the README there; this module knows what their
rows mean. All are of the model of the handouts (vocabulary 10,000), batch 4, eager, without TF32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import pandas as pd

from cs336_systems.analysis.published import NAN
from cs336_systems.errors import unknown_name
from cs336_systems.model import SIZES, TransformerConfig
from cs336_systems.profiling.categories import CATEGORIES, Category, category_of

_CONTEXT_OF_PROFILES = 256
_BATCH_SIZE = 4
_RANGE_OF_PHASE = MappingProxyType(
    {
        "forward": "forward",
        "backward": "backward",
        "forward-backward": "forward_backward",
        "step": "train_step",
    }
)
_PERCENT_ROUNDING = 0.05
"""A published percentage is rounded to a tenth."""


def _is_published_model(config: TransformerConfig, batch_size: int) -> bool:
    """Whether this is GPT-2 XL, of whatever context, in the published batch."""
    known = dataclasses.replace(SIZES["gpt2-xl"], context_length=config.context_length)
    return config == known and batch_size == _BATCH_SIZE


# Kernels -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PublishedKernel:
    """One row of a kernel summary."""

    kernel: str
    category: Category
    time_percent: float
    """Of the GPU time of the range, rounded to a tenth."""
    total_ms: float
    instances: int


class PublishedKernels:
    """Kernel summaries of the ranges of a training step, context 256: of each the rows with the most time.

    The rest is not printed, so that a share is "at least".
    """

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        self._rows: dict[str, tuple[PublishedKernel, ...]] = {}
        for row in reference("nsys_gpt2xl_ctx256_a100").itertuples():
            kernel = PublishedKernel(
                kernel=str(row.kernel),
                category=category_of(str(row.kernel)),
                time_percent=float(row.time_percent),
                total_ms=float(row.total_ms),
                instances=int(row.instances),
            )
            self._rows[str(row.range)] = (*self._rows.get(str(row.range), ()), kernel)

    @property
    def ranges(self) -> tuple[str, ...]:
        """The names of the ranges as they are printed; `forward_nonmatmul` is of another run of `forward`."""
        return tuple(self._rows)

    def kernels(self, name: str) -> tuple[PublishedKernel, ...]:
        """The published rows of a range, the most time first.

        Raises:
            UserError: nothing was published for a range of this name.
        """
        if name not in self._rows:
            raise unknown_name("published range", name, self._rows)
        return self._rows[name]

    def gpu_ms(self, name: str) -> tuple[float, float]:
        """All GPU time of a range, printed or not: at least and at most what every row's share of it allows."""
        rows = self.kernels(name)
        least = (row.total_ms / (row.time_percent + _PERCENT_ROUNDING) for row in rows)
        most = (row.total_ms / (row.time_percent - _PERCENT_ROUNDING) for row in rows)
        return 100 * max(least), 100 * min(most)

    def percent_at_least(self, name: str, category: Category = "matrix products") -> float:
        """The share of a range's GPU time that the printed kernels of a kind have, if all the rest is of other kinds.

        Raises:
            UserError: an unknown range or kind.
        """
        if category not in CATEGORIES:
            raise unknown_name("category", category, CATEGORIES)
        printed = sum(row.total_ms for row in self.kernels(name) if row.category == category)
        return 100 * printed / self.gpu_ms(name)[1]

    def beside(
        self,
        config: TransformerConfig,
        *,
        phase: str,
        batch_size: int,
        autocast: str = "none",
        tf32: bool = False,
        compiled: bool = False,
    ) -> dict[str, float | str]:
        """Of the phase's range the GPU time, the least share of matrix products, and its first kernel.

        Columns `a100_gpu_ms`, `a100_products_percent_at_least`, `a100_kernel`, `a100_kernel_percent` and
        `a100_kernel_instances`; NaN, and no kernel, where nothing was published for this work.
        """
        numbers = ("a100_gpu_ms", "a100_products_percent_at_least", "a100_kernel_percent", "a100_kernel_instances")
        found: dict[str, float | str] = {**dict.fromkeys(numbers, NAN), "a100_kernel": ""}
        is_eager = (autocast, tf32, compiled) == ("none", False, False)
        is_published = _is_published_model(config, batch_size) and config.context_length == _CONTEXT_OF_PROFILES
        if not (is_eager and is_published and phase in _RANGE_OF_PHASE):
            return found
        name = _RANGE_OF_PHASE[phase]
        first = self.kernels(name)[0]
        return {
            "a100_gpu_ms": sum(self.gpu_ms(name)) / 2,
            "a100_products_percent_at_least": self.percent_at_least(name),
            "a100_kernel": first.kernel,
            "a100_kernel_percent": first.time_percent,
            "a100_kernel_instances": float(first.instances),
        }


# Ranges of attention -------------------------------------------------------------------------------------------


class PublishedRanges:
    """Time of one layer of attention in forward, its four projections included, and of its softmax alone.

    The context is not printed. It is taken to be that of the kernel summaries, 256: there the eight matrices that
    softmax moves take 135 µs of an A100's memory, and 34 µs or 539 µs at half or twice that.
    """

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        rows = reference("attention_ranges_gpt2xl_a100")
        self._microseconds = dict(zip(rows["range"], map(float, rows["microseconds"]), strict=True))

    def beside(
        self,
        config: TransformerConfig,
        *,
        batch_size: int,
        autocast: str = "none",
        tf32: bool = False,
        compiled: bool = False,
    ) -> dict[str, float]:
        """Columns `a100_attention_us` and `a100_softmax_us`; NaN where nothing was published for this work."""
        is_eager = (autocast, tf32, compiled) == ("none", False, False)
        is_published = _is_published_model(config, batch_size) and config.context_length == _CONTEXT_OF_PROFILES
        if not (is_eager and is_published):
            return {"a100_attention_us": NAN, "a100_softmax_us": NAN}
        return {
            "a100_attention_us": self._microseconds["CausalMultiHeadSelfAttention"],
            "a100_softmax_us": self._microseconds["softmax"],
        }


# Peaks of memory -----------------------------------------------------------------------------------------------

_PHASES = MappingProxyType({"forward": "forward", "train_step": "step"})
_AUTOCASTS = MappingProxyType({"fp32": "none", "bf16_autocast": "bfloat16"})
_DOUBTFUL = MappingProxyType(
    {
        (
            "step",
            "bfloat16",
            512,
        ): "printed as context 512, probably 256: at 512 the weights, both moments and what the "
        "blocks keep would be more than the GPU has"
    }
)
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class PublishedPeak:
    """A peak of allocated memory. Published is a whole number of decimal gigabytes, cut: so the peak is in between."""

    phase: str
    """`forward`, with what backward needs kept, or `step`."""
    autocast: str
    context_length: int
    """As it is printed."""
    at_least_bytes: int
    below_bytes: int
    remark: str
    """Why it is to be doubted, if it is."""


LARGEST_ALLOCATION_BYTES, LARGEST_ALLOCATION_CONTEXT = 104_857_600, 512
"""The largest allocations that were read off the forward's timeline, and its context."""


class PublishedPeaks:
    """Peaks read off memory_viz."""

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        self._peaks: dict[tuple[str, str, int], PublishedPeak] = {}
        for row in reference("peak_memory_gpt2xl_a100").itertuples():
            key = (_PHASES[str(row.phase)], _AUTOCASTS[str(row.precision)], int(row.context_length))
            gigabytes = int(row.peak_gb_truncated)
            self._peaks[key] = PublishedPeak(
                *key,
                at_least_bytes=gigabytes * _GB,
                below_bytes=(gigabytes + 1) * _GB,
                remark=_DOUBTFUL.get(key, ""),
            )

    def rows(self) -> tuple[PublishedPeak, ...]:
        """Every peak, in the order of the table."""
        return tuple(self._peaks.values())

    def peak(self, phase: str, context_length: int, autocast: str = "none") -> PublishedPeak | None:
        """The peak that is printed for this work, doubtful or not."""
        return self._peaks.get((phase, autocast, context_length))

    def beside(
        self,
        config: TransformerConfig,
        *,
        phase: str,
        batch_size: int,
        autocast: str = "none",
        compiled: bool = False,
    ) -> dict[str, float | str]:
        """Columns `a100_peak_at_least_bytes`, `a100_peak_below_bytes` and `a100_peak_remark`.

        NaN, and no remark, where nothing was published for this work.
        """
        peak = self.peak(phase, config.context_length, autocast)
        if peak is None or compiled or not _is_published_model(config, batch_size):
            return {"a100_peak_at_least_bytes": NAN, "a100_peak_below_bytes": NAN, "a100_peak_remark": ""}
        return {
            "a100_peak_at_least_bytes": float(peak.at_least_bytes),
            "a100_peak_below_bytes": float(peak.below_bytes),
            "a100_peak_remark": peak.remark,
        }

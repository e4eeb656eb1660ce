"""The time of a step from its operators: at the ceilings, and with three constants that measured steps give.

    constants = calibrate(timed, peaks)                  # TimedStep of several sizes, on one machine
    estimate_seconds(chosen, peaks, constants)

The constants, each with a meaning of its own:

- matrix fraction: of the matrix rate, what products reach;
- bandwidth fraction: of the memory's bandwidth, what all kernels reach;
- host step: what the host takes for an operator before its kernel can run, interpreter, dispatcher and launch
  together; twice where autograd records it, and for a kernel of compiled code (`analysis/operators.py`).

A kernel takes the longer of its FLOPs and its bytes at these rates. A CPU works through operators itself, so that the
host's steps add to the kernels. A GPU works beside the host: launches wait in a queue, and whoever is slower sets the
pace. Stage by stage, with H the host's time, D the device's, and b what was still queued when the stage began:

    host done        e  = max(H, b + D·(1 − q))         q: the part of the stage's launches that the queue holds
    still queued     b' = max(H, b + D) − e
    step             Σ e + b of the last stage

So a step is bound by launches where the stages are, and by kernels where they are: forward may be the one and the
optimizer the other. The floor is the same with whole ceilings and a host that takes no time, so that no estimate is
below it.

What is left out: that products of other shapes reach other fractions, and that tensors may stay in a cache. Fitted is
the sum of squared relative errors, by a search over a grid and then along its axes: no start to choose, and the same
constants each time.

Source: Williams, Waterman & Patterson 2009, "Roofline"; the queue's length: "CUDA stream are blocked when launch lots
of kernels (>1000)", NVIDIA developer forums 68937 (2019).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.roofline import operator_ceilings, operators_floor
from cs336_systems.analysis.step_operators import Stage, stages_of
from cs336_systems.errors import UserError
from cs336_systems.step import StepConfig

QUEUED_LAUNCHES = 1_000
"""How many launches a CUDA stream holds before the host has to wait."""
LEAST_SIZES = 2
"""How many sizes of models constants are fitted to: one alone cannot tell them apart."""

_Array = npt.NDArray[np.float64]
# Between which they are searched: fractions are of a ceiling, and a host takes between one microsecond and a hundred.
_LEAST = np.log([0.05, 0.05, 1e-6])
_MOST = np.log([1.0, 1.0, 1e-4])
_GRID = (8, 8, 25)
"""Fine in the host's step: where no row is bound by launches, many are equally good, next to the one that is better."""
_STARTS = 6
_FINEST = 1e-3
_NEIGHBOURS = np.array([each for each in itertools.product((-1, 0, 1), repeat=3) if any(each)], dtype=float)


@dataclasses.dataclass(frozen=True)
class Constants:
    """What is fitted."""

    matrix_fraction: float
    bandwidth_fraction: float
    host_step_s: float

    @property
    def host_step_us(self) -> float:
        return 1e6 * self.host_step_s


CEILINGS = Constants(1.0, 1.0, 0.0)
"""With which the estimate is the floor."""


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """A step and what it took."""

    chosen: StepConfig
    seconds: float

    @property
    def model(self) -> tuple[int, ...]:
        """What tells sizes apart, whatever the context."""
        config = self.chosen.config
        return config.d_model, config.d_ff, config.num_layers, config.num_heads, config.vocab_size


def floor_seconds(chosen: StepConfig, peaks: Peaks) -> float:
    """The step's operators one after the other, each at its ceiling.

    Raises:
        UserError: see `stages_of`; a precision or a bandwidth that the machine has no ceiling for.
    """
    _require_ceilings(peaks)
    return sum(operators_floor(stage.operators, peaks, chosen.float32_matmul) for stage in stages_of(chosen))


def estimate_seconds(chosen: StepConfig, peaks: Peaks, constants: Constants) -> float:
    """The step on a machine with these constants.

    Raises:
        UserError: as `floor_seconds`.
    """
    return float(_Steps([chosen], peaks).seconds(_as_array(constants))[0, 0])


def calibrate(timed: Sequence[TimedStep], peaks: Peaks) -> Constants:
    """The constants with the least squares of relative errors over `timed`.

    Raises:
        UserError: fewer than three times or than two sizes; as `floor_seconds`.
    """
    sizes = len({each.model for each in timed})
    if len(timed) < len(dataclasses.fields(Constants)) or sizes < LEAST_SIZES:
        raise UserError(
            f"three constants need at least three times, of {LEAST_SIZES} sizes; found {len(timed)} of {sizes}: "
            "measure more sizes"
        )
    steps = _Steps([each.chosen for each in timed], peaks)
    measured = np.array([each.seconds for each in timed])

    def errors(candidates: _Array) -> _Array:
        return np.square(steps.seconds(np.exp(candidates)) / measured - 1).sum(axis=-1)

    axes = [np.linspace(*ends) for ends in zip(_LEAST, _MOST, _GRID, strict=True)]
    grid = np.array(list(itertools.product(*axes)))
    starts = grid[np.argsort(errors(grid), kind="stable")[:_STARTS]]
    spacing = (_MOST - _LEAST) / (np.array(_GRID) - 1)
    found = [_descend(errors, start, spacing / 2) for start in starts]
    best = min(found, key=lambda each: each[0])[1]
    return Constants(*map(float, np.exp(best)))


def left_out(timed: Sequence[TimedStep], peaks: Peaks) -> list[float]:
    """Seconds of every step as the others predict it: by the constants fitted to all sizes but its own.

    NaN where the others are too few.
    """
    estimates = [math.nan] * len(timed)
    for model in dict.fromkeys(each.model for each in timed):
        others = [each for each in timed if each.model != model]
        try:
            constants = calibrate(others, peaks)
        except UserError:
            continue
        for place, each in enumerate(timed):
            if each.model == model:
                estimates[place] = estimate_seconds(each.chosen, peaks, constants)
    return estimates


def _descend(errors: Callable[[_Array], _Array], start: _Array, spacing: _Array) -> tuple[float, _Array]:
    """From `start` to the least of `errors` around it: to the best neighbour, or closer where none is better."""
    at, least = start, float(errors(start[None])[0])
    while spacing.max() > _FINEST:
        around = np.clip(at + _NEIGHBOURS * spacing, _LEAST, _MOST)
        found = errors(around)
        best = int(found.argmin())
        if found[best] < least * (1 - _FINEST**2):
            at, least = around[best], float(found[best])
        else:
            spacing = spacing / 2
    return least, at


class _Steps:
    """Steps as arrays, steps × stages × kernels, for many constants at once."""

    def __init__(self, chosen: Sequence[StepConfig], peaks: Peaks) -> None:
        _require_ceilings(peaks)
        per_step = [stages_of(each) for each in chosen]
        stages = max(map(len, per_step))
        kernels = [
            [_kernels(stage, peaks, each.float32_matmul) for stage in of_step]
            for each, of_step in zip(chosen, per_step, strict=True)
        ]
        longest = max(len(of_stage) for of_step in kernels for of_stage in of_step)
        self._compute, self._memory = np.zeros((2, len(chosen), stages, longest))
        self._host_steps, self._launches = np.zeros((2, len(chosen), stages))
        for row, (of_step, seconds) in enumerate(zip(per_step, kernels, strict=True)):
            for column, (stage, of_stage) in enumerate(zip(of_step, seconds, strict=True)):
                self._compute[row, column, : len(of_stage)], self._memory[row, column, : len(of_stage)] = zip(
                    *of_stage, strict=True
                )
                self._host_steps[row, column], self._launches[row, column] = stage.host_steps, stage.launches
        self._is_gpu = np.array([each.device == "cuda" for each in chosen])

    def seconds(self, constants: _Array) -> _Array:
        """Of constants in rows, candidates × 3: candidates × steps."""
        matrix, bandwidth, host_step = (constants[:, column, None, None] for column in range(3))
        device = np.maximum(self._compute / matrix[..., None], self._memory / bandwidth[..., None]).sum(axis=-1)
        host = self._host_steps * host_step
        return np.where(self._is_gpu, self._side_by_side(host, device), (host + device).sum(axis=-1))

    def _side_by_side(self, host: _Array, device: _Array) -> _Array:
        """The queue of launches between host and device, stage by stage."""
        waiting = 1 - np.minimum(1, QUEUED_LAUNCHES / np.maximum(1, self._launches))
        elapsed, queued = np.zeros((2, *host.shape[:2]))
        for stage in range(host.shape[-1]):
            behind = queued + device[..., stage]
            done = np.maximum(host[..., stage], queued + device[..., stage] * waiting[:, stage])
            queued = np.maximum(host[..., stage], behind) - done
            elapsed += done
        return elapsed + queued


def _kernels(stage: Stage, peaks: Peaks, float32_matmul: str) -> list[tuple[float, float]]:
    """Seconds at the ceilings, of compute and of memory: one pair for each kind of product, one for all the rest."""
    products, rest = [], 0.0
    for kind, times in stage.operators.items():
        compute_s, memory_s = operator_ceilings(kind, peaks, float32_matmul)
        if kind.flops:
            products.append((compute_s * times, memory_s * times))
        else:
            rest += memory_s * times
    return [*products, (0.0, rest)]


def _as_array(constants: Constants) -> _Array:
    return np.array([dataclasses.astuple(constants)])


def _require_ceilings(peaks: Peaks) -> None:
    if math.isnan(peaks.bandwidth_bytes_per_s):
        raise UserError(f"the bandwidth of {peaks.name} is not known: {peaks.lacks or 'measure machine_peaks'}")

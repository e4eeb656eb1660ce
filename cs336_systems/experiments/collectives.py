"""Collectives between ranks of one machine: time, bandwidth, and what a ring could do at the speed of its links.

Problems `distributed_communication_single_node` and `alternate_ring_all_reduce`. One case is a number of ranks and the
size of an array of float32. In a launch of its own, a round runs everything once, in turn: messages between neighbours,
the library's collectives, and the two rings of `distributed/collectives.py`. What a rank does is in
`collectives_ranks.py`; of a call, the time is that of its slowest rank.

The bound is a ring's, and of the same rounds: the bytes that a ring sends (`analysis/communication.py`) at the best
bandwidth that any message had which was sent while one came, as in a ring. Those are chunks of s/N bytes between two
ranks alone, the same while all ranks send, and whole arrays of s bytes while all send; each at its fastest round. A
message's time includes its start: of a small array that is most of it, so that its bound is one of such messages and
not of the link. And it bounds rings, not every algorithm: a switch that adds up what passes through it (NVLink SHARP)
has each rank send its array once, about half of a ring's bytes.

Between GPUs the ranks use NCCL, a GPU each; between CPUs Gloo, with one thread each, and there may be more ranks than
cores. Sizes are decimal: 1 MB is 10⁶ bytes.

Source: CS336 assignment 2 (2025), section 2.1; bandwidths as in nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from cs336_systems.analysis.communication import (
    ALL_REDUCES,
    ALTERNATE,
    algorithm_bandwidth,
    bus_bandwidth,
    ring_cost,
)
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.analysis.published import PublishedAllReduce
from cs336_systems.bench import grid as grids
from cs336_systems.bench.allocator import available_bytes
from cs336_systems.bench.machine import resolve_device, usable_cores
from cs336_systems.bench.ranks import lack_of_memory_told, slowest_of
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import bytes_in_words
from cs336_systems.bench.sweep import OnPart, OutOfMemory
from cs336_systems.distributed.collectives import COLLECTIVES, scratch_elements
from cs336_systems.distributed.launch import TIMEOUT_S, RankFailed, launch
from cs336_systems.distributed.rank import BACKENDS
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.experiments.collectives_ranks import ALL_AT_ONCE, ALL_WHOLE, BOTH_WAYS, ONE_WAY, take_part

MB = 10**6
OPERATIONS = tuple(COLLECTIVES)
OTHERS = tuple(name for name in OPERATIONS if name not in ALL_REDUCES)
LINKS: Mapping[str, str] = MappingProxyType(
    {
        ONE_WAY: "one_way_bytes_per_s",
        BOTH_WAYS: "link_bytes_per_s",
        ALL_AT_ONCE: "shared_bytes_per_s",
        ALL_WHOLE: "shared_whole_bytes_per_s",
    }
)
"""The column of each message's bandwidth."""
RING_LINK = "ring_bytes_per_s"
"""The column of the best of those that were sent while one came; bounds are computed with it."""
LARGE_BYTES, FEWEST_ROUNDS = 10 * MB, 5
"""Up to which size the rounds are those that are asked for; beyond it they are fewer, but not below these."""
PROCESS_BYTES = 50 * 2**20
"""About what a rank has for itself beside its arrays."""
SLOWEST_BYTES_PER_S = 2e8
"""What the links of all ranks together move at least; slower ones count as hung."""

PASSES: Mapping[str, float] = MappingProxyType({"cpu": 16.0, "cuda": 8.0})
START_S: Mapping[str, float] = MappingProxyType({"cpu": 1.0, "cuda": 10.0})
"""How many times over a byte that is sent goes through memory, about, and what starting the ranks takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """So many ranks, and an array so large. All of it is checked on creation.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    world_size: int
    size_bytes: int
    device: str
    operations: tuple[str, ...] = OPERATIONS
    """In the order in which a round runs them."""
    warmup: int = 5
    rounds: int = 20

    def __post_init__(self) -> None:
        for name, least in (("world_size", 2), ("size_bytes", 4), ("warmup", 0), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, found {value!r}")
        operations = tuple(self.operations)  # a list, as records have it
        for each in operations:
            if each not in OPERATIONS:
                raise unknown_name("operation", each, OPERATIONS)
        if not operations:
            raise UserError(f"operations is empty: name one or more of {', '.join(OPERATIONS)}")
        object.__setattr__(self, "operations", tuple(each for each in OPERATIONS if each in operations))
        if self.device not in BACKENDS.values():
            raise unknown_name("device", self.device, BACKENDS.values())

    @property
    def backend(self) -> str:
        """gloo between CPUs, nccl between GPUs."""
        return next(backend for backend, device in BACKENDS.items() if device == self.device)

    @property
    def length(self) -> int:
        """Elements of the array, rounded up to what the ranks can share evenly."""
        return -(-self.size_bytes // (4 * self.world_size)) * self.world_size

    @property
    def array_bytes(self) -> int:
        return 4 * self.length

    @property
    def scratch_length(self) -> int:
        """Elements of scratch that the operations share."""
        return max(scratch_elements(each, self.length, self.world_size) for each in self.operations)

    @property
    def messages(self) -> tuple[str, ...]:
        """What is sent between neighbours in a round; a whole array only where the alternate ring has room for it."""
        return (ONE_WAY, BOTH_WAYS, ALL_AT_ONCE, *([ALL_WHOLE] if ALTERNATE in self.operations else []))

    def __str__(self) -> str:
        return f"{self.size_bytes / MB:g} MB, {self.world_size} ranks, {self.backend}"


def grid(
    *,
    sizes_mb: Sequence[float] = (1, 10, 100),
    world_sizes: Sequence[int] = (2, 4),
    operations: Sequence[str] = OPERATIONS,
    others_mb: Sequence[float] | None = (10,),
    warmup: int = 5,
    rounds: int = 20,
    device: str = "auto",
    device_count: int | None = None,
) -> list[grids.Cell[Case]]:
    """Numbers of ranks × sizes.

    Args:
        sizes_mb: of the array, in 10⁶ bytes.
        operations: what is timed, of `distributed.collectives.COLLECTIVES`.
        others_mb: the sizes at which what is no all-reduce is timed as well; None for all sizes.
        rounds: for arrays of up to 10 MB; of larger ones fewer in proportion, but at least 5.
        device_count: the machine's GPUs; by default this machine's.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    device = resolve_device(device)
    count = device_count if device_count is not None else torch.cuda.device_count()
    cells: list[grids.Cell[Case]] = []
    for world_size in world_sizes:
        for size in sizes_mb:
            size_bytes = round(size * MB)
            is_for_all = others_mb is None or size in others_mb
            chosen = [each for each in operations if is_for_all or each not in OTHERS]
            cells += grids.product(
                Case,
                skip=partial(_too_few_devices, count=count),
                world_size=world_size,
                size_bytes=size_bytes,
                operations=[tuple(chosen)],
                warmup=warmup,
                rounds=_rounds_for(size_bytes, rounds),
                device=device,
            )
    return cells


def _rounds_for(size_bytes: int, rounds: int) -> int:
    if size_bytes <= LARGE_BYTES:
        return rounds
    return min(rounds, max(FEWEST_ROUNDS, rounds * LARGE_BYTES // size_bytes))


def _too_few_devices(case: Case, count: int) -> str | None:
    if case.backend != "nccl" or case.world_size <= count:
        return None
    return f"NCCL needs a GPU for each rank: {case.world_size} ranks, and the machine has {count}"


# Memory --------------------------------------------------------------------------------------------------------


def planned_bytes(case: Case) -> int:
    """What one rank holds at most: its arrays, and the copy that the library may make of one."""
    ours = 4 * (case.length + case.length // case.world_size + case.scratch_length)
    copies = {"reduce_scatter", "all_gather"} & set(case.operations)
    return ours + (case.array_bytes if copies else 0) + PROCESS_BYTES


def require_memory(case: Case) -> None:
    """Refuse what cannot fit before any rank is started.

    Raises:
        OutOfMemory: the ranks hold more than is available; a GPU each, or the memory of the machine together.
    """
    ranks = case.world_size if case.device == "cpu" else 1
    planned, available = ranks * planned_bytes(case), available_bytes(case.device)
    if planned > available:
        together = f"{ranks} ranks" if ranks > 1 else "a rank"
        raise OutOfMemory(
            f"{together} with arrays of {case.size_bytes / MB:g} MB hold {bytes_in_words(planned)} "
            f"({planned:,} bytes), and {bytes_in_words(available)} are available: take a smaller size or fewer ranks"
        )


# Measuring -----------------------------------------------------------------------------------------------------


def measure(case: Case, on_part: OnPart) -> Measurement:
    """Launch the ranks, and time everything in `warmup` + `rounds` rounds.

    Samples: `<operation> ms`, of each measured round the slowest rank's. Values: by operation its status; `ranks_ms` by
    operation and message every rank's own times, as far as it takes part; `cores` that the ranks had.

    Raises:
        OutOfMemory: the arrays do not fit, or the system killed a rank.
        RankFailed: a rank failed; what had been finished until then is told with it.
    """
    require_memory(case)
    rounds = Rounds(case, on_part)
    try:
        with lack_of_memory_told():
            launch(
                take_part,
                case,
                world_size=case.world_size,
                backend=case.backend,
                timeout_s=timeout_s(case),
                on_report=rounds.add,
            )
    except RankFailed as error:
        error.add_note(f"Times of the measured rounds that were finished, in ms: {json.dumps(rounds.ranks_ms())}")
        raise
    return rounds.measurement()


def timeout_s(case: Case) -> float:
    """How long a rank may be silent: longer than the longest call of very slow links."""
    longest = max(ring_cost(each, case.array_bytes, case.world_size).total_bytes for each in case.operations)
    return max(TIMEOUT_S, longest / SLOWEST_BYTES_PER_S)


class Rounds:
    """What the ranks have reported so far."""

    def __init__(self, case: Case, on_part: OnPart) -> None:
        self._case, self._on_part = case, on_part
        self._times: list[dict[str, list[float]]] = [{} for _ in range(case.world_size)]
        self._reports = 0
        self._skipped: dict[str, str] = {}

    def add(self, rank: int, report: Mapping[str, Any]) -> None:
        """A call of a measured round, a finished round, or why an operation is left out."""
        if "skipped" in report:
            self._skipped[report["skipped"]] = report["reason"]
        elif "round" in report:
            self._reports += 1
            total = self._case.world_size * (self._case.warmup + self._case.rounds)
            self._on_part(self._reports / total)
            if report["round"] >= self._case.warmup:
                for name, ms in report["ms"].items():
                    self._times[rank].setdefault(name, []).append(ms)

    def ranks_ms(self) -> dict[str, list[list[float]]]:
        """By name the times of each rank that takes part."""
        names = (*self._case.messages, *self._case.operations)
        found = {name: [of_rank[name] for of_rank in self._times if name in of_rank] for name in names}
        return {name: times for name, times in found.items() if times}

    def measurement(self) -> Measurement:
        """What a record keeps."""
        ranks_ms = self.ranks_ms()
        slowest = {
            f"{name} ms": slowest_of(ranks) for name, ranks in ranks_ms.items() if name not in self._case.messages
        }
        values: dict[str, Any] = {
            name: {
                "status": "skipped" if name in self._skipped else "ok",
                "reason": self._skipped.get(name),
            }
            for name in self._case.operations
        }
        return Measurement(slowest, values | {"ranks_ms": ranks_ms, "cores": usable_cores()})


# Predicting ----------------------------------------------------------------------------------------------------


def predict(cases: Sequence[Case], peaks: Peaks) -> pd.DataFrame:
    """One row per case and operation: bytes and steps, and on a CPU what memory alone takes to pass them on."""
    return pd.DataFrame(
        {
            **_fields(case),
            "operation": name,
            **_costs(name, case),
            "memory_ms": 1e3 * memory_seconds(name, case, peaks),
            "ceilings": peaks.name,
        }
        for case in cases
        for name in case.operations
    )


def memory_seconds(operation: str, case: Case, peaks: Peaks) -> float:
    """Every byte that is sent read once and written once, in the one memory of all ranks; NaN of GPUs."""
    if case.device != "cpu":
        return math.nan
    sent = ring_cost(operation, case.array_bytes, case.world_size).total_bytes
    return 2 * sent / peaks.bandwidth_bytes_per_s


def _fields(case: Case) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(case).items() if name != "operations"}
    return fields | {"size_mb": case.size_bytes / MB, "backend": case.backend}


def _costs(operation: str, case: Case) -> dict[str, Any]:
    cost = ring_cost(operation, case.array_bytes, case.world_size)
    return {"sent_bytes": cost.sent_bytes, "steps": cost.steps, "total_bytes": cost.total_bytes}


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """About how long a case takes: the start of the ranks, and per round all bytes through memory, some times over."""
    del slowdown  # of steps of a model, which says nothing of messages
    per_round = sum(ring_cost(each, case.array_bytes, case.world_size).total_bytes for each in case.operations)
    through = PASSES[case.device] * per_round / peaks.bandwidth_bytes_per_s
    return START_S[case.device] + (case.warmup + case.rounds) * through


# Summarising ---------------------------------------------------------------------------------------------------


def summarise(
    records: Sequence[Record],
    peaks: Peaks | None,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and operation: times over ranks, bandwidths, the ring's bound, and what was published."""
    del peaks  # the bound is of the record's own links, and no other record's: each row says the same without the rest
    published = PublishedAllReduce((store or Store.default()).reference)
    rows = []
    for record in records:
        case = Case(**record.case)
        links = links_of(record, case)
        for name in case.operations:
            part = record.measurement.values.get(name, {})
            ranks_ms = record.measurement.values.get("ranks_ms", {}).get(name, [])
            row = {
                **_fields(case),
                "case": record.key,
                "operation": name,
                **record.circumstances(fingerprint),
                "status": part.get("status", record.status),
                "reason": part.get("reason", record.reason),
                "cores": record.measurement.values.get("cores", math.nan),
                **_costs(name, case),
                **links,
                **times_of(ranks_ms),
                "published_ms": published.milliseconds(case.size_bytes, case.world_size, name, case.backend),
            }
            rows.append(row | reached(row, case))
    return pd.DataFrame(rows)


def times_of(ranks_ms: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean over ranks and the deviation between them; of the slowest rank of each round mean and deviation."""
    if not ranks_ms:
        return dict.fromkeys(("mean_ms", "std_ms", "slowest_ms", "slowest_std_ms"), math.nan)
    means = [statistics.fmean(times) for times in ranks_ms]
    slowest = slowest_of(ranks_ms)
    return {
        "mean_ms": statistics.fmean(means),
        "std_ms": statistics.stdev(means),
        "slowest_ms": statistics.fmean(slowest),
        "slowest_std_ms": statistics.stdev(slowest) if len(slowest) > 1 else math.nan,
    }


def links_of(record: Record, case: Case) -> dict[str, float]:
    """Bytes per second that a rank sends in each message, at the fastest that any round had, and the ring's best."""
    found: dict[str, float] = {}
    for name, column in LINKS.items():
        ranks_ms = record.measurement.values.get("ranks_ms", {}).get(name)
        size = case.array_bytes if name == ALL_WHOLE else case.array_bytes / case.world_size
        found[column] = 1e3 * size / min(slowest_of(ranks_ms)) if ranks_ms else math.nan
    in_rings = [found[column] for name, column in LINKS.items() if name != ONE_WAY and found[column] == found[column]]
    return found | {RING_LINK: max(in_rings, default=math.nan)}


def reached(row: Mapping[str, Any], case: Case) -> dict[str, float]:
    """The bound and what was reached of it, by the slowest rank's time."""
    name, seconds = str(row["operation"]), row["slowest_ms"] / 1e3
    least = "all_reduce" if name in ALL_REDUCES else name
    links = [row[RING_LINK], row[LINKS[ONE_WAY]]] if name == "broadcast" else [row[RING_LINK]]  # whose root only sends
    link = max((each for each in links if each == each), default=math.nan)
    bound = ring_cost(least, case.array_bytes, case.world_size).seconds(link)
    return {
        "bound_ms": 1e3 * bound,
        "fraction": bound / seconds,
        "algorithm_bytes_per_s": algorithm_bandwidth(case.array_bytes, seconds),
        "bus_bytes_per_s": bus_bandwidth(name, case.array_bytes, case.world_size, seconds),
    }

"""Records of collectives that were never measured: links of one speed, and whatever shares of it were reached."""

from __future__ import annotations

from typing import Any

from profile_records import record_of

from cs336_systems.analysis.communication import ring_cost
from cs336_systems.bench.ranks import slowest_of
from cs336_systems.bench.records import Measurement, Record
from cs336_systems.experiments.collectives import MB, Case
from cs336_systems.experiments.collectives_ranks import ALL_WHOLE, ONE_WAY

LINK_BYTES_PER_S = 1e9


def case_of(size_mb: float = 10, world_size: int = 2, **changes: Any) -> Case:
    chosen = {"device": "cpu", "warmup": 1, "rounds": 2}
    return Case(**{"world_size": world_size, "size_bytes": round(size_mb * MB), **chosen, **changes})


def record_for(case: Case, *, reached: float = 0.5, cores: int = 2, **changes: Any) -> Record:
    """Every operation takes its own bytes at that share of the links' speed; later ranks a little less long."""
    ranks_ms: dict[str, list[list[float]]] = {}
    for name in case.messages:
        size = case.array_bytes if name == ALL_WHOLE else case.array_bytes / case.world_size
        ranks = 2 if name == ONE_WAY else case.world_size
        ranks_ms[name] = [[1e3 * size / LINK_BYTES_PER_S] * case.rounds] * ranks
    for name in case.operations:
        ms = 1e3 * ring_cost(name, case.array_bytes, case.world_size).seconds(reached * LINK_BYTES_PER_S)
        ranks_ms[name] = [[ms * (1 - 0.01 * rank)] * case.rounds for rank in range(case.world_size)]
    samples = {f"{name} ms": slowest_of(ranks_ms[name]) for name in case.operations}
    values: dict[str, Any] = {name: {"status": "ok", "reason": None} for name in case.operations}
    measurement = Measurement(samples, values | {"ranks_ms": ranks_ms, "cores": cores})
    return record_of("collectives", case, measurement, **changes)

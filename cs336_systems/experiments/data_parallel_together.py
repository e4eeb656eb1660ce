"""What the ranks of one launch measured, made one measurement.

Every rank began each step when all others had arrived, so that their times are comparable: a step is as long as its
slowest rank's, and backward is over when the last rank's is. In the recorded step a call of a rank that is ahead begins
with waiting for the others, which is no communication: each begins where its last rank begins it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cs336_systems.bench.ranks import slowest_of
from cs336_systems.bench.records import Measurement
from cs336_systems.experiments.data_parallel_ranks import ALONE, AT_ONCE, FINISH, GRADIENTS, ONE_NUMBER, STEP, TIMES
from cs336_systems.profiling.overlap import Overlap, Span, merged, without_waiting

SHOWN_GAP_MS = 0.5
"""Spans of a timeline that are closer than this are shown as one."""


def measurement_of(names: Sequence[str], ranks: Sequence[Mapping[str, Any]]) -> Measurement:
    """Samples and values of what `data_parallel_ranks.train` gave on each rank, of the variants of these names.

    `finish_ms` is from the moment at which backward is over on all ranks to that at which the last has the averages: a
    rank's own would count the time in which it waits for a slower one's backward.
    """
    times = {
        f"{name} {part}": slowest_of([each["times"][name][part] for each in ranks])
        for name in (ALONE, *names)
        for part in TIMES
    }
    times |= {f"{name} {FINISH}": _finish_of_all([each["times"][name] for each in ranks]) for name in (ALONE, *names)}
    samples = {name: taken for name, taken in times.items() if name.endswith(STEP)}
    parts = {name: taken for name, taken in times.items() if name not in samples}
    parts |= {f"{way} ms": slowest_of([each["reductions_ms"][way] for each in ranks]) for way in (ONE_NUMBER, AT_ONCE)}
    recorded = {name: _recorded_of(name, ranks) for name in names}
    values = {
        "checked": {name: _worst([each["checked"][name] for each in ranks]) for name in names},
        "gradient_bytes": ranks[0]["gradient_bytes"],
        "gradients": ranks[0]["gradients"],
        "parts_ms": parts,
        "ranks": [
            {"times": each["times"], "recorded": {name: recorded[name][rank] for name in names}}
            for rank, each in enumerate(ranks)
        ],
    }
    return Measurement(samples=samples, values=values)


def _finish_of_all(ranks: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
    """Of each round, from the end of the last rank's backward to that of the last rank's communication."""
    ends = slowest_of([each[GRADIENTS] for each in ranks])
    backward_ends = slowest_of(
        [[end - finish for end, finish in zip(each[GRADIENTS], each[FINISH], strict=True)] for each in ranks]
    )
    return [end - backward_end for end, backward_end in zip(ends, backward_ends, strict=True)]


def _worst(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks' checks of one variant come to."""
    errors = [each["relative_error"] for each in ranks]
    return {
        "relative_error": None if None in errors else max(errors),
        "same_parameters": all(each["same_parameters"] for each in ranks),
        "ranks_equal": all(each["ranks_equal"] for each in ranks),
    }


def _recorded_of(name: str, ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each rank its recorded step; each call begins where the last rank began it.

    `is_matched` is False where ranks made different numbers of calls: then they begin where this rank began them.
    """
    seen: list[Overlap] = [each["recorded"][name] for each in ranks]
    matched = without_waiting(seen)
    return [
        {
            "calls": len(found.calls),
            "reductions": found.all_reduces if (own := rank["reductions"][name]) is None else own,
            "is_matched": matched is not None,
            "communication_ms": found.communication_ms,
            "overlapped_ms": found.overlapped_ms,
            "compute_spans_ms": _shown(found.compute),
            "communication_spans_ms": _shown(found.communication),
        }
        for rank, found in zip(ranks, matched or seen, strict=True)
    ]


def _shown(spans: Sequence[Span]) -> list[list[float]]:
    """As a timeline needs them, to the microsecond."""
    return [[round(moment, 3) for moment in span] for span in merged(spans, SHOWN_GAP_MS)]

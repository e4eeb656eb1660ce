"""Which kernels ran for which named range, and how long: one model for every profiler's file, and its summaries.

A reader (`nsys`, `trace`) gives a `Recording`: work, each with the moment and the thread of its launch, and the ranges
that were open on threads. Work belongs to a range by its launch, so a kernel that runs long after its range closed is
still that range's. The rule:

1. A launch belongs to every range open on its own thread at that moment, the inner as the outer ones.
2. The autograd thread launches the kernels of a backward whose range was pushed on the main thread. So a launch on
   another thread belongs also to those ranges of its process's home thread that were open around it: around the moment
   where the launching thread has no range of its own, else around its own outermost range. The home thread is the main
   one (its id is the process's); where that has no range, as on Windows, the one that opened the first.
3. A start/end range of NVTX is of the whole process by definition, and holds for all its threads.

Processes are never mixed. Work in two ranges of one name counts once for the name. Times are whole nanoseconds; the
columns are those of Nsight Systems' own summary, its sample deviation included.

Source: Nsight Systems user guide, "cuda_gpu_kern_sum" and "nvtx_gpu_proj_sum"; NVTX 3, nvToolsExt.h.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from cs336_systems.errors import UserError, unknown_name
from cs336_systems.profiling.categories import category_of

Integers = npt.NDArray[np.int64]
Group = Literal["kernel", "category"]
GROUPS = get_args(Group)
RANGE_KEY = ["range", "process"]

WORK_COLUMNS = ("name", "start", "end", "time", "process", "thread", "launched", "is_linked")
RANGE_COLUMNS = ("name", "start", "end", "process", "thread", "is_process_wide")


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a profiler saw, whichever it was. Times in nanoseconds of one clock."""

    work: pd.DataFrame
    """`WORK_COLUMNS`: `time` is what counts as its duration; `thread` and `launched` are of the launch if `is_linked`;
    `name` is categorical."""
    ranges: pd.DataFrame
    """`RANGE_COLUMNS`: a row for each time that a range was open."""
    unit: Literal["kernel", "operator"]
    notes: tuple[str, ...] = ()
    """What the file lacks, and what that means for the figures."""

    @functools.cached_property
    def range_keys(self) -> pd.DataFrame:
        """The ranges by name and process, in the order in which they were first opened."""
        ordered = self.ranges.sort_values("start", kind="stable")
        keys = ordered.drop_duplicates(["name", "process"])[["name", "process"]]
        return keys.rename(columns={"name": "range"}).reset_index(drop=True)

    @functools.cached_property
    def key_of_range(self) -> Integers:
        """The row of `range_keys` that each row of `ranges` belongs to."""
        numbers = pd.Series(range(len(self.range_keys)), index=pd.MultiIndex.from_frame(self.range_keys))
        return numbers.reindex(pd.MultiIndex.from_frame(self.ranges[["name", "process"]])).to_numpy(np.int64)

    @functools.cached_property
    def pairs(self) -> pd.DataFrame:
        """A row for each work in each range that it belongs to: rows of `ranges` and of `work`, by the work's start."""
        in_range, of_work = membership(self.work, self.ranges)
        order = np.argsort(self.work["start"].to_numpy()[of_work], kind="stable")
        return pd.DataFrame({"range": in_range[order], "work": of_work[order]})

    @functools.cached_property
    def in_all(self) -> pd.DataFrame:
        """As `pairs`, but each work once per name: rows of `range_keys` and of `work`."""
        keys, work = self.key_of_range[self.pairs["range"]], self.pairs["work"].to_numpy()
        first = ~pd.Series(keys * max(1, len(self.work)) + work).duplicated().to_numpy()
        return pd.DataFrame({"key": keys[first], "work": work[first]})

    def check_range(self, name: str) -> None:
        """Raise a UserError, which lists those that there are, if no range is called `name`."""
        if name not in set(self.range_keys["range"]):
            raise unknown_name("range", name, dict.fromkeys(self.range_keys["range"]))


def during(recording: Recording, name: str) -> Recording:
    """What was launched, and which ranges were opened, while the range called `name` was open, the first time.

    Raises:
        UserError: there is no such range.
    """
    recording.check_range(name)
    ranges, work = recording.ranges, recording.work
    around = ranges[ranges["name"] == name].sort_values("start").iloc[0]
    opened = ranges["start"].between(around["start"], around["end"]) & (ranges["end"] <= around["end"])
    launched = work["launched"].between(around["start"], around["end"])
    return dataclasses.replace(
        recording, ranges=ranges[opened].reset_index(drop=True), work=work[launched].reset_index(drop=True)
    )


# Membership ----------------------------------------------------------------------------------------------------


def membership(work: pd.DataFrame, ranges: pd.DataFrame) -> tuple[Integers, Integers]:
    """Pairs of a row of `ranges` and a row of `work` that belongs to it by the rule above, in no order."""
    found: list[tuple[Integers, Integers]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    linked = work[["process", "thread", "launched"]].reset_index(drop=True)[work["is_linked"].to_numpy()]
    ranges = ranges.reset_index(drop=True)
    launches_of = dict(iter(linked.groupby("process")))
    for process, opened in ranges.groupby("process"):
        launches = launches_of.get(process)
        if launches is None:
            continue
        wide = opened["is_process_wide"].to_numpy(bool)
        found.append(_around_moments(opened[wide], launches))
        found += _on_threads(int(process), opened[~wide], launches)
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])


def _on_threads(process: int, opened: pd.DataFrame, launches: pd.DataFrame) -> list[tuple[Integers, Integers]]:
    """The pairs of one process's ranges that are of threads."""
    if opened.empty:
        return []
    ranges_of = dict(iter(opened.groupby("thread")))
    home = process if process in ranges_of else opened["thread"].iloc[opened["start"].to_numpy().argmin()]
    found = []
    for thread, launched in launches.groupby("thread"):
        own = ranges_of.get(thread)
        if own is not None:
            found.append(_around_moments(own, launched))
        if thread != home:
            first, last = _outermost(own, launched["launched"].to_numpy())
            found.append(_around(ranges_of[home], launched.index.to_numpy(), first, last))
    return found


def _outermost(own: pd.DataFrame | None, moments: Integers) -> tuple[Integers, Integers]:
    """For each moment, start and end of the outermost of a thread's ranges around it; else of the moment itself."""
    if own is None:
        return moments, moments
    starts, ends = own["start"].to_numpy(), own["end"].to_numpy()
    order = np.lexsort((-ends, starts))
    starts, ends = starts[order], ends[order]
    outer = np.ones(len(starts), bool)
    outer[1:] = starts[1:] >= np.maximum.accumulate(ends)[:-1]
    starts, ends = starts[outer], ends[outer]
    at = np.searchsorted(starts, moments, side="right") - 1
    inside = (at >= 0) & (moments < ends[at])
    # A range's last nanosecond is still in it, and its end is not.
    return np.where(inside, starts[at], moments), np.where(inside, ends[at] - 1, moments)


def _around_moments(opened: pd.DataFrame, launches: pd.DataFrame) -> tuple[Integers, Integers]:
    moments = launches["launched"].to_numpy()
    return _around(opened, launches.index.to_numpy(), moments, moments)


def _around(opened: pd.DataFrame, rows: Integers, first: Integers, last: Integers) -> tuple[Integers, Integers]:
    """Pairs of a range that was open from before `first` until after `last`, and of the row that these are of."""
    order = np.argsort(first, kind="stable")
    rows, first, last = rows[order], first[order], last[order]
    starts, ends = opened["start"].to_numpy(), opened["end"].to_numpy()
    low = np.searchsorted(first, starts, side="left")
    counts = np.maximum(np.searchsorted(first, ends, side="left") - low, 0)
    before = np.cumsum(counts) - counts
    at = np.arange(counts.sum()) - np.repeat(before - low, counts)
    of_range = np.repeat(np.arange(len(opened)), counts)
    covered = last[at] < ends[of_range]
    return opened.index.to_numpy()[of_range[covered]], rows[at[covered]]


# Summaries -----------------------------------------------------------------------------------------------------


def summarise(
    recording: Recording, *, range_name: str | None = None, occurrence: int | None = None, group: Group = "kernel"
) -> pd.DataFrame:
    """Per range the kernels, or their categories, from the most time to the least.

    Columns: range, process, share (of the range's summed time), total, instances, average, median, minimum, maximum,
    deviation (of a sample; NaN for one), busy, name, category. Times in nanoseconds; `busy` is when at least one of
    them ran, and NaN for operators, of which one runs inside another.

    Args:
        range_name: only this range; else every one.
        occurrence: only the n-th time, from 1, that the range was open in its process; else all times together.

    Raises:
        UserError: there is no such range, or it was not open so often.
    """
    work = recording.work
    if occurrence is None:
        key, of_work = recording.in_all["key"].to_numpy(), recording.in_all["work"].to_numpy()
    else:
        of_range, of_work = recording.pairs["range"].to_numpy(), recording.pairs["work"].to_numpy()
        chosen = _numbers(recording)[of_range] == occurrence
        key, of_work = recording.key_of_range[of_range[chosen]], of_work[chosen]
    if range_name is not None:
        recording.check_range(range_name)
        chosen = (recording.range_keys["range"] == range_name).to_numpy()[key]
        key, of_work = key[chosen], of_work[chosen]
        if occurrence is not None:
            _check_occurrence(recording, range_name, occurrence)

    names = work["name"].cat.categories
    categories = pd.Categorical([category_of(name) for name in names])
    labels = names if group == "kernel" else categories.categories
    of_name = work["name"].cat.codes.to_numpy(np.int64)
    label = (of_name if group == "kernel" else categories.codes.astype(np.int64)[of_name])[of_work]

    rows = _statistics(key * max(1, len(labels)) + label, recording, of_work)
    at, label = np.divmod(rows.index.to_numpy(), max(1, len(labels)))
    keys = recording.range_keys.iloc[at]
    rows["range"], rows["process"] = keys["range"].to_numpy(), keys["process"].to_numpy()
    rows["name"] = labels.to_numpy()[label]
    rows["category"] = rows["name"] if group == "category" else np.asarray(categories)[label]
    # The average of none is no share: an empty range has no rows.
    rows["share"] = (rows["total"] / rows.groupby(at)["total"].transform("sum").to_numpy()).fillna(0.0)
    rows["at"] = at
    rows = rows.sort_values(["at", "total", "name"], ascending=[True, False, True], ignore_index=True)
    columns = ("share", "total", "instances", "average", "median", "minimum", "maximum", "deviation", "busy")
    return rows[[*RANGE_KEY, *columns, "name", "category"]]


def _statistics(label: Integers, recording: Recording, of_work: Integers) -> pd.DataFrame:
    """A row per label, in increasing order, with what `summarise` says of each."""
    times = pd.Series(recording.work["time"].to_numpy()[of_work]).groupby(label)
    rows = times.agg(["sum", "size", "mean", "median", "min", "max", "std"])
    rows.columns = pd.Index(["total", "instances", "average", "median", "minimum", "maximum", "deviation"])
    # An operator runs in several pieces, between those that it calls: of one kind alone there is no union to take.
    rows["busy"] = busy(label, recording.work, of_work) if recording.unit == "kernel" else np.nan
    return rows


def busy(label: Integers, work: pd.DataFrame, of_work: Integers) -> pd.Series:
    """Per label, in increasing order, how long at least one of its work ran: the length of the union of intervals.

    Args:
        of_work: rows of `work`, in the order of their starts.
    """
    start = pd.Series(work["start"].to_numpy()[of_work])
    end = pd.Series(work["end"].to_numpy()[of_work])
    reached = end.groupby(label).cummax().groupby(label).shift(fill_value=np.iinfo(np.int64).min)
    return (end - np.maximum(start, reached)).clip(lower=0).groupby(label).sum()


def overview(recording: Recording) -> pd.DataFrame:
    """A row per range: how often it was open, how long on its own thread, and its work summed and as busy time."""
    durations = (recording.ranges["end"] - recording.ranges["start"]).groupby(recording.key_of_range)
    rows = pd.DataFrame({"occurrences": durations.size(), "open": durations.sum()})
    found = _work_of(recording.in_all["key"].to_numpy(), recording, recording.in_all["work"].to_numpy())
    return pd.concat([recording.range_keys, _with_work(rows, found)], axis=1)


def occurrences(recording: Recording, range_name: str) -> pd.DataFrame:
    """A row for each time that a range was open, in order: when, how long, and its work summed and as busy time.

    Raises:
        UserError: there is no such range.
    """
    recording.check_range(range_name)
    found = _work_of(recording.pairs["range"].to_numpy(), recording, recording.pairs["work"].to_numpy())
    rows = recording.ranges.reset_index(drop=True)
    rows = rows.assign(number=_numbers(recording), open=rows["end"] - rows["start"]).rename(columns={"name": "range"})
    rows = _with_work(rows[rows["range"] == range_name], found).sort_values(["process", "number"], ignore_index=True)
    return rows[[*RANGE_KEY, "number", "start", "open", "instances", "total", "busy"]]


def outside(recording: Recording) -> tuple[int, int]:
    """How much work, and how many nanoseconds of it, belong to no range at all."""
    alone = np.ones(len(recording.work), bool)
    alone[recording.pairs["work"]] = False
    return int(alone.sum()), int(recording.work["time"].to_numpy()[alone].sum())


def _work_of(label: Integers, recording: Recording, of_work: Integers) -> pd.DataFrame:
    times = pd.Series(recording.work["time"].to_numpy()[of_work]).groupby(label)
    return pd.DataFrame({"instances": times.size(), "total": times.sum(), "busy": busy(label, recording.work, of_work)})


def _with_work(rows: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """`rows` beside what was found for their numbers, which is nothing for a range that launched nothing."""
    return rows.join(found.reindex(rows.index, fill_value=0).astype(np.int64))


def _numbers(recording: Recording) -> Integers:
    """For each row of `ranges` how often its range was opened in its process by then, itself included."""
    ordered = pd.Series(recording.key_of_range).iloc[np.argsort(recording.ranges["start"].to_numpy(), kind="stable")]
    return (ordered.groupby(ordered).cumcount() + 1).sort_index().to_numpy(np.int64)


def _check_occurrence(recording: Recording, range_name: str, occurrence: int) -> None:
    often = int(_numbers(recording)[(recording.ranges["name"] == range_name).to_numpy()].max())
    if not 1 <= occurrence <= often:
        raise UserError(f"range {range_name!r} was open {often} times: expected a number from 1, found {occurrence}")

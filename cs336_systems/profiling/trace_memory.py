"""What a Chrome trace of PyTorch's profiler tells of memory, on a CPU or a GPU, as a snapshot tells it of a GPU.

    with torch.profiler.profile(profile_memory=True, with_stack=True) as profiler:
        step()
    profiler.export_chrome_trace("trace.json")
    memory = read_trace_memory(Path("trace.json"))

A trace has one event called `[memory]` for each allocation and each release. Where one was made follows from what was
open on its thread at that moment: operators, named ranges, modules and, with `with_stack=True`, Python's functions, of
which a trace has the first line and not the one that ran. Without them an allocation is put down to the innermost named
range and the operator (`softmax: aten::exp`): that is what such a trace has, and `unit` says so.

On a CPU the backward pass runs on the thread that called it. What is open outside of the node of the graph that makes
something is cut off, as it has nothing to do with it; the operator of the forward pass that has the node's sequence
number, if one alone does, says which line's gradient it is (`autograd: MulBackward0 of model.py:190 forward`).

What a CPU had allocated before the profiler began is unknown, and that it is freed is not reported. A GPU's allocator
tells its total with every event, and its sizes are those that it gave, rounded up.

Source: PyTorch, torch/csrc/profiler/collection.cpp; c10/core/CPUAllocator.cpp; c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cs336_systems.errors import UserError
from cs336_systems.profiling.memory_history import Device, MemoryHistory
from cs336_systems.profiling.open_calls import MOMENT, Calls, Rows, open_calls
from cs336_systems.profiling.stacks import OPERATOR, RANGE, Frame, is_python, place_of
from cs336_systems.profiling.timeline import Phase, paired_timeline
from cs336_systems.profiling.trace import OPERATORS, RANGES, nanoseconds, trace_events, without_collecting

HOW_TO_RECORD = "record it with torch.profiler.profile(profile_memory=True, with_stack=True)"

FUNCTIONS = frozenset({"python_function"})
MEMORY, OUT_OF_MEMORY = "[memory]", "[OutOfMemory]"
NODE = "autograd::engine::evaluate_function"
"""What the evaluation of a node of the graph is called by; the node's name follows."""
MODULE = "nn.Module: "
MOST_BYTES, MOST_DEVICES, MOST_KINDS = 2**47, 1024, 128
"""What a process can address, more devices than a machine has, and what PyTorch numbers their kinds up to."""

_FUNCTION = re.compile(r"(.*)\((\d{1,9})\): (.*)", re.DOTALL)
_ABSOLUTE = re.compile(r"[/\\<]|[A-Za-z]:")

# The profiler cuts off what sys.path begins with: of these the folder is put back by which they are told from the
# user's own. A user's file may be called as a module of the standard library that nothing imports, so only those are
# here that calls of PyTorch go through.
_INSTALLED = re.compile(
    r"""( torch | torchvision | torchaudio | functorch | triton | numpy | pandas | sympy | einops | einx | opt_einsum
    | jaxtyping | beartype | nvtx | tqdm | transformers | accelerate | datasets | safetensors | lightning
    | pytorch_lightning | ray | wandb | submitit | hydra | IPython | ipykernel | traitlets | tornado | jupyter_client
    | nbclient | papermill | _pytest | pytest | pluggy | xdist | execnet )(\.py|[/\\].*)""",
    re.VERBOSE,
)
_STANDARD = re.compile(
    r"""( abc | ast | asyncio | bdb | cProfile | collections | concurrent | contextlib | copy | copyreg | ctypes
    | dataclasses | enum | functools | importlib | inspect | json | logging | multiprocessing | pdb | pickle | random
    | re | runpy | selectors | tempfile | threading | traceback | typing | unittest | warnings | weakref
    )(\.py|[/\\].*)""",
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TraceMemory(MemoryHistory):
    """What a trace tells of one device's memory."""

    innermost: NDArray[np.int32]
    """Of every allocation of the timeline: the innermost call that was open, as a number for `known_calls`, or -1."""
    known_calls: Calls

    def calls(self, allocation: int) -> tuple[int, ...]:
        """For each frame of the stack a number that only this call of it has."""
        return self.known_calls.outwards(int(self.innermost[allocation]))

    def _columns_of(self, allocations: NDArray[np.int64]) -> dict[str, Any]:
        return super()._columns_of(allocations) | {"innermost": self.innermost[allocations]}


def read_trace_memory(path: Path, device: Device | None = None, *, start_bytes: int | None = None) -> TraceMemory:
    """The memory of `device` in a trace (.json, .json.gz), or of the one with most events.

    Args:
        start_bytes: what was allocated before the profiler began, which a CPU's trace does not tell.

    Raises:
        UserError: the file is cut off, no trace, or tells nothing of memory (of that device); or `start_bytes` is less
            than what the trace frees of it.
    """
    with without_collecting():
        events = _Events(trace_events(path))
    counts = {device: len(memory.time) for device, memory in events.memory.items()}
    if not counts:
        damaged = f" that make sense, and {events.damaged:,} that do not" if events.damaged else ""
        raise UserError(
            f"{path} has no memory events: expected events called {MEMORY}, found none{damaged}; {HOW_TO_RECORD}"
        )
    if device is not None and device not in counts:
        found = ", ".join(sorted(map(str, counts)))
        raise UserError(f"{path} has no memory events of device {device}; there are some of {found}")
    chosen = max(counts, key=lambda known: counts[known]) if device is None else device
    return _assembled(events, chosen, path, start_bytes)


# Events --------------------------------------------------------------------------------------------------------


class _Memory:
    """The changes of one device's memory, in columns."""

    def __init__(self) -> None:
        self.time, self.change, self.key = array("q"), array("q"), array("q")
        # In nanoseconds, bytes, a number for the address; and for an allocation the row that it is among what was open.
        self.row = array("i")
        # What the allocator says that is allocated and reserved after it; -1 where it makes no sense.
        self.total, self.reserved = array("q"), array("q")


class _Events:
    """The events of a trace that matter."""

    def __init__(self, events: list[Any]) -> None:
        self.damaged = 0
        self.rows = Rows()
        self.frames: list[Frame] = []
        self.memory: defaultdict[Device, _Memory] = defaultdict(_Memory)
        # Ranges of each thread: beginning, end, name.
        self.ranges: defaultdict[int, list[tuple[int, int, str]]] = defaultdict(list)
        self.out_of_memory: Counter[Device | None] = Counter()
        self.has_functions = False
        # Files of functions that nothing has called: they were run, and not imported.
        self.scripts: set[str] = set()
        # Sequence numbers: of nodes by their row, and for each number and thread the last operator to have it.
        self.sequence_of_node: dict[int, int] = {}
        self.forward: dict[tuple[int, int], int] = {}
        self._threads: dict[object, int] = {}
        self._addresses: dict[tuple[str, int], int] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        for event in events:
            phase = event.get("ph") if isinstance(event, dict) else None
            if phase == "X":
                self._take_span(event)
            elif phase == "i" and event.get("name") == MEMORY:
                self._take_memory(event)
            elif phase == "i" and event.get("name") == OUT_OF_MEMORY:
                self.out_of_memory[_device(event.get("args"))] += 1

    def _take_span(self, event: dict[str, Any]) -> None:
        found, name = event.get("cat"), event.get("name")
        if not isinstance(found, str) or not isinstance(name, str):
            return
        category = found.lower()
        number = self._numbers.get((category, name))
        if number is None:
            number = self._numbers[category, name] = self._frame(category, name)
        if number < 0:
            return
        start, duration = nanoseconds(event.get("ts")), nanoseconds(event.get("dur", 0))
        if start is None or duration is None or duration < 0:
            self.damaged += 1
            return
        thread = self._thread(event)
        row = self.rows.add(thread, start, start + duration, number)
        if category in RANGES:
            self.ranges[thread].append((start, start + duration, name))
            return
        told = event.get("args")
        if not isinstance(told, dict):
            return
        if category in FUNCTIONS:
            if name.endswith("<module>") and told.get("Python parent id", row) is None:
                self.scripts.add(self.frames[number].filename)
            return
        sequence = told.get("Sequence number")
        if not isinstance(sequence, int):
            return
        if _is_node(name):
            self.sequence_of_node[row] = sequence
        elif not told.get("Fwd thread id"):
            # An operator tells the number that the next node will get, so the last of those that tell it made the node.
            known = self.forward.setdefault((sequence, thread), row)
            if self.rows.start[known] < start:
                self.forward[sequence, thread] = row

    def _frame(self, category: str, name: str) -> int:
        """The number of the frame that such spans are; -1 for what is on no stack."""
        if category in OPERATORS:
            frame = Frame(name, OPERATOR, 0)
        elif category in RANGES:
            frame = Frame(name, RANGE, 0)
        elif category in FUNCTIONS and name.startswith(MODULE):
            frame = Frame(name.removeprefix(MODULE), RANGE, 0)
        elif category in FUNCTIONS and (function := _FUNCTION.fullmatch(name)):
            self.has_functions = True
            frame = Frame(function[3], function[1], int(function[2]))
        else:  # of no matter, or a function of Python's own such as <built-in method add of …>
            return -1
        self.frames.append(frame)
        return len(self.frames) - 1

    def _take_memory(self, event: dict[str, Any]) -> None:
        time, told = nanoseconds(event.get("ts")), event.get("args")
        if time is None or not isinstance(told, dict):
            self.damaged += 1
            return
        device, change, address = _device(told), _whole(told.get("Bytes")), _whole(told.get("Addr"))
        if device is None or change is None or abs(change) > MOST_BYTES or address is None or address < 0:
            self.damaged += 1
            return
        if not change:
            return
        memory = self.memory[device]
        memory.time.append(time)
        memory.change.append(change)
        memory.key.append(self._addresses.setdefault((str(event.get("pid")), address), len(self._addresses)))
        memory.row.append(self.rows.add(self._thread(event), time, time, MOMENT) if change > 0 else -1)
        memory.total.append(_total(told.get("Total Allocated")))
        memory.reserved.append(_total(told.get("Total Reserved")))

    def _thread(self, event: dict[str, Any]) -> int:
        process, thread = event.get("pid"), event.get("tid")
        key = (process, thread) if type(process) is int and type(thread) is int else f"{process!r} {thread!r}"
        return self._threads.setdefault(key, len(self._threads))


def _is_node(name: str) -> bool:
    return name.startswith(NODE)


def _whole(found: object) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _total(found: object) -> int:
    total = _whole(found)
    return total if total is not None and 0 <= total <= MOST_BYTES else -1


def _device(told: object) -> Device | None:
    """Whose memory an event tells of; None where that makes no sense."""
    if not isinstance(told, dict):
        return None
    kind, number = _whole(told.get("Device Type")), _whole(told.get("Device Id"))
    if kind == 0:
        return "cpu"
    if kind is None or not 0 < kind < MOST_KINDS or number is None or not 0 <= number < MOST_DEVICES:
        return None
    return number


def _with_folder(frame: Frame, scripts: set[str]) -> Frame:
    """A function whose file has its folder again, where that tells a library from the user's own."""
    if not is_python(frame) or _ABSOLUTE.match(frame.filename) or frame.filename in scripts:
        return frame
    if _INSTALLED.fullmatch(frame.filename):
        return frame._replace(filename=f"/site-packages/{frame.filename}")
    return frame._replace(filename=f"/lib/python3/{frame.filename}") if _STANDARD.fullmatch(frame.filename) else frame


# Together ------------------------------------------------------------------------------------------------------


def _assembled(events: _Events, device: Device, path: Path, start_bytes: int | None) -> TraceMemory:
    """The timeline of one device, with the place of each allocation."""
    memory = events.memory[device]
    order = np.argsort(np.asarray(memory.time), kind="stable")
    time, change, key, row = (
        np.asarray(column)[order] for column in (memory.time, memory.change, memory.key, memory.row)
    )
    births = np.flatnonzero(change > 0)
    rows = row[births].tolist()
    frames = [_with_folder(frame, events.scripts) for frame in events.frames]
    nodes = {number for number, frame in enumerate(frames) if frame.filename == OPERATOR and _is_node(frame.name)}
    sources = _sources(events)
    calls, call_at = open_calls(events.rows, {*rows, *sources.values()}, frames, nodes)
    label = np.zeros(len(change), dtype=np.int64)
    label[births], labels = _places(rows, sources, calls, call_at)
    first = int(time[0])
    timeline = paired_timeline(
        time_us=(time - first) / 1000,
        change=change,
        keys=key.astype(np.uint64),
        label=label,
        labels=labels,
        start_bytes=None,
        phases=_phases(max(events.ranges.values(), key=len, default=[]), first),
    )
    least = timeline.start_bytes
    if start_bytes is None and device != "cpu" and memory.total[order[0]] >= 0:
        start_bytes = max(least, memory.total[order[0]] - int(change[0]))
    if start_bytes is not None and start_bytes < least:
        raise UserError(
            f"start_bytes must be at least what {path} frees without having allocated it, {least:,} bytes; found "
            f"{start_bytes:,}"
        )
    innermost = [call_at[at] for at in rows]
    reserved = max(memory.reserved)
    return TraceMemory(
        path=path,
        device=device,
        other_devices=tuple(other for other in events.memory if other != device),
        timeline=timeline if start_bytes is None else dataclasses.replace(timeline, start_bytes=start_bytes),
        stacks=np.array([_stack(calls, call) for call in innermost], dtype=np.int32),
        known_stacks=calls.known_stacks(),
        events=len(change),
        unit="function" if events.has_functions else "operator",
        knows_before=start_bytes is not None,
        rounds_up=device != "cpu",
        peak_reserved_bytes=None if device == "cpu" or reserved < 0 else reserved,
        out_of_memory=events.out_of_memory[device],
        damaged=events.damaged,
        innermost=np.array(innermost, dtype=np.int32),
        known_calls=calls,
    )


def _places(
    rows: Sequence[int], sources: dict[int, int], calls: Calls, call_at: dict[int, int]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """For each allocation what it is put down to, as a number, and what the numbers stand for."""
    stacks = calls.known_stacks()
    numbers: dict[str, int] = {}
    known: dict[tuple[int, int], int] = {}
    found = np.zeros(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        call = call_at[row]
        source = sources.get(calls.outermost[call]) if call >= 0 else None
        pair = (_stack(calls, call), -1 if source is None else _stack(calls, call_at[source]))
        if pair not in known:
            stack, forward = (stacks[number] if number >= 0 else () for number in pair)
            known[pair] = numbers.setdefault(place_of(stack, forward), len(numbers))
        found[index] = known[pair]
    return found, tuple(numbers)


def _stack(calls: Calls, call: int) -> int:
    return calls.stack[call] if call >= 0 else -1


def _sources(events: _Events) -> dict[int, int]:
    """For nodes of the graph, by row, the row of the operator of the forward pass whose gradient they compute."""
    threads = Counter(sequence for sequence, _ in events.forward)
    # Each thread counts for itself: of a number that two have, nothing is known.
    rows = {sequence: row for (sequence, _), row in events.forward.items() if threads[sequence] == 1}
    start = events.rows.start
    return {
        node: rows[sequence]
        for node, sequence in events.sequence_of_node.items()
        if sequence in rows and start[rows[sequence]] < start[node]
    }


def _phases(ranges: Sequence[tuple[int, int, str]], first: int) -> list[Phase]:
    """Ranges of one thread, in microseconds since `first`, each as deep as others are open where it begins."""
    found: list[Phase] = []
    ends: list[int] = []
    for start, end, name in sorted(ranges, key=lambda one: (one[0], -one[1])):
        ends = [later for later in ends if later > start]
        found.append(Phase(name, (start - first) / 1000, (end - first) / 1000, len(ends)))
        ends.append(end)
    return found

"""Memory is read from a trace of PyTorch's profiler: what was live, and what was open where it was made."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from traces import AUTOGRAD, change, event, forward, function, named, node, operator, written

from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.errors import UserError
from cs336_systems.profiling.live_memory import Summary, summarise
from cs336_systems.profiling.memory_history import device_named
from cs336_systems.profiling.open_calls import MOMENT, Rows, open_calls
from cs336_systems.profiling.recordings import read_memory
from cs336_systems.profiling.stacks import OPERATOR, RANGE, Frame
from cs336_systems.profiling.trace_memory import TraceMemory, read_trace_memory


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """The memory in a trace of these events, in any order."""

    def reading(*events: Any, **more: Any) -> TraceMemory:
        shuffled = list(events)
        random.Random(len(events)).shuffle(shuffled)
        return read_trace_memory(written(tmp_path / "trace.json", shuffled), **more)

    return reading


def names(memory: TraceMemory, allocation: int = 0) -> list[str]:
    return [str(frame) for frame in memory.stack(allocation)]


def places(memory: TraceMemory) -> list[str]:
    return [memory.place(index) for index in range(len(memory.timeline.birth))]


# Stacks --------------------------------------------------------------------------------------------------------


def test_a_stack_is_what_was_open_on_the_thread_from_the_innermost_out(read: Any) -> None:
    memory = read(
        function("/project/train.py(3): step", 0, 100),
        named("forward", 5, 80),
        function("nn.Module: Linear_0", 8, 50),
        function("/project/model.py(127): forward", 10, 40),
        function("<built-in method linear of type object at 0x7f>", 11, 35),
        operator("aten::linear", 12, 30),
        operator("aten::t", 13, 2),
        operator("aten::addmm", 16, 20),
        operator("aten::empty", 17, 3),
        function("/project/other.py(9): beside", 60, 10),
        change(512, 18),
        change(64, 70, 128),
    )
    assert names(memory) == [
        *("aten::empty", "aten::addmm", "aten::linear", "model.py:127 forward", "Linear_0", "forward"),
        "train.py:3 step",
    ]
    assert names(memory, 1) == ["other.py:9 beside", "forward", "train.py:3 step"]
    assert places(memory) == ["model.py:127 forward", "other.py:9 beside"]
    assert memory.unit == "function"
    largest = summarise(memory).largest[0]
    # An operator that only makes memory is passed over, and what is no code of the user's left out.
    assert [str(frame) for frame in largest.trace] == ["aten::addmm", "model.py:127 forward", "train.py:3 step"]


def test_of_what_begins_together_the_longer_is_the_caller_and_what_ends_at_a_moment_is_still_open(read: Any) -> None:
    memory = read(
        function("/project/a.py(1): outer", 10, 30),
        operator("aten::long", 10, 20),
        operator("aten::short", 10, 5),
        operator("aten::next", 30, 5),
        change(1, 10, 1),
        change(2, 15, 2),
        change(4, 30, 3),
        change(8, 35, 4),
        change(16, 41, 5),
    )
    assert [names(memory, index) for index in range(5)] == [
        ["aten::short", "aten::long", "a.py:1 outer"],
        ["aten::short", "aten::long", "a.py:1 outer"],
        ["aten::next", "a.py:1 outer"],
        ["aten::next", "a.py:1 outer"],
        [],
    ]
    assert places(memory)[-1] == "(no stack trace)"


def test_files_that_the_profiler_has_cut_short_are_told_from_the_users_own(read: Any) -> None:
    memory = read(
        function("torch.py(1): <module>", 0, 100, parent=None),
        function("my_package/model.py(20): forward", 10, 50),
        function("contextlib.py(78): inner", 11, 40),
        function("torch/nn/functional.py(5): linear", 12, 30),
        function("einops/einops.py(7): rearrange", 13, 20),
        function("<frozen importlib._bootstrap>(9): load", 14, 10),
        function("torch/nn/functional.py(6): relu", 70, 10),
        change(8, 15, 1),
        change(8, 75, 2),
    )
    # A script may be called as a library is; what nothing has called is a script.
    assert places(memory) == ["model.py:20 forward", "torch.py:1 <module>"]
    trace = summarise(memory).largest[0].trace
    assert [str(frame) for frame in trace] == ["model.py:20 forward", "torch.py:1 <module>"]


def test_each_thread_has_a_stack_of_its_own_and_may_free_what_another_made(read: Any) -> None:
    memory = read(
        function("/project/a.py(1): main", 0, 100),
        function("/project/b.py(2): worker", 0, 100, thread="loader"),
        change(512, 10, 64),
        change(256, 11, 128, thread="loader"),
        change(-512, 20, 64, thread="loader"),
        change(128, 21, 64),
    )
    assert places(memory) == ["a.py:1 main", "b.py:2 worker", "a.py:1 main"]
    assert memory.timeline.death.tolist() == [2, 4, 4]
    assert memory.timeline.total.tolist() == [512, 768, 256, 384]


def test_what_was_open_is_what_a_search_of_all_spans_finds() -> None:
    """Spans of three threads, nested and not, against looking at each span for each moment."""
    chance = random.Random(1)
    rows, frames = Rows(), [Frame(str(number), OPERATOR, 0) for number in range(400)]
    spans = []
    for number in range(300):
        start = chance.randrange(0, 4000, 2)
        spans.append((chance.randrange(3), start, start + 2 * chance.randrange(1, 400), number))
        rows.add(*spans[-1])
    moments = [(chance.randrange(3), chance.randrange(1, 5000, 2)) for _ in range(300)]
    asked = [rows.add(thread, time, time, MOMENT) for thread, time in moments]
    calls, found = open_calls(rows, asked, frames, ())
    stacks = calls.known_stacks()
    for row, (thread, time) in zip(asked, moments, strict=True):
        around = [span for span in spans if span[0] == thread and span[1] <= time <= span[2]]
        expected = [str(span[3]) for span in sorted(around, key=lambda span: (-span[1], span[2], -span[3]))]
        stack = stacks[calls.stack[found[row]]] if found[row] >= 0 else ()
        assert [frame.name for frame in stack] == expected


# Backward ------------------------------------------------------------------------------------------------------


def training() -> list[dict[str, Any]]:
    """Forward and, on the same thread, backward, each node within the line that called backward."""
    return [
        function("/project/train.py(3): step", 0, 200),
        function("/project/model.py(190): forward", 10, 40),
        # All three tell the number that the next node gets: the last is the one that makes it.
        forward("aten::to", 12, 2, 5),
        forward("aten::mul", 15, 10, 5),
        change(512, 20, 1),
        forward("aten::exp", 30, 5, 6),
        named("backward", 100, 90),
        function("torch/autograd/__init__.py(40): backward", 101, 80),
        node("ExpBackward0", 105, 10, 6),
        operator("ExpBackward0", 106, 8),
        operator("aten::mul", 107, 6),
        change(256, 108, 2),
        node("MulBackward0", 120, 20, 5),
        operator("aten::mul", 125, 6),
        change(1024, 126, 3),
        operator("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 150, 20),
        change(2048, 155, 4),
        change(4096, 175, 5),
    ]


def test_within_a_node_of_the_graph_the_line_that_called_backward_is_cut_off(read: Any) -> None:
    memory = read(*training())
    assert names(memory, 1) == [
        *("aten::mul", "ExpBackward0", "autograd::engine::evaluate_function: ExpBackward0"),
    ]
    assert places(memory) == [
        "model.py:190 forward",
        "autograd: ExpBackward0 of model.py:190 forward",
        "autograd: MulBackward0 of model.py:190 forward",
        "autograd: AccumulateGrad",
        "train.py:3 step",
    ]
    assert [memory.calls(index)[-1] == memory.calls(0)[-1] for index in (1, 2, 4)] == [False, False, True]
    # What is a gradient of a line was not allocated below it.
    under = summarise(memory, under="model.py").under
    assert under is not None
    assert under.total_bytes == 512


def test_a_backward_that_is_written_in_python_is_its_own_line(read: Any) -> None:
    memory = read(
        *training(),
        node("FlashAttentionBackward", 180, 15, 6),
        function("/project/flash.py(70): backward", 182, 10),
        operator("aten::bmm", 184, 5),
        change(8192, 185, 6),
    )
    assert places(memory)[-1] == "flash.py:70 backward"
    assert names(memory, 5)[1:] == [
        "flash.py:70 backward",
        "autograd::engine::evaluate_function: FlashAttentionBackward",
    ]


def test_of_a_number_that_two_threads_have_no_line_is_told(read: Any) -> None:
    memory = read(*training(), forward("aten::add", 14, 2, 5, thread=77))
    assert places(memory)[1:3] == ["autograd: ExpBackward0 of model.py:190 forward", "autograd: MulBackward0"]


def test_a_node_that_comes_before_the_operator_of_its_number_is_not_its_gradient(read: Any) -> None:
    memory = read(*training(), forward("aten::mul", 160, 5, 6))
    assert places(memory)[1] == "autograd: ExpBackward0"


def test_a_backward_on_a_thread_of_its_own_has_the_lines_of_the_forward_pass_too(read: Any) -> None:
    memory = read(
        function("/project/model.py(190): forward", 10, 40),
        forward("aten::mul", 15, 10, 5),
        node("MulBackward0", 60, 20, 5, AUTOGRAD),
        change(1024, 65, 3, AUTOGRAD),
    )
    assert places(memory) == ["autograd: MulBackward0 of model.py:190 forward"]


def test_a_range_that_begins_in_one_node_and_ends_in_a_later_one_is_open_in_between_alone(read: Any) -> None:
    memory = read(
        named("backward", 0, 100),
        named("backward of block 1", 15, 40),
        node("A_Backward", 10, 10, 1),
        node("B_Backward", 30, 10, 2),
        node("C_Backward", 50, 20, 3),
        *(change(8, time, address) for address, time in enumerate((12, 16, 25, 35, 52, 60, 75))),
    )
    inside = ["backward of block 1" in names(memory, index) for index in range(7)]
    # Inside of a node what is outside of it is cut off, so the range shows where it was begun inside.
    assert inside == [False, True, True, False, False, False, False]
    assert names(memory, 6) == ["backward"]
    assert [(phase.name, phase.depth) for phase in memory.timeline.phases] == [
        ("backward", 0),
        ("backward of block 1", 1),
    ]


# Without functions ---------------------------------------------------------------------------------------------


def test_without_functions_the_innermost_range_and_the_operator_stand_for_the_line(read: Any) -> None:
    memory = read(
        named("forward", 0, 60),
        named("softmax", 10, 40),
        forward("aten::exp", 20, 10, 5),
        operator("aten::empty_strided", 21, 2),
        change(512, 22, 1),
        change(256, 45, 2),
        operator("aten::empty", 70, 5),
        change(128, 72, 3),
        named("backward", 80, 20),
        node("ExpBackward0", 85, 10, 5),
        operator("aten::mul", 86, 5),
        change(64, 87, 4),
    )
    assert memory.unit == "operator"
    assert places(memory) == ["softmax: aten::exp", "softmax", "aten::empty", "autograd: ExpBackward0 of softmax"]
    summary = summarise(memory, under="forward")
    assert summary.block is None
    assert summary.under is not None
    assert summary.under.total_bytes == 512 + 256
    with pytest.raises(UserError, match=r"unknown frame 'sofmax': did you mean 'softmax'\? Known: .*aten::exp"):
        summarise(memory, under="sofmax")


def test_the_phases_are_the_ranges_of_the_thread_that_has_most(read: Any) -> None:
    memory = read(
        named("elsewhere", 0, 100, thread=77),
        named("step", 0, 50),
        named("forward", 0, 20),
        named("attention", 5, 10),
        named("backward", 20, 20),
        change(8, 10),
    )
    found = [(phase.name, phase.start_us, phase.end_us, phase.depth) for phase in memory.timeline.phases]
    assert found == [
        ("step", -10, 40, 0),
        ("forward", -10, 10, 1),
        ("attention", -5, 5, 2),
        ("backward", 10, 30, 1),
    ]
    assert summarise(memory).peak_phases == ("step", "forward", "attention")


# Totals --------------------------------------------------------------------------------------------------------


def test_an_address_that_is_given_again_is_another_allocation_and_another_process_has_its_own(read: Any) -> None:
    other = {**change(1000, 15, 64), "pid": 99}
    memory = read(change(8, 10, 64), change(-8, 20, 64), change(9, 30, 64), other, change(-9, 40, 64))
    assert memory.timeline.total.tolist() == [8, 1008, 1000, 1009, 1000]
    assert memory.timeline.death.tolist() == [2, 5, 4]
    assert summarise(memory).freed_from_before_count == 0


def test_changes_at_one_time_are_taken_in_the_order_of_the_file(tmp_path: Path) -> None:
    events = [change(8, 10, 64), change(-8, 10, 64), change(9, 10, 64)]
    memory = read_trace_memory(written(tmp_path / "trace.json", events))
    assert memory.timeline.total.tolist() == [8, 0, 9]


def test_what_a_cpu_had_before_is_unknown_but_for_what_is_freed_of_it_or_told(read: Any) -> None:
    events = [change(100, 10, 1), change(-70, 20, 2), change(50, 30, 3), change(-60, 40, 4)]
    summary: Summary = summarise(read(*events))
    assert (summary.before_trace_bytes, summary.peak_allocated_bytes) == (None, 230)
    assert (summary.before_trace_at_peak_bytes, summary.freed_from_before_bytes) == (130, 130)
    assert (summary.peak_reserved_bytes, summary.missing_from_segments_bytes, summary.device) == (None, None, "cpu")
    summary = summarise(read(*events, start_bytes=1000))
    assert (summary.before_trace_bytes, summary.peak_allocated_bytes) == (1000, 1100)
    assert summary.before_trace_at_peak_bytes == 1000
    with pytest.raises(
        UserError, match=r"must be at least what .* frees without having allocated it, 130 bytes; found 129"
    ):
        read(*events, start_bytes=129)


def gpu(size: int, time: float, address: int, total: int, reserved: int, device: int = 0) -> dict[str, Any]:
    told = {"Device Type": 1, "Device Id": device, "Total Allocated": total, "Total Reserved": reserved}
    return change(size, time, address, AUTOGRAD, **told)


def test_a_gpus_allocator_tells_what_was_there_before_and_what_it_reserves(read: Any) -> None:
    memory = read(
        change(7, 5),
        gpu(512, 10, 1, 1512, 2000),
        gpu(-400, 20, 2, 1112, 2000),
        gpu(1024, 30, 3, 2136, 4096),
        gpu(-1024, 40, 3, 1112, 3000),
        {**gpu(10**9, 45, 0, 1112, 3000), "name": "[OutOfMemory]"},
        gpu(64, 50, 3, 64, 64, device=1),
    )
    summary = summarise(memory)
    assert (summary.device, set(summary.other_devices), summary.events) == (0, {"cpu", 1}, 4)
    assert (summary.before_trace_bytes, summary.before_trace_at_peak_bytes) == (1000, 600)
    assert (summary.peak_allocated_bytes, summary.peak_reserved_bytes) == (2136, 4096)
    assert (summary.freed_from_before_bytes, summary.out_of_memory, summary.rounds_up) == (400, 1, True)


def test_another_device_of_the_trace_can_be_named_and_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.json", [change(7, 5), change(9, 6, 2), gpu(64, 50, 3, 64, 64, device=1)])
    assert read_memory(path).timeline.peak_bytes == 16
    other = read_memory(path, device_named("cuda:1"))
    assert (other.device, other.other_devices, other.timeline.peak_bytes) == (1, ("cpu",), 64)
    with pytest.raises(UserError, match=r"no memory events of device 0; there are some of 1, cpu$"):
        read_memory(path, 0)
    with pytest.raises(UserError, match="unknown device 'gpu': expected cpu, or the number of a GPU"):
        device_named("gpu")


# Blocks --------------------------------------------------------------------------------------------------------


def test_the_calls_of_a_block_are_told_apart_though_a_trace_has_one_line_of_it(read: Any) -> None:
    events = [
        function("/project/model.py(300): forward", 0, 1000),
        function("/project/model.py(5): norm", 500, 10),
        change(99, 505, 99),
    ]
    for number in range(3):
        start = 10 + 100 * number
        events += [
            function("/project/model.py(257): forward", start, 90),
            function("/project/model.py(5): norm", start + 5, 10),
            change(10, start + 6, 4 * number),
            function("/project/model.py(5): norm", start + 20, 10),
            change(10, start + 21, 4 * number + 1),
            operator("aten::mm", start + 40, 10),
            change(40 if number else 41, start + 45, 4 * number + 2),
        ]
    memory = read(*events)
    block = summarise(memory).block
    assert block is not None
    assert (block.function, block.called_from) == ("model.py:257 forward", "model.py:300 forward")
    assert (block.calls, block.alike, block.total_bytes) == (3, 2, 60)
    assert [(group.bytes, group.count, str(group.trace[0])) for group in block.groups] == [
        (40, 1, "aten::mm"),
        (10, 2, "model.py:5 norm"),
    ]


# Refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        {"ts": float("nan")},
        {"ts": "soon"},
        {"ts": 10**400},
        {"args": None},
        {"args": {"Bytes": "8", "Addr": 1, "Device Type": 0}},
        {"args": {"Bytes": 8, "Addr": -1, "Device Type": 0}},
        {"args": {"Bytes": 8.5, "Addr": 1, "Device Type": 0}},
        {"args": {"Bytes": 2**60, "Addr": 1, "Device Type": 0}},
        {"args": {"Bytes": float("nan"), "Addr": 1, "Device Type": 0}},
        {"args": {"Bytes": True, "Addr": 1, "Device Type": 0}},
        {"args": {"Bytes": 8, "Addr": 1}},
        {"args": {"Bytes": 8, "Addr": 1, "Device Type": 1, "Device Id": -1}},
        {"args": {"Bytes": 8, "Addr": 1, "Device Type": [0]}},
    ],
)
def test_an_event_that_makes_no_sense_is_left_out_and_counted(
    read: Any, damage: dict[str, Any], tmp_path: Path
) -> None:
    sound = [change(512, 10, 1), change(-512, 20, 1), change(0, 30, 1), 3, None, {"ph": "i"}, {"ph": "X", "cat": 3}]
    memory = read(*sound, change(8, 15, 2) | damage)
    assert (memory.timeline.total.tolist(), memory.damaged) == ([512, 0], 1)
    with pytest.raises(
        UserError, match=r"has no memory events.* found none that make sense, and 1 that do not; record"
    ):
        read_memory(written(tmp_path / "other.json", [change(8, 15, 2) | damage]))


@pytest.mark.parametrize("damage", [{"ts": None}, {"dur": -1}, {"dur": float("inf")}])
def test_a_span_without_a_time_is_counted_as_damaged_and_in_no_stack(read: Any, damage: dict[str, Any]) -> None:
    memory = read(operator("aten::mul", 0, 20) | damage, named("range", 0, 20), change(8, 10))
    assert (names(memory), memory.damaged) == (["range"], 1)


@pytest.mark.parametrize("told", [None, [], {"Sequence number": "5"}, {"Sequence number": None}])
def test_an_operator_that_does_not_tell_its_number_is_an_operator_still(read: Any, told: object) -> None:
    memory = read(operator("aten::mul", 0, 20) | {"args": told}, change(8, 10))
    assert names(memory) == ["aten::mul"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"traceEvents": [{"ph": "i", "name": "[mem', "is no trace: expected JSON"),
        ('{"weights": [1]}', "is JSON, but no trace: expected a list of events under `traceEvents`"),
        (json.dumps([event("cpu_op", "aten::mm", 1, 2)]), r"has no memory events.*profile_memory=True"),
        ("[]", r"has no memory events: expected events called \[memory\], found none; record it with"),
    ],
)
def test_what_tells_nothing_of_memory_is_an_error_of_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        read_memory(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compressed_trace_reads_alike_and_one_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    content = gzip.compress(json.dumps({"traceEvents": training()}).encode())
    path.write_bytes(content)
    plain = read_trace_memory(written(tmp_path / "trace.json", training()))
    compressed = read_trace_memory(path)
    assert compressed.timeline.total.tolist() == plain.timeline.total.tolist()
    assert places(compressed) == places(plain)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        read_memory(path)


# Real ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        with record_function("activation"):
            inner = torch.sigmoid(self.up(stream))
        return stream + self.down(inner)


class Stack(torch.nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            stream = block(stream)
        return stream


@pytest.mark.parametrize("with_stack", [True, False])
def test_a_real_step_has_the_peak_that_the_allocator_counts_and_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_stack: bool
) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    model = Stack(blocks=3)
    stream = torch.randn(32, 16)

    def step() -> None:
        with record_function("forward"):
            loss = model(stream).square().mean()
        with record_function("backward"):
            loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    counted, left = allocated_bytes(step, "cpu")
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, with_stack=with_stack, acc_events=True) as profiled:
        step()
    path = tmp_path / "trace.json.gz"
    profiled.export_chrome_trace(str(path))
    memory = read_memory(path)
    assert isinstance(memory, TraceMemory)
    timeline = memory.timeline
    assert (timeline.peak_bytes, int(timeline.total[-1])) == (counted, left)
    assert (memory.device, memory.damaged, len(timeline.unmatched)) == ("cpu", 0, 0)
    summary = summarise(memory, under="activation")
    assert sum(group.total_bytes for group in summary.by_place) == counted

    found = set(places(memory))
    # Each block's activations, and of the sigmoid alone the output, which its gradient needs.
    activations = 3 * 32 * 64 * 4
    if with_stack:
        line = f"{Path(__file__).name}:{Block.forward.__code__.co_firstlineno} forward"
        assert {line, f"autograd: SigmoidBackward0 of {line}", f"autograd: AddmmBackward0 of {line}"} <= found
        assert not [place for place in found if place.startswith(("module.py", "functional.py", "_tensor.py"))]
    else:
        assert {"activation: aten::sigmoid", "autograd: SigmoidBackward0 of activation"} <= found
        assert memory.unit == "operator"
    assert summary.under is not None
    kept = [index for index in timeline.live_at_peak() if memory.stack(index)[0] == Frame("aten::sigmoid", OPERATOR, 0)]
    assert sum(int(timeline.size[index]) for index in kept) == activations
    assert [phase.name for phase in timeline.phases if phase.depth == 0] == ["forward", "backward"]
    assert all(Frame("activation", RANGE, 0) in memory.stack(index) for index in kept)


def test_a_real_models_block_keeps_the_same_in_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    model, stream = Stack(blocks=3), torch.randn(32, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=True, acc_events=True) as profiled:
        kept = model(stream)
        torch.empty(10**6)  # so that the peak is here, and not within the last block
    path = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(path))
    block = summarise(read_memory(path)).block
    assert block is not None
    assert (block.calls, block.alike) == (3, 3)
    assert block.function == f"{Path(__file__).name}:{Block.forward.__code__.co_firstlineno} forward"
    # The output of the sigmoid, and the block's own: the sum needs neither of its parts.
    assert block.total_bytes == 32 * 64 * 4 + kept.nbytes

"""A Chrome trace of PyTorch's profiler is read: kernels by their launches, or operators by their own time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from traces import AUTOGRAD, MAIN, event, written

from cs336_systems.errors import UserError
from cs336_systems.profiling.kernels import outside, overview, summarise
from cs336_systems.profiling.recordings import read_recording
from cs336_systems.profiling.trace import read_trace


def training() -> list[dict[str, Any]]:
    """A step of forward and backward on a GPU."""
    return [
        {"ph": "M", "name": "process_name", "pid": MAIN, "tid": 0, "args": {"name": "python"}},
        event("Trace", "PyTorch Profiler (0)", 0, 1000, "Traces"),
        event("user_annotation", "step", 0, 100),
        event("user_annotation", "forward", 5, 40),
        event("user_annotation", "backward", 50, 45),
        event("gpu_user_annotation", "forward", 500, 90),
        event("cpu_op", "aten::mm", 10, 20, **{"External id": 3}),
        event("cuda_runtime", "cudaLaunchKernel", 12, 5, correlation=1, **{"External id": 3}),
        event("cuda_driver", "cuLaunchKernel", 60.5, 5, AUTOGRAD, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 200, 5, correlation=3),
        event("kernel", "ampere_sgemm_128x64_tn", 500, 20.125, correlation=1, stream=7),
        event("kernel", "ampere_sgemm_128x64_nn", 510, 30.001, correlation=2, stream=9),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 600, 1.5, correlation=3),
        event("ac2g", "ac2g", 12, 0),
    ]


# A GPU's trace -------------------------------------------------------------------------------------------------


def test_kernels_belong_to_the_ranges_open_at_their_launch_to_the_nanosecond(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path / "trace.json", training()))
    assert overview(recording)[["range", "occurrences", "open", "instances", "total", "busy"]].to_numpy().tolist() == [
        ["step", 1, 100_000, 2, 50_126, 40_001],
        ["forward", 1, 40_000, 1, 20_125, 20_125],
        ["backward", 1, 45_000, 1, 30_001, 30_001],
    ]
    assert recording.unit == "kernel"
    assert recording.notes == ()
    assert outside(recording) == (1, 1500)
    assert summarise(recording, range_name="backward")["name"].tolist() == ["ampere_sgemm_128x64_nn"]


def test_a_compressed_trace_and_a_bare_list_of_events_read_alike(tmp_path: Path) -> None:
    plain = overview(read_recording(written(tmp_path / "trace.json", training())))
    compressed = tmp_path / "trace.json.gz"
    compressed.write_bytes(gzip.compress(json.dumps({"traceEvents": training()}).encode()))
    bare = tmp_path / "bare.json"
    bare.write_text("\n " + json.dumps(training()))
    assert overview(read_recording(compressed)).equals(plain)
    assert overview(read_recording(bare)).equals(plain)


def test_where_no_call_has_its_number_the_operator_that_called_is_the_launch(tmp_path: Path) -> None:
    events = [each for each in training() if each.get("cat") not in ("cuda_runtime", "cuda_driver")]
    events.append(event("kernel", "k", 700, 2, correlation=9, **{"External id": 3}))
    recording = read_trace(written(tmp_path / "trace.json", events))
    assert summarise(recording, range_name="forward")["name"].tolist() == ["k"]
    assert recording.notes == ("Without a launch in the trace, and so in no range: 3 of 4",)


def test_the_categories_of_older_versions_are_known(tmp_path: Path) -> None:
    names = {"kernel": "Kernel", "gpu_memcpy": "Memcpy", "cuda_runtime": "Runtime", "cuda_driver": "Runtime"}
    events = [{**each, "cat": names.get(each["cat"], each["cat"])} for each in training() if "cat" in each]
    recording = read_trace(written(tmp_path / "trace.json", events))
    assert overview(recording)["total"].tolist() == [50_126, 20_125, 30_001]


@pytest.mark.parametrize(
    "damage",
    [
        {"ts": "soon"},
        {"ts": None},
        {"dur": -1},
        {"dur": 1e400},
        {"ts": 10**400},
        {"ts": 1e300},
        {"ts": True},
        {"name": 7},
    ],
)
def test_an_event_without_a_name_or_a_time_is_left_out_and_told_of(tmp_path: Path, damage: dict[str, Any]) -> None:
    events = [*training(), event("kernel", "damaged", 700, 2, correlation=1) | damage, "no event", None, {"ph": "X"}]
    recording = read_trace(written(tmp_path / "trace.json", events))
    assert overview(recording)["total"].tolist() == [50_126, 20_125, 30_001]
    assert recording.notes == ("Left out for want of a name or a time: 1 of the events",)


def test_the_first_call_of_a_correlation_number_is_the_launch(tmp_path: Path) -> None:
    late = event("cuda_driver", "cuLaunchKernel", 55, 1, correlation=1)
    for events in ([late, *training()], [*training(), late]):
        assert overview(read_trace(written(tmp_path / "trace.json", events)))["total"].tolist() == [
            50_126,
            20_125,
            30_001,
        ]


@pytest.mark.parametrize("told", [None, [], {"correlation": "1"}, {"correlation": 2**70}])
def test_a_kernel_that_does_not_tell_its_launch_belongs_to_no_range(tmp_path: Path, told: object) -> None:
    events = [*training(), event("kernel", "lost", 700, 2) | {"args": told}]
    assert outside(read_trace(written(tmp_path / "trace.json", events))) == (2, 3500)


# A CPU's trace -------------------------------------------------------------------------------------------------


def test_operators_stand_for_kernels_with_their_own_time(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "forward", 0, 100),
        event("user_annotation", "inner", 19, 12),
        event("cpu_op", "aten::linear", 10, 50),
        event("cpu_op", "aten::t", 10, 5),  # begins with its caller
        event("cpu_op", "aten::addmm", 20, 30.5),
        event("cpu_op", "aten::expand", 21, 4),
        event("cpu_op", "aten::resolve_conj", 40, 10.5),  # ends with its caller
        event("cpu_op", "aten::linear", 70, 5),
        event("cpu_op", "aten::mm", 20, 8, AUTOGRAD),
    ]
    recording = read_trace(written(tmp_path / "trace.json", events))
    rows = summarise(recording, range_name="forward").set_index("name")
    assert rows["total"].to_dict() == {
        "aten::linear": 14_500 + 5_000,
        "aten::t": 5_000,
        "aten::addmm": 30_500 - 4_000 - 10_500,
        "aten::expand": 4_000,
        "aten::resolve_conj": 10_500,
        "aten::mm": 8_000,
    }
    assert rows.loc["aten::linear", ["instances", "minimum", "maximum"]].tolist() == [2, 5_000, 14_500]
    assert overview(recording)[["total", "busy"]].to_numpy().tolist() == [[63_000, 55_000], [28_000, 30_500]]
    assert recording.unit == "operator"
    assert "operators of the CPU stand in their place" in recording.notes[0]


def test_an_operator_that_only_calls_another_of_its_name_is_one_with_it(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "forward", 0, 100),
        event("cpu_op", "aten::sum", 10, 20),
        event("cpu_op", "aten::sum", 12, 15),
        event("cpu_op", "aten::fill_", 14, 4),
        event("cpu_op", "aten::sum", 40, 20),
        event("cpu_op", "aten::sum", 42, 5),
        event("cpu_op", "aten::empty", 50, 5),
    ]
    rows = summarise(read_trace(written(tmp_path / "trace.json", events))).set_index("name")
    assert rows.loc["aten::sum", ["instances", "total"]].tolist() == [3, 16_000 + 15_000]


def test_a_trace_that_the_profiler_wrote_agrees_with_the_profilers_own_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    weights = torch.randn(32, 32, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            with record_function("step"):
                with record_function("forward"):
                    loss = torch.softmax(weights @ weights, dim=-1).square().sum()
                with record_function("backward"):
                    loss.backward()
    path = tmp_path / "trace.json.gz"
    profiled.export_chrome_trace(str(path))
    recording = read_recording(path)

    ranges = overview(recording).set_index("range")
    assert ranges["occurrences"].to_dict() == {"step": 3, "forward": 3, "backward": 3}
    step, forward, backward = (summarise(recording, range_name=name).set_index("name") for name in ranges.index)
    known = {each.key: each for each in profiled.key_averages() if each.key not in ranges.index}
    assert set(step.index) == set(known)
    for name, row in step.iterrows():
        assert row["instances"] == known[name].count
        # The profiler rounds each to the last digit of a double that holds the clock.
        assert row["total"] == pytest.approx(1000 * known[name].self_cpu_time_total, abs=10 * row["instances"])
    assert forward.loc["aten::mm", "instances"] == 3
    assert backward.loc["aten::mm", "instances"] == 6
    assert "aten::_softmax_backward_data" not in forward.index
    parts = forward["total"].sum() + backward["total"].sum()
    assert parts <= step["total"].sum() <= ranges.loc["step", "open"]


# What cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2", "is no trace: expected JSON"),
        ('{"traceEvents": [{"ph": "X", "cat": "kern', "is no trace: expected JSON"),
        ("[" * 100_000, "is no trace: expected JSON"),
        ('{"segments": []}', "is JSON, but no trace: expected a list of events under `traceEvents`"),
        ('{"traceEvents": 3}', "is JSON, but no trace"),
        ("[]", "has neither kernels nor operators"),
        ('[1, null, "text", {"ph": "X", "cat": "kernel"}]', "has neither kernels nor operators"),
    ],
)
def test_what_is_no_trace_is_an_error_of_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


def test_a_trace_without_kernels_and_operators_names_what_it_has(tmp_path: Path) -> None:
    events = [event("user_annotation", "forward", 0, 10), event("python_function", "f", 1, 2)]
    with pytest.raises(UserError, match="found python_function, user_annotation; record one with"):
        read_trace(written(tmp_path / "trace.json", events))


def test_a_trace_without_ranges_says_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no named ranges: .* torch\.profiler\.record_function"):
        read_trace(written(tmp_path / "trace.json", [event("cpu_op", "aten::mm", 1, 2)]))


def test_a_compressed_trace_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    content = gzip.compress(json.dumps(training()).encode())
    for kept in (5, len(content) // 2, len(content) - 4):
        path.write_bytes(content[:kept])
        with pytest.raises(UserError, match="cut off or damaged"):
            read_recording(path)
    path.write_bytes(content[:40] + b"\xff" * (len(content) - 40))
    with pytest.raises(UserError, match="cut off or damaged"):
        read_recording(path)

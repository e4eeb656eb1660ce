"""scripts/memory_summary.py tells what filled the memory, and refuses what it cannot or must not read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import traces
from snapshots import A100_SNAPSHOT, allocated, freed, segment, snapshot, written
from source_files import load_script, status_of
from traces import change, function, named, operator


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("memory_summary")


class Runs:
    """A pickle of this runs a command when it is loaded without care."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (self.command,)


def test_the_samples_summary_has_its_figures_to_the_byte(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, A100_SNAPSHOT) == 0
    text = capsys.readouterr().out
    for figure in ("13,581,844,992 | 12.649", "14,120,124,416 | 13.150", "8,192,293,376 |  7.630", "111,650,816 bytes"):
        assert figure in text


def test_json_has_the_same_in_plain_numbers(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, A100_SNAPSHOT, "--format", "json", "--top", "2", "--under", "softmax") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_allocated_bytes"] == 13_581_844_992
    assert found["before_trace_bytes"] == 8_192_293_376
    assert found["block"]["total_bytes"] == 111_650_816
    assert [len(found[name]) for name in ("by_size", "by_place", "largest")] == [2, 2, 2]
    assert [len(found[name]["groups"]) for name in ("block", "under")] == [2, 2]
    assert found["largest"][0]["trace"][0].endswith("/model.py:43 forward")
    assert found["by_size"][0]["trace"] == []


def test_csv_has_a_row_for_each_quantity_and_group(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, A100_SNAPSHOT, "--format", "csv", "--top", "3") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    totals = {row["name"]: int(row["total_bytes"]) for row in rows if row["section"] == "total"}
    assert totals["peak_allocated"] == 13_581_844_992
    assert totals["peak_reserved"] == 14_120_124_416
    counted = [row["section"] for row in rows]
    assert [counted.count(section) for section in ("by_size", "by_place", "largest", "block")] == [3, 3, 3, 3]
    for row in rows:
        if row["bytes"]:
            assert int(row["count"]) * int(row["bytes"]) == int(row["total_bytes"])


@pytest.mark.parametrize("name", ["timeline", "timeline.svg", "timeline.png", "v1.2"])
def test_the_plot_is_written_as_svg_and_as_png_of_one_name(script: ModuleType, tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "file", snapshot([allocated(64, 8), *freed(64, 8)], segments=[segment(64, 32)]))
    assert status_of(script, path, "--plot", tmp_path / "made" / name) == 0
    base = name.removesuffix(".svg").removesuffix(".png")
    assert sorted(made.name for made in (tmp_path / "made").iterdir()) == [f"{base}.png", f"{base}.svg"]


# Traces --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A megabyte on the CPU and two on a GPU, in a file whose name tells nothing."""
    events = [
        function("/project/model.py(190): forward", 0, 50),
        named("softmax", 2, 40),
        operator("aten::exp", 5, 10),
        change(2**20, 10, 1),
        change(8, 45, 2),
        change(2**21, 12, 1, **{"Device Type": 1, "Device Id": 0, "Total Allocated": 2**22, "Total Reserved": 2**23}),
    ]
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(traces.written(tmp_path / "plain", events).read_bytes()))
    return path


def test_a_trace_is_summarised_as_a_snapshot_is(
    script: ModuleType, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, trace, "--under", "softmax", "--plot", trace.with_name("plot")) == 0
    text = capsys.readouterr().out
    for shown in (
        "**Memory of the CPU, 2 events**",
        "1,048,584 | 1.000",
        "model.py:190 forward",
        "trace of device 0 too",
    ):
        assert shown in text
    assert "allocated under softmax: 1 allocation, 1,048,576 bytes" in text
    assert "peak reserved" not in text
    assert trace.with_name("plot.png").exists()
    assert b"by function" in trace.with_name("plot.svg").read_bytes()


def test_a_traces_json_and_csv_leave_empty_what_it_does_not_know(
    script: ModuleType, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, trace, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["unit"], found["peak_allocated_bytes"]) == ("cpu", "function", 2**20 + 8)
    assert [found[name] for name in ("peak_reserved_bytes", "before_trace_bytes", "missing_from_segments_bytes")] == [
        *(None, None, None)
    ]
    assert found["largest"][0]["trace"] == ["aten::exp", "/project/model.py:190 forward"]
    assert status_of(script, trace, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    totals = {row["name"]: row["total_bytes"] for row in rows if row["section"] == "total"}
    assert totals == {
        "peak_allocated": str(2**20 + 8),
        "peak_reserved": "",
        "before_trace": "",
        "before_trace_at_peak": "0",
    }


@pytest.mark.parametrize("name", ["0", "cuda:0"])
def test_of_a_trace_another_device_can_be_read(
    script: ModuleType, trace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert status_of(script, trace, "--device", name, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["other_devices"], found["peak_reserved_bytes"]) == (0, ["cpu"], 2**23)
    assert (found["before_trace_bytes"], found["peak_allocated_bytes"]) == (2**21, 2**22)


# Mistakes ------------------------------------------------------------------------------------------------------


def fault(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence of a call that ends with status 2 and prints nothing else."""
    assert status_of(script, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_a_forbidden_class_is_named_and_not_run(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Runs(["touch", str(tmp_path / "was_run")])
    path = written(tmp_path / "file", snapshot([allocated(64, 8)]) | {"allocator_settings": bad})
    assert "names 'subprocess.call'" in fault(script, capsys, path)
    assert not (tmp_path / "was_run").exists()


def test_a_snapshot_without_a_trace_says_how_to_record_one(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "file", snapshot([], segments=[segment(64, 32)]))
    text = fault(script, capsys, path)
    assert "the history was not recorded, so the peak is unknown" in text
    assert "torch.cuda.memory._record_memory_history(max_entries=" in text


def test_a_truncated_snapshot_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(A100_SNAPSHOT.read_bytes()[:1_000_000])
    assert "is truncated or damaged" in fault(script, capsys, path)


def test_what_was_misspelt_or_cannot_be_written_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot read" in fault(script, capsys, tmp_path / "missing")
    assert "--top takes a number of rows from 1 on, found 0" in fault(script, capsys, A100_SNAPSHOT, "--top", "0")
    assert "there is one of 0" in fault(script, capsys, A100_SNAPSHOT, "--device", "3")
    assert "unknown frame 'attenshun'" in fault(script, capsys, A100_SNAPSHOT, "--under", "attenshun")
    assert "unknown device 'gpu'" in fault(script, capsys, A100_SNAPSHOT, "--device", "gpu")
    assert "tells of GPUs alone" in fault(script, capsys, A100_SNAPSHOT, "--device", "cpu")
    (tmp_path / "occupied").write_text("")
    assert status_of(script, A100_SNAPSHOT, "--plot", tmp_path / "occupied" / "plot") == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"text", "is neither a memory snapshot nor a Chrome trace"),
        (b"PK\x03\x04 as torch.save writes", "is neither a memory snapshot nor a Chrome trace"),
        (b'{"traceEvents": [{"ph": "i", "na', "is no trace: expected JSON"),
        (b'{"traceEvents": []}', "has no memory events"),
        (b"\x1f\x8bnothing", "is cut off or damaged"),
        (b"\x80", "is truncated or damaged"),
    ],
)
def test_what_is_neither_a_snapshot_nor_a_trace_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert told in fault(script, capsys, path)


def test_a_device_that_a_trace_does_not_tell_of_is_one_sentence(
    script: ModuleType, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no memory events of device 3; there are some of 0, cpu" in fault(script, capsys, trace, "--device", "3")

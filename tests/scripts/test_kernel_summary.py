"""scripts/kernel_summary.py prints one table from two sources, and a mistake is one line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from nsys_exports import AUTOGRAD, PROCESS, Export
from source_files import load_script, status_of

from cs336_systems.bench.records import Store

GEMM, LONG = "ampere_sgemm_128x64_tn", f"void elementwise_kernel<{'at::native::Functor<float>, ' * 20}3>(int)"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("kernel_summary")


@pytest.fixture
def export() -> Export:
    made = Export()
    for step in (0, 1_000_000):
        made.range("step", step, step + 900_000)
        made.range("forward", step, step + 400_000)
        made.kernel(GEMM, launched=step + 10, start=step + 500_000, end=step + 800_000)
        made.kernel(LONG, launched=step + 20, start=step + 700_000, end=step + 900_000)
        made.kernel(GEMM, launched=step + 450_000, thread=AUTOGRAD, start=step + 900_000, end=step + 1_300_000)
    made.copy(1, launched=5_000_000, start=5_000_000, end=5_002_000)
    return made


@pytest.fixture
def path(export: Export, tmp_path: Path) -> Path:
    return export.write(tmp_path / "step.sqlite")


def test_csv_begins_with_the_columns_of_the_published_table(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    assert status_of(script, path, "--format", "csv") == 0
    heading, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    published = list(store.reference("nsys_gpt2xl_ctx256_a100").columns)
    assert heading[: len(published)] == published
    assert heading[len(published) :] == ["category", "busy_ms", "process"]
    found = [[row[0], float(row[1]), float(row[2]), int(row[3]), *map(float, row[4:8]), row[9]] for row in rows]
    assert found == [
        ["step", pytest.approx(100 * 1.4 / 1.8), 1.4, 4, 0.35, 0.35, 0.3, 0.4, GEMM],
        ["step", pytest.approx(100 * 0.4 / 1.8), 0.4, 2, 0.2, 0.2, 0.2, 0.2, LONG],
        ["forward", 60.0, 0.6, 2, 0.3, 0.3, 0.3, 0.3, GEMM],
        ["forward", 40.0, 0.4, 2, 0.2, 0.2, 0.2, 0.2, LONG],
    ]
    assert {row[-1] for row in rows} == {str(PROCESS)}


def test_json_has_what_is_summed_and_busy_and_each_time_of_a_named_range(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, path, "--format", "json", "--range", "forward", "--group", "category") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["file"], told["unit"], told["group"], told["notes"]) == ("step.sqlite", "kernel", "category", [])
    assert told["outside"] == {"instances": 1, "total_ms": 0.002}
    (forward,) = told["ranges"]
    assert (forward["occurrences"], forward["instances"], forward["total_ms"], forward["busy_ms"]) == (2, 4, 1.0, 0.8)
    assert [row["category"] for row in forward["rows"]] == ["matrix products", "elementwise"]
    assert forward["rows"][0]["std_ms"] == 0.0
    assert [(each["number"], each["total_ms"], each["busy_ms"]) for each in forward["each"]] == [
        (1, 0.5, 0.4),
        (2, 0.5, 0.4),
    ]


def test_one_occurrence_alone_is_null_where_one_instance_has_no_deviation(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, path, "--format", "json", "--range", "forward", "--occurrence", "2") == 0
    (forward,) = json.loads(capsys.readouterr().out)["ranges"]
    assert [(row["instances"], row["std_ms"]) for row in forward["rows"]] == [(1, None), (1, None)]


def test_markdown_has_the_ranges_and_the_kernels_of_each(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, path) == 0
    text = capsys.readouterr().out
    (step,) = (line for line in text.splitlines() if line.startswith("| `step`"))
    assert [cell.strip() for cell in step.split("|")[1:-1]] == ["`step`", "2", "1.800", "6", "1.800", "1.600"]
    assert "In no range: 1 of 7 kernels (0.002000 ms)." in text
    assert "**step: by kernel**" in text
    assert "**forward: by kernel**" in text
    assert f"`{GEMM}`" in text
    assert LONG not in text
    assert f"`{LONG[: script.NAME_WIDTH - 1]}…`" in text


def test_markdown_says_how_much_it_leaves_out(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, path, "--range", "forward", "--top", "1") == 0
    text = capsys.readouterr().out
    assert "1 more (0.4000 ms, 40.0 %) are not shown: see `--top 0`" in text
    assert "forward: each time that it was open" in text
    assert status_of(script, path, "--range", "forward", "--top", "0") == 0
    assert "not shown" not in capsys.readouterr().out


def test_two_processes_have_tables_of_their_own(
    script: ModuleType, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.range("forward", 0, 100, process=4321)
    export.kernel(GEMM, launched=50, start=200, end=2_000_200, process=4321)
    assert status_of(script, export.write(tmp_path / "two.sqlite"), "--range", "forward") == 0
    text = capsys.readouterr().out
    assert f"**forward (process {PROCESS}): by kernel**" in text
    assert "**forward (process 4321): by kernel**" in text
    assert "2.000" in text.split("(process 4321)")[1]


def test_a_trace_of_a_cpu_says_that_its_rows_are_operators(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"ph": "X", "pid": 1, "tid": 1}
    events = [
        {**place, "cat": "user_annotation", "name": "forward", "ts": 0, "dur": 10},
        {**place, "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 5},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert status_of(script, path) == 0
    text = capsys.readouterr().out
    assert "The trace has no kernels: operators of the CPU stand in their place" in text
    assert "**forward: by operator, own time on the CPU**" in text
    assert status_of(script, path, "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines() == [
        "range,time_percent,total_ms,instances,avg_ms,median_ms,min_ms,max_ms,std_ms,operator,category,busy_ms,process",
        "forward,100.0,0.005,1,0.005,0.005,0.005,0.005,,aten::mm,matrix products,,1",
    ]


# Mistakes ------------------------------------------------------------------------------------------------------


def mistake(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a mistake is answered with."""
    assert status_of(script, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--range", "foward"], "error: unknown range 'foward': did you mean 'forward'? Known: step, forward"),
        (["--range", "step", "--occurrence", "3"], "error: range 'step' was open 2 times: expected a number from 1"),
        (["--occurrence", "1"], "error: --occurrence counts how often one range was open: name it with --range"),
    ],
)
def test_what_does_not_occur_is_an_error_that_says_what_does(
    script: ModuleType, path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert mistake(script, capsys, path, *arguments).startswith(told)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.sqlite", b"", "is empty"),
        ("notes.txt", b"some notes", "is neither an SQLite export of Nsight Systems nor a Chrome trace"),
        ("step.nsys-rep", b"\x00\x01\x02", "export it with `nsys export --type sqlite step.nsys-rep`"),
        ("cut.sqlite", b"SQLite format 3\x00", "damaged or cut off"),
        ("trace.json", b'{"traceEvents": [', "is no trace: expected JSON"),
        ("trace.json", b"{}", "is JSON, but no trace"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, told: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = mistake(script, capsys, path)
    assert line.startswith(f"error: {path}")
    assert told in line


def test_a_file_that_is_not_there_and_a_folder_are_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot read" in mistake(script, capsys, tmp_path / "nowhere.sqlite")
    assert not (tmp_path / "nowhere.sqlite").exists()
    assert "cannot read" in mistake(script, capsys, tmp_path)


def test_an_export_without_ranges_is_one_line(
    script: ModuleType, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export.write(tmp_path / "step.sqlite", without=("NVTX_EVENTS",))
    assert "has no NVTX ranges" in mistake(script, capsys, path)

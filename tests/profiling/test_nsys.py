"""An export of Nsight Systems is read in the schemas of several versions, and what it lacks is named."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

import pytest
from nsys_exports import AUTOGRAD, MARK, PROCESS, SCHEMAS, START_END, Export, Schema

from cs336_systems.errors import UserError
from cs336_systems.profiling.kernels import occurrences, outside, overview, summarise
from cs336_systems.profiling.nsys import COPY_KINDS, contents_of, read_export
from cs336_systems.profiling.recordings import read_recording

GEMM, ADD = "ampere_sgemm_128x64_tn", "void at::native::vectorized_elementwise_kernel<4, add>(int)"


def training() -> Export:
    """Two steps: forward and backward, the latter's kernels launched by the autograd thread and run after all."""
    export = Export()
    for step in (0, 1000):
        export.range("step", step, step + 900)
        export.range("forward", step + 10, step + 300)
        export.range("scores", step + 20, step + 100)
        export.range("backward", step + 300, step + 800)
        export.kernel(GEMM, launched=step + 30, start=step + 400, end=step + 450)
        export.kernel(ADD, launched=step + 200, start=step + 450, end=step + 460)
        export.kernel(GEMM, launched=step + 310, thread=AUTOGRAD, start=step + 5000, end=step + 5100)
        export.kernel(ADD, launched=step + 320, thread=AUTOGRAD, start=step + 5050, end=step + 5080)
    export.copy(1, launched=2000, start=9000, end=9004)
    return export


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "step.sqlite"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_ranges_kernels_and_copies_are_read_to_the_nanosecond_in_every_schema(path: Path, schema: Schema) -> None:
    recording = read_recording(training().write(path, schema))
    columns = ["range", "occurrences", "open", "instances", "total", "busy"]
    assert overview(recording)[columns].to_numpy().tolist() == [
        ["step", 2, 1800, 8, 380, 320],
        ["forward", 2, 580, 4, 120, 120],
        ["scores", 2, 160, 2, 100, 100],
        ["backward", 2, 1000, 4, 260, 200],
    ]
    rows = summarise(recording, range_name="step")
    columns = ["name", "total", "instances", "average", "median", "minimum", "maximum", "process"]
    assert rows[columns].to_numpy().tolist() == [
        [GEMM, 300, 4, 75.0, 75.0, 50, 100, PROCESS],
        [ADD, 80, 4, 20.0, 20.0, 10, 30, PROCESS],
    ]
    assert occurrences(recording, "backward")[["start", "total"]].to_numpy().tolist() == [[300, 130], [1300, 130]]
    assert outside(recording) == (1, 4)
    assert recording.notes == ()


def test_a_range_is_of_its_process_although_correlation_numbers_repeat(path: Path) -> None:
    export = Export()
    for process, length in ((PROCESS, 10), (4321, 70)):
        export.range("step", 0, 100, process=process)
        export.kernel(GEMM, launched=50, start=200, end=200 + length, process=process)
    assert len({kernel[-1] for kernel in export.kernels}) == 1
    rows = overview(read_export(export.write(path)))
    assert rows[["process", "total"]].to_numpy().tolist() == [[PROCESS, 10], [4321, 70]]


def test_streams_that_overlap_are_summed_and_busy(path: Path) -> None:
    export = Export()
    export.range("step", 0, 100)
    export.kernel(GEMM, launched=10, start=200, end=300)
    export.kernel("ncclDevKernel_AllReduce", launched=20, start=250, end=400)
    export.copy(8, launched=30, start=390, end=420)
    (row,) = overview(read_export(export.write(path))).itertuples(index=False)
    assert (row.total, row.busy) == (280, 220)


def test_every_copy_is_named_by_its_direction_and_a_memset_is_one_too(path: Path) -> None:
    export = Export()
    export.range("step", 0, 100)
    for kind in (*COPY_KINDS, 99):
        export.copy(kind, launched=10, start=200, end=201)
    export.set(launched=20, start=300, end=305)
    rows = summarise(read_export(export.write(path)))
    expected = {f"[CUDA memcpy {direction}]" for direction in COPY_KINDS.values()}
    assert set(rows["name"]) == expected | {"[CUDA memset]", "[CUDA memcpy of an unknown kind]"}
    assert set(rows["category"]) == {"copies"}


def test_whole_cuda_graphs_count_and_are_told_of(path: Path) -> None:
    export = training()
    export.graph(launched=40, start=6000, end=6700)
    recording = read_export(export.write(path))
    row = summarise(recording, range_name="scores").iloc[0]
    assert (row["name"], row["total"]) == ("[CUDA graph]", 700)
    assert any("--cuda-graph-trace=node" in note for note in recording.notes)


def test_a_range_started_on_one_thread_holds_for_the_whole_process(path: Path) -> None:
    export = Export()
    export.range("request", 0, 100, thread=AUTOGRAD, kind=START_END)
    export.kernel(GEMM, launched=50, start=200, end=207)
    assert overview(read_export(export.write(path)))["total"].tolist() == [7]


def test_marks_are_no_ranges(path: Path) -> None:
    export = training()
    export.range("a mark", 5, None, kind=MARK)
    assert "a mark" not in set(overview(read_export(export.write(path)))["range"])


def test_a_range_that_was_never_closed_lasts_to_the_end_and_is_told_of(path: Path) -> None:
    export = Export()
    export.range("step", 10, None)
    export.kernel(GEMM, launched=50, start=200, end=290)
    recording = read_export(export.write(path))
    assert overview(recording)[["open", "total"]].to_numpy().tolist() == [[291 - 10, 90]]
    assert recording.notes == ("Still open when the recording ended, and taken to end there: 1 of the ranges",)


def test_ranges_from_before_the_recording_have_negative_times(path: Path) -> None:
    export = training()
    export.range("set up", -500, -100)
    export.range("all", -500, 5000)
    rows = overview(read_export(export.write(path))).set_index("range")
    assert rows.loc["all", "instances"] == 9
    assert rows.loc["set up", "instances"] == 0


def test_a_kernel_without_a_launch_is_in_no_range_and_told_of(path: Path) -> None:
    export = training()
    export.kernel(GEMM, launched=None, start=20, end=25)
    recording = read_export(export.write(path))
    assert outside(recording) == (2, 9)
    assert recording.notes == ("Without a launch in the export, and so in no range: 1 of 10",)


def test_the_first_call_of_a_correlation_number_is_the_launch(path: Path) -> None:
    """cudaLaunchKernel calls cuLaunchKernel, and both may be recorded."""
    export = Export()
    export.range("forward", 0, 100)
    export.range("backward", 100, 200)
    export.kernel(GEMM, launched=99, start=300, end=310)
    export.calls.insert(0, (100, 101, PROCESS, PROCESS, 1))
    assert overview(read_export(export.write(path)))["total"].tolist() == [10, 0]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_tables_that_are_empty_are_as_good_as_missing(path: Path, schema: Schema) -> None:
    recording = read_export(training().write(path, schema, is_lazy=False))
    assert overview(recording)["total"].tolist() == [380, 120, 100, 260]


def test_short_names_stand_in_where_there_are_no_full_ones(path: Path) -> None:
    export = training().write(path, without=("CUPTI_ACTIVITY_KIND_KERNEL.demangledName",))
    assert set(summarise(read_export(export))["name"]) == {f"short {GEMM}", f"short {ADD}"}


@pytest.mark.parametrize(
    "without",
    [
        ("META_DATA_EXPORT",),
        ("CUPTI_ACTIVITY_KIND_MEMCPY",),
        ("CUPTI_ACTIVITY_KIND_KERNEL.globalPid", "CUPTI_ACTIVITY_KIND_MEMCPY.globalPid"),
        ("NVTX_EVENTS.text",),
        ("NVTX_EVENTS.rangeId", "NVTX_EVENTS.domainId", "NVTX_EVENTS.endGlobalTid"),
    ],
)
def test_what_is_missing_and_not_needed_changes_nothing(path: Path, without: tuple[str, ...]) -> None:
    recording = read_export(training().write(path, without=without))
    assert overview(recording)["total"].tolist() == [380, 120, 100, 260]


# What cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("NVTX_EVENTS", "has no NVTX ranges: its table NVTX_EVENTS is missing or empty"),
        ("CUPTI_ACTIVITY_KIND_RUNTIME", "its table CUPTI_ACTIVITY_KIND_RUNTIME is missing or empty"),
        ("StringIds", "does not tell the kernels' names: its table StringIds is missing"),
        ("NVTX_EVENTS.eventType", "its table NVTX_EVENTS has no column eventType"),
        ("NVTX_EVENTS.globalTid", "its table NVTX_EVENTS has no column globalTid"),
        (
            "CUPTI_ACTIVITY_KIND_KERNEL.correlationId",
            "its table CUPTI_ACTIVITY_KIND_KERNEL has no column correlationId",
        ),
        ("CUPTI_ACTIVITY_KIND_RUNTIME.globalTid", "its table CUPTI_ACTIVITY_KIND_RUNTIME has no column globalTid"),
    ],
)
def test_what_is_missing_and_needed_is_named(path: Path, without: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        read_export(training().write(path, without=(without,)))


def test_an_unknown_schema_is_named_by_its_version(path: Path) -> None:
    with pytest.raises(UserError, match=r"\(schema 3\.16\.1, EXPORT_META_DATA, written by 2020\.1\.1\)"):
        read_export(training().write(path, "2020.1", without=("CUPTI_ACTIVITY_KIND_KERNEL.start",)))
    missing = ("CUPTI_ACTIVITY_KIND_KERNEL.start", "META_DATA_EXPORT")
    with pytest.raises(UserError, match="schema not told: neither META_DATA_EXPORT nor EXPORT_META_DATA"):
        read_export(training().write(path, without=missing))


def test_two_processes_that_cannot_be_told_apart_are_an_error(path: Path) -> None:
    export = training()
    export.kernel(GEMM, launched=50, start=200, end=270, process=4321)
    with pytest.raises(UserError, match="holds 2 processes, and its table CUPTI_ACTIVITY_KIND_KERNEL has no column"):
        read_export(export.write(path, without=("CUPTI_ACTIVITY_KIND_KERNEL.globalPid",)))


def test_an_export_without_gpu_work_is_an_error(path: Path) -> None:
    export = Export()
    export.range("step", 0, 100)
    with pytest.raises(UserError, match="has no GPU work: its table CUPTI_ACTIVITY_KIND_KERNEL is missing or empty"):
        read_export(export.write(path))


def test_an_export_with_marks_alone_has_no_ranges(path: Path) -> None:
    export = Export()
    export.range("a mark", 5, None, kind=MARK)
    export.kernel(GEMM, launched=50, start=200, end=290)
    with pytest.raises(
        UserError, match="has no NVTX ranges: its table NVTX_EVENTS has no event of the types 59 and 60"
    ):
        read_export(export.write(path))


def test_a_foreign_sqlite_file_is_an_error_that_says_what_was_found(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
        connection.commit()
    with pytest.raises(UserError, match=r"no export of Nsight Systems: expected tables such as .*, found songs"):
        read_recording(path)


def test_a_file_that_was_cut_off_is_an_error_wherever_the_cut_is(path: Path) -> None:
    export = training()
    for number in range(300):
        export.kernel(GEMM, launched=50, start=200 + number, end=290 + number)
    content = export.write(path).read_bytes()
    for share in (0.02, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match="damaged or cut off"):
            read_recording(path)


def test_garbage_in_the_middle_is_an_error_without_a_traceback(path: Path) -> None:
    content = bytearray(training().write(path).read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut off"):
        read_recording(path)


def test_texts_in_the_place_of_times_are_no_times(path: Path) -> None:
    export = training().write(path)
    with contextlib.closing(sqlite3.connect(export)) as connection:
        connection.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'x', correlationId = NULL, globalPid = 'y'")
        connection.execute("UPDATE NVTX_EVENTS SET textId = 'z', text = x'ff'")
        connection.commit()
    assert overview(read_export(export))["instances"].sum() == 0


def test_a_kernel_without_a_correlation_number_is_not_taken_for_that_of_call_0(path: Path) -> None:
    export = training().write(path)
    with contextlib.closing(sqlite3.connect(export)) as connection:
        connection.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET correlationId = NULL")
        connection.commit()
    assert outside(read_export(export)) == (9, 384)


def test_a_view_in_the_place_of_a_table_is_not_read(path: Path) -> None:
    """A view is SQL of the file's own."""
    export = training().write(path)
    with contextlib.closing(sqlite3.connect(export)) as connection:
        connection.execute("ALTER TABLE NVTX_EVENTS RENAME TO events")
        connection.execute("CREATE VIEW NVTX_EVENTS AS SELECT * FROM events")
        connection.commit()
    with pytest.raises(UserError, match="its table NVTX_EVENTS is missing"):
        read_export(export)


def test_reading_leaves_the_file_and_its_folder_as_they_are(path: Path) -> None:
    export = training().write(path)
    before = export.read_bytes()
    read_recording(export)
    assert [each.name for each in export.parent.iterdir()] == [export.name]
    assert export.read_bytes() == before


@pytest.mark.parametrize("name", ["a file?mode=rwc#%41.sqlite", "ä ö.sqlite"])
def test_any_name_of_a_file_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    assert len(overview(read_export(training().write(tmp_path / name)))) == 4


# What a file has -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS)
def test_contents_are_the_ranges_and_how_many_kernels_and_graphs_ran(path: Path, schema: Schema) -> None:
    export = training()
    export.graph(launched=40, start=6000, end=6700)
    contents = contents_of(export.write(path, schema))
    assert contents.ranges == {"step", "forward", "scores", "backward"}
    assert contents.kernels == len(export.kernels) + 1


def test_a_file_without_kernels_has_contents_although_it_gives_no_figures(path: Path) -> None:
    export = Export()
    export.range("forward", 0, 100)
    contents = contents_of(export.write(path))
    assert contents.ranges == {"forward"}
    assert contents.kernels == 0
    with pytest.raises(UserError, match="has no GPU work"):
        read_export(path)


def test_contents_of_a_file_that_is_cut_off_anywhere_are_an_error(path: Path) -> None:
    whole = training().write(path).read_bytes()
    for size in range(1000, len(whole), 3000):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or cut off"):
            contents_of(path)

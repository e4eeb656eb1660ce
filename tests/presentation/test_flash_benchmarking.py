"""Tables, figures and sentences about FlashAttention-2 and its rivals say what the summary says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from attention_records import PEAKS, TO_RUN, flash_case, nothing_of, record_of
from matplotlib.figure import Figure
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import Table, number
from cs336_systems.experiments import flash_benchmarking
from cs336_systems.presentation import flash_benchmarking as presentation
from cs336_systems.presentation.flash_benchmarking_roofline import on_gpus, roofline, roofline_findings

pytestmark = pytest.mark.problem("flash_benchmarking")

LENGTHS = (256, 1024, 4096)
ALL = ("reference", "flash", "sdpa-flash")
ON_A_GPU = ("reference", "flash", "flash-triton", "sdpa-flash")


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return flash_benchmarking.summarise(records, PEAKS, store=store, **options)


def usual(seq_lens: Sequence[int] = LENGTHS, **changes: Any) -> list[Record]:
    """Eager takes 8 ms forward at the first length, ours a quarter of that, and PyTorch's kernel half as much again."""
    times = {"reference": 8.0, "flash": 2.0, "flash-triton": 1.0, "sdpa-flash": 3.0}
    return [
        record_of(
            flash_case(**{"seq_len": length, "implementations": ALL, **changes}),
            {name: ms * (length / 256) ** 2 for name, ms in times.items()},
        )
        for length in seq_lens
    ]


def told(found: Sequence[Any], start: str) -> Any:
    """The one sentence that contains a text."""
    (only,) = [sentence for sentence in found if start in str(sentence)]
    return only


# Tables --------------------------------------------------------------------------------------------------------


def test_a_row_has_times_to_their_deviation_rate_memory_and_errors(store: Store) -> None:
    table = presentation.table(summary(store, *usual()))
    assert len(table.rows) == 3 * len(LENGTHS)
    assert cells(table, "forward (ms)")[:3] == ["8.00", "2.00", "3.00"]
    assert cells(table, "both (ms)")[:3] == ["24.0", "6.00", "9.00"]
    assert cells(table, "eager / this")[:3] == ["1.0", "4.0", "2.7"]
    # 3.5 times forward's products of 256·257/2 pairs, in 24 ms and in a quarter of that, of 100 GFLOP/s.
    flops = 3.5 * 4 * 16 * 256 * 257 / 2
    assert cells(table, "TFLOP/s")[0] == f"{flops / 24e-3 / 1e12:.6f}"
    assert cells(table, "of peak")[:2] == [f"{100 * flops / 24e-3 / 1e11:.2f} %", f"{100 * flops / 6e-3 / 1e11:.1f} %"]
    assert cells(table, "error of output")[0] == "1.0e-07"
    assert cells(table, "of gradients")[0] == "2.0e-07"
    # 9 tensors of 16 KiB.
    assert cells(table, "peak memory (MiB)")[1] == "0.141"


def test_what_is_the_same_for_all_stands_in_the_caption_and_what_varies_in_a_column(store: Store) -> None:
    same = presentation.table(summary(store, *usual()))
    assert same.caption == (
        "Attention by implementation: toy-1c, 2 threads, PyTorch 2.13.0, Triton 3.7.1, batch 1, 1 head, float32, "
        "causal, medians of 3 rounds"
    )
    assert not {"precision", "mask", "batch", "heads"} & set(same.headings)
    varied = presentation.table(
        summary(
            store,
            *usual((256,)),
            *usual((256,), dtype="bfloat16", is_causal=False, batch_size=4, heads=16),
        )
    )
    assert cells(varied, "precision") == ["float32"] * 3 + ["bfloat16"] * 3
    assert cells(varied, "mask") == ["causal"] * 3 + ["none"] * 3
    assert (cells(varied, "batch")[-1], cells(varied, "heads")[-1]) == ("4", "16")
    assert varied.caption.endswith("Triton 3.7.1, medians of 3 rounds")
    assert presentation.caption(pd.DataFrame()) == "No records"


def test_what_has_no_time_says_why_and_what_was_disturbed_or_stale_is_marked(store: Store) -> None:
    case = flash_case(implementations=("reference", "flash", "sdpa-math", "sdpa-flash"))
    fell_out = {
        "reference": ("oom", "needs 9 GiB"),
        "flash": ("skipped", "not *here*"),
        "sdpa-math": ("failed", "ValueError: x"),
    }
    shown = summary(
        store,
        record_of(case, fell_out=fell_out, noise={"flags": ["spread of 40%"]}),  # type: ignore[arg-type]
        nothing_of(flash_case(seq_len=1024)),
        fingerprint={"source": {"measure": "now"}},
    )
    table = presentation.table(shown)
    assert cells(table, "both (ms)") == ["oom", "skipped", "failed", "6.00 ~ †", "missing", "missing"]
    assert "eager / this" not in table.headings  # there is no eager time to tell it from
    assert set(table.notes[1:]) == {
        "~ noisy, 1 of 2 cases: length 256, d 16, float32 (spread of 40%)",
        "† stale: measure changed",
        "oom: reference at length 256, d 16, float32: `needs 9 GiB`",
        "skipped: flash at length 256, d 16, float32: `not *here*`",
        "failed: sdpa-math at length 256, d 16, float32: `ValueError: x`",
        f"missing: reference at length 1,024, d 16, float32; flash at length 1,024, d 16, float32: {TO_RUN}",
    }


def test_cases_that_differ_in_mask_or_batch_alone_are_several_in_the_note_about_noise(store: Store) -> None:
    changes: list[dict[str, Any]] = [{}, {"is_causal": False}, {"batch_size": 4, "heads": 16}]
    shown = summary(
        store,
        *(record_of(flash_case(**change), noise={"flags": [f"load {load}"]}) for load, change in enumerate(changes)),
    )
    (note,) = presentation.notes_below(shown)
    assert note.startswith("~ noisy, 3 of 3 cases: ")


def test_rows_of_trainings_shapes_that_fell_out_are_told_apart(store: Store) -> None:
    fell_out: Any = {"flash": ("skipped", "too long")}
    shown = summary(
        store, *(record_of(flash_case(is_causal=is_causal), fell_out=fell_out) for is_causal in (True, False))
    )
    (note,) = presentation.notes_below(shown)
    names = note.removeprefix("skipped: ").removesuffix(": `too long`").split("; ")
    assert len(set(names)) == 2


def configured(*tuned: bool) -> dict[str, Any]:
    kernels = ("forward", "grad_query")
    return {
        name: {"queries": 64, "keys": 32 * place, "tuned": each}
        for place, (name, each) in enumerate(zip(kernels, tuned, strict=False), start=1)
    }


@pytest.mark.parametrize(
    ("tuned", "text"),
    [
        ((), "–"),
        ((True,), "64 × 32"),
        ((True, True), "64 × 32, 64 × 64"),
        ((True, False), "64 × 32, 64 × 64 (untuned)"),
    ],
)
def test_tiles_are_told_by_kernel_and_whether_they_were_chosen(
    store: Store, tuned: tuple[bool, ...], text: str
) -> None:
    values = {"flash-triton": {"configuration": configured(*tuned)}}
    shown = summary(store, record_of(flash_case(implementations=ON_A_GPU), values=values))
    table = presentation.table(shown)
    expected = ["–", "–", text, "–"]
    if tuned:
        assert cells(table, "tiles") == expected
    else:
        assert "tiles" not in table.headings


def test_speedups_stand_beside_the_published_ones_shape_by_shape(store: Store) -> None:
    values = {"flash-triton": {"configuration": configured(True)}}
    times = {"reference": 8.0, "flash-triton": 1.0}
    records = [
        record_of(flash_case(seq_len=length, implementations=ON_A_GPU), times, values=values) for length in (256, 300)
    ]
    table = presentation.speedups(summary(store, *records))
    assert table.caption.startswith("flash-triton over eager: toy-1c")
    assert cells(table, "length") == ["256", "300"]
    assert cells(table, "forward: eager (ms)") == ["8.00", "8.00"]
    assert cells(table, "forward + backward: eager (ms)") == ["24.0", "24.0"]
    assert cells(table, "ours (ms)") == ["1.00", "1.00"]
    assert cells(table, "eager / ours") == ["8.0", "8.0"]
    # Published at length 256, d 16, float32: 0.167 against 0.019, 1.269 against 1.75, 1.436 against 1.768.
    heading = "H100 80 GB eager / Triton"
    places = [place for place, name in enumerate(table.headings) if name == heading]
    assert [plain(table.rows[0][place]) for place in places] == ["8.8", "0.73", "0.81"]
    assert [table.rows[1][place] for place in places] == ["–"] * 3
    assert cells(table, "H100 80 GB tile") == ["16 × 16", "–"]
    assert cells(table, "tiles") == ["64 × 32"] * 2


def test_without_the_kernel_ours_is_the_loop_and_without_either_there_is_no_row(store: Store) -> None:
    assert presentation.speedups(summary(store, *usual())).caption.startswith("flash over eager")
    none = presentation.speedups(summary(store, *usual(implementations=("reference", "sdpa-flash"))))
    assert none.rows == ()


def test_a_shape_without_a_record_keeps_its_row_among_the_speedups(store: Store) -> None:
    """A hole is shown where the number would be, with what to run for it."""
    records = [*usual((256,), implementations=ON_A_GPU), nothing_of(flash_case(seq_len=1024, implementations=ON_A_GPU))]
    table = presentation.speedups(summary(store, *records))
    assert cells(table, "length") == ["256", "1,024"]
    assert TO_RUN in str(table)


def test_the_published_figures_alone_have_every_shape(store: Store) -> None:
    others = flash_benchmarking.published_shapes(store)
    table = presentation.published(others)
    assert len(table.rows) == len(others)
    (row,) = [row for row in table.rows if row[:3] == ("65,536", "64", "bfloat16")]
    ratios = [29.3 / 6.297, 39.078 / 44.382, 68.378 / 50.679]
    places = [place for place, name in enumerate(table.headings) if name == "eager / Triton"]
    assert [float(plain(row[place])) for place in places] == pytest.approx(ratios, rel=0.05)
    assert row[-1] == "64 × 128"


# Sentences -----------------------------------------------------------------------------------------------------


def test_sentences_that_the_data_bear_out_have_their_numbers(store: Store) -> None:
    found = presentation.findings(summary(store, *usual()))
    memory, fastest, rival, eager, errors, nearness = found
    assert [sentence.holds for sentence in found] == [True, None, True, True, True, True]
    assert str(memory).startswith(
        "From length 256 to 4,096, 16 times as long, the peak of flash grows 16 times and eager's 256 times"
    )
    flops = 3.5 * 4 * 16 * 4096 * 4097 / 2
    assert str(fastest) == (
        "At length 4,096, d 16, float32 the fastest forward with backward is flash with 1,536 ms, 4.0 times as fast "
        f"as eager, at {flops / 1.536 / 1e12:.5f} TFLOP/s."
    )
    assert str(rival) == (
        "flash is 1.5 times as fast as PyTorch's flash backend forward and 1.5 times backward, over 3 shapes: "
        "everywhere at least the 1.15 times forward and 0.9 times backward that are aimed at."
    )
    assert str(eager).startswith(
        "Times as fast as eager attention is flash: forward 4.0, backward 4.0, forward + backward 4.0, over 3 shapes"
    )
    assert "it is never the slower one" in str(eager)
    assert "errs 1.0 times as much" in str(errors)
    assert "Nearest its floor is flash at length" in str(nearness)
    assert str(nearness).endswith("no time lies below its floor, as it must be.")


def test_sentences_that_the_data_contradict_say_so(store: Store) -> None:
    times = {"reference": 1e-9, "flash": 8.0, "sdpa-flash": 2.0}
    records = [
        record_of(
            flash_case(seq_len=length, implementations=ALL),
            times,
            values={"flash": {"output_error": 1e-6, "peak_bytes": length**2}},
        )
        for length in LENGTHS
    ]
    memory, fastest, rival, eager, errors, nearness = presentation.findings(summary(store, *records))
    assert [each.holds for each in (memory, rival, eager, errors, nearness)] == [False] * 5
    assert "not the linear growth" in str(memory)
    assert "is reference with" in str(fastest)
    assert "flash is a loop over tiles in Python, for reading" in str(rival)
    assert "it is the slower one in some phase at length 256, d 16, float32; length 1,024" in str(eager)
    assert "errs 10 times as much" in str(errors)
    assert "more than twice the error" in str(errors)
    assert "a time lies below its floor" in str(nearness)


def test_ours_is_the_kernel_where_there_is_one_and_it_is_told_when_it_is_beaten(store: Store) -> None:
    found = presentation.findings(summary(store, *usual(implementations=ON_A_GPU)))
    assert "flash-triton is 3.0 times as fast" in str(told(found, "PyTorch's flash backend"))
    slow = [
        record_of(flash_case(seq_len=length, implementations=ON_A_GPU), {"flash-triton": 8.0}) for length in LENGTHS
    ]
    beaten = told(presentation.findings(summary(store, *slow)), "PyTorch's flash backend")
    assert beaten.holds is False
    assert "0.9 times backward aimed at are missed at length 256, d 16, float32; length 1,024" in str(beaten)


@pytest.mark.parametrize(("slower", "holds"), [(1.0, True), (1.01, False)])
def test_one_shape_at_which_ours_is_slower_is_enough_to_say_so(store: Store, slower: float, holds: bool) -> None:
    records = [
        *usual((256, 4096)),
        record_of(flash_case(seq_len=1024, implementations=ALL), {"reference": 2.0, "flash": 2.0 * slower}),
    ]
    found = told(presentation.findings(summary(store, *records)), "Times as fast as eager attention")
    assert found.holds is holds
    assert str(found).endswith("it is the slower one in some phase at length 1,024, d 16, float32.") is not holds


def test_where_eager_ran_out_of_memory_no_number_of_the_sentences_is_a_hole(store: Store) -> None:
    too_long = record_of(
        flash_case(seq_len=16_384, implementations=ALL), fell_out={"reference": ("oom", "needs 9 GiB")}
    )
    found = presentation.findings(summary(store, *usual(), too_long))
    assert "At length 16,384" in str(told(found, "the fastest"))
    assert "–" not in str(found)


def test_where_no_ceiling_is_known_no_number_of_the_sentences_is_a_hole(store: Store) -> None:
    shown = flash_benchmarking.summarise(usual(dtype="float16"), PEAKS, store=store)
    found = presentation.findings(shown)
    assert "the fastest" in str(found)
    assert "–" not in str(found)


def test_growth_is_told_of_one_precision(store: Store) -> None:
    """As in the grid of a GPU, where the longest shape of eager attention fits in 16 bits alone."""
    fell_out: Any = {"reference": ("oom", "needs 9 GiB")}
    records = [
        record_of(
            flash_case(seq_len=length, dtype=dtype, implementations=ALL),
            fell_out=fell_out if (length, dtype) == (4096, "float32") else {},
        )
        for dtype in ("float32", "bfloat16")
        for length in LENGTHS
    ]
    memory = told(presentation.findings(summary(store, *records)), "the peak of flash grows")
    # Linear in the length: whatever precision is told of, the ratio of the peaks is that of its lengths.
    (long,) = re.findall(r"to ([\d,]+), ", str(memory))
    times = int(long.replace(",", "")) / 256
    assert f"grows {number(times, 2)} times" in str(memory)


def test_of_a_single_length_no_growth_is_told(store: Store) -> None:
    assert "times as long" not in str(presentation.findings(summary(store, *usual((256,)))))
    both = [*usual((256,)), *usual((256,), dtype="bfloat16")]
    assert "times as long" not in str(presentation.findings(summary(store, *both)))


def test_with_one_missing_record_every_sentence_says_what_to_run_and_counts_one_case(store: Store) -> None:
    shown = summary(store, *usual(), nothing_of(flash_case(seq_len=8192, implementations=ALL)))
    found = presentation.findings(shown)
    assert len(found) == 6
    for sentence in found:
        assert str(sentence).endswith(f"cannot be told: no record of 1 of 4 cases; {TO_RUN}.")
        assert sentence.holds is None


def test_of_nothing_but_missing_records_every_sentence_says_what_to_run(store: Store) -> None:
    shown = summary(store, *(nothing_of(flash_case(seq_len=length)) for length in LENGTHS))
    found = presentation.findings(shown)
    assert len(found) == 6
    assert all(TO_RUN in str(sentence) for sentence in found)
    table = presentation.table(shown)
    assert set(cells(table, "both (ms)")) == {"missing"}
    assert TO_RUN in str(table)
    assert TO_RUN in str(roofline(shown))


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py flash_benchmarking" in str(only)
    assert list(roofline(pd.DataFrame())) == []
    assert len(roofline_findings(pd.DataFrame())) == 1
    assert "No records" in presentation.table(pd.DataFrame()).caption


def test_of_cases_that_were_measured_and_have_no_time_nobody_is_told_to_measure_them(store: Store) -> None:
    shown = summary(store, record_of(flash_case(), status="failed", reason="because", measurement=Measurement()))
    assert list(presentation.findings(shown)) == []
    assert "`because`" in str(presentation.table(shown))


def test_that_sentences_speak_of_an_earlier_source_is_the_last_of_them_and_counts_cases(store: Store) -> None:
    found = presentation.findings(summary(store, *usual(), fingerprint={"source": {"measure": "now"}}))
    assert str(found[-1]) == "Stale (†) are 3 of 3 cases: they say nothing of today's source."
    assert "tale" not in str(presentation.findings(summary(store, *usual())))


# The roofline --------------------------------------------------------------------------------------------------


def test_tiling_crosses_the_ridge_of_every_gpu_by_its_datasheet() -> None:
    found = on_gpus()
    assert found.holds is True
    # Twice d over 7·i, and T over i, less what Q, K, V and O add to the traffic of the matrices.
    assert "does 9.1" in str(found)
    assert "up to 8,192" in str(found)
    for name, ridge in (("a100-40gb", 312 / 1.555), ("h100-sxm", 989.4 / 3.35), ("h200", 989.4 / 4.8)):
        assert f"{ridge:.0f} on {name}" in str(found)


def test_where_both_forms_lie_on_one_side_of_the_ridge_it_is_said() -> None:
    found = on_gpus(seq_len=128)
    assert found.holds is False
    assert "there both lie on one side" in str(found)


def test_the_machines_own_roofline_is_of_the_longest_shape_that_both_forms_have(store: Store) -> None:
    records = [*usual(), record_of(flash_case(seq_len=8192), fell_out={"reference": ("oom", "x")})]
    shown = summary(store, *records)
    (found,) = roofline(shown)
    assert "At length 4,096, d 16, float32" in str(found)
    assert "10.0 on toy-1c" in str(found)
    assert found.holds is True
    (other,) = roofline(shown.assign(ridge=0.1))
    assert other.holds is False
    assert list(roofline_findings(shown)) == [found, on_gpus()]


# Figures -------------------------------------------------------------------------------------------------------


def drawn(shown: pd.DataFrame) -> Figure:
    return presentation.figure(shown).draw()


def across(line: Any) -> list[float]:
    """Where the points of a line lie on the horizontal axis."""
    return np.ravel(line.get_xdata()).tolist()


def up(line: Any) -> list[float]:
    return np.ravel(line.get_ydata()).tolist()


def legend_of(drawing: Figure) -> list[str]:
    return [text.get_text() for text in drawing.legends[0].get_texts()]


def test_a_figure_has_a_panel_per_pass_and_one_of_memory_with_units_and_a_legend(store: Store) -> None:
    drawing = drawn(summary(store, *usual()))
    assert [panel.get_title() for panel in drawing.axes] == ["forward", "backward", "peak of both"]
    units = ["time per pass (ms)"] * 2 + ["memory beyond the inputs (MiB)"]
    assert [panel.get_ylabel() for panel in drawing.axes] == units
    assert {panel.get_xlabel() for panel in drawing.axes} == {"length (tokens)"}
    assert legend_of(drawing) == [*ALL, "floor", "published Triton, H100 80 GB"]


def test_a_series_shows_the_medians_of_its_implementation_in_order_of_length(store: Store) -> None:
    for records in (usual(), usual()[::-1]):
        panel = drawn(summary(store, *records)).axes[0]
        for line, first in zip(panel.lines, (8.0, 2.0, 3.0), strict=False):
            assert across(line) == list(LENGTHS)
            assert up(line) == pytest.approx([first * (length / 256) ** 2 for length in LENGTHS])
        assert [text.get_text() for text in panel.get_xticklabels()] == ["256", "1k", "4k"]


def test_many_implementations_are_told_apart(store: Store) -> None:
    names = flash_benchmarking.known_implementations("cuda", "bfloat16")
    panel = drawn(summary(store, *usual(implementations=names))).axes[0]
    lines = panel.lines[: len(names)]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(names) > 5


def test_a_figure_of_a_grid_is_of_one_precision_dimension_and_mask(store: Store) -> None:
    records = [
        *usual(dtype="bfloat16"),
        *usual(dtype="bfloat16", head_dim=64),
        *usual(dtype="float32", head_dim=64),
        *usual(dtype="bfloat16", head_dim=64, is_causal=False),
    ]
    picture = presentation.figure(summary(store, *records))
    assert "bfloat16, causal" in picture.caption
    assert picture.caption.endswith(", d 64")
    assert all(len(across(line)) <= len(LENGTHS) for panel in picture.draw().axes for line in panel.lines)


def test_a_figure_of_the_handouts_and_trainings_shapes_shows_each_length_once(store: Store) -> None:
    records = [*usual(head_dim=64, dtype="bfloat16")]
    records += usual((4096,), head_dim=64, dtype="bfloat16", batch_size=4, heads=16)
    panel = drawn(summary(store, *records)).axes[0]
    for line in panel.lines:
        assert len(set(across(line))) == len(across(line))


@pytest.mark.parametrize("seq_lens", [(256,), LENGTHS])
def test_the_same_records_give_the_same_bytes_even_of_one_length(store: Store, seq_lens: Sequence[int]) -> None:
    one, two = (presentation.figure(summary(store, *usual(seq_lens))).svg() for _ in range(2))
    assert one == two
    assert one.startswith(b"<?xml")


def test_a_figure_leaves_out_what_has_no_time(store: Store) -> None:
    records = [
        *usual((256, 1024)),
        record_of(flash_case(seq_len=4096, implementations=ALL), fell_out={"reference": ("oom", "too large")}),
        nothing_of(flash_case(seq_len=8192, implementations=ALL)),
    ]
    picture = presentation.figure(summary(store, *records))
    eager, ours, *_ = picture.draw().axes[0].lines
    assert across(eager) == [256, 1024]
    assert across(ours) == [256, 1024, 4096]
    assert picture.svg()


def test_a_figure_of_nothing_but_missing_records_is_empty_and_no_error(store: Store) -> None:
    assert presentation.figure(summary(store, *(nothing_of(flash_case(seq_len=length)) for length in LENGTHS))).svg()


# Several machines ----------------------------------------------------------------------------------------------


def test_the_records_of_several_machines_stand_below_one_another_with_their_names(store: Store) -> None:
    record = usual((256,))[0]
    other = Record(**{**vars(record), "machine": "other-1c", "fingerprint": {"torch": "2.12.0"}})
    elsewhere = presentation.elsewhere(summary(store, record, other))
    assert isinstance(elsewhere, Table)
    assert cells(elsewhere, "machine") == ["toy-1c"] * 3 + ["other-1c"] * 3
    assert "toy-1c and other-1c" in elsewhere.caption
    assert "PyTorch 2.13.0 and 2.12.0" in elsewhere.caption
    assert "No machine has published records" in str(presentation.elsewhere(pd.DataFrame()))

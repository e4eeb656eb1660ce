"""Tables, the figure and sentences about compiled models say what the summary says."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from compile_records import EAGER_MS, PEAKS, TO_RUN, compile_case, compile_record, no_record_of
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.experiments import model_compile
from cs336_systems.experiments.model_compile_forms import name_of
from cs336_systems.presentation import model_compile as presentation

pytestmark = pytest.mark.problem("torch_compile")

BREAK = {"reason": "a *print*", "place": "theirs.py:12 in forward", "count": 2}
BROKEN = {"graphs": 3, "breaks": [BREAK], "left": [BREAK | {"count": 1}]}


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return model_compile.summarise(records, PEAKS, store=store, **options)


def usual(**changes: Any) -> list[Record]:
    return [
        compile_record(compile_case("tiny"), **changes),
        compile_record(compile_case("small", phases=("forward", "step")), **changes),
    ]


# Tables --------------------------------------------------------------------------------------------------------


def test_a_row_has_every_form_side_by_side_with_the_floor_and_both_ratios(store: Store) -> None:
    table = presentation.table(summary(store, *usual()))
    assert cells(table, "size") == ["tiny"] * 3 + ["small"] * 2
    assert cells(table, "eager (ms)") == ["100 ± 10", "300 ± 30", "360 ± 36", "100 ± 10", "360 ± 36"]
    assert cells(table, "eager / whole") == ["2.00"] * 5
    assert cells(table, "eager / blocks") == ["1.25"] * 5
    assert cells(table, "peak, whole / eager") == ["0.50"] * 5
    assert cells(table, "H100 80 GB eager / whole") == ["–"] * 4 + [f"{73.0 / 49.8:.2f}"]
    assert "floor (ms)" in table.headings
    assert "compile" not in table.headings


def test_the_caption_comes_from_the_records(store: Store) -> None:
    assert presentation.caption(summary(store, *usual())) == (
        "Model eager and compiled: toy-1c, 2 threads, PyTorch 2.13.0, batch 4, float32; mean and deviation of 3 rounds"
    )
    assert presentation.caption(pd.DataFrame()) == "No records"


def test_how_float32_is_multiplied_is_a_column_where_it_varies(store: Store) -> None:
    both = [compile_record(compile_case("tiny", float32_matmul=products)) for products in ("highest", "high")]
    table = presentation.table(summary(store, *both))
    assert cells(table, "float32_matmul") == ["highest"] * 3 + ["high"] * 3
    assert presentation.figure(summary(store, *both)).svg()


def test_a_form_that_is_not_among_the_cases_has_no_column_of_its_own(store: Store) -> None:
    table = presentation.table(summary(store, compile_record(compile_case("tiny", modes=("none", "blocks")))))
    assert "eager / blocks" in table.headings
    assert not [heading for heading in table.headings if "whole" in heading]


def test_what_has_no_time_says_why_and_what_was_disturbed_or_stale_is_marked(store: Store) -> None:
    record = compile_record(
        compile_case("tiny", phases=("forward",)),
        fell_out={name_of("forward", "model"): ("failed", "CompileError: *no*")},
        noise={"flags": ["load 3"]},
    )
    table = presentation.table(summary(store, record, fingerprint={"source": {"measure": "now"}}))
    assert cells(table, "whole (ms)") == ["failed"]
    assert cells(table, "blocks (ms)") == ["80.0 ± 8.0 ~ †"]
    assert set(table.notes) == {
        "~ noisy, 1 of 1 cases: tiny at context 128 (load 3)",
        "† stale: measure changed",
        "failed: forward, whole, of tiny at context 128: `CompileError: *no*`",
    }


def test_compilation_is_told_of_the_last_phase_with_its_stages_and_errors(store: Store) -> None:
    table = presentation.compile_table(summary(store, *usual()))
    assert cells(table, "form") == ["whole", "blocks", "whole", "blocks"]
    assert cells(table, "for") == ["step"] * 4
    # 6 s forward and 5 s backward of a block; small has twelve, tiny two, and small's record has no forward-backward
    assert cells(table, "compiling (s)") == ["22.0", "11.0", "72.0", "6.00"]
    assert cells(table, "Inductor (s)")[:2] == ["11", "5.5"]
    assert cells(table, "Dynamo (s)")[:2] == ["5.5", "2.8"]
    assert cells(table, "graphs") == ["1"] * 4
    assert cells(table, "graph breaks") == ["0"] * 4
    assert cells(table, "error of logits") == cells(table, "eager's") == ["3.0e-07"] * 4
    # A step is 180 ms shorter as a whole, 72 ms by blocks.
    assert cells(table, "steps to pay back") == ["123", "153", "400", "84"]


def test_graph_breaks_and_functions_left_uncompiled_are_told_below_with_line_and_reason(store: Store) -> None:
    broken = {name_of("forward", "model"): BROKEN}
    table = presentation.compile_table(summary(store, compile_record(compile_case("tiny"), values=broken)))
    assert cells(table, "graph breaks") == ["2", "0"]
    assert cells(table, "graphs") == ["3", "1"]
    where = "tiny at context 128, whole"
    assert f"{where}: graph break at `theirs.py:12 in forward`, 2 times: `a *print*`" in table.notes
    assert f"{where}: left uncompiled at `theirs.py:12 in forward`: `a *print*`" in table.notes


def test_that_something_was_compiled_while_it_was_timed_is_told(store: Store) -> None:
    quiet, loud = (
        presentation.compile_table(summary(store, compile_record(compile_case("tiny"), compiled_while_timed=count)))
        for count in (0, 2)
    )
    assert "Compiled anew" not in str(quiet)
    assert "Compiled anew while being timed, so that its times are no steady ones: tiny at context 128" in str(loud)


@pytest.mark.parametrize(
    ("seconds", "saved", "steps"), [(12.0, 5.0, 2400.0), (1.0, 300.0, 4.0), (1.0, 0.0, float("inf"))]
)
def test_compiling_is_paid_back_by_the_first_step_that_makes_up_for_it(
    seconds: float, saved: float, steps: float
) -> None:
    assert presentation.pay_back(seconds, saved) == steps


def test_the_prediction_names_its_ceilings_and_has_a_row_per_phase() -> None:
    table = presentation.prediction(model_compile.predict([compile_case()], PEAKS))
    assert cells(table, "phase") == ["forward", "forward-backward", "step"]
    assert "on toy-1c, predicted" in table.caption


def test_machines_stand_in_front_of_their_rows(store: Store) -> None:
    other = [compile_record(compile_case("tiny"), machine=name) for name in ("toy-1c", "toy-2c")]
    table = presentation.elsewhere(summary(store, *other))
    assert cells(table, "machine") == ["toy-1c"] * 3 + ["toy-2c"] * 3
    assert "No machine has published" in str(presentation.elsewhere(pd.DataFrame()))


# Sentences -----------------------------------------------------------------------------------------------------


def test_sentences_that_the_data_bear_out_have_their_numbers(store: Store) -> None:
    found = presentation.findings(summary(store, *usual()))
    gains, traffic, payback, blocks, exactness = found
    assert [sentence.holds for sentence in found] == [True] * 5
    assert "compiled whole, forward 2.00, forward-backward 2.00, step 2.00; compiled by blocks, forward 1.25" in str(
        gains
    )
    # 1 GB at 10 GB/s is 100 ms.
    assert "500 operators besides products read and write 954 MiB: 100 ms at the bandwidth of memory" in str(traffic)
    assert "Compiled whole it takes 50.0 ms less: fusing them saves traffic" in str(traffic)
    assert "compiled whole takes 22.0 to 72.0 s and has paid after 123 to 400 runs" in str(payback)
    assert "compiled by blocks takes 6.00 to 11.0 s and has paid after 84 to 153 runs" in str(payback)
    assert "Small's 12 blocks at context 128 take 72.0 s to compile as a whole and 6.00 s one by one" in str(blocks)
    assert "a factor of 12" in str(blocks)
    assert "1.0 times eager's own error" in str(exactness)


def test_sentences_that_the_data_contradict_say_so(store: Store) -> None:
    wrong = {name_of("forward", "model"): {"logits_error": 1e-3}}
    slow = {"none": 1.0, "model": 1.5, "blocks": 2.0}
    case = compile_case("tiny", num_layers=1)
    found = presentation.findings(summary(store, compile_record(case, times=slow, values=wrong)))
    assert [sentence.holds for sentence in found] == [False] * 5
    assert "compiling does not make every phase of every model faster here" in str(found[0])
    assert "Compiled whole it takes 50.0 ms more: what fusing them saves is not seen here" in str(found[1])
    assert "never pays for 1 model" in str(found[2])
    assert "does not shorten compiling" in str(found[3])
    assert "more than another order of the same sums explains" in str(found[4])


def test_a_gain_beyond_the_traffic_is_not_put_down_to_it(store: Store) -> None:
    record = compile_record(compile_case("tiny"), traffic_bytes=10**8)
    found = presentation.saved_traffic(summary(store, record))
    assert found is not None
    assert found.holds is False
    assert "more than their traffic" in str(found)


def test_where_the_largest_model_is_compiled_by_blocks_alone_its_traffic_is_told_of_those(store: Store) -> None:
    small = compile_record(compile_case("small", phases=("forward",), modes=("none", "blocks")))
    found = presentation.findings(summary(store, compile_record(compile_case("tiny")), small))
    assert "In forward of small at context 128" in str(found[1])
    assert "Compiled by blocks it takes 20.0 ms less" in str(found[1])
    assert "Tiny's 2 blocks" in str(found[3])


def test_with_one_missing_record_every_sentence_says_what_to_run_and_tells_no_number(store: Store) -> None:
    found = presentation.findings(summary(store, *usual(), no_record_of(compile_case("mini"))))
    assert len(found) == 5
    for sentence in found:
        assert str(sentence).endswith(f"cannot be told: no record of 1 of 3 cases; {TO_RUN}.")
        assert sentence.holds is None


def test_a_missing_record_changes_nothing_but_its_own_cells(store: Store) -> None:
    first, second = usual()
    whole = presentation.table(summary(store, first, second))
    holed = presentation.table(summary(store, first, no_record_of(compile_case("small", phases=("forward", "step")))))
    assert holed.headings == whole.headings
    assert holed.rows[:3] == whole.rows[:3]
    for row, old in zip(holed.rows[3:], whole.rows[3:], strict=True):
        changed = {plain(cell).strip() for cell, before in zip(row, old, strict=True) if cell != before}
        assert changed <= {"missing", "–"}
    assert holed.caption == whole.caption
    assert TO_RUN in str(presentation.compile_table(summary(store, no_record_of(compile_case()))))


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py model_compile" in str(only)
    for table in (presentation.table(pd.DataFrame()), presentation.compile_table(pd.DataFrame())):
        assert "No records" in table.caption


def test_of_a_case_that_failed_nobody_is_told_to_measure_it(store: Store) -> None:
    record = compile_record(compile_case("tiny"), status="failed", reason="because", measurement=Measurement())
    shown = summary(store, record)
    assert list(presentation.findings(shown)) == []
    assert "`because`" in str(presentation.table(shown))
    assert presentation.figure(shown).svg()


def test_that_sentences_speak_of_an_earlier_source_is_told_once_and_last(store: Store) -> None:
    found = presentation.findings(summary(store, *usual(), fingerprint={"source": {"measure": "now"}}))
    assert "Stale (†) are 2 of 2 cases" in str(found[-1])
    assert str(found).count("Stale") == 1


def test_what_others_published_has_its_hardware_and_numbers_and_both_wordings(store: Store) -> None:
    others = model_compile.published_steps(store)
    (told,) = presentation.published_findings(others)
    assert told.holds is True
    assert "On an H100 80 GB others measured" in str(told)
    assert "over 15 models" in str(told)
    (contradicted,) = presentation.published_findings(others.assign(compiled_ms=others["eager_ms"] / others["d_model"]))
    assert contradicted.holds is False


# Figure --------------------------------------------------------------------------------------------------------


def test_the_figure_has_a_panel_per_phase_and_bars_as_high_as_the_ratios(store: Store) -> None:
    drawing = presentation.figure(summary(store, *usual())).draw()
    assert [panel.get_title() for panel in drawing.axes] == ["forward", "forward-backward", "step"]
    bars: list[Any] = list(drawing.axes[0].patches)
    heights = [bar.get_height() for bar in bars]
    assert heights == pytest.approx([2.0, 2.0, 1.25, 1.25])


def test_a_figure_of_many_models_has_a_panel_below_the_other(store: Store) -> None:
    records = [compile_record(compile_case("tiny", context)) for context in range(8, 17)]
    drawing = presentation.figure(summary(store, *records)).draw()
    lefts = {round(panel.get_position().x0, 3) for panel in drawing.axes}
    assert (len(drawing.axes), len(lefts)) == (3, 1)


@pytest.mark.parametrize("records", [[], [no_record_of(compile_case())]])
def test_a_figure_without_times_is_drawn(store: Store, records: list[Record]) -> None:
    assert presentation.figure(summary(store, *records)).svg()


def test_eager_times_of_the_records_are_in_the_table(store: Store) -> None:
    shown = str(presentation.table(summary(store, compile_record(compile_case("tiny")))))
    for milliseconds in (EAGER_MS["forward"], EAGER_MS["step"]):
        assert re.search(rf"\b{milliseconds:.0f} ±", shown)

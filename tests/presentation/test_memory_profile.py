"""Tables, timelines and sentences about a step's memory say what the records say."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, case_of, memory_record, record_of
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Finding, Picture, Table
from cs336_systems.experiments import memory_profile
from cs336_systems.presentation import memory_profile as presentation

pytestmark = pytest.mark.problem("memory_profiling")

TO_RUN = "run `what measures it`"


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return memory_profile.summarise(records, PEAKS, store=store, **options)


def usual(contexts: tuple[int, ...] = (128, 256), *, over: float = 1.1, **changes: Any) -> list[Record]:
    return [
        memory_record(case_of("small", context, phase, autocast=autocast, **changes), over=over)
        for context in contexts
        for phase in ("forward", "step")
        for autocast in ("none", "bfloat16")
    ]


def missing(record: Record) -> Record:
    return missing_record("memory_profile", "toy-1c", record.case, TO_RUN)


def out_of_memory(**changes: Any) -> Record:
    values = Measurement(values={"available_bytes": 1})
    return record_of("memory_profile", case_of(**changes), values, status="oom", reason="too large")


# Tables --------------------------------------------------------------------------------------------------------


def test_every_peak_stands_beside_the_least_that_it_can_be(store: Store) -> None:
    rows = summary(store, *usual())
    table = presentation.table(rows)
    assert cells(table, "peak / least") == ["1.10"] * 8
    assert [float(cell) for cell in cells(table, "peak (GiB)")] == pytest.approx(
        (rows["peak_bytes"] / 2**30).tolist(), rel=1e-3
    )
    assert "reserved (GiB)" not in table.headings  # a CPU reserves nothing
    assert "2³⁰ bytes" in " ".join(table.notes)


def test_published_peaks_are_shown_as_printed_with_a_mark_where_they_are_in_doubt(store: Store) -> None:
    records = [
        memory_record(case_of("gpt2-xl", 128)),
        memory_record(case_of("gpt2-xl", 512, "step", autocast="bfloat16")),
    ]
    assert cells(presentation.table(summary(store, *records)), "A100 40 GB (GB)") == ["13", "37 ?"]


def test_the_case_that_is_shown_in_detail_holds_the_most_in_float32(store: Store) -> None:
    found = presentation.chosen(summary(store, *usual()), "forward")
    assert found is not None
    assert (found["context_length"], found["autocast"]) == (256, "none")
    assert presentation.chosen(summary(store, out_of_memory()), "forward") is None


def test_the_largest_allocations_are_called_by_what_has_their_size(store: Store) -> None:
    table = presentation.largest(summary(store, *usual((512,))))
    assert cells(table, "accounted as")[1] == "a matrix of scores"
    assert cells(table, "bytes")[1] == f"{4 * 12 * 512**2 * 4:,}"
    assert "reference.py:31 softmax < model.py:300 forward" in cells(table, plain(table.headings[-1]))[1]  # type: ignore[union-attr]


def test_five_contributors_of_a_block_have_names_and_the_rest_is_summed_up(store: Store) -> None:
    rows = summary(store, *usual((512,)))
    table = presentation.saved(rows)
    assert isinstance(table, Table)
    assert cells(table, "contributor")[:2] == ["exponentials of softmax", "weights of softmax"]
    assert len(table.rows) == 5
    sizes = [int(cell.replace(",", "")) for cell in cells(table, "bytes")]
    assert sizes == sorted(sizes, reverse=True)
    row = presentation.chosen(rows, "forward")
    assert row is not None
    assert f"{row['saved_bytes']:,.0f} bytes" in table.notes[0]
    assert "19 further tensors" in table.notes[0]


def test_a_case_without_a_record_keeps_its_row_and_captions_stay(store: Store) -> None:
    records = usual()
    whole = summary(store, *records)
    for hole in range(len(records)):
        holed = summary(store, *[missing(record) if at == hole else record for at, record in enumerate(records)])
        before, after = presentation.table(whole), presentation.table(holed)
        assert cells(after, "peak (GiB)")[hole] == "missing"
        assert cells(after, "least peak (GiB)") == cells(before, "least peak (GiB)")
        assert TO_RUN in " ".join(after.notes)
        for show in (presentation.largest, presentation.saved):
            detail = show(holed)
            assert isinstance(detail, Table)
            assert detail.caption == show(whole).caption  # type: ignore[union-attr]
        for draw in (presentation.timeline, presentation.step_timeline):
            assert draw(holed).caption == draw(whole).caption  # type: ignore[union-attr]


def test_details_of_a_missing_record_are_one_cell_that_says_so(store: Store) -> None:
    holed = summary(store, *map(missing, usual((128,))))
    for show in (presentation.largest, presentation.saved):
        detail = show(holed)
        assert isinstance(detail, Table)
        assert detail.rows == (("missing",),)
        assert TO_RUN in " ".join(detail.notes)


def test_without_a_case_that_fits_a_sentence_stands_in_the_place_of_details(store: Store) -> None:
    rows = summary(store, out_of_memory(), out_of_memory(phase="step"))
    for show in (presentation.largest, presentation.saved, presentation.timeline, presentation.step_timeline):
        assert isinstance(show(rows), Finding)
    assert cells(presentation.table(rows), "peak (GiB)") == ["oom", "oom"]


# Timelines -----------------------------------------------------------------------------------------------------


def test_a_timeline_is_drawn_of_what_the_record_kept(store: Store) -> None:
    picture = presentation.timeline(summary(store, *usual()))
    assert isinstance(picture, Picture)
    assert "forward of small at context 256" in picture.caption
    (axes,) = picture.draw().axes
    assert "live memory" in axes.get_ylabel()
    assert any("peak" in text.get_text() for text in axes.texts)


def test_a_timeline_without_a_record_says_that_there_is_none(store: Store) -> None:
    picture = presentation.timeline(summary(store, *map(missing, usual((128,)))))
    assert isinstance(picture, Picture)
    (axes,) = picture.draw().axes
    assert [text.get_text() for text in axes.texts] == ["no record yet"]


# Findings ------------------------------------------------------------------------------------------------------


def said(rows: pd.DataFrame) -> str:
    return plain(presentation.findings(rows))


def test_the_parts_of_the_problem_are_answered_in_their_order(store: Store) -> None:
    text = said(summary(store, *usual()))
    assert re.findall(r"^- \((\w)\)", text, re.MULTILINE) == ["a", "b", "c", "d", "e", "f", "f"]
    assert "4 · 256 · 768 · 4 B = 3,145,728 B = 3.00 MiB" in text
    assert text.count("off by 0 B at most: every byte is accounted for") == 1
    assert "a gradient for each parameter, and nothing else stays" in text


def test_peaks_that_grow_no_faster_than_the_context_are_said_to(store: Store) -> None:
    assert "grows faster than the context" in said(summary(store, *usual((128, 1024))))
    short = memory_record(case_of("small", 128), over=2.0)
    long = memory_record(case_of("small", 256), over=1.0)
    assert "does not grow faster" in said(summary(store, short, long))


def test_a_block_that_saves_something_else_is_said_to(store: Store) -> None:
    record = memory_record(case_of())
    record.measurement.values["saved"]["total_bytes"] += 4096
    text = said(summary(store, record))
    assert "off by 4.00 KiB at most: something is saved that the accounting does not know" in text


def test_gradients_that_are_not_those_of_the_parameters_are_said_to_be_so(store: Store) -> None:
    record = memory_record(case_of(phase="step"))
    record.measurement.values["block_gradient_bytes"] -= 1024
    assert "by 1.00 KiB at most: something else stays too, or not all of it is seen" in said(summary(store, record))


def test_half_the_peak_under_mixed_precision_is_told_otherwise_than_more(store: Store) -> None:
    assert "not half" in said(summary(store, *usual()))
    plain_record = memory_record(case_of(context=1024), over=3.0)
    mixed = memory_record(case_of(context=1024, autocast="bfloat16"), over=1.0)
    assert "half or less" in said(summary(store, plain_record, mixed))


def test_with_a_hole_in_the_grid_no_answer_is_given_for_the_whole(store: Store) -> None:
    first, *others = usual()
    text = said(summary(store, missing(first), *others))
    assert text.count("cannot be told") == 7
    assert TO_RUN in text
    assert "(f) Backward of one block" in text  # of steps, which are all there


def test_stale_records_and_none_at_all_are_said_to_be_so(store: Store) -> None:
    stale = said(summary(store, *usual(), fingerprint={**FINGERPRINT, "torch": "3.0"}))
    assert "Stale (†) are 8 of 8 cases" in stale
    assert "python scripts/measure.py memory_profile" in said(summary(store))
    assert "notes of the table say why" in said(summary(store, out_of_memory()))


# Grids that are odd -------------------------------------------------------------------------------------------


def test_precisions_are_compared_within_one_attention(store: Store) -> None:
    reference = [memory_record(case_of(context=1024, autocast=autocast)) for autocast in ("none", "bfloat16")]
    other = memory_record(case_of(context=1024, autocast="bfloat16", rope="2026"), over=0.1)
    assert said(summary(store, *reference)).count("(c)") == 1
    with_other, without = (
        presentation.mixed_precision(summary(store, *rows)) for rows in ([*reference, other], reference)
    )
    assert str(with_other) == str(without)


def test_a_grid_under_autocast_alone_is_answered_all_the_same(store: Store) -> None:
    records = [memory_record(case_of(phase=phase, autocast="bfloat16")) for phase in ("forward", "step")]
    assert re.findall(r"^- \((\w)\)", said(summary(store, *records)), re.MULTILINE) == ["a", "d", "e", "f", "f"]


def test_what_was_not_asked_for_is_told_apart_from_what_did_not_run(store: Store) -> None:
    steps = summary(store, memory_record(case_of(phase="step")))
    assert "No case of phase forward was asked for." in str(presentation.timeline(steps))
    assert "the table says why" in str(presentation.timeline(summary(store, out_of_memory())))


def test_what_another_attention_saves_is_told_without_an_accounting(store: Store) -> None:
    record = memory_record(case_of())
    record.case["attention"] = "flash"
    text = said(summary(store, record))
    assert "(f) One block of small at context 128, attention flash saves" in text
    assert "the accounting knows only our model" in text


def test_why_nothing_is_known_of_a_block_is_said_in_the_place_of_its_table(store: Store) -> None:
    record = memory_record(case_of())
    record.measurement.values["saved"] = {"reason": "the model must have its blocks in a list"}
    assert "the model must have its blocks in a list" in str(presentation.saved(summary(store, record)))


def test_a_peak_that_is_not_made_by_what_forward_saves_is_told_otherwise(store: Store) -> None:
    assert "goes as backward uses it" in said(summary(store, *usual()))
    record = memory_record(case_of(phase="step"))
    record.measurement.values["peak_phases"] = ["optimizer"]
    assert "is not what makes this peak" in said(summary(store, record))

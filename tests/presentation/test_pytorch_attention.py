"""Tables, figures and sentences about attention pass by pass say what the summary says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from attention_records import PEAKS, TO_RUN, attention_case, nothing_of, record_of
from matplotlib.figure import Figure
from shown_tables import cells

from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import Finding, Table
from cs336_systems.experiments import pytorch_attention
from cs336_systems.presentation import pytorch_attention as presentation

pytestmark = pytest.mark.problem("pytorch_attention")

LENGTHS = (256, 1024, 4096)
BOTH = ("reference", "reference+compile")


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return pytorch_attention.summarise(records, PEAKS, store=store, **options)


def usual(seq_lens: Sequence[int] = LENGTHS, *, ms: float = 8.0, **changes: Any) -> list[Record]:
    """Eager takes twice as long as compiled, and both what the square of the length says."""
    return [
        record_of(
            attention_case(seq_len=length, **changes),
            {"reference": ms * (length / 256) ** 2, "reference+compile": ms / 2 * (length / 256) ** 2},
        )
        for length in seq_lens
    ]


# Tables --------------------------------------------------------------------------------------------------------


def test_a_row_has_both_passes_with_deviations_floors_and_what_was_published(store: Store) -> None:
    table = presentation.table(summary(store, *usual()))
    assert len(table.rows) == 2 * len(LENGTHS)
    assert cells(table, "forward (ms)")[:2] == ["8.00 ± 0.80", "4.00 ± 0.40"]
    assert cells(table, "backward (ms)")[:2] == ["16.0 ± 1.6", "8.00 ± 0.80"]
    assert cells(table, "implementation") == [*BOTH] * len(LENGTHS)
    assert cells(table, "H100 80 GB (ms)")[:2] == ["0.312", "0.360"]
    assert table.headings.count("floor (ms)") == table.headings.count("H100 80 GB (ms)") == 2
    # Published at d 16, length 256: 68.9614 MiB, of which 64 are not attention's.
    assert cells(table, "H100 80 GB kept (MiB)")[:2] == ["4.96", "–"]
    assert cells(table, "kept (MiB)")[0] == cells(table, "accounted (MiB)")[0] == "4.96"


def test_the_caption_comes_from_the_records(store: Store) -> None:
    assert presentation.caption(summary(store, *usual())) == (
        "One-head attention: toy-1c, 2 threads, PyTorch 2.13.0, batch 8, float32, causal; "
        "mean and deviation of 3 passes"
    )
    single = presentation.caption(summary(store, *usual(passes=1, is_causal=False)))
    assert single.endswith("float32, no mask; mean and deviation of 1 pass")
    assert presentation.caption(pd.DataFrame()) == "No records"


def test_how_float32_is_multiplied_is_a_column_where_it_varies(store: Store) -> None:
    one = presentation.table(summary(store, *usual()))
    assert "float32 products" not in one.headings
    both = presentation.table(summary(store, *usual((256,)), *usual((256,), float32_matmul="high")))
    assert cells(both, "float32 products") == ["float32", "float32", "TF32", "TF32"]


def test_what_has_no_time_says_why_and_what_was_disturbed_or_stale_is_marked(store: Store) -> None:
    case = attention_case(implementations=(*BOTH, "flash", "sdpa-math"))
    fell_out = {
        "reference": ("oom", "needs 9 GiB"),
        "flash": ("skipped", "not *here*"),
        "sdpa-math": ("failed", "ValueError: x"),
    }
    shown = summary(
        store,
        record_of(case, fell_out=fell_out, noise={"flags": ["spread of 40%"]}),  # type: ignore[arg-type]
        nothing_of(attention_case(seq_len=1024)),
        fingerprint={"source": {"measure": "now"}},
    )
    table = presentation.table(shown)
    assert cells(table, "forward (ms)") == ["oom", "2.00 ± 0.20 ~ †", "skipped", "failed", "missing", "missing"]
    assert cells(table, "accounted (MiB)")[0] == "4.96"
    assert set(table.notes[1:]) == {
        "~ noisy, 1 of 2 cases: d 16, length 256 (spread of 40%)",
        "† stale: measure changed",
        "oom: reference at d 16, length 256: `needs 9 GiB`",
        "skipped: flash at d 16, length 256: `not *here*`",
        "failed: sdpa-math at d 16, length 256: `ValueError: x`",
        f"missing: reference at d 16, length 1,024; reference+compile at d 16, length 1,024: {TO_RUN}",
    }


def test_cases_that_differ_in_their_precision_alone_are_two_in_the_note_about_noise(store: Store) -> None:
    shown = summary(
        store,
        *(
            record_of(attention_case(float32_matmul=products), noise={"flags": [f"load {load}"]})
            for load, products in enumerate(("highest", "high"))
        ),
    )
    (note,) = presentation.notes_below(shown)
    assert note.startswith("~ noisy, 2 of 2 cases: ")


@pytest.mark.parametrize("implementations", [("flash",), ("sdpa-math", "flash")])
def test_a_summary_without_the_materialised_form_is_shown_like_any_other(
    store: Store, implementations: tuple[str, ...]
) -> None:
    records = [record_of(attention_case(seq_len=length, implementations=implementations)) for length in LENGTHS]
    shown = summary(store, *records)
    table = presentation.table(shown)
    if len(implementations) > 1:
        assert cells(table, "implementation") == [*implementations] * len(LENGTHS)
    else:
        assert implementations[0] in table.caption
    assert presentation.figure(shown).svg()
    assert list(presentation.findings(shown)) == []
    assert isinstance(presentation.accounting(shown), Finding)


def test_the_prediction_has_a_row_per_shape_and_names_its_ceilings() -> None:
    cases = [attention_case(seq_len=length) for length in LENGTHS]
    predicted = pytorch_attention.predict(cases, PEAKS)
    table = presentation.prediction(predicted)
    assert cells(table, "length") == ["256", "1,024", "4,096"]
    assert cells(table, "kept, materialised (MiB)")[0] == "4.96"
    # Q, K, V, their gradients and the output, 128 KiB each, and a logarithm per row.
    assert cells(table, "kept by FlashAttention (MiB)")[0] == f"{(7 * 128 + 8) / 1024:.2f}"
    assert "on toy-1c, predicted" in table.caption
    assert "no machine" in presentation.prediction(predicted.iloc[:0]).caption


def test_compiled_stands_beside_eager_with_the_same_ratio_of_the_published_times(store: Store) -> None:
    table = presentation.compile_table(summary(store, *usual((256, 1024))))
    assert cells(table, "forward: eager (ms)") == ["8.00", "128"]
    assert cells(table, "compiled (ms)") == ["4.00", "64.0"]
    assert cells(table, "eager / compiled") == ["2.0", "2.0"]
    assert cells(table, "H100 80 GB eager / compiled") == [f"{312 / 360:.2f}", f"{476 / 418:.1f}"]
    assert cells(table, "kept, compiled / eager") == ["1.0", "1.0"]
    assert "implementation" not in table.headings


def test_each_precision_is_paired_with_itself(store: Store) -> None:
    shown = summary(store, *usual((256,)), *usual((256,), float32_matmul="high"))
    table = presentation.compile_table(shown)
    assert cells(table, "float32 products") == ["float32", "TF32"]
    assert cells(table, "H100 80 GB eager / compiled") == [f"{312 / 360:.2f}", "–"]


def test_a_pair_that_is_not_whole_has_no_ratio_and_is_told_below(store: Store) -> None:
    records = [
        record_of(attention_case(), fell_out={"reference+compile": ("failed", "ValueError: x")}),
        *usual((1024,)),
    ]
    table = presentation.compile_table(summary(store, *records))
    assert cells(table, "length") == ["256", "1,024"]
    assert cells(table, "eager / compiled") == ["–", "2.0"]
    assert table.notes == ("failed: reference+compile at d 16, length 256: `ValueError: x`",)


def test_the_accounting_is_of_the_longest_shape_that_ran_out_of_memory(store: Store) -> None:
    too_long = [
        record_of(attention_case(seq_len=length), fell_out={"reference": ("oom", "too large")})
        for length in (16_384, 8192)
    ]
    table = presentation.accounting(summary(store, *usual(), *too_long))
    assert isinstance(table, Table)
    assert table.caption.endswith("batch 8, length 16,384, d 16")
    assert table.notes == ("It did not fit on toy-1c: `too large`.",)
    items = dict(zip(cells(table, "what"), cells(table, "MiB"), strict=True))
    assert items["exponentials"] == items["weights"] == "8,192.00"
    assert items["causal mask"] == "256.00"
    # Published: 16,761.5 MiB, of which 64 are not attention's.
    assert items["in use between forward and backward"] == "16,697.50"
    assert items["at most at once beside inputs and gradients, in backward"] == f"{6 * 8192 + 256:,}.00"


def test_where_all_fitted_the_accounting_is_of_the_longest(store: Store) -> None:
    table = presentation.accounting(summary(store, *usual()[::-1]))
    assert isinstance(table, Table)
    assert table.caption.endswith("batch 8, length 4,096, d 16")
    assert table.notes == ()
    sizes = [float(text.replace(",", "")) for text in cells(table, "MiB")]
    assert sum(sizes[:-2]) == pytest.approx(sizes[-2], abs=0.05)


def test_without_eager_rows_the_accounting_is_a_sentence(store: Store) -> None:
    none = summary(store, *usual(implementations=("reference+compile",)))
    for shown in (none, pd.DataFrame()):
        assert "not among the implementations" in str(presentation.accounting(shown))


# Sentences -----------------------------------------------------------------------------------------------------


def test_sentences_that_the_data_bear_out_have_their_numbers(store: Store) -> None:
    growth, agreement, roofline, compiled = presentation.findings(summary(store, *usual(ms=4.0)))
    assert (growth.holds, agreement.holds) == (True, True)
    # From length 1,024 to 4,096, in bytes as accounted: two matrices of 4·T² and 28·16·T + 12·T beside them.
    kept = [8 * (2 * 4 * length**2 + 7 * 4 * 16 * length + 12 * length) + length**2 for length in LENGTHS[1:]]
    assert f"4 times the length keeps {kept[1] / kept[0]:.1f} times the memory" in str(growth)
    assert "quadratic" in str(growth)
    assert str(agreement).startswith(
        "What is kept differs from the accounting by 0 B at most, over 3 cases: every byte"
    )
    assert "The published figures of 3 shapes agree to 0.0" in str(agreement)
    assert "At d 16 and length 4,096 the materialised form does 1.1" in str(roofline)
    assert "toy-1c can do 10.0" in str(roofline)
    assert roofline.holds is True
    assert compiled.holds is True
    assert str(compiled).startswith(
        "Compiled, forward 2.0 times as fast (2.0 to 2.0) and backward 2.0 times as fast (2.0 to 2.0), over 3 shapes; "
        "it keeps 1.0 times the memory: the compiler makes one pass"
    )


def test_sentences_that_the_data_contradict_say_so(store: Store) -> None:
    records = [
        record_of(
            attention_case(seq_len=length),
            {"reference": 2.0, "reference+compile": 8.0},
            values={"reference": {"kept_bytes": 10**9 * length}},
        )
        for length in LENGTHS
    ]
    growth, agreement, roofline, compiled = presentation.findings(summary(store, *records))
    assert (growth.holds, agreement.holds, compiled.holds) == (False, False, False)
    assert "a growth with the power 1.0, not the square" in str(growth)
    assert "something is kept that the accounting does not know" in str(agreement)
    assert "forward 0.25 times as fast" in str(compiled)
    assert "not what fusing" in str(compiled)
    rich = presentation.roofline(summary(store, *records).assign(ridge=0.5))
    assert rich is not None
    assert (roofline.holds, rich.holds) == (True, False)
    assert "here neither ceiling explains it" in str(rich)


def test_what_is_said_of_the_longest_shape_is_not_said_of_the_order_of_the_rows(store: Store) -> None:
    forwards, backwards = (presentation.findings(summary(store, *usual()[::step])) for step in (1, -1))
    assert forwards == backwards


def test_growth_is_not_told_of_a_single_length(store: Store) -> None:
    found = presentation.findings(summary(store, *usual((256,))))
    assert "times the length" not in str(found)
    assert len(found) == 3


def test_out_of_memory_is_no_hole_in_the_sentences(store: Store) -> None:
    too_long = record_of(attention_case(seq_len=16_384), fell_out=dict.fromkeys(BOTH, ("oom", "too large")))
    found = presentation.findings(summary(store, *usual(), too_long))
    whole = presentation.findings(summary(store, *usual()))
    assert [found[place] for place in (0, 2, 3)] == [whole[place] for place in (0, 2, 3)]
    # One more published shape, though it was not measured here.
    assert "The published figures of 4 shapes" in str(found[1])


def test_of_eager_and_of_compiled_the_sentences_are_those_of_all(store: Store) -> None:
    shown = summary(store, *usual())
    parts = [*presentation.eager_findings(shown), *presentation.compile_findings(shown)]
    assert list(presentation.findings(shown)) == parts


def test_with_one_missing_record_every_sentence_says_what_to_run_and_counts_one_case(store: Store) -> None:
    shown = summary(store, *usual(), nothing_of(attention_case(seq_len=16_384)))
    found = presentation.findings(shown)
    assert len(found) == 4
    for sentence in found:
        assert str(sentence).endswith(f"cannot be told: no record of 1 of 4 cases; {TO_RUN}.")
        assert sentence.holds is None


def test_of_nothing_but_missing_records_every_sentence_says_what_to_run(store: Store) -> None:
    shown = summary(store, *(nothing_of(attention_case(seq_len=length)) for length in LENGTHS))
    found = presentation.findings(shown)
    assert len(found) == 4
    assert all(TO_RUN in str(sentence) for sentence in found)
    assert set(cells(presentation.table(shown), "forward (ms)")) == {"missing"}
    assert TO_RUN in str(presentation.compile_table(shown))


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py pytorch_attention" in str(only)
    for table in (presentation.table(pd.DataFrame()), presentation.compile_table(pd.DataFrame())):
        assert "No records" in table.caption


def test_of_cases_that_were_measured_and_have_no_time_nobody_is_told_to_measure_them(store: Store) -> None:
    record = record_of(attention_case(), status="failed", reason="because", measurement=Measurement())
    shown = summary(store, record)
    assert "run" not in str(presentation.findings(shown))
    assert "`because`" in str(presentation.table(shown))


def test_that_sentences_speak_of_an_earlier_source_is_told_once_and_last(store: Store) -> None:
    shown = summary(store, *usual(), fingerprint={"source": {"measure": "now"}})
    found = presentation.findings(shown)
    stale = [sentence for sentence in found if "Stale (†)" in str(sentence)]
    assert len(stale) == 1
    assert found[-1] == stale[0]
    assert "Stale (†) are 3 of 3 cases" in str(stale[0])


# What others published -----------------------------------------------------------------------------------------


def others(traffic_ms: float) -> pd.DataFrame:
    rows = [
        {"head_dim": d, "seq_len": length, "forward_ms": 50.0, "traffic_ms": traffic_ms, "products_ms": d / 10}
        for d in (16, 128)
        for length in (256, 16_384)
    ]
    return pd.DataFrame(rows)


def test_the_published_roofline_is_told_in_the_words_that_its_numbers_bear_out() -> None:
    (bound,) = presentation.published_findings(others(40.0))
    (not_bound,) = presentation.published_findings(others(5.0))
    assert (bound.holds, not_bound.holds) == (True, False)
    assert "at length 16,384 as 50 ms" in str(bound)
    assert "takes 40 ms, 80 % of that, and the products of the whole matrix 1.6 to 13 ms" in str(bound)
    assert "most of eager attention's time is traffic" in str(bound)
    assert "traffic alone does not explain eager attention's time" in str(not_bound)


def test_the_real_published_roofline_is_told_with_the_numbers_of_its_table(store: Store) -> None:
    (told,) = presentation.published_findings(pytorch_attention.published_roofline(store))
    assert "at length 16,384 as 48 to 63 ms" in str(told)


# Figures -------------------------------------------------------------------------------------------------------


def drawn(shown: pd.DataFrame) -> Figure:
    return presentation.figure(shown).draw()


def legend_of(drawing: Figure) -> list[str]:
    return [text.get_text() for text in drawing.legends[0].get_texts()]


def test_a_figure_has_a_panel_per_pass_and_one_of_memory_with_units_and_a_legend(store: Store) -> None:
    drawing = drawn(summary(store, *usual()))
    assert [panel.get_title() for panel in drawing.axes] == ["forward", "backward", "kept for backward"]
    units = ["time per pass (ms)"] * 2 + ["memory (MiB)"]
    assert [panel.get_ylabel() for panel in drawing.axes] == units
    assert {panel.get_xlabel() for panel in drawing.axes} == {"length (tokens)"}
    expected = {*BOTH, "reference, published, H100 80 GB", "floor", "accounted", "FlashAttention would keep"}
    assert set(legend_of(drawing)) == expected


def test_a_series_shows_the_medians_of_its_implementation_over_the_length(store: Store) -> None:
    panel = drawn(summary(store, *usual())).axes[0]
    series = [
        sorted(zip(*(np.ravel(data).tolist() for data in (line.get_xdata(), line.get_ydata())), strict=True))
        for line in panel.lines
    ]
    for first in (8.0, 4.0):
        assert [(length, first * (length / 256) ** 2) for length in LENGTHS] in series
    assert [text.get_text() for text in panel.get_xticklabels()] == ["256", "1k", "4k"]


def test_a_figure_is_of_the_largest_dimension_and_of_plain_float32(store: Store) -> None:
    records = [*usual(), *usual(head_dim=64), *usual(head_dim=64, float32_matmul="high")]
    picture = presentation.figure(summary(store, *records))
    assert picture.caption.endswith("; d 64")
    lines = [line for panel in picture.draw().axes for line in panel.lines]
    assert max(np.size(line.get_xdata()) for line in lines) == len(LENGTHS)


@pytest.mark.parametrize("seq_lens", [(256,), LENGTHS])
def test_the_same_records_give_the_same_bytes_even_of_one_length(store: Store, seq_lens: Sequence[int]) -> None:
    one, two = (presentation.figure(summary(store, *usual(seq_lens))).svg() for _ in range(2))
    assert one == two
    assert one.startswith(b"<?xml")


def test_a_figure_of_products_in_tf32_alone_shows_them(store: Store) -> None:
    drawing = drawn(summary(store, *usual(float32_matmul="high")))
    assert set(BOTH) <= set(legend_of(drawing))


def test_a_figure_leaves_out_what_has_no_time(store: Store) -> None:
    records = [
        *usual((256, 1024)),
        record_of(attention_case(seq_len=4096), fell_out={"reference": ("oom", "too large")}),
        nothing_of(attention_case(seq_len=8192)),
    ]
    drawing = drawn(summary(store, *records))
    by_length = [sorted(np.ravel(line.get_xdata()).tolist()) for line in drawing.axes[0].lines]
    assert [256, 1024] in by_length
    assert [256, 1024, 4096] in by_length
    assert presentation.figure(summary(store, *records)).svg()


# Several machines ----------------------------------------------------------------------------------------------


def test_the_records_of_several_machines_stand_below_one_another_with_their_names(store: Store) -> None:
    record = usual((256,))[0]
    elsewhere = presentation.elsewhere(
        summary(store, record, Record(**{**vars(record), "machine": "other-1c", "fingerprint": {"torch": "2.12.0"}}))
    )
    assert isinstance(elsewhere, Table)
    assert cells(elsewhere, "machine") == ["toy-1c", "toy-1c", "other-1c", "other-1c"]
    assert "toy-1c and other-1c" in elsewhere.caption
    assert "PyTorch 2.13.0 and 2.12.0" in elsewhere.caption
    assert "No machine has published records" in str(presentation.elsewhere(pd.DataFrame()))

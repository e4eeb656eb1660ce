"""Tables, the figure and the sentences about a step's profile say what the records say."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from profile_records import FINGERPRINT, PEAKS, case_of, profile_record, record_of, usual_kernels
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Finding, Table
from cs336_systems.experiments import step_profile
from cs336_systems.presentation import step_profile as presentation
from cs336_systems.profiling.categories import CATEGORIES

pytestmark = pytest.mark.problem("nsys_profile")

TO_RUN = "run `what measures it`"


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return step_profile.summarise(records, PEAKS, store=store, **options)


def usual(phase: str = "forward", context: int = 128, *, products_ms: float = 60.0, **changes: Any) -> Record:
    options = {name: changes.pop(name) for name in ("slowdown", "noise") if name in changes}
    case = case_of(context=context, phase=phase, **changes)
    return profile_record(case, kernels=usual_kernels(phase, products_ms), **options)


def both(**changes: Any) -> list[Record]:
    return [usual("forward", **changes), usual("step", **changes)]


def missing(phase: str, context: int = 128) -> Record:
    known = usual(phase, context)
    return missing_record("step_profile", "toy-1c", known.case, TO_RUN)


# Tables --------------------------------------------------------------------------------------------------------


def test_a_row_of_the_stopwatch_is_a_whole_phase_with_its_floor(store: Store) -> None:
    table = presentation.stopwatch(summary(store, *both()))
    assert cells(table, "phase") == ["forward", "step"]
    assert cells(table, "ratio") == ["1.05", "1.05"]
    assert cells(table, "operators busy (ms)") == ["100.0", "370.0"]
    floors = step_profile.summarise(both(), PEAKS, store=store).groupby("phase")["bound_ms"].first()
    shown = [float(cell.replace(",", "")) for cell in cells(table, "floor (ms)")]
    assert shown == pytest.approx([floors["forward"], floors["step"]], rel=0.01)


def test_kernels_are_those_of_the_largest_case_with_the_columns_of_nsight_systems(store: Store) -> None:
    rows = summary(store, usual(context=128, products_ms=60.0), usual(context=256, products_ms=160.0))
    table = presentation.kernels(rows, "forward")
    assert isinstance(table, Table)
    assert "context 256" in table.caption
    assert cells(table, "time %") == ["80.0", "10.0", "5.0", "5.0"]
    assert cells(table, "operator") == ["`aten::bmm`", "`aten::mul`", "`aten::exp`", "`aten::max`"]
    assert cells(table, "instances") == ["10", "6", "2", "2"]
    assert cells(table, "average (ms)") == cells(table, "median (ms)") == ["16.00", "3.333", "5.000", "5.000"]


def test_a_forward_alone_is_preferred_to_the_forward_of_a_step_and_float32_to_autocast(store: Store) -> None:
    rows = summary(store, *both(autocast="bfloat16"), *both())
    found = presentation.largest(rows, "forward")
    assert found is not None
    assert (found["phase"], found["autocast"]) == ("forward", "none")
    assert presentation.largest(rows, "sideways") is None


def test_what_a_table_of_kernels_leaves_out_is_told(store: Store) -> None:
    table = presentation.kernels(summary(store, usual()), "forward", top=1)
    assert isinstance(table, Table)
    assert len(table.rows) == 1
    assert "Not shown are 40 % of the time" in table.notes[0]


def test_shares_of_kinds_add_up_in_every_row(store: Store) -> None:
    table = presentation.categories(summary(store, *both()))
    assert cells(table, "range") == ["forward", "step", "forward", "loss", "backward", "optimizer"]
    for row in range(len(table.rows)):
        shares = [cells(table, name)[row] for name in CATEGORIES if name in table.headings]
        assert sum(float(share.split()[0]) for share in shares if share != "–") == pytest.approx(100, abs=0.6)
    assert "communication" not in table.headings


def test_inside_attention_the_time_ratio_is_of_the_products_alone(store: Store) -> None:
    table = presentation.attention(summary(store, usual()))
    assert cells(table, "scores (ms)") == ["8.00"]
    assert cells(table, "of it product (ms)") == ["4.00"]
    assert cells(table, "softmax / products: time") == ["2.5"]  # 20 ms over 4 and 4


def test_a_case_without_a_record_keeps_its_rows_and_says_what_to_run(store: Store) -> None:
    whole, holed = summary(store, *both()), summary(store, missing("forward"), usual("step"))
    for show in (presentation.stopwatch, presentation.categories, presentation.attention):
        before, after = show(whole), show(holed)
        assert len(after.rows) == len(before.rows)
        assert after.caption == before.caption
        assert TO_RUN in "\n".join(after.notes)
    table = presentation.kernels(holed, "forward")
    assert isinstance(table, Table)
    assert table.caption == presentation.kernels(whole, "forward").caption  # type: ignore[union-attr]
    assert table.rows == (("missing",),)
    assert TO_RUN in "\n".join(table.notes)


def test_a_case_that_cannot_be_run_is_passed_over_for_the_kernels(store: Store) -> None:
    oom = record_of(
        "step_profile", case_of(context=512), Measurement(values={"available_bytes": 1}), status="oom", reason="big"
    )
    table = presentation.kernels(summary(store, usual(), oom), "forward")
    assert isinstance(table, Table)
    assert "context 128" in table.caption
    assert isinstance(presentation.kernels(summary(store, oom), "forward"), Finding)


def test_no_records_at_all_make_empty_tables(store: Store) -> None:
    nothing = summary(store)
    for show in (presentation.stopwatch, presentation.categories, presentation.attention):
        assert show(nothing).rows == ()
    assert "python scripts/measure.py step_profile" in str(presentation.findings(nothing))


# Figure --------------------------------------------------------------------------------------------------------


def test_every_phase_has_a_bar_whose_parts_fill_it(store: Store) -> None:
    (axes,) = presentation.figure(summary(store, *both())).draw().axes
    assert len(axes.get_yticks()) == 6
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == [
        "small 128: inference",
        "small 128: whole step",
    ]
    widths = [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sum(widths) == pytest.approx(600)
    assert "share of the time of operators" in axes.get_xlabel()


def test_a_figure_without_a_single_profile_can_be_drawn(store: Store) -> None:
    assert presentation.figure(summary(store, missing("forward"))).draw().axes


# Findings ------------------------------------------------------------------------------------------------------


def said(rows: pd.DataFrame) -> str:
    return plain(presentation.findings(rows))


def test_the_five_parts_of_the_problem_are_answered_in_their_order(store: Store) -> None:
    text = said(summary(store, *both()))
    assert re.findall(r"^- \((\w)\)", text, re.MULTILINE) == ["a", "b", "c", "d", "e"]
    assert "1.05 times what the stopwatch says" in text
    assert "`aten::bmm`, with 60 % of it in 10 calls" in text
    assert "60 % of inference and 49 % of a whole training step" in text
    assert "The optimizer, 24 % of it, has none." in text


@pytest.mark.parametrize(("slowdown", "expected"), [(1.02, "read for times"), (3.0, "read for shares")])
def test_what_a_profile_may_be_read_for_depends_on_what_it_costs(store: Store, slowdown: float, expected: str) -> None:
    assert expected in said(summary(store, *both(slowdown=slowdown)))


def test_another_kernel_in_backward_is_named(store: Store) -> None:
    step = case_of(phase="step")
    kernels = usual_kernels("step") | {"backward": {"aten::mul": (40, 80.0), "aten::bmm": (20, 40.0)}}
    text = said(summary(store, usual("forward"), profile_record(step, kernels=kernels)))
    assert "in backward it is `aten::mul`, with 67 %" in text


def test_a_share_of_products_that_training_does_not_lower_is_said_to_be_so(store: Store) -> None:
    step = case_of(phase="step")
    kernels = usual_kernels("step") | {"step": {"aten::bmm": (30, 180.0)}}
    assert "does not lower their share" in said(summary(store, usual("forward"), profile_record(step, kernels=kernels)))


def test_softmax_as_slow_as_its_arithmetic_is_told_otherwise_than_one_that_moves_bytes(store: Store) -> None:
    fast = usual_kernels("forward") | {"softmax": {"aten::exp": (2, 0.1)}}
    text = said(summary(store, profile_record(case_of(), kernels=fast)))
    assert "nearer to that of its arithmetic" in text
    assert "goes with the scores that it moves" in said(summary(store, usual()))


def test_with_a_hole_in_the_grid_no_answer_is_given_for_the_whole(store: Store) -> None:
    text = said(summary(store, missing("forward"), usual("step")))
    assert text.count("cannot be told") == 5
    assert "%" not in text


def test_noisy_and_stale_records_are_said_to_be_so(store: Store) -> None:
    noisy = said(summary(store, *both(noise={"flags": ["spread 40 %"]})))
    assert "every time is noisy" in noisy
    stale = said(summary(store, *both(), fingerprint={**FINGERPRINT, "torch": "3.0"}))
    assert "Stale (†) are 2 of 2 cases" in stale


def test_each_machine_keeps_its_own_row(store: Store) -> None:
    table = presentation.elsewhere(summary(store, *both()))
    assert isinstance(table, Table)
    assert cells(table, "machine") == ["toy-1c", "toy-1c"]
    assert isinstance(presentation.elsewhere(pd.DataFrame()), Finding)


# Grids that are odd -------------------------------------------------------------------------------------------


def test_inference_is_compared_with_the_step_of_the_same_model_where_that_of_a_larger_one_did_not_fit(
    store: Store,
) -> None:
    oom = record_of(
        "step_profile", case_of(context=512, phase="step"), Measurement(values={}), status="oom", reason="big"
    )
    larger = usual("forward", 512, products_ms=900.0)
    text = said(summary(store, *both(), larger, oom))
    assert "(d) Matrix products are 60 % of inference and 49 % of a whole training step (small at context 128)" in text
    assert "(b) In forward of small at context 128 the operator" in text


def test_a_phase_of_forward_and_backward_is_told_as_a_whole(store: Store) -> None:
    kernels = usual_kernels("step") | usual_kernels("forward-backward")
    record = profile_record(case_of(phase="forward-backward"), kernels=kernels)
    rows = summary(store, record)
    table = presentation.stopwatch(rows)
    (whole,) = rows[rows["range"] == "step"]["total_ms"]
    assert float(cells(table, "operators busy (ms)")[0]) == pytest.approx(whole, rel=1e-3)
    assert "(a), (d) and (e) cannot be answered: no phase forward and no phase step was asked for" in said(rows)


def test_with_several_precisions_the_kernels_shown_are_of_one_without_autocast(store: Store) -> None:
    rows = summary(store, *both(autocast="bfloat16"), *both())
    for name in ("forward", "backward"):
        found = presentation.largest(rows, name)
        assert found is not None
        assert found["autocast"] == "none"
    only = summary(store, *both(autocast="bfloat16"))
    assert re.findall(r"^- \((\w)\)", said(only), re.MULTILINE) == ["a", "b", "c", "d", "e"]


def test_notes_count_cases_and_not_their_ranges(store: Store) -> None:
    noisy = summary(store, *both(noise={"flags": ["spread 40 %"]}))
    for show in (presentation.stopwatch, presentation.categories):
        (note,) = [note for note in show(noisy).notes if note.startswith("~")]
        assert "2 of 2 cases" in note
    oom = record_of("step_profile", case_of(phase="step"), Measurement(values={}), status="oom", reason="too large")
    (note,) = [note for note in presentation.categories(summary(store, oom)).notes if note.startswith("oom")]
    assert note.count("small at context 128") == 1


def test_another_attention_is_named(store: Store) -> None:
    kernels = {name: found for name, found in usual_kernels("forward").items() if name not in ("scores", "softmax")}
    rows = summary(store, profile_record(case_of(attention="flash"), kernels=kernels))
    assert "small at context 128, attention flash" in said(rows)


def test_published_figures_stand_beside_the_same_work_alone(store: Store) -> None:
    published = profile_record(case_of("gpt2-xl", 256), kernels=usual_kernels("forward"))
    table = presentation.categories(summary(store, published, usual()))
    assert cells(table, "products there, at least") == ["85 %", "–"]

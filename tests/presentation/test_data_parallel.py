"""Tables, figures and sentences about data parallel say what the records say."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest
from data_parallel_records import COST, GRADIENT_BYTES, case_of, record_for
from profile_records import FINGERPRINT, PEAKS, record_of
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, missing_record
from cs336_systems.bench.report import Finding, Findings, Picture
from cs336_systems.experiments import data_parallel
from cs336_systems.experiments.data_parallel import BYTES_PER_MB, Case
from cs336_systems.presentation import data_parallel as presentation

pytestmark = [
    pytest.mark.problem("naive_ddp_benchmarking"),
    pytest.mark.problem("minimal_ddp_flat_benchmarking"),
    pytest.mark.problem("ddp_overlap_individual_parameters_benchmarking"),
    pytest.mark.problem("ddp_bucketed_benchmarking"),
]

TO_RUN = "run `what measures it`"
FIGURES = (presentation.figure, presentation.overhead_figure, presentation.timeline)
SENTENCES = (
    presentation.naive,
    presentation.flat,
    presentation.overlapped,
    presentation.bucketed,
    presentation.pytorchs,
)


def summary(*records: Record, **options: Any) -> pd.DataFrame:
    return data_parallel.summarise(records, PEAKS, **options)


def missing(case: Case) -> Record:
    return missing_record("data_parallel", "toy-1c", record_for(case).case, TO_RUN)


def out_of_memory(case: Case) -> Record:
    return record_of("data_parallel", case, Measurement(), status="oom", reason="too large")


def drawn(picture: Picture | Finding) -> Any:
    """The figure, once it has been rendered."""
    assert isinstance(picture, Picture)
    figure = picture.draw()
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def caption(picture: Picture | Finding) -> str:
    assert isinstance(picture, Picture)
    return picture.caption


def titles(picture: Picture | Finding) -> list[str]:
    return [panel.get_title() or panel.get_title(loc="left") for panel in drawn(picture).axes]


# Tables --------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_a_rank_alone_and_for_every_variant() -> None:
    table = presentation.table(summary(record_for(case_of())))
    assert cells(table, "wrapper") == [
        "alone", "naive", "flat", "overlapped", "bucketed 1 MB", "bucketed 10 MB", "bucketed 25 MB", "bucketed 100 MB",
        "torch 25 MB",
    ]  # fmt: skip
    assert cells(table, "reductions")[1:4] == ["50.0", "1.00", "50.0"]
    assert cells(table, "overlapped")[1:4] == ["0 %", "0 %", "50 %"]
    assert cells(table, "exposed (ms)")[0] == "–"
    assert cells(table, "exposed (ms)") == cells(table, "exposed by the model (ms)")
    assert "context" not in table.headings
    assert "4 blocks, context 64, 2 ranks" in table.caption


def test_what_tells_cases_apart_is_a_column_and_leaves_the_caption() -> None:
    rows = summary(record_for(case_of()), record_for(case_of(world_size=4)), record_for(case_of("medium")))
    table = presentation.table(rows)
    assert set(cells(table, "ranks")) == {"2", "4"}
    assert set(cells(table, "size")) == {"small", "medium"}
    assert "ranks" not in table.caption
    assert "context 64" in table.caption


def test_a_case_without_a_record_keeps_its_rows_and_all_captions_stay() -> None:
    cases = [case_of(), case_of(world_size=4)]
    whole = summary(*map(record_for, cases))
    for hole in range(len(cases)):
        holed = summary(*[missing(case) if at == hole else record_for(case) for at, case in enumerate(cases)])
        before, after = presentation.table(whole), presentation.table(holed)
        assert cells(after, "wrapper") == cells(before, "wrapper")
        assert cells(after, "floor alone (ms)") == cells(before, "floor alone (ms)")
        assert after.caption == before.caption
        assert TO_RUN in " ".join(after.notes)
        for figure in FIGURES:
            assert caption(figure(holed)) == caption(figure(whole))
            assert drawn(figure(holed)).axes


def test_out_of_memory_is_told_in_the_table_and_no_sentence_speaks_of_it() -> None:
    rows = summary(out_of_memory(case_of()))
    table = presentation.table(rows)
    assert set(cells(table, "step, mean ± std (ms)")) == {"oom"}
    assert "too large" in " ".join(table.notes)
    assert [say(rows) for say in SENTENCES] == [()] * len(SENTENCES)
    for figure in FIGURES:
        assert drawn(figure(rows)).axes


def test_predictions_say_what_a_rank_has_and_reduces() -> None:
    cases = [case_of(), case_of(world_size=4)]
    predicted = data_parallel.predict(cases, PEAKS)
    table = presentation.prediction(predicted)
    assert cells(table, "batch of a rank") == ["2", "1"]
    assert cells(table, "wrappers in turn") == ["8", "8"]
    shown = [float(text.replace(",", "")) for text in cells(table, "gradients (MB)")]
    assert shown == pytest.approx((predicted["gradient_bytes"] / BYTES_PER_MB).tolist(), rel=1e-3)


def test_machines_are_told_apart_and_none_is_a_sentence() -> None:
    assert isinstance(presentation.elsewhere(pd.DataFrame()), Finding)
    assert set(cells(presentation.elsewhere(summary(record_for(case_of()))), "machine")) == {"toy-1c"}


def test_a_wrapper_without_room_is_told_with_its_reason_and_the_others_are_shown() -> None:
    whole, record = (record_for(case_of()) for _ in range(2))
    record.measurement.values["left_out"] = {"torch 25 MB": "6 sets need more than 5"}
    for rank in record.measurement.values["ranks"]:
        del rank["recorded"]["torch 25 MB"]
    for values in (record.measurement.samples, record.measurement.values["parts_ms"]):
        for name in [name for name in values if name.startswith("torch")]:
            del values[name]
    del record.measurement.values["checked"]["torch 25 MB"]
    rows = summary(record)
    table, before = presentation.table(rows), presentation.table(summary(whole))
    assert cells(table, "step, mean ± std (ms)")[-1] == "oom"
    assert cells(table, "step, mean ± std (ms)")[:-1] == cells(before, "step, mean ± std (ms)")[:-1]
    assert "torch 25 MB of small at context 64 on 2 ranks: `6 sets need more than 5`" in " ".join(table.notes)
    assert {say for say in SENTENCES if not say(rows)} == {presentation.pytorchs}
    for figure in FIGURES:
        assert drawn(figure(rows)).axes


def test_a_step_whose_calls_cannot_be_matched_says_so_in_table_and_timeline() -> None:
    whole, record = (record_for(case_of()) for _ in range(2))
    for rank in record.measurement.values["ranks"]:
        rank["recorded"]["overlapped"]["is_matched"] = False
    before, table = (presentation.table(summary(each)) for each in (whole, record))
    assert [cell for cell in cells(table, "overlapped") if "‡" in cell] == ["50 % ‡"]
    assert presentation.UNMATCHED in table.notes
    assert presentation.UNMATCHED not in before.notes
    timeline = presentation.timeline(summary(record))
    assert caption(timeline) == caption(presentation.timeline(summary(whole)))
    assert [title for title in titles(timeline) if "with their waiting" in title] == [
        "overlapped, 50 % overlapped, calls with their waiting"
    ]


# Figures -------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_steps_and_what_is_exposed_ends_them() -> None:
    rows = summary(record_for(case_of(), exposed_ms={"naive": -30.0}))
    (panel,) = drawn(presentation.figure(rows)).axes
    alone, exposed = (list(container) for container in panel.containers[:2])
    for row, first, second in zip(rows.to_dict("records"), alone, exposed, strict=True):
        assert first.get_width() + second.get_width() == pytest.approx(row["mean_ms"])
        assert second.get_x() == pytest.approx(first.get_width())
        expected = row["exposed_ms"] if row["exposed_ms"] > 0 else 0  # of alone, and where noise made it less
        assert second.get_width() == pytest.approx(expected)
    assert [label.get_text() for label in panel.get_yticklabels()] == rows["variant"].tolist()


def test_every_case_has_a_panel_and_the_timeline_names_the_first() -> None:
    rows = summary(record_for(case_of()), record_for(case_of(world_size=4)))
    names = [f"small at context 64 on {ranks} ranks" for ranks in (2, 4)]
    assert titles(presentation.figure(rows)) == names
    assert titles(presentation.overhead_figure(rows)) == names
    timeline = presentation.timeline(rows)
    assert names[0] in caption(timeline)
    assert names[1] not in caption(timeline)
    (first, *_) = drawn(timeline).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["rank 0", "rank 1"]


def test_the_model_of_buckets_is_drawn_with_its_least_at_the_star() -> None:
    (panel,) = drawn(presentation.overhead_figure(summary(record_for(case_of())))).axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert lines.keys() == {"ours, measured", "PyTorch's, measured", "model", "its best size"}
    assert list(lines["ours, measured"].get_xdata()) == [1, 10, 25, 100]
    assert lines["model"].get_marker() in ("", "None")  # a curve has no dots that could be taken for measurements
    star = float(lines["its best size"].get_xdata()[0]), float(lines["its best size"].get_ydata()[0])
    assert star[0] * BYTES_PER_MB == pytest.approx(COST.best_bucket_bytes(GRADIENT_BYTES))
    assert star[1] <= min(lines["model"].get_ydata()) * (1 + 1e-12)


@pytest.mark.parametrize("hide", [missing, lambda case: record_for(case, cost=None)])
def test_without_constants_there_is_no_model_to_draw(hide: Any) -> None:
    (panel,) = drawn(presentation.overhead_figure(summary(hide(case_of())))).axes
    assert {line.get_label() for line in panel.get_lines()} == {"ours, measured", "PyTorch's, measured"}


@pytest.mark.parametrize(
    ("wrappers", "buckets_mb", "shown"),
    [
        (data_parallel.WRAPPERS, (1, 10, 100), ["naive", "flat", "overlapped", "bucketed 25 MB"]),
        (("bucketed",), (1, 10, 100), ["bucketed 10 MB"]),
        (("bucketed",), (100,), ["bucketed 100 MB"]),
        (("torch",), (), ["torch 25 MB"]),
        (("own_wrappers:Summed", "torch"), (), ["own_wrappers:Summed"]),
        (("overlapped", "bucketed"), (0.1, 1), ["overlapped", "bucketed 1 MB"]),
    ],
)
def test_the_timeline_shows_whatever_wrappers_were_chosen(
    wrappers: tuple[str, ...], buckets_mb: tuple[float, ...], shown: list[str]
) -> None:
    case = case_of(wrappers=wrappers, buckets_mb=buckets_mb)
    found = titles(presentation.timeline(summary(record_for(case))))
    assert [title.rpartition(", ")[0] for title in found] == shown
    without = titles(presentation.timeline(summary(missing(case))))
    assert without == [f"{name}: no record yet" for name in shown]


def test_without_buckets_their_figure_is_a_sentence_and_the_others_are_drawn() -> None:
    rows = summary(record_for(case_of(wrappers=("naive", "own_wrappers:Summed"))))
    assert isinstance(presentation.overhead_figure(rows), Finding)
    assert drawn(presentation.figure(rows)).axes
    assert len(titles(presentation.timeline(rows))) == 2


def test_nothing_measured_is_a_sentence_in_the_place_of_each_figure() -> None:
    for figure in FIGURES:
        assert isinstance(figure(summary()), Finding)


# Findings ------------------------------------------------------------------------------------------------------

BRANCHES: dict[Any, tuple[dict[str, float], str, str]] = {
    presentation.naive: (
        {"naive": -1.0},
        "after backward, while nothing is computed",
        "the machine's noise is larger",
    ),
    presentation.flat: ({"flat": 1000.0}, "each call costs something", "here calls are cheap"),
    presentation.overlapped: ({"overlapped": 1000.0}, "ms.", "nothing was gained"),
    presentation.bucketed: ({"bucketed 10 MB": 1000.0}, "the best measured is the nearest", "do not agree here"),
    presentation.pytorchs: ({"bucketed 25 MB": 1000.0}, "within 10 %", "more than the 10 %"),
}
"""Of each sentence: what contradicts it, what it says where it holds, and where it does not."""


@pytest.mark.parametrize("say", SENTENCES)
def test_each_sentence_says_whether_the_record_bears_it_out(say: Any) -> None:
    contradicting, so, but = BRANCHES[say]
    (holds,) = say(summary(record_for(case_of())))
    (fails,) = say(summary(record_for(case_of(), exposed_ms=contradicting)))
    assert (holds.holds, fails.holds) == (True, False)
    assert so in plain(holds)
    assert but not in plain(holds)
    assert but in plain(fails)


@pytest.mark.parametrize("say", [presentation.flat, presentation.overlapped])
def test_causes_that_only_a_cpu_has_are_not_told_of_gpus(say: Any) -> None:
    contradicting, *_ = BRANCHES[say]
    told = {
        device: plain(say(summary(record_for(case_of(device=device), exposed_ms=contradicting))))
        for device in ("cpu", "cuda")
    }
    assert any(cause in told["cpu"] for cause in ("cores of one machine", "copying all gradients"))
    assert not any(cause in told["cuda"] for cause in ("cores of one machine", "copying all gradients"))


CHECKS: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"ranks_equal": False}, "; ranks differ with naive."),
    "missing": ({"same_parameters": False}, "; of naive some gradients are missing"),
    "error": ({"relative_error": 1.0}, "; those of naive are further off than 839 times"),
    "no number": ({"relative_error": None}, "; those of naive are further off than 839 times"),
}


@pytest.mark.parametrize("what", CHECKS)
def test_each_cause_of_wrong_gradients_has_its_own_words(what: str) -> None:
    changes, told = CHECKS[what]
    record = record_for(case_of())
    (holds,) = presentation.right(summary(record))
    assert holds.holds
    checked = record.measurement.values["checked"]
    checked["naive"] = {**checked["naive"], **changes}
    (found,) = presentation.right(summary(record))
    assert found.holds is False
    assert told in plain(found)
    others = {cause for cause, (_, words) in CHECKS.items() if words != told and words in plain(found)}
    assert others == set()


def test_gradients_of_which_none_can_be_compared_are_told_to_be_so() -> None:
    record = record_for(case_of(wrappers=("naive",)))
    record.measurement.values["checked"]["naive"] |= {"relative_error": None, "same_parameters": False}
    (found,) = presentation.right(summary(record))
    assert "no averaged gradients can be compared with those of one process" in plain(found)
    assert found.holds is False


def test_under_autocast_gradients_may_be_further_off() -> None:
    for autocast, holds in (("none", False), ("bfloat16", True)):
        record = record_for(case_of(autocast=autocast))
        record.measurement.values["checked"]["naive"] |= {"relative_error": 0.01}
        (found,) = presentation.right(summary(record))
        assert found.holds is holds


def test_sentences_have_the_numbers_of_the_table() -> None:
    rows = summary(record_for(case_of()))
    by_variant = rows.set_index("variant")
    assert "takes 270 ms, a rank alone 120 ms; 150 ms or 56 % of it go into 50 reductions" in plain(
        presentation.naive(rows)
    )
    assert by_variant["mean_ms"][["naive", "alone"]].tolist() == pytest.approx([270, 120])
    assert "averaged in 101 ms, one by one in 150 ms: 1.5 times as long for 50 times the calls" in plain(
        presentation.flat(rows)
    )
    assert "50 % of the communication goes on while its rank computes" in plain(presentation.overlapped(rows))
    text = plain(presentation.bucketed(rows))
    assert "buckets of 10 MB leave the least exposed, 20.0 ms" in text
    assert "1,000 µs per call" in text
    assert "the best bucket has 10.0 MB" in text
    assert "ours takes 1.00 times as long" in plain(presentation.pytorchs(rows))


def test_ours_keeps_up_with_pytorchs_where_it_is_faster() -> None:
    (found,) = presentation.pytorchs(summary(record_for(case_of(), exposed_ms={"torch 25 MB": 1000.0})))
    assert found.holds


def test_where_no_constants_follow_sizes_are_compared_and_no_model_is() -> None:
    (found,) = presentation.bucketed(summary(record_for(case_of(), cost=None)))
    assert found.holds is None
    assert "buckets of 10 MB leave the least exposed" in plain(found)
    assert "constants of the model do not follow" in plain(found)


def test_sentences_about_missing_records_say_what_to_run() -> None:
    for say in SENTENCES:
        (found,) = say(summary(missing(case_of())))
        assert TO_RUN in plain(found)
        assert found.holds is None
        (found,) = say(summary())
        assert "python scripts/measure.py data_parallel" in plain(found)


def test_each_case_has_a_sentence_of_its_own_whatever_another_lacks() -> None:
    rows = summary(record_for(case_of()), missing(case_of(world_size=4)), out_of_memory(case_of("medium")))
    for say in SENTENCES:
        found: Findings = say(rows)
        assert len(found) == 2
        assert TO_RUN not in plain(found[0])
        assert "on 4 ranks" in plain(found[1])
        assert TO_RUN in plain(found[1])


@pytest.mark.parametrize(
    ("wrappers", "told"),
    [
        (("flat", "overlapped"), set()),
        (("naive",), {presentation.naive}),
        (("overlapped", "bucketed"), {presentation.bucketed}),
        (("torch",), set()),
        (("torch", "bucketed"), {presentation.bucketed, presentation.pytorchs}),
        (("own_wrappers:Summed",), set()),
    ],
)
def test_what_was_not_chosen_is_not_spoken_of(wrappers: tuple[str, ...], told: set[Any]) -> None:
    rows = summary(record_for(case_of(wrappers=wrappers)))
    assert {say for say in SENTENCES if say(rows)} == told
    assert cells(presentation.table(rows), "wrapper")[0] == "alone"


def test_one_size_of_bucket_has_nothing_to_be_compared_with() -> None:
    rows = summary(record_for(case_of(wrappers=("bucketed",), buckets_mb=(10,))))
    assert presentation.bucketed(rows) == ()
    assert drawn(presentation.overhead_figure(rows)).axes


def test_all_sentences_are_told_together_and_stale_ones_are_said_to_be_so() -> None:
    rows = summary(record_for(case_of()), fingerprint={**FINGERPRINT, "torch": "3.0"})
    found = presentation.findings(rows)
    assert {str(each) for say in SENTENCES for each in say(rows)} <= {str(each) for each in found}
    assert "Stale (†) are 1 of 1 case" in plain(found)
    assert "Stale" not in plain(presentation.findings(summary(record_for(case_of()))))
    assert presentation.findings(summary())

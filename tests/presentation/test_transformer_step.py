"""Tables, figures and sentences about the step say what the summary says."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from cs336_systems.presentation import transformer_step as presentation

pytestmark = pytest.mark.problem("benchmarking_script")

NAN = float("nan")


def row(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "size": "small",
        "d_model": 768,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 10_000,
        "context_length": 128,
        "batch_size": 4,
        "phase": "forward",
        "dtype": "float32",
        "autocast": "none",
        "float32_matmul": "highest",
        "compile": "none",
        "attention": "reference",
        "formulation": "reference",
        "optimizer": "reference",
        "rope": "2025",
        "checkpointing": "none",
        "model": None,
        "warmup": 5,
        "steps": 10,
        "machine": "toy-1c",
        "torch": "2.13.0",
        "threads": 2,
        "status": "ok",
        "reason": None,
        "mean_ms": 10.0,
        "std_ms": 0.1,
        "median_ms": 10.0,
        "device": "cpu",
        "bound_ms": 5.0,
        "predicted_ms": NAN,
        "matrix_fraction": NAN,
        "bandwidth_fraction": NAN,
        "host_step_us": NAN,
        "bound_by": "compute",
        "bound_lacks": "",
        "times_bound": 2.0,
        "peak_bytes": 2**30,
        "planned_bytes": 2**29,
        "noise": "",
        "stale": "",
        "a100_ms": 40.4,
        "a100_std_ms": 0.3,
        "h100_ms": NAN,
    } | changes
    return content | {"min_ms": content["median_ms"] * 0.9, "max_ms": content["median_ms"] * 1.1}


def summary(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


PAIR = (row(), row(phase="forward-backward", mean_ms=30.0, median_ms=30.0))


def test_a_row_has_the_measured_time_its_floor_and_the_published_one() -> None:
    text = str(presentation.table(summary(*PAIR)))
    assert "10.00 ± 0.10" in text
    assert "40.4 ± 0.3 |" in text  # with the digits that were published
    assert "resident growth (MiB)" in text
    assert re.search(r"\| +1,024 \|", text)
    # No row has an H100 figure, so the column would say nothing.
    assert "H100" not in text


def test_the_caption_comes_from_the_records_and_a_choice_that_varies_becomes_a_column() -> None:
    assert presentation.caption(summary(*PAIR)) == (
        "Time per step: toy-1c, 2 threads, PyTorch 2.13.0, batch 4, float32, 5 warm-up and 10 measured steps"
    )
    both = str(presentation.table(summary(row(), row(autocast="bfloat16"))))
    assert "| autocast" in both
    same = presentation.caption(summary(row(autocast="bfloat16"), row(autocast="bfloat16", phase="step")))
    assert "autocast bfloat16" in same


def test_what_did_not_run_says_why_and_what_was_disturbed_or_stale_is_marked() -> None:
    text = str(
        presentation.table(
            summary(
                row(status="oom", reason="needs 9 GiB", mean_ms=NAN, std_ms=NAN, peak_bytes=None),
                row(noise="spread of 40% of the median"),
                row(stale="model changed"),
            )
        )
    )
    assert re.search(r"\| +oom \|", text)
    assert "oom: forward of small at context 128: `needs 9 GiB`" in text
    assert "10.00 ± 0.10 ~" in text
    assert "~ noisy, 1 of 3 cases: forward of small at context 128 (spread of 40% of the median)" in text
    assert "10.00 ± 0.10 †" in text
    assert "† stale: model changed" in text


def test_backward_is_compared_with_forward_case_by_case() -> None:
    found = str(presentation.findings(summary(*PAIR))[0])
    assert found == (
        "Loss and backward take 2.0 times as long as forward, the median of 1 quiet case, "
        "about the two times that the products alone predict."
    )


def test_a_sentence_that_the_data_contradict_says_so() -> None:
    slow = row(phase="forward-backward", mean_ms=90.0, median_ms=90.0)
    first = presentation.findings(summary(row(), slow))[0]
    assert first.holds is False
    assert "8.0 times" in str(first)
    assert "not the two times" in str(first)


@pytest.mark.parametrize(("predicted_ms", "holds"), [(10.5, True), (13.0, False)])
def test_what_other_sizes_predict_stands_beside_the_time_and_is_judged(predicted_ms: float, holds: bool) -> None:
    known = {"predicted_ms": predicted_ms, "matrix_fraction": 0.8, "bandwidth_fraction": 0.5, "host_step_us": 6.4}
    rows = summary(row(**known), row(phase="step", **known))
    assert f"{predicted_ms:.1f}" in str(presentation.table(rows))
    (said,) = (each for each in presentation.findings(rows) if each.text.startswith("Predicted by the other sizes"))
    assert said.holds is holds
    assert "80 % of the matrix rate, 50 % of the bandwidth and 6.4 µs for a step of the host" in said.text
    assert not any("Predicted by" in each.text for each in presentation.findings(summary(*PAIR)))


def test_noisy_times_are_not_compared() -> None:
    noisy = row(phase="forward-backward", median_ms=5.0, noise="spread of 90% of the median")
    assert "cannot be told: every pair of times is noisy" in str(presentation.findings(summary(row(), noisy))[0])


def test_a_time_below_its_floor_is_told_as_a_fault_of_the_ceilings() -> None:
    below = presentation.findings(summary(row(times_bound=0.7)))[-1]
    assert below.holds is False
    assert "0.70 times the floor" in str(below)
    assert str(below).endswith(
        "No time can lie below its floor: a ceiling is too low, or the work was not done as it is counted."
    )


def test_nearest_and_farthest_are_quiet_times_however_near_or_far_the_noisy_ones_come() -> None:
    quiet = (row(times_bound=2.0), row(times_bound=3.0, size="large"))
    noisy = [row(times_bound=times, size="xl", noise="spread of 40% of the median") for times in (1.1, 90.0)]
    found = presentation.findings(summary(*quiet, *noisy))[-1]
    assert found.holds is True
    assert "Nearest its floor is forward of small at context 128, a median of 10.00 ms or 2.0 times" in str(found)
    assert "farthest forward of large at context 128, 10.00 ms or 3.0 times (the quiet ones of 4 cases)" in str(found)
    assert "xl" not in str(found)
    assert str(found).endswith("No time lies below its floor, as it must be.")


def test_that_no_time_lies_below_its_floor_is_said_of_the_noisy_ones_too() -> None:
    noisy = row(times_bound=0.7, size="xl", noise="spread of 40% of the median")
    found = presentation.findings(summary(row(times_bound=2.0), noisy))[-1]
    assert found.holds is False
    assert "(the quiet ones of 2 cases)" in str(found)
    assert "No time can lie below its floor" in str(found)


def test_a_case_without_a_floor_is_not_counted_among_those_near_theirs() -> None:
    without = row(bound_ms=NAN, times_bound=NAN, autocast="float16")
    assert "(the quiet ones of 1 case)" in str(presentation.findings(summary(row(), without))[-1])


def test_of_nothing_but_noisy_times_none_is_the_nearest() -> None:
    noisy = row(times_bound=2.0, noise="spread of 40% of the median")
    found = presentation.findings(summary(noisy))[-1]
    assert "How near their floors the times come cannot be told: every time is noisy. No time lies below" in str(found)
    below = presentation.findings(summary({**noisy, "times_bound": 0.7}))[-1]
    assert below.holds is False
    assert "No time can lie below its floor" in str(below)


def test_that_sentences_speak_of_an_earlier_source_is_the_last_of_them() -> None:
    old = row(stale="model changed")
    found = presentation.findings(summary(old, PAIR[1], row(phase="step")))
    assert str(found[-1]) == "Stale (†) are 1 of 3 cases: they say nothing of today's source."
    assert found[-1].holds is None
    fresh = presentation.findings(summary(row(), PAIR[1], row(phase="step")))
    assert found[:-1] == fresh
    assert "tale" not in str(fresh)


def test_staleness_is_told_beside_a_missing_row() -> None:
    found = presentation.findings(summary(row(stale="model changed"), missing(phase="step")))
    assert "Stale (†) are 1 of 2 cases" in str(found[-1])
    assert "run `what measures it`" in str(found)


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py transformer_step" in str(only)


def test_of_cases_that_were_measured_and_have_no_time_nobody_is_told_to_measure_them() -> None:
    none = summary(row(status="failed", reason="because", mean_ms=NAN), row(status="oom", reason="why", mean_ms=NAN))
    (only,) = presentation.findings(none)
    assert str(only) == "No case has a time; the notes of the table say why."
    assert {"failed: forward of small at context 128: `because`", "oom: forward of small at context 128: `why`"} <= set(
        presentation.notes_below(none)
    )


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("RuntimeError: f(*args, **kw) of a_b_c <x>", "`RuntimeError: f(*args, **kw) of a_b_c <x>`"),
        ("no module `x`\n  line two", "`` no module `x` line two ``"),
        ("", "`no reason was recorded`"),
        (None, "`no reason was recorded`"),
    ],
)
def test_the_reason_of_a_failure_is_shown_as_it_stands(reason: str | None, shown: str) -> None:
    failed = missing(status="failed", reason=reason)
    for rows in (summary(failed), summary(row(), failed)):
        assert presentation.notes_below(rows)[-1] == f"failed: forward of small at context 128: {shown}"


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (40.4, 0.3, "40.4 ± 0.3"),
        (96.6, 175.8, "96.6 ± 175.8"),
        (1234.5, 0.0, "1,234.5 ± 0.0"),
        (7.0, 12.0, "7.0 ± 12.0"),
        (NAN, NAN, "–"),
    ],
)
def test_a_published_time_has_the_digits_that_were_published(mean: float, std: float, text: str) -> None:
    assert presentation.published_text(mean, std) == text


def test_a_single_measured_step_is_not_in_the_plural() -> None:
    assert presentation.caption(summary(row(steps=1))).endswith("5 warm-up and 1 measured step")


def missing(**changes: Any) -> dict[str, Any]:
    """The row of a case that nobody measured."""
    nothing = {
        "mean_ms": NAN,
        "std_ms": NAN,
        "median_ms": NAN,
        "times_bound": NAN,
        "planned_bytes": NAN,
        "peak_bytes": None,
    }
    return row(**({"status": "missing", "reason": "run `what measures it`"} | nothing | changes))


@pytest.mark.parametrize("hole", [missing(), missing(phase="forward-backward")], ids=["forward", "both"])
def test_with_one_missing_row_every_sentence_about_its_grid_says_what_to_run(hole: dict[str, Any]) -> None:
    sentences = presentation.findings(summary(*PAIR, hole | {"context_length": 256}))
    assert len(sentences) == 4
    for sentence, subject, count in zip(
        sentences,
        (
            "How long backward takes beside forward",
            "How much the times vary",
            "How near their floors the times come",
            "How well sizes predict one another",
        ),
        (3, 3, 3, 3),
        strict=True,
    ):
        assert str(sentence) == f"{subject} cannot be told: no record of 1 of {count} cases; run `what measures it`."
        assert sentence.holds is None


def test_a_missing_full_step_does_not_keep_backward_from_being_compared_with_forward() -> None:
    sentences = presentation.findings(summary(*PAIR, missing(phase="step")))
    assert sentences[0] == presentation.findings(summary(*PAIR))[0]
    assert ["cannot be told" in str(sentence) for sentence in sentences] == [False, True, True, True]


def test_of_a_grid_without_any_record_every_sentence_says_what_to_run() -> None:
    sentences = presentation.findings(summary(missing(), missing(phase="forward-backward")))
    assert ["no record of 2 of 2 cases; run `what measures it`" in str(sentence) for sentence in sentences] == [
        True
    ] * 4


def test_a_case_that_ran_out_of_memory_is_told_and_does_not_silence_the_sentences() -> None:
    too_large = missing(status="oom", reason="needs 9 GiB", size="large")
    assert presentation.findings(summary(*PAIR, too_large)) == presentation.findings(summary(*PAIR))


def test_without_any_ceiling_the_sentence_about_floors_names_the_command_that_measures_them() -> None:
    lacks = "run `python scripts/measure.py machine_peaks`"
    unknown = [each | {"bound_ms": NAN, "bound_by": "", "times_bound": NAN, "bound_lacks": lacks} for each in PAIR]
    sentences = presentation.findings(summary(*unknown))
    assert lacks in str(sentences[-1])
    assert sentences[:2] == presentation.findings(summary(*PAIR))[:2]


def test_what_has_no_time_for_the_same_reason_is_one_note() -> None:
    rows = [
        missing(),
        missing(phase="step"),
        missing(status="oom", reason="needs 9 GiB"),
        missing(size="large", reason="run `something else`"),
        missing(size="xl", reason="run `something else`"),
    ]
    assert presentation.notes_below(summary(row(), *rows)) == [
        "missing: forward of small at context 128; step of small at context 128: run `what measures it`",
        "oom: forward of small at context 128: `needs 9 GiB`",
        "missing: forward of large at context 128; forward of xl at context 128: run `something else`",
    ]


def test_of_many_cases_in_a_note_the_first_are_named_and_the_rest_counted() -> None:
    rows = [missing(context_length=context) for context in range(1, 31)]
    (note,) = presentation.notes_below(summary(*rows))
    named = note.count("forward of small at context")
    assert f"; and {30 - named} more: run" in note


def drawn(*rows: dict[str, Any]) -> Figure:
    return presentation.figure(summary(*rows)).draw()


def legend_of(drawing: Figure) -> list[str]:
    return [text.get_text() for text in drawing.legends[0].get_texts()]


def test_a_figure_has_a_panel_per_phase_with_units_and_a_legend_of_what_is_shown() -> None:
    drawing = drawn(*PAIR)
    assert [axes.get_title() for axes in drawing.axes] == ["forward", "forward-backward"]
    assert drawing.axes[0].get_ylabel() == "time per step (ms)"
    assert all(axes.get_xlabel() for axes in drawing.axes)
    assert legend_of(drawing) == ["measured median, toy-1c", "floor, toy-1c", "published, A100 40 GB"]


def test_where_no_floor_is_known_the_legend_has_none() -> None:
    unknown = [each | {"bound_ms": NAN, "bound_by": "", "times_bound": NAN} for each in PAIR]
    assert legend_of(drawn(*unknown)) == ["measured median, toy-1c", "published, A100 40 GB"]
    # One that is known is enough.
    assert "floor, toy-1c" in legend_of(drawn(PAIR[0], unknown[1]))
    assert "floor, toy-1c" in legend_of(drawn(unknown[0], PAIR[1]))


def test_a_figure_is_captioned_as_its_table_with_what_its_bars_are() -> None:
    picture = presentation.figure(summary(*PAIR))
    assert picture.caption == f"{presentation.caption(summary(*PAIR))}; bars from the least to the most"


def test_two_kinds_of_autocast_are_two_series_side_by_side() -> None:
    drawing = drawn(*PAIR, *(row(autocast="bfloat16", phase=each["phase"], median_ms=4.0) for each in PAIR))
    measured = [label for label in legend_of(drawing) if label.startswith("measured")]
    assert measured == [f"measured median, toy-1c, autocast {kind}" for kind in ("none", "bfloat16")]
    for panel in drawing.axes:
        first, second = (bars[0] for bars in panel.containers)
        assert first.get_marker() != second.get_marker()
        assert first.get_color() != second.get_color()
        assert first.get_xdata()[0] < second.get_xdata()[0]
        assert second.get_ydata()[0] == 4.0


def names_below(panel: Any) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """Where the contexts and where the sizes stand along a panel's axis, and what they say."""
    return tuple(  # type: ignore[return-value]
        list(
            zip(panel.get_xticks(minor=minor), [t.get_text() for t in panel.get_xticklabels(minor=minor)], strict=True)
        )
        for minor in (False, True)
    )


@pytest.mark.parametrize(
    ("places", "contexts", "sizes"),
    [
        ([("small", 128)], [(0, "128")], [(0, "small")]),
        ([("small", 128), ("large", 128)], [(0, "128"), (1, "128")], [(0, "small"), (1, "large")]),
        (
            [("small", 128), ("small", 256), ("large", 128)],
            [(0, "128"), (1, "256"), (2, "128")],
            [(0.5, "small"), (2, "large")],
        ),
    ],
    ids=["one", "a single context each", "several contexts"],
)
def test_a_size_is_named_once_in_the_middle_of_its_contexts(
    places: list[tuple[str, int]], contexts: list[tuple[float, str]], sizes: list[tuple[float, str]]
) -> None:
    drawing = drawn(*(row(size=size, context_length=context) for size, context in places))
    (panel,) = drawing.axes
    drawing.draw_without_rendering()
    assert names_below(panel) == (contexts, sizes)
    # Matplotlib leaves minor ticks out where a major one stands, unless it is told not to.
    shown = {label.get_text() for label in panel.get_xticklabels(minor=True) if label.get_visible()}
    assert shown == {name for _, name in sizes}


def test_the_names_of_sizes_stand_below_the_contexts_and_clear_of_them() -> None:
    drawing = drawn(row(), row(size="large"))
    drawing.draw_without_rendering()
    (panel,) = drawing.axes
    contexts, sizes = (
        [label.get_window_extent() for label in panel.get_xticklabels(minor=minor)] for minor in (False, True)
    )
    assert max(box.y1 for box in sizes) <= min(box.y0 for box in contexts)


def test_many_sizes_are_stacked_so_that_their_names_fit() -> None:
    many = [row(context_length=context, phase=phase) for phase in ("forward", "step") for context in range(1, 20)]
    few, large = drawn(*PAIR), drawn(*many)
    assert large.get_figwidth() > few.get_figwidth()
    assert large.axes[0].get_position().y0 > large.axes[1].get_position().y0


def test_a_figure_of_a_grid_with_holes_shows_what_there_is() -> None:
    picture = presentation.figure(
        summary(*PAIR, missing(context_length=256), missing(phase="step", context_length=256))
    )
    assert [axes.get_title() for axes in picture.draw().axes] == ["forward", "forward-backward", "step"]
    assert picture.svg()


def test_published_records_of_nobody_are_a_sentence() -> None:
    assert "No machine has published records" in str(presentation.elsewhere(pd.DataFrame()))
    assert "toy-1c" in str(presentation.elsewhere(summary(row())))


@pytest.mark.parametrize("status", ["missing", "oom", "failed"])
def test_a_table_of_nothing_but_cases_without_a_time_is_still_a_table(status: str) -> None:
    text = str(presentation.table(summary(missing(status=status), missing(status=status, phase="step"))))
    assert len(re.findall(rf"\| +{status} \|", text)) == 2
    assert "MiB" not in text
    assert f"{status}: forward of small at context 128; step of small at context 128" in text

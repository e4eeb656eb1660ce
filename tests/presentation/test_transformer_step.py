"""Tables, figures and sentences about the step say what the summary says."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest

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
        "compile": False,
        "attention": "reference",
        "formulation": "reference",
        "optimizer": "reference",
        "model": None,
        "warmup": 5,
        "steps": 10,
        "machine": "toy-1c",
        "status": "ok",
        "reason": None,
        "mean_ms": 10.0,
        "std_ms": 0.1,
        "median_ms": 10.0,
        "device": "cpu",
        "bound_ms": 5.0,
        "bound_by": "compute",
        "times_bound": 2.0,
        "peak_bytes": 2**30,
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
    assert "40.40 ± 0.30" in text
    assert "1.00 GiB" in text
    # No row has an H100 figure, so the column would say nothing.
    assert "H100" not in text


def test_the_caption_comes_from_the_records_and_a_choice_that_varies_becomes_a_column() -> None:
    assert presentation.caption(summary(*PAIR)) == (
        "Time per step: toy-1c, batch 4, float32, 5 warm-up and 10 measured steps"
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
    assert "small, context 128, forward: oom, needs 9 GiB" in text
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


def test_noisy_times_are_not_compared() -> None:
    noisy = row(phase="forward-backward", median_ms=5.0, noise="spread of 90% of the median")
    assert "cannot be told: every pair of times is noisy" in str(presentation.findings(summary(row(), noisy))[0])


def test_a_time_below_its_floor_is_told_as_a_fault_of_the_ceilings() -> None:
    below = presentation.findings(summary(row(times_bound=0.7)))[-1]
    assert below.holds is False
    assert "disturbed when its ceilings were measured" in str(below)


def test_without_records_the_sentence_names_the_command_that_produces_them() -> None:
    none = summary(row(status="failed", mean_ms=NAN))
    assert "scripts/measure.py transformer_step" in str(presentation.findings(none))


def test_a_figure_has_a_panel_per_phase_with_units_and_a_legend_of_what_is_shown() -> None:
    drawing = presentation.figure(summary(*PAIR))
    assert [axes.get_title() for axes in drawing.axes] == ["forward", "forward-backward"]
    assert drawing.axes[0].get_ylabel() == "time per step (ms)"
    assert all(axes.get_xlabel() for axes in drawing.axes)
    labels = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert labels == ["median, and least to most, toy-1c", "floor, toy-1c", "published, A100 40 GB"]


def test_many_sizes_are_stacked_so_that_their_names_fit() -> None:
    many = [row(context_length=context, phase=phase) for phase in ("forward", "step") for context in range(1, 20)]
    few, large = presentation.figure(summary(*PAIR)), presentation.figure(summary(*many))
    assert large.get_figwidth() > few.get_figwidth()
    assert large.axes[0].get_position().y0 > large.axes[1].get_position().y0


def test_published_records_of_nobody_are_a_sentence() -> None:
    assert "No machine has published records" in str(presentation.elsewhere(pd.DataFrame()))
    assert "toy-1c" in str(presentation.elsewhere(summary(row())))

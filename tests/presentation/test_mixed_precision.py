"""Steps without and with autocast stand side by side, and what is said of them follows from both."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, case_of, record_of
from shown_tables import cells

from cs336_systems.analysis import flops
from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Finding, Table
from cs336_systems.experiments import memory_profile, transformer_step
from cs336_systems.presentation import mixed_precision as presentation

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

SIZES = ("tiny", "mini", "small")
FASTER = {"tiny": 1.2, "mini": 1.5, "small": 1.9}
TO_RUN = "run `what measures it`"


def record(
    size: str, autocast: str, *, milliseconds: float | None = None, mebibytes: int = 100, **changes: Any
) -> Record:
    case = case_of(size, 128, changes.pop("phase", "step"), autocast=autocast, warmup=2)
    if milliseconds is None:
        milliseconds = 1000 / (1 if autocast == "none" else FASTER[size])
    measurement = Measurement({"step_ms": [milliseconds] * 3}, {"growth_resident_bytes": mebibytes * 2**20})
    return record_of("transformer_step", case, measurement, **changes)


def usual(**changes: Any) -> list[Record]:
    return [
        record(size, autocast, mebibytes=100 if autocast == "none" else 90, **changes)
        for size in SIZES
        for autocast in ("none", "bfloat16")
    ]


def missing(found: Record) -> Record:
    return missing_record("transformer_step", "toy-1c", found.case, TO_RUN)


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return transformer_step.summarise(records, PEAKS, store=store, **options)


# Pairs ---------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_row_with_the_ratios_of_its_two_records(store: Store) -> None:
    found = presentation.pairs(summary(store, *usual()))
    assert found["size"].tolist() == list(SIZES)
    assert found["speedup"].tolist() == pytest.approx(list(FASTER.values()))
    assert found["memory_ratio"].tolist() == pytest.approx([0.9] * 3)


def test_a_step_that_was_asked_for_in_one_way_alone_is_no_pair(store: Store) -> None:
    other = [record("tiny", "none", phase="forward"), record("mini", "float16", phase="forward", milliseconds=1.0)]
    rows = summary(store, *usual(), *other)
    assert len(presentation.pairs(rows)) == len(SIZES)
    assert len(presentation.both(rows)) == 2 * len(SIZES)
    assert len(presentation.pairs(pd.DataFrame())) == 0


def test_by_their_operators_wider_models_gain_more(store: Store) -> None:
    """On a machine whose products become twice as fast: never more than that with all traffic as it was."""
    gains = presentation.pairs(summary(store, *usual()))["operators_speedup"].tolist()
    assert gains == sorted(gains)
    assert 1 < gains[0] < gains[-1] <= 2


# Tables --------------------------------------------------------------------------------------------------------


def test_a_row_has_both_times_beside_both_floors_and_the_published(store: Store) -> None:
    table = presentation.table(summary(store, *usual()))
    assert cells(table, "times as fast") == ["1.20", "1.50", "1.90"]
    assert cells(table, "under bfloat16 (ms)") == ["833", "667", "526"]
    halved = presentation.pairs(summary(store, *usual()))
    assert (halved["bound_ms_mixed"] < halved["bound_ms"]).all()
    assert cells(table, "floor under bfloat16 (ms)") != cells(table, "floor (ms)")
    assert cells(table, "A100 40 GB, times as fast") == ["–", "–", "0.890"]
    assert "resident growth, float32 (MiB)" in table.headings


def test_a_missing_twin_is_told_in_its_cell_and_below(store: Store) -> None:
    first, second, *rest = usual()
    table = presentation.table(summary(store, first, missing(second), *rest))
    assert cells(table, "under bfloat16 (ms)")[0] == "missing"
    assert cells(table, "float32 (ms)")[0] == "1,000"
    assert cells(table, "times as fast")[0] == "–"
    assert f"missing: step of tiny at context 128 under bfloat16: {TO_RUN}" in table.notes


def test_a_noisy_or_stale_twin_is_marked(store: Store) -> None:
    noisy = record("tiny", "bfloat16", noise={"flags": ["busy"]})
    rows = summary(store, record("tiny", "none"), noisy, fingerprint={**FINGERPRINT, "torch": "3.0"})
    table = presentation.table(rows)
    assert cells(table, "float32 (ms)") == ["1,000 †"]
    assert cells(table, "under bfloat16 (ms)") == ["833 ~ †"]


def test_machines_stay_apart_where_all_are_shown(store: Store) -> None:
    rows = summary(store, *usual())
    both = pd.concat([rows, rows.assign(machine="other-2c")], ignore_index=True)
    table = presentation.elsewhere(both)
    assert cells(table, "machine") == ["toy-1c"] * 3 + ["other-2c"] * 3
    assert isinstance(presentation.elsewhere(rows[rows["autocast"] == "none"]), Finding)


# Findings ------------------------------------------------------------------------------------------------------


def told(store: Store, *records: Record) -> list[Finding]:
    return list(presentation.findings(summary(store, *records)))


def test_the_usual_gain_follows_from_flops_against_bytes(store: Store) -> None:
    times, operators, memory = told(store, *usual())
    assert [times.holds, operators.holds, memory.holds] == [True] * 3
    assert "step of tiny at context 128 1.20, of small at context 128 1.90 (3 quiet pairs)" in times.text
    assert "of 3 comparisons of two sizes in one phase and context, 3 come out" in operators.text


def test_a_gain_that_shrinks_with_the_model_is_told_as_such(store: Store) -> None:
    slower = [record(size, "bfloat16", milliseconds=1000 / (3 - FASTER[size])) for size in SIZES]
    times, operators, _ = told(store, *(record(size, "none") for size in SIZES), *slower)
    assert (times.holds, operators.holds) == (False, False)


def test_noisy_times_are_no_ground_for_a_sentence_about_times(store: Store) -> None:
    times, memory = told(store, *usual(noise={"flags": ["busy"]}))
    assert times.text.endswith("cannot be told: every pair of times is noisy.")
    assert memory.holds is True


def test_half_the_memory_contradicts_what_is_kept_in_float32(store: Store) -> None:
    *_, memory = told(store, record("tiny", "none"), record("tiny", "bfloat16", mebibytes=40))
    assert memory.holds is False


def test_without_any_record_under_autocast_it_is_said_what_to_run_whatever_else_is_there(store: Store) -> None:
    records = usual()
    none_mixed = [missing(each) if each.case["autocast"] != "none" else each for each in records]
    (only,) = told(store, *none_mixed)
    assert only.text == f"No step under autocast is recorded: {TO_RUN}."
    assert told(store, missing(none_mixed[0]), *none_mixed[1:]) == [only]


def test_one_missing_record_leaves_nothing_said_of_the_whole(store: Store) -> None:
    first, second, *rest = usual()
    for records in ((missing(first), second), (first, missing(second))):
        found = told(store, *records, *rest)
        assert all(f"no record of 1 of 6 cases; {TO_RUN}" in finding.text for finding in found)


def test_without_pairs_there_is_nothing_to_say(store: Store) -> None:
    (only,) = told(store, record("tiny", "none"))
    assert only.holds is None
    (none,) = presentation.findings(pd.DataFrame())
    assert none == only
    failed = [dataclasses.replace(each, status="failed", reason="why") for each in usual()]
    (only,) = told(store, *failed)
    assert "No case has a time" in only.text


# The figure ----------------------------------------------------------------------------------------------------


def test_the_figure_has_a_panel_per_phase_and_can_be_drawn_with_holes(store: Store) -> None:
    records = [*usual(), *usual(phase="forward")]
    drawing = presentation.figure(summary(store, *records)).draw()
    assert [axes.get_title() for axes in drawing.axes] == ["step", "forward"]
    labels = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert labels == ["measured", "by its operators", "published, A100 40 GB"]
    none = presentation.figure(summary(store, *map(missing, records)))
    assert none.draw().axes
    assert presentation.figure(pd.DataFrame()).draw().axes


# Published -----------------------------------------------------------------------------------------------------


def test_the_published_pairs_are_those_of_both_tables(store: Store) -> None:
    steps = transformer_step.published_autocast(store)
    plain, mixed = (store.reference(f"e2e_train_step_{name}a100") for name in ("", "bf16_autocast_"))
    shape = ["d_model", "d_ff", "num_layers", "num_heads", "context_length", "batch_size"]
    assert len(steps) == len(plain.merge(mixed, on=shape)) > 0
    first = steps.iloc[0]
    assert first["none_ms"] == 1e3 * plain["mean_s"][0]
    assert first["bfloat16_ms"] == 1e3 * mixed["mean_s"][0]
    assert (steps["none_operators_ms"] < steps["none_ms"]).all()
    case = case_of("small", 128)
    assert first["flops"] == flops.total(flops.phase_work(case.config, "step", 4, 128).values()).flops


def test_the_published_bear_out_what_is_said_of_them(store: Store) -> None:
    steps, peaks = transformer_step.published_autocast(store), memory_profile.published_peaks(store)
    assert [finding.holds for finding in presentation.published_findings(steps, peaks)] == [True] * 3
    table = presentation.published(steps)
    assert isinstance(table, Table)
    assert len(table.rows) == len(steps)


def test_other_figures_would_not_bear_it_out(store: Store) -> None:
    steps, peaks = transformer_step.published_autocast(store), memory_profile.published_peaks(store)
    turned = steps.assign(bfloat16_ms=steps["none_ms"] * steps["none_ms"], none_ms=steps["none_ms"])
    same = peaks.assign(at_least_bytes=1e9)
    assert [finding.holds for finding in presentation.published_findings(turned, same)] == [False] * 3

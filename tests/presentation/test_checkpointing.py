"""Tables, figures and sentences about checkpointing say what the records and the counting say."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from checkpointing_records import case_of, narrow_case, record_for
from profile_records import FINGERPRINT, PEAKS, record_of
from shown_tables import cells, plain

from cs336_systems.bench.records import Measurement, Record, Store, missing_record
from cs336_systems.bench.report import Finding, Table
from cs336_systems.experiments import checkpointing
from cs336_systems.experiments.checkpointing import Case
from cs336_systems.presentation import checkpointing as presentation

pytestmark = pytest.mark.problem("gradient_checkpointing")

TO_RUN = "run `what measures it`"
POLICIES = ("none", "every-1", "every-2", "nested")


def long_case(policy: str) -> Case:
    """Of a context so long that what is kept for backward is most of the peak."""
    return case_of(policy, context_length=512)


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return checkpointing.summarise(records, PEAKS, store=store, **options)


def usual() -> list[Record]:
    cases = [case_of(policy) for policy in POLICIES]
    cases += [narrow_case(policy, depth) for depth in (2, 8) for policy in ("none", "nested")]
    return [record_for(case) for case in cases]


def missing(record: Record) -> Record:
    return missing_record("checkpointing", "toy-1c", record.case, TO_RUN)


def said(rows: pd.DataFrame) -> str:
    return plain(presentation.findings(rows))


def test_policies_on_a_size_and_by_depth_are_tables_of_their_own(store: Store) -> None:
    rows = summary(store, *usual())
    assert cells(presentation.table(rows), "checkpointing") == list(POLICIES)
    assert cells(presentation.depth_table(rows), "blocks") == ["2", "2", "8", "8"]
    assert set(cells(presentation.depth_table(rows), "size")) == {"narrow"}


def test_every_peak_stands_beside_its_least_and_every_time_beside_the_work(store: Store) -> None:
    table = presentation.table(summary(store, *usual()))
    assert cells(table, "time / none") == cells(table, "work")
    assert cells(table, "runs of a block") == cells(table, "counted") == ["1.00", "2.00", "2.00", "2.50"]
    peaks, least = (list(map(float, cells(table, name))) for name in ("peak (MiB)", "least (MiB)"))
    assert all(1.05 < peak / floor < 1.15 for peak, floor in zip(peaks, least, strict=True))


def test_a_case_without_a_record_keeps_its_row_and_captions_stay(store: Store) -> None:
    records = usual()
    whole = summary(store, *records)
    for hole in range(len(records)):
        holed = summary(store, *[missing(record) if at == hole else record for at, record in enumerate(records)])
        for show in (presentation.table, presentation.depth_table):
            before, after = show(whole), show(holed)
            assert after.caption == before.caption
            assert cells(after, "least (MiB)") == cells(before, "least (MiB)")
        assert presentation.figure(holed).caption == presentation.figure(whole).caption
        assert presentation.figure(holed).draw().axes
        assert TO_RUN in said(holed)


def test_out_of_memory_is_told_in_the_table(store: Store) -> None:
    record = record_of("checkpointing", case_of(), Measurement(), status="oom", reason="too large")
    table = presentation.table(summary(store, record, record_for(case_of("every-1"))))
    assert cells(table, "peak (MiB)")[0] == "oom"
    assert "too large" in " ".join(table.notes)


def test_predictions_are_told_before_anything_runs() -> None:
    table = presentation.prediction(checkpointing.predict([case_of(policy) for policy in POLICIES], PEAKS))
    assert cells(table, "inputs") == ["4", "4", "3", "3"]


# Figure --------------------------------------------------------------------------------------------------------


def test_the_figure_has_memory_and_work_over_the_depth(store: Store) -> None:
    memory, time = presentation.figure(summary(store, *usual())).draw().axes
    assert [tick.get_text() for tick in memory.get_xticklabels()] == ["2", "8"]
    assert "work" in time.get_title()
    lines: list[Any] = [line.get_ydata() for line in time.get_lines()]
    for counted, measured in zip(lines[::2], lines[1::2], strict=True):
        assert list(counted) == pytest.approx(list(measured))


def test_a_figure_of_no_depth_can_be_drawn(store: Store) -> None:
    assert presentation.figure(summary(store, record_for(case_of()))).draw().axes


# Findings ------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_problem_are_answered(store: Store) -> None:
    text = said(summary(store, *usual()))
    assert re.findall(r"^- \((\w)\)", text, re.MULTILINE) == ["a", "b"]
    assert "In 8 of 8 cases blocks run as often as counted" in text
    assert "every-1 with" in text
    assert "the size that is counted to be the best" in text


def test_blocks_that_run_otherwise_than_counted_are_said_to(store: Store) -> None:
    records = usual()
    records[1].measurement.values["block_runs"] = [3] * 4
    assert "In 7 of 8 cases" in said(summary(store, *records))
    assert "something else is done as well" in said(summary(store, *records))


def test_another_group_that_holds_the_least_is_said_to_be_another(store: Store) -> None:
    cases = {policy: long_case(policy) for policy in ("none", "every-1", "every-2")}
    records = [record_for(case, over=3.0 if policy == "every-1" else 1.1) for policy, case in cases.items()]
    assert "another size than is counted to be the best" in said(summary(store, *records))


def test_a_growth_that_is_not_as_counted_is_said_to_be_so(store: Store) -> None:
    records = [record_for(narrow_case("nested", 2)), record_for(narrow_case("nested", 8), over=3.0)]
    assert "not all as counted" in said(summary(store, *records))


def test_peaks_that_no_policy_lowers_are_said_to_be_so(store: Store) -> None:
    records = [record_for(case_of("none")), record_for(case_of("every-1"), over=30.0)]
    assert "No policy lowers the peak" in said(summary(store, *records))


def test_memory_is_said_to_be_bought_with_time_only_where_time_is_paid(store: Store) -> None:
    plain_step = record_for(long_case("none"), ms=10.0)
    slower, faster = (record_for(long_case("every-1"), ms=ms) for ms in (13.0, 7.0))
    assert "in 1.3 times the time. Memory is bought with time" in said(summary(store, plain_step, slower))
    assert "not every policy that lowers the peak takes longer" in said(summary(store, plain_step, faster))


def test_noisy_times_say_nothing_of_what_memory_costs(store: Store) -> None:
    noisy: dict[str, Any] = {"noise": {"flags": ["spread of 99% of the median"]}}
    quiet_step, noisy_step = (record_for(long_case("none"), ms=10.0, **changes) for changes in ({}, noisy))
    quiet, disturbed = record_for(long_case("every-1"), ms=13.0), record_for(long_case("nested"), ms=7.0, **noisy)
    text = said(summary(store, quiet_step, quiet, disturbed))
    assert "(noisy times are left out). Memory is bought with time" in text
    assert text.count("times the time") == 1
    for records in ([noisy_step, quiet], [quiet_step, disturbed]):
        assert "cannot be told: every pair of times is noisy" in said(summary(store, *records))


def test_stale_records_and_none_at_all_are_said_to_be_so(store: Store) -> None:
    assert "Stale (†)" in said(summary(store, *usual(), fingerprint={**FINGERPRINT, "torch": "3.0"}))
    assert "python scripts/measure.py checkpointing" in said(summary(store))
    record = record_of("checkpointing", case_of(), Measurement(), status="oom", reason="too large")
    assert "notes of the table say why" in said(summary(store, record))


def test_without_published_records_the_machines_are_a_sentence() -> None:
    assert isinstance(presentation.elsewhere(pd.DataFrame()), Finding)


# What needs no record ------------------------------------------------------------------------------------------


def groups_of(*held: float) -> pd.DataFrame:
    """Half a block, one, two, …, that hold so many GiB."""
    sizes = [0.5, *range(1, len(held))]
    return pd.DataFrame(
        {
            "size": "made",
            "context_length": 64,
            "batch_size": 1,
            "blocks": len(held) - 1,
            "group": sizes,
            "compiled_bytes": 1.0,
            "policy": "made",
            "inputs": 4,
            "kept_bytes": [int(size * 2**28) for size in sizes],
            "activation_bytes": [int(each * 2**30) for each in held],
            "step_bytes": 2**33,
            "block_runs": 2.0,
            "flops": 10,
            "work": 1.3,
        }
    )


def test_the_best_group_is_told_beside_the_next_smaller_and_larger() -> None:
    groups = groups_of(3, 2, 4, 5, 6)
    text = str(presentation.best_finding(groups))
    assert "checkpoints of 1 block hold the least, 2.00 GiB" in text
    assert "3.00 GiB with ½ and 4.00 GiB with 2" in text
    table = presentation.best(groups)
    assert isinstance(table, Table)
    assert cells(table, "blocks per checkpoint") == ["½", "1", "2", "4"]


def test_a_best_group_of_several_blocks_is_told_by_their_number() -> None:
    assert "checkpoints of 3 blocks hold the least" in str(presentation.best_finding(groups_of(5, 4, 3, 2, 6)))


def test_residuals_that_are_the_handouts_are_said_to_be(store: Store) -> None:
    published = store.reference("checkpointing_residuals")
    found = pd.DataFrame(
        {
            "blocks": published["blocks"],
            "group": published["group"],
            "tensors": 1,
            "bytes": (published["residuals_mib"] * 2**20).round().astype(int),
            "published_mib": published["residuals_mib"],
        }
    )
    assert "to their last digit" in str(presentation.residuals_finding(found))
    assert cells(presentation.residuals(found), "blocks per checkpoint") == ["none", "none", "2"]
    other = found.assign(bytes=found["bytes"] + 2**20)
    assert "1.00 MiB off" in str(presentation.residuals_finding(other))

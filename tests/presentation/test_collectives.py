"""Tables, figures and sentences about collectives say what the records say."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from collective_records import LINK_BYTES_PER_S, case_of, record_for
from profile_records import PEAKS
from shown_tables import cells, plain

from cs336_systems.analysis.communication import ALTERNATE, RING
from cs336_systems.bench.records import Record, Store, missing_record
from cs336_systems.experiments import collectives
from cs336_systems.presentation import collectives as presentation

pytestmark = [
    pytest.mark.problem("distributed_communication_single_node"),
    pytest.mark.problem("alternate_ring_all_reduce"),
]

TO_RUN = "run `what measures it`"
TABLES = (presentation.table, presentation.links_table, presentation.rings_table)


def summary(store: Store, *records: Record, **options: Any) -> pd.DataFrame:
    return collectives.summarise(records, None, store=store, **options)


def usual() -> list[Record]:
    return [record_for(case_of(size, world)) for world in (2, 4) for size in (1, 10, 100)]


def missing(record: Record) -> Record:
    return missing_record("collectives", "toy-1c", record.case, TO_RUN)


def said(rows: pd.DataFrame) -> str:
    return plain(presentation.findings(rows)) + "\n" + plain(presentation.ring_findings(rows))


def test_every_operation_has_its_row_with_the_bound_and_the_share_of_it(store: Store) -> None:
    table = presentation.table(summary(store, record_for(case_of(10, 4), reached=0.5)))
    assert cells(table, "operation") == list(collectives.OPERATIONS)
    reached = dict(zip(cells(table, "operation"), cells(table, "reached"), strict=True))
    assert reached.pop(ALTERNATE) == "25 %"
    assert set(reached.values()) == {"50 %"}
    assert cells(table, "published, one CPU machine (ms)")[0] == "140"


def test_the_links_are_as_fast_as_their_messages_were(store: Store) -> None:
    table = presentation.links_table(summary(store, *usual()))
    assert cells(table, "MB") == ["1", "10", "100"] * 2
    for heading in ("one way (GB/s)", "both ways (GB/s)", "all ranks at once (GB/s)", "all, whole arrays (GB/s)"):
        assert set(map(float, cells(table, heading))) == {LINK_BYTES_PER_S / 1e9}


def test_rings_at_the_speed_of_their_bytes_are_apart_by_half_the_ranks(store: Store) -> None:
    rows = summary(store, *usual())
    table = presentation.rings_table(rows)
    assert cells(table, "alternate / ring") == cells(table, "bytes, N/2") == cells(table, "messages alone")
    ratio, steps = presentation.ring_findings(rows)
    assert ratio.holds
    assert "N/2 is 2.0" in plain(ratio)
    assert "half as many steps does not show" in plain(steps)


def test_rings_that_are_apart_by_anything_else_are_told_to_be(store: Store) -> None:
    rows = summary(store, *usual())
    rows.loc[rows["operation"] == RING, "slowest_ms"] *= 3
    ratio, _ = presentation.ring_findings(rows)
    assert ratio.holds is False
    assert "It is not N/2 everywhere" in plain(ratio)


def test_a_lead_of_the_alternate_ring_on_small_arrays_is_put_down_to_its_steps(store: Store) -> None:
    rows = summary(store, *usual())
    rows.loc[(rows["operation"] == ALTERNATE) & (rows["size_mb"] == 1), "slowest_ms"] /= 2
    _, steps = presentation.ring_findings(rows)
    assert steps.holds


def test_time_in_proportion_to_the_size_is_told_to_be_linear_and_other_time_not(store: Store) -> None:
    rows = summary(store, *usual())
    assert "about linear" in said(rows)
    rows.loc[rows["size_bytes"] == rows["size_bytes"].max(), "slowest_ms"] *= 3
    assert "is not linear" in said(rows)


def test_links_of_their_own_and_one_that_is_shared_are_told_apart(store: Store) -> None:
    assert "nearer to the first" in said(summary(store, *usual()))
    shared = [record_for(case_of(100, 2), reached=0.9), record_for(case_of(100, 4), reached=0.4)]
    assert "nearer to the second" in said(summary(store, *shared))


def test_what_is_faster_than_the_links_is_said_to_beat_the_bound(store: Store) -> None:
    assert "None beats the bound" in said(summary(store, *usual()))
    fast = summary(store, record_for(case_of(100, 2), reached=1.5))
    assert "What beats it is no ring of such messages" in said(fast)


def test_more_ranks_than_cores_are_told_and_others_are_not(store: Store) -> None:
    assert "4 ranks share 2 cores" in " ".join(presentation.table(summary(store, *usual())).notes)
    roomy = [record_for(case_of(10, 2), cores=4)]
    assert "share" not in " ".join(presentation.notes_below(summary(store, *roomy)))


def test_what_was_published_is_compared_in_either_direction(store: Store) -> None:
    assert "slower everywhere" in said(summary(store, *usual()))
    slow = [record_for(case_of(1, 2), reached=1e-3)]
    assert "not slower everywhere" in said(summary(store, *slow))


def test_a_case_without_a_record_keeps_its_row_and_captions_stay(store: Store) -> None:
    records = usual()
    whole = summary(store, *records)
    for hole in range(len(records)):
        holed = summary(store, *[missing(record) if at == hole else record for at, record in enumerate(records)])
        for show in TABLES:
            before, after = show(whole), show(holed)
            assert after.caption == before.caption
            assert cells(after, "MB") == cells(before, "MB")
            assert len(after.rows) == len(before.rows)
        assert presentation.figure(holed).draw().axes  # type: ignore[union-attr]
        assert TO_RUN in plain(presentation.findings(holed))
        assert TO_RUN in plain(presentation.ring_findings(holed))


def test_cases_that_the_machine_has_no_gpus_for_are_told_and_nothing_is_said_of_them(store: Store) -> None:
    records = []
    for cell in collectives.grid(sizes_mb=[1], world_sizes=[2], device="cuda", device_count=1):
        record = record_for(cell.case, status="skipped", reason=cell.skip_reason)
        record.measurement.samples.clear()
        record.measurement.values.clear()
        records.append(record)
    rows = summary(store, *records)
    assert set(cells(presentation.table(rows), "mean ± std (ms)")) == {"skipped"}
    assert "2 ranks, and the machine has 1" in " ".join(presentation.table(rows).notes)
    assert "No case can be measured on this machine" in said(rows)
    assert presentation.figure(rows).draw().axes  # type: ignore[union-attr]


def test_without_any_record_everything_says_so() -> None:
    nothing = pd.DataFrame()
    assert "python scripts/measure.py collectives" in said(nothing)
    assert "measure" in str(presentation.figure(nothing))
    assert presentation.table(nothing).rows == ()
    assert presentation.rings_table(nothing).rows == ()
    assert presentation.links_table(nothing).rows == ()


def test_predictions_are_told_before_anything_runs() -> None:
    table = presentation.prediction(collectives.predict([case_of(10, 4)], PEAKS))
    assert dict(zip(cells(table, "operation"), cells(table, "steps"), strict=True))[ALTERNATE] == "3"
    assert PEAKS.name in " ".join(table.notes)

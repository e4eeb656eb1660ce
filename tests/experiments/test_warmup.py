"""Warm-ups are studied in fresh processes."""

from __future__ import annotations

import re

import pytest
from step_records import record_of

from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Store
from cs336_systems.experiments import warmup
from cs336_systems.presentation import warmup as presentation

pytestmark = pytest.mark.problem("benchmarking_script")

PEAKS = Peaks("toy-1c", {"float32": 1e12}, 1e11, 0, 2**33, "made up for a test")


def test_the_grid_has_every_number_of_warm_ups_for_every_size() -> None:
    cells = warmup.grid(warmup_contexts={"tiny": [16, 32], "mini": [16]}, warmup_counts=[0, 5])
    assert len(cells) == 2 * 3
    assert {cell.case.warmup for cell in cells} == {0, 5}


@pytest.mark.slow
def test_every_case_is_a_process_of_its_own_whose_first_step_is_seen(store: Store) -> None:
    cells = warmup.grid(warmup_contexts={"tiny": [16]}, warmup_counts=[0, 2], warmup_steps=4, device="cpu")
    outcome = sweep.run(warmup, cells, store=store)
    assert [record.status for record in outcome.records] == ["ok", "ok"]
    summary = warmup.summarise(outcome.records, PEAKS, store=store)
    assert [len(times) for times in summary["steps_ms"]] == [4, 6]
    # What a process pays once is in its first step, whatever else the machine does: no later one loads kernels too.
    assert sum(times[0] for times in summary["steps_ms"]) > sum(min(times[1:]) for times in summary["steps_ms"])
    text = str(presentation.table(summary))
    assert "each in a fresh process" in text
    assert "first step of a process takes" in str(presentation.findings(summary))
    assert len(presentation.figure(summary).draw().axes) == 1


def test_the_published_deviations_have_every_size_after_no_one_and_five_warm_ups(store: Store) -> None:
    published = warmup.published_deviations(store)
    assert len(published) == 15
    small = published[(published["size"] == "small") & (published["context_length"] == 128)].iloc[0]
    assert (small["mean_ms_0"], small["std_ms_0"]) == pytest.approx((96.6, 175.8))
    assert (small["mean_ms_1"], small["std_ms_1"]) == pytest.approx((39.5, 0.4))
    assert (small["mean_ms_5"], small["std_ms_5"]) == pytest.approx((40.4, 0.3))
    text = str(presentation.published(published))
    (row,) = (line for line in text.splitlines() if re.match(r"\| small +\| +128 \|", line))
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["96.6 ± 175.8", "39.5 ± 0.4", "40.4 ± 0.3", "182"]


def test_beside_two_warm_ups_stands_no_published_figure(store: Store) -> None:
    cells = warmup.grid(warmup_contexts={"small": [128]}, warmup_counts=[0, 2, 5], device="cpu")
    records = [record_of(cell.case) for cell in cells]
    summary = warmup.summarise(records, PEAKS, store=store)
    assert summary["a100_ms"].round(1).fillna(0).tolist() == [96.6, 0, 40.4]

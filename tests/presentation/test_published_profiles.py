"""What others published of profiles is shown as printed, and said to agree with arithmetic only where it does."""

from __future__ import annotations

import pytest
from shown_tables import cells

from cs336_systems.bench.records import Store
from cs336_systems.experiments import memory_profile, step_profile
from cs336_systems.presentation import published_profiles


@pytest.mark.problem("nsys_profile")
def test_the_published_kernels_keep_their_figures(store: Store) -> None:
    table = published_profiles.kernels(step_profile.published_kernels(store))
    assert cells(table, "range")[0] == "forward"
    assert cells(table, "time %")[0] == "43.0"
    assert cells(table, "kernel")[0] == "`ampere_sgemm_128x64_tn`"
    assert len(table.rows) == len(step_profile.published_kernels(store))


@pytest.mark.problem("nsys_profile")
def test_the_published_kernels_answer_the_same_questions(store: Store) -> None:
    shares, softmax = step_profile.published_shares(store), step_profile.published_softmax(store)
    top, products, moved = map(str, published_profiles.kernel_findings(shares, softmax))
    assert "`ampere_sgemm_128x64_tn` take 43.0 % of forward in 153 calls; in backward" in top
    assert "at least 84.7 % of forward, and at least 68.7 % of a training step." in products
    assert "its time is that of its traffic" in moved


@pytest.mark.problem("nsys_profile")
def test_figures_that_say_otherwise_are_told_otherwise(store: Store) -> None:
    shares, softmax = step_profile.published_shares(store), step_profile.published_softmax(store)
    same = shares.copy()
    same.loc["backward", "kernel"] = same.loc["forward", "kernel"]
    same.loc["train_step", "products_percent"] = 99.0
    top, products, moved = map(str, published_profiles.kernel_findings(same, softmax | {"a100_softmax_us": 1000.0}))
    assert "the same lead in backward" in top
    assert "do not show training to lower" in products
    assert "not that of its traffic alone" in moved


@pytest.mark.problem("memory_profiling")
def test_published_peaks_stand_beside_the_accounting_with_the_doubt_said(store: Store) -> None:
    table = published_profiles.peaks(memory_profile.published_peaks(store))
    assert cells(table, "published peak (GB)")[:3] == ["13", "20", "37"]
    assert cells(table, "published peak (GB)")[-1] == "37 ?"
    assert any("probably 256" in note for note in table.notes)


@pytest.mark.problem("memory_profiling")
def test_the_published_largest_allocation_is_one_matrix_of_scores(store: Store) -> None:
    peaks = memory_profile.published_peaks(store)
    beside, largest = map(str, published_profiles.peak_findings(peaks))
    assert "4 · 25 · 512² · 4 B = 104,857,600 B: the same" in largest
    assert "9 of the 9 published peaks" in beside
    wrong = peaks.assign(score_matrix_bytes=1, accounted_bytes=1e12)
    beside, largest = map(str, published_profiles.peak_findings(wrong))
    assert "another size" in largest
    assert "has more than there was" in beside

"""A machine's evidence has one row for every case that its profile asks for, and a case without a record says so."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from step_records import record_of
from writeup_records import (
    COMMAND,
    H200,
    TOY,
    copy_of_published,
    laptop_case,
    peak_records,
    publish,
    published_cpu,
    record_here,
)

from cs336_systems.analysis.hardware import GPUS
from cs336_systems.bench.fingerprint import fingerprint, source_hashes
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.errors import UserError, WorkbookWarning
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.presentation import machine_peaks as peaks_presentation
from cs336_systems.presentation import transformer_step as presentation
from cs336_systems.workbook.evidence import Archive, Evidence, NotAsked, Unmeasured, published_rows
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.plan import lay_out_all
from cs336_systems.workbook.profiles import experiments_of

INDEX = load_index()
ON_CUDA = laptop_case("small", device="cuda", warmup=5, steps=10)


def evidence_of(store: Store, experiment: str = "transformer_step", **options: Any) -> Evidence:
    """The evidence of the one machine there is."""
    (found,) = Archive(store, INDEX, **options).machines(experiment)
    return found


def cases_in(summary: pd.DataFrame) -> list[transformer_step.Case]:
    names = [field.name for field in dataclasses.fields(transformer_step.Case)]
    return [transformer_step.Case(**row) for row in summary[names].to_dict("records")]


def cases_asked(profile: str, device: str) -> list[transformer_step.Case]:
    grids = experiments_of(profile, INDEX)["transformer_step"]
    return [cell.case for cell in lay_out_all("transformer_step", [{**each, "device": device} for each in grids])]


def fresh(record: Record, **changes: Any) -> Record:
    """A record of today's source."""
    return dataclasses.replace(record, fingerprint={"source": source_hashes(transformer_step), **changes})


# Which cases ---------------------------------------------------------------------------------------------------


def test_every_case_of_the_laptops_grid_has_one_row_in_the_grids_order(store: Store) -> None:
    asked = cases_asked("laptop", "cpu")
    publish(store, TOY, [record_of(case) for case in reversed(asked[1:4])])
    summary = evidence_of(store).summary
    assert cases_in(summary) == asked
    assert list(summary["status"]) == ["missing", "ok", "ok", "ok", *["missing"] * (len(asked) - 4)]


def test_a_missing_case_says_what_to_run_and_where(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    summary = evidence_of(store).summary
    missing = summary[summary["status"] == "missing"]
    assert set(missing["reason"]) == {f"run `{COMMAND}` on toy-1c, then `python scripts/publish_records.py`"}
    assert missing["mean_ms"].isna().all()


def test_a_missing_case_of_this_checkout_is_measured_by_one_command(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    summary = evidence_of(store).summary
    assert set(summary[summary["status"] == "missing"]["reason"]) == {f"run `{COMMAND}`"}


def test_a_published_gpu_is_asked_for_what_the_profile_of_its_kind_asks(store: Store) -> None:
    publish(store, H200, [record_of(ON_CUDA)])
    found = evidence_of(store)
    assert cases_in(found.summary) == cases_asked("h200", "cuda")
    assert set(found.summary[found.summary["status"] == "missing"]["reason"]) == {
        f"run `{COMMAND} --profile h200` on h200-x1, then `python scripts/publish_records.py`"
    }


def test_the_floors_of_a_published_gpu_are_those_of_its_datasheet(store: Store) -> None:
    publish(store, H200, [record_of(ON_CUDA)])
    found = evidence_of(store)
    expected = [transformer_step.bound_ms(case, GPUS["h200"])[0] for case in cases_in(found.summary)]
    assert list(found.summary["bound_ms"]) == expected


def test_a_gpu_that_no_profile_knows_is_asked_for_the_laptops_grid_on_cuda(store: Store) -> None:
    unknown = Machine("rtx-x1", "cuda", {**H200.description, "device_name": "NVIDIA RTX 4090"})
    publish(store, unknown, [record_of(ON_CUDA)])
    assert cases_in(evidence_of(store).summary) == cases_asked("laptop", "cuda")


def test_a_case_that_its_grid_does_not_ask_for_is_counted_and_not_shown(store: Store) -> None:
    asked, others = laptop_case(), [laptop_case(context=512), laptop_case("large")]
    publish(store, TOY, [record_of(case) for case in (asked, *others)])
    found = evidence_of(store)
    assert found.beyond == len(others)
    assert not {case.context_length for case in cases_in(found.summary)} & {512}


def test_an_experiment_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(UserError, match="unknown experiment 'warmpu': did you mean 'warmup'"):
        Archive(store, INDEX).machines("warmpu")


# Whose records -------------------------------------------------------------------------------------------------


def test_this_checkouts_own_records_come_first_and_the_published_after_them_by_name(store: Store) -> None:
    publish(store, H200, [record_of(ON_CUDA)])
    publish(store, dataclasses.replace(TOY, name="a-1c"), [record_of(laptop_case())])
    record_here(store, [record_of(laptop_case())], machine=TOY)
    found = Archive(store, INDEX).machines("transformer_step")
    assert [(each.machine, each.origin) for each in found] == [
        ("toy-1c", "this checkout"),
        ("a-1c", "published"),
        ("h200-x1", "published"),
    ]


def test_own_and_published_records_of_one_machine_are_two_pieces_of_evidence(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    record_here(store, [record_of(laptop_case(phase="forward"))], machine=TOY)
    own, published = Archive(store, INDEX).machines("transformer_step")
    assert own.name == "toy-1c-own"
    assert published.name == "toy-1c"
    assert own.case(size="tiny", context_length=128, phase="forward", autocast="none").status == "ok"
    assert published.case(size="tiny", context_length=128, phase="step", autocast="none").status == "ok"


def test_own_records_are_asked_for_the_profile_that_was_run(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    found = evidence_of(store, profile="smoke")
    assert cases_in(found.summary) == cases_asked("smoke", "cpu")
    assert set(found.summary["reason"]) == {f"run `{COMMAND} --profile smoke`"}


def test_the_profile_that_was_run_does_not_change_what_published_records_are_asked_for(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    assert cases_in(evidence_of(store, profile="smoke").summary) == cases_asked("laptop", "cpu")


def test_own_records_are_asked_for_the_grid_that_a_run_was_given(store: Store) -> None:
    record_here(store, [record_of(laptop_case("mini", 32))])
    grids = {"transformer_step": [{"contexts": {"mini": [32, 64]}, "phases": ["step"], "device": "cpu"}]}
    found = evidence_of(store, run=grids)
    assert list(found.summary["context_length"]) == [32, 64]
    assert list(found.summary["status"]) == ["ok", "missing"]


def test_records_of_this_cpu_are_not_asked_for_the_grid_of_a_gpus_profile(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    assert cases_in(evidence_of(store, profile="h200").summary) == cases_asked("laptop", "cpu")


def test_own_records_can_be_left_out(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    assert Archive(store, INDEX, own=False).machines("transformer_step") == []
    assert not len(published_rows("transformer_step", store))


def test_without_a_profile_own_records_are_asked_for_what_suits_their_machine(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    record_here(store, [record_of(ON_CUDA)], machine=H200)
    asked = {each.machine: cases_in(each.summary) for each in Archive(store, INDEX).machines("transformer_step")}
    assert asked == {this_machine("cpu").name: cases_asked("laptop", "cpu"), "h200-x1": cases_asked("h200", "cuda")}


# One case ------------------------------------------------------------------------------------------------------


def test_a_case_gives_the_numbers_of_its_row(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none").mean_ms == 3.0


def test_a_case_by_a_column_that_is_not_there_is_an_error_that_lists_the_columns(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(UserError, match=r"unknown column 'siz' of transformer_step: did you mean 'size'"):
        evidence_of(store).case(siz="tiny")


def test_a_case_that_several_rows_fit_is_an_error(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    found = evidence_of(store)
    several = len(found.where(size="tiny").summary)
    with pytest.raises(UserError, match=rf"^{several} cases of transformer_step on toy-1c have size tiny: say which"):
        found.case(size="tiny")


def test_a_case_without_a_record_is_unmeasured_and_names_the_command(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(
        Unmeasured, match=rf"^Not known yet: .*size mini.* on toy-1c is not measured; run `{COMMAND}` on toy-1c, then"
    ):
        evidence_of(store).case(size="mini", phase="step", autocast="none")


def test_a_case_that_the_grid_has_not_is_none_that_is_asked_for(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(NotAsked, match=r"^transformer_step \(size xl\) on toy-1c is not asked for$"):
        evidence_of(store).case(size="xl")


@pytest.mark.parametrize("status", ["oom", "skipped", "failed"])
def test_a_case_that_ended_without_a_time_is_unmeasured_and_says_how_it_ended(store: Store, status: str) -> None:
    publish(store, TOY, [record_of(laptop_case(), status=status, reason="it was too large")])
    with pytest.raises(Unmeasured, match=f"ended as {status}: `it was too large`$") as caught:
        evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    assert "Not known yet" not in str(caught.value)
    assert not isinstance(caught.value, NotAsked)


def test_a_number_that_a_measured_case_lacks_is_unmeasured(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])  # without ceilings there is no floor
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    with pytest.raises(Unmeasured, match=r"bound_ms of .* is not known: ") as caught:
        _ = row.bound_ms
    assert "`python scripts/measure.py machine_peaks` on toy-1c, then `python scripts/publish" in str(caught.value)


def test_a_floor_of_this_checkouts_own_that_is_unknown_names_the_command_alone(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    with pytest.raises(Unmeasured, match=r"; run `python scripts/measure\.py machine_peaks`$"):
        _ = row.times_bound


def test_the_deviation_of_a_single_step_is_none_and_no_missing_measurement(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case(), measurement=Measurement({"step_ms": [3.0]}))])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    assert math.isnan(row.std_ms)
    assert row.mean_ms == 3.0


def test_a_column_that_a_case_has_not_is_no_missing_measurement(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    with pytest.raises(AttributeError, match="'mean_mss': it has size, "):
        _ = row.mean_mss


# The handouts' names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", ["2025", "2026"])
def test_a_handout_gives_sizes_its_names_and_leaves_out_those_of_the_other_year_only(store: Store, year: str) -> None:
    publish(store, H200, [record_of(ON_CUDA)])
    handout = INDEX.handout(year)
    found = evidence_of(store, handout=handout)
    kept = [size for size in found.summary["size"] if size in handout.sizes]
    assert set(found.summary["size"]) - set(kept), "the grid is of both years"
    assert list(found.shown["size"]) == [handout.sizes[size] for size in kept]


def test_the_models_of_this_workbooks_own_stay_in_every_handout(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    found = evidence_of(store, handout=INDEX.handout("2026"))
    assert list(dict.fromkeys(found.shown["size"])) == ["tiny", "mini", "small"]


def test_cases_are_asked_for_by_this_workbooks_names_whatever_the_handout(store: Store) -> None:
    publish(store, H200, [record_of(laptop_case("gpt2-xl", device="cuda", warmup=5, steps=10))])
    found = evidence_of(store, handout=INDEX.handout("2025"))
    row = found.case(size="gpt2-xl", context_length=128, phase="step", autocast="none")
    assert row.mean_ms == 3.0


# Ceilings and staleness ----------------------------------------------------------------------------------------


def test_a_cpu_with_all_its_ceilings_has_a_floor_for_every_case_missing_ones_too(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    publish(store, TOY, peak_records(TOY), "machine_peaks")
    assert evidence_of(store).where(autocast="none").summary["bound_ms"].gt(0).all()


@pytest.mark.parametrize("lacking", [{"precision": "float32", "side": 2048}, {"operation": "sum"}])
def test_a_cpu_that_lacks_one_record_of_a_ceiling_has_times_without_floors(
    store: Store, lacking: dict[str, Any]
) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    kept = [record for record in peak_records(TOY) if not lacking.items() <= record.case.items()]
    assert len(kept) < len(peak_records(TOY))
    publish(store, TOY, kept, "machine_peaks")
    summary = evidence_of(store).where(autocast="none").summary
    assert summary["bound_ms"].isna().all()
    assert list(summary[summary["status"] == "ok"]["mean_ms"]) == [3.0]


def test_a_ceiling_of_another_precision_is_not_needed_for_the_floors_of_float32(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    publish(store, TOY, [each for each in peak_records(TOY) if each.case["precision"] == "float32"], "machine_peaks")
    assert evidence_of(store).where(autocast="none").summary["bound_ms"].gt(0).all()


def with_instructions(sets: list[str]) -> Machine:
    return Machine("here-1c", "cpu", {**TOY.description, "instruction_sets": sets})


def test_what_a_published_machine_lacks_does_not_depend_on_the_machine_that_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of_published(tmp_path)
    path = store.published / published_cpu() / "machine_peaks.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"precision": "bfloat16"' not in line]
    path.write_text("\n".join(lines) + "\n")
    seen = []
    for sets in (["avx2"], ["avx2", "avx512_bf16"], ["avx512_bf16", "avx512_fp16"]):
        monkeypatch.setattr(machine_peaks, "this_machine", lambda _, sets=sets: with_instructions(sets))
        found = Archive(store, INDEX, own=False).machines("machine_peaks")
        seen.append(list(found[0].summary["what"]))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_record_of_another_source_is_shown_stale_and_its_time_kept(store: Store) -> None:
    now = source_hashes(transformer_step)
    other = {"source": {**now, "measure": "another"}}
    publish(store, TOY, [dataclasses.replace(record_of(laptop_case()), fingerprint=other)])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    assert row.stale == "measure changed"
    assert row.mean_ms == 3.0


def test_a_published_record_is_compared_by_its_source_alone(store: Store) -> None:
    publish(store, TOY, [fresh(record_of(laptop_case()), torch="0.1", threads=99)])
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none").stale == ""


def test_a_record_of_this_machine_is_compared_by_its_versions_too(store: Store) -> None:
    today = fingerprint(transformer_step, this_machine("cpu"))
    cases = [laptop_case(phase="step"), laptop_case(phase="forward")]
    same, other = (dataclasses.replace(record_of(case), fingerprint=today) for case in cases)
    record_here(store, [same, dataclasses.replace(other, fingerprint={**today, "torch": "0.1"})])
    found = evidence_of(store)
    assert found.case(size="tiny", context_length=128, phase="step", autocast="none").stale == ""
    assert "torch 0.1 →" in found.case(size="tiny", context_length=128, phase="forward", autocast="none").stale


def test_own_records_that_came_from_another_machine_are_compared_by_their_source_alone(store: Store) -> None:
    record_here(store, [fresh(record_of(laptop_case()), torch="0.1")], machine=TOY)
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none").stale == ""


# This checkout's own ceilings ----------------------------------------------------------------------------------


def today(**changes: Any) -> dict[str, Any]:
    """What a record of this machine's ceilings must have in its fingerprint to be fresh, with changes."""
    return fingerprint(machine_peaks, this_machine("cpu")) | changes


def record_ceilings(store: Store, speed: float, finished_utc: str = "2026-01-01", **changes: Any) -> None:
    records = peak_records(this_machine("cpu"), speed=speed, fingerprint=today(**changes), finished_utc=finished_utc)
    record_here(store, records, experiment="machine_peaks")


def ceilings_shown(store: Store) -> dict[str, tuple[float, float]]:
    """The Machines table: by ceiling what bounds with it, and what was reached, in FLOP/s or B/s."""
    found = evidence_of(store, "machine_peaks")
    table = peaks_presentation.ceilings(found.summary, found.peaks, found.machine)
    assert table.headings == ("ceiling", "bounds with", "reached here")
    assert all(text.endswith((" GFLOP/s", " GB/s")) for row in table.rows for text in row[1:])
    return {
        what: (1e9 * float(bound.split()[0]), 1e9 * float(reached.split()[0])) for what, bound, reached in table.rows
    }


@pytest.mark.parametrize(
    "other", [{"torch": "0.1"}, {"threads": 99}, {"device": "another"}, {"source": {"measure": "another"}}], ids=str
)
@pytest.mark.parametrize("stale_finished", ["2025-01-01", "2027-01-01"])
def test_a_stale_ceiling_is_neither_in_the_floors_nor_in_the_table_of_ceilings(
    store: Store, other: dict[str, Any], stale_finished: str
) -> None:
    record_here(store, [record_of(laptop_case())])
    record_ceilings(store, 50.0, finished_utc=stale_finished, **other)
    record_ceilings(store, 2.0, finished_utc="2026-01-01")
    found = evidence_of(store)
    assert found.peaks.rate("float32") == pytest.approx(2e9)
    assert found.peaks.bandwidth_bytes_per_s == pytest.approx(2e9)
    expected = [transformer_step.bound_ms(case, found.peaks)[0] for case in cases_in(found.summary)]
    assert list(found.summary["bound_ms"]) == expected
    assert set(ceilings_shown(store).values()) == {(2e9, 2e9)}


@pytest.mark.parametrize("speeds", [(4.0, 2.0), (2.0, 4.0)])
def test_of_two_fresh_runs_the_faster_is_in_the_floors_and_in_the_table_of_ceilings(
    store: Store, speeds: tuple[float, float]
) -> None:
    record_here(store, [record_of(laptop_case())])
    for year, speed in zip(("2025", "2026"), speeds, strict=True):
        record_ceilings(store, speed, finished_utc=f"{year}-01-01")
    assert evidence_of(store).peaks.rate("float32") == pytest.approx(4e9)
    assert set(ceilings_shown(store).values()) == {(4e9, 4e9)}


def test_a_floor_set_by_compute_times_the_rate_in_the_table_of_ceilings_is_its_work(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    record_ceilings(store, 50.0, torch="0.1")
    record_ceilings(store, 2.0)
    record_ceilings(store, 4.0)
    rate = ceilings_shown(store)["float32 products"][0]
    summary = evidence_of(store).summary
    by_compute = summary[summary["bound_by"] == "compute"]
    assert len(by_compute)
    assert list(by_compute["bound_ms"] / 1e3 * rate) == pytest.approx(list(by_compute["flops"]))


def test_with_stale_ceilings_alone_no_floor_is_known_and_what_measures_them_is_said(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    record_ceilings(store, 50.0, torch="0.1")
    assert evidence_of(store).summary["bound_ms"].isna().all()
    found = evidence_of(store, "machine_peaks")
    table = peaks_presentation.ceilings(found.summary, found.peaks, found.machine)
    assert all("50" not in text for row in table.rows for text in row)
    assert any("run `python scripts/measure.py machine_peaks`" in note for note in table.notes)


def test_published_ceilings_of_another_source_are_marked_stale(store: Store) -> None:
    publish(store, TOY, peak_records(TOY, fingerprint={"source": {"measure": "another"}}), "machine_peaks")
    found = evidence_of(store, "machine_peaks")
    table = peaks_presentation.ceilings(found.summary, found.peaks, found.machine)
    assert all(row[2].endswith(" †") for row in table.rows)
    assert any(note.startswith("† stale: ") for note in table.notes)


# What a run asks -----------------------------------------------------------------------------------------------

RUN = "python scripts/run.py 01 -p contexts '{mini: [32]}'"
"""As `Archive` takes it: braces are doubled."""


def small_grid(device: str) -> dict[str, list[dict[str, Any]]]:
    return {"transformer_step": [{"contexts": {"mini": [32, 64]}, "phases": ["step"], "device": device}]}


def test_the_grid_of_a_run_on_cuda_does_not_ask_the_cpu_beside_it(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    found = evidence_of(store, run=small_grid("cuda"), command=RUN, profile="h200")
    assert cases_in(found.summary) == cases_asked("laptop", "cpu")
    assert found.what_to_run == f"run `{COMMAND}`"


def test_the_grid_of_a_run_on_cuda_asks_the_gpu(store: Store) -> None:
    record_here(store, [record_of(ON_CUDA)], machine=H200)
    found = evidence_of(store, run=small_grid("cuda"), command=RUN, profile="h200")
    assert list(found.summary["context_length"]) == [32, 64]
    assert set(found.summary["device"]) == {"cuda"}


def test_a_hole_in_the_grid_of_a_run_names_the_command_of_the_run(store: Store) -> None:
    record_here(store, [record_of(laptop_case("mini", 32))])
    found = evidence_of(store, run=small_grid("cpu"), command=RUN)
    told = "run `python scripts/run.py 01 -p contexts '{mini: [32]}'`"
    assert list(found.summary[found.summary["status"] == "missing"]["reason"]) == [told]
    with pytest.raises(Unmeasured) as caught:
        found.case(context_length=64)
    assert str(caught.value).endswith(f"; {told}")
    assert "measure.py" not in str(caught.value)


def test_the_grid_of_a_run_asks_nothing_of_what_is_published(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    found = evidence_of(store, run=small_grid("cpu"), command=RUN)
    assert cases_in(found.summary) == cases_asked("laptop", "cpu")
    assert found.what_to_run == f"run `{COMMAND}` on toy-1c, then `python scripts/publish_records.py`"


def test_a_case_that_two_grids_ask_for_is_one_row(store: Store) -> None:
    record_here(store, [record_of(laptop_case("mini", 32))])
    (first,) = small_grid("cpu")["transformer_step"]
    grids = {"transformer_step": [first, {**first, "contexts": {"mini": [64, 128]}}]}
    assert list(evidence_of(store, run=grids).summary["context_length"]) == [32, 64, 128]


# Experiments without a record ----------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["this checkout", "published"])
@pytest.mark.parametrize("experiment", ["transformer_step", "warmup", "machine_peaks"])
def test_a_machine_is_asked_for_every_experiment_of_its_profile_whichever_it_has_records_of(
    store: Store, origin: str, experiment: str
) -> None:
    known = "warmup" if experiment == "transformer_step" else "transformer_step"
    if origin == "published":
        publish(store, TOY, [record_of(laptop_case())], known)
    else:
        record_here(store, [record_of(laptop_case())], machine=TOY, experiment=known)
    found = evidence_of(store, experiment)
    assert (found.machine, found.origin, found.recorded) == ("toy-1c", origin, 0)
    assert len(found.summary)
    assert f"run `python scripts/measure.py {experiment}`" in found.what_to_run
    assert ("on toy-1c, then `python scripts/publish_records.py`" in found.what_to_run) == (origin == "published")


def test_how_many_cases_have_a_record_counts_those_that_are_asked_for(store: Store) -> None:
    cases = [laptop_case(), laptop_case(phase="forward"), laptop_case(context=512)]
    publish(store, TOY, [record_of(cases[0]), record_of(cases[1], status="oom", reason="large"), record_of(cases[2])])
    found = evidence_of(store)
    assert (found.recorded, found.beyond) == (2, 1)


# Noise and staleness in words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, ""),
        ({"noise": {"flags": ["disturbed"]}}, " ~"),
        ({"fingerprint": {"source": {"measure": "another"}}}, " †"),
        ({"noise": {"flags": ["disturbed"]}, "fingerprint": {"source": {"measure": "another"}}}, " ~ †"),
    ],
)
def test_a_case_in_words_is_marked_as_noisy_and_stale(store: Store, changes: dict[str, Any], marks: str) -> None:
    publish(store, TOY, [dataclasses.replace(fresh(record_of(laptop_case())), **changes)])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step", autocast="none")
    assert presentation.measured_text(row) == f"3.0 ± 1.0{marks}"


# Records that are left out -------------------------------------------------------------------------------------


def test_a_folder_of_records_without_its_machine_is_left_out_with_a_warning_that_names_it(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    record_here(store, [record_of(laptop_case())], machine=TOY)
    (store.local / "toy-1c" / "machine.json").unlink()
    with pytest.warns(WorkbookWarning, match=r"the records of toy-1c are left out: cannot read .*machine\.json"):
        archive = Archive(store, INDEX)
    assert [each.machine for each in archive.machines("transformer_step")] == [this_machine("cpu").name]

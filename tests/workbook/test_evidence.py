"""A machine's evidence has one row for every case that its profile asks for, and a case without a record says so."""

from __future__ import annotations

import dataclasses
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
    record_here,
)

from cs336_systems.analysis.hardware import GPUS
from cs336_systems.bench.fingerprint import fingerprint, source_hashes
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Record, Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.workbook.evidence import Archive, Evidence, Unmeasured
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.plan import lay_out
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
    arguments = experiments_of(profile, INDEX).get("transformer_step", {})
    return [cell.case for cell in lay_out("transformer_step", {**arguments, "device": device})]


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
    assert own.case(size="tiny", context_length=128, phase="forward").status == "ok"
    assert published.case(size="tiny", context_length=128, phase="step").status == "ok"


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
    grids = {"transformer_step": {"contexts": {"mini": [32, 64]}, "phases": ["step"], "device": "auto"}}
    found = evidence_of(store, grids=grids)
    assert list(found.summary["context_length"]) == [32, 64]
    assert list(found.summary["status"]) == ["ok", "missing"]


def test_records_of_this_cpu_are_not_asked_for_the_grid_of_a_gpus_profile(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    assert cases_in(evidence_of(store, profile="h200").summary) == cases_asked("laptop", "cpu")


def test_without_a_profile_own_records_are_left_out(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    assert Archive(store, INDEX, profile=None).machines("transformer_step") == []


# One case ------------------------------------------------------------------------------------------------------


def test_a_case_gives_the_numbers_of_its_row(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step").mean_ms == 3.0


def test_a_case_by_a_column_that_is_not_there_is_an_error_that_lists_the_columns(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(UserError, match=r"unknown column 'siz' of transformer_step: did you mean 'size'"):
        evidence_of(store).case(siz="tiny")


def test_a_case_that_several_rows_fit_is_an_error(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(UserError, match=r"6 cases of transformer_step on toy-1c have size tiny: say which"):
        evidence_of(store).case(size="tiny")


def test_a_case_without_a_record_is_unmeasured_and_names_the_command(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(Unmeasured, match=rf"size mini.*not measured on toy-1c; run `{COMMAND}` on toy-1c"):
        evidence_of(store).case(size="mini", phase="step")


def test_a_case_that_the_grid_has_not_is_unmeasured(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    with pytest.raises(Unmeasured, match=r"grid of toy-1c has no case of transformer_step \(size xl\)"):
        evidence_of(store).case(size="xl")


@pytest.mark.parametrize("status", ["oom", "skipped", "failed"])
def test_a_case_that_ended_without_a_time_is_unmeasured_and_says_how_it_ended(store: Store, status: str) -> None:
    publish(store, TOY, [record_of(laptop_case(), status=status, reason="it was too large")])
    with pytest.raises(Unmeasured, match=f"ended as {status}: it was too large"):
        evidence_of(store).case(size="tiny", context_length=128, phase="step")


def test_a_number_that_a_measured_case_lacks_is_unmeasured(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])  # without ceilings there is no floor
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step")
    with pytest.raises(Unmeasured, match=r"bound_ms of .* cannot be told.*python scripts/measure\.py machine_peaks"):
        _ = row.bound_ms


def test_a_column_that_a_case_has_not_is_no_missing_measurement(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step")
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
    assert evidence_of(store).summary["bound_ms"].gt(0).all()


@pytest.mark.parametrize("lacking", [{"precision": "float32", "side": 2048}, {"operation": "sum"}])
def test_a_cpu_that_lacks_one_record_of_a_ceiling_has_times_without_floors(
    store: Store, lacking: dict[str, Any]
) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    kept = [record for record in peak_records(TOY) if not lacking.items() <= record.case.items()]
    assert len(kept) < len(peak_records(TOY))
    publish(store, TOY, kept, "machine_peaks")
    summary = evidence_of(store).summary
    assert summary["bound_ms"].isna().all()
    assert list(summary[summary["status"] == "ok"]["mean_ms"]) == [3.0]


def test_a_ceiling_of_another_precision_is_not_needed_for_the_floors_of_float32(store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case())])
    publish(store, TOY, [each for each in peak_records(TOY) if each.case["precision"] == "float32"], "machine_peaks")
    assert evidence_of(store).summary["bound_ms"].gt(0).all()


def with_instructions(sets: list[str]) -> Machine:
    return Machine("here-1c", "cpu", {**TOY.description, "instruction_sets": sets})


def test_what_a_published_machine_lacks_does_not_depend_on_the_machine_that_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of_published(tmp_path)
    path = store.published / "epyc-turin-2c" / "machine_peaks.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"precision": "bfloat16"' not in line]
    path.write_text("\n".join(lines) + "\n")
    seen = []
    for sets in (["avx2"], ["avx2", "avx512_bf16"], ["avx512_bf16", "avx512_fp16"]):
        monkeypatch.setattr(machine_peaks, "this_machine", lambda _, sets=sets: with_instructions(sets))
        found = Archive(store, INDEX, profile=None).machines("machine_peaks")
        seen.append(list(found[0].summary["what"]))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_record_of_another_source_is_shown_stale_and_its_time_kept(store: Store) -> None:
    now = source_hashes(transformer_step)
    other = {"source": {**now, "measure": "another"}}
    publish(store, TOY, [dataclasses.replace(record_of(laptop_case()), fingerprint=other)])
    row = evidence_of(store).case(size="tiny", context_length=128, phase="step")
    assert row.stale == "measure changed"
    assert row.mean_ms == 3.0


def test_a_published_record_is_compared_by_its_source_alone(store: Store) -> None:
    publish(store, TOY, [fresh(record_of(laptop_case()), torch="0.1", threads=99)])
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step").stale == ""


def test_a_record_of_this_machine_is_compared_by_its_versions_too(store: Store) -> None:
    today = fingerprint(transformer_step, this_machine("cpu"))
    cases = [laptop_case(phase="step"), laptop_case(phase="forward")]
    same, other = (dataclasses.replace(record_of(case), fingerprint=today) for case in cases)
    record_here(store, [same, dataclasses.replace(other, fingerprint={**today, "torch": "0.1"})])
    found = evidence_of(store)
    assert found.case(size="tiny", context_length=128, phase="step").stale == ""
    assert "torch 0.1 →" in found.case(size="tiny", context_length=128, phase="forward").stale


def test_own_records_that_came_from_another_machine_are_compared_by_their_source_alone(store: Store) -> None:
    record_here(store, [fresh(record_of(laptop_case()), torch="0.1")], machine=TOY)
    assert evidence_of(store).case(size="tiny", context_length=128, phase="step").stale == ""

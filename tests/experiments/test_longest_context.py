"""The map of longest contexts: what is planned is what is shown, and one hole takes no other answer with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from profile_records import FINGERPRINT, PEAKS, record_of

from cs336_systems.analysis import longest
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.bench import sweep
from cs336_systems.bench.fingerprint import measured_modules
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import Picture
from cs336_systems.errors import UserError
from cs336_systems.experiments import longest_context, memory_profile
from cs336_systems.experiments.longest_context import Case
from cs336_systems.presentation import longest_context as presentation

pytestmark = pytest.mark.problem("memory_profiling")

GPU_NAMES = ("a100-40gb", "h200")
LITTLE = {"a100-40gb": 2**26, "h200": 2**27}


def case_of(size: str = "small", **changes: Any) -> Case:
    (cell,) = longest_context.grid(planned_sizes=[size], gpus=GPU_NAMES)
    return dataclasses.replace(cell.case, **changes)


def planned(case: Case, *contexts: int, **changes: Any) -> Record:
    values = {gpu: {"context": context} for gpu, context in zip(case.gpus, contexts, strict=False)}
    return record_of("longest_context", case, Measurement(values=values), **changes)


def summary(*records: Record, **options: Any) -> pd.DataFrame:
    return longest_context.summarise(records, PEAKS, **options)


def test_what_is_measured_is_what_the_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    little = {name: dataclasses.replace(GPUS[name], usable_bytes=size) for name, size in LITTLE.items()}
    for module in ("longest", "footprint"):
        monkeypatch.setattr(f"cs336_systems.analysis.{module}.gpu_peaks", little.__getitem__)
    case = dataclasses.replace(case_of("tiny"), vocab_size=64, num_layers=1, d_model=32, d_ff=64)
    parts: list[float] = []
    values = longest_context.measure(case, parts.append).values
    for gpu in GPU_NAMES:
        found = longest.longest_context(case, gpu)
        assert values[gpu]["context"] == found.value
        assert values[gpu]["peak_allocated_bytes"] == found.plan.peak_allocated_bytes <= little[gpu].usable_bytes
    assert values["a100-40gb"]["context"] < values["h200"]["context"]
    assert parts == [0.5, 1.0]


def test_what_does_not_fit_at_all_is_a_zero_and_no_failure() -> None:
    case = case_of("10b", gpus=("a100-40gb",))
    assert longest_context.measure(case, lambda _: None).values == {"a100-40gb": {"context": 0}}


def test_the_planner_is_part_of_what_is_measured_here_and_nowhere_else() -> None:
    planner = {"cs336_systems.analysis.footprint", "cs336_systems.analysis.longest"}
    assert planner <= set(measured_modules(longest_context))
    assert not planner & set(measured_modules(memory_profile))


def test_a_record_comes_back_from_its_file_as_the_same_case(tmp_path: Path) -> None:
    case = case_of(gpus=("h200",))
    assert Case(**json.loads(json.dumps(dataclasses.asdict(case)))) == case
    with pytest.raises(UserError, match="unknown GPU"):
        dataclasses.replace(case, gpus=("h2000",))
    assert sweep.run(longest_context, [], store=Store.default(tmp_path)).records == []


def test_a_row_of_the_table_is_a_step_and_a_column_a_gpu() -> None:
    text = str(presentation.table(summary(planned(case_of(), 2304, 4766), planned(case_of("xl"), 0, 600))))
    (small,) = [line for line in text.splitlines() if line.startswith("| step of small")]
    assert [cell.strip() for cell in small.split("|")[2:4]] == ["2,304", "4,766"]
    (xl,) = [line for line in text.splitlines() if line.startswith("| step of xl")]
    assert [cell.strip() for cell in xl.split("|")[2:4]] == ["0", "600"]
    assert "batch 4" in text


def test_the_sentences_are_of_the_records() -> None:
    said = str(presentation.findings(summary(planned(case_of(), 1000, 2000), planned(case_of("xl"), 0, 600))))
    assert "Step of small fits 1,000 tokens on `a100-40gb` and 2,000 on `h200`" in said
    assert "3.6 times the memory for 2.0 times the context, since the scores" in said
    assert "Not one token fits in 25 % of the cells: step of xl on a100-40gb." in said
    linear = str(presentation.findings(summary(planned(case_of(), 1000, 5000))))
    assert "what does not grow with the context" in linear
    assert "Not one token" not in linear


def test_a_failed_plan_and_a_stale_one_are_said_to_be_so() -> None:
    failed = planned(case_of("xl"), status="failed", reason="RuntimeError: a defect")
    rows = summary(planned(case_of(), 1000, 2000), failed, fingerprint={**FINGERPRINT, "torch": "3.0"})
    assert "RuntimeError: a defect" in str(presentation.table(rows))
    assert "Stale (†)" in str(presentation.findings(rows))
    assert "xl" not in str(presentation.findings(summary(planned(case_of(), 1000, 2000), failed)))


def test_the_map_is_drawn_with_and_without_numbers() -> None:
    missing = planned(case_of("xl"), status="missing")
    for rows in (summary(planned(case_of(), 1000, 0), missing), summary(missing)):
        picture = presentation.figure(rows)
        assert isinstance(picture, Picture)
        assert picture.png()[:4] == b"\x89PNG"
    assert "No longest context was planned" in str(presentation.figure(summary()))
    assert str(presentation.table(summary()))

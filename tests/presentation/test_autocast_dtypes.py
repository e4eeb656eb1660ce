"""What is said of precisions under autocast is what was observed, also where it contradicts the rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest
from profile_records import PEAKS, record_of
from shown_tables import cells

from cs336_systems.bench.records import Measurement, Record, missing_record
from cs336_systems.experiments import autocast_dtypes as experiment
from cs336_systems.experiments.autocast_dtypes import OBSERVED, Case
from cs336_systems.presentation import autocast_dtypes as presentation

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

CASES = [cell.case for cell in experiment.grid(device="cpu")]
TO_RUN = "run `what observes it`"


def record(case: Case, **other: str) -> Record:
    """What the rules say, and on a CPU the norm in half precision."""
    dtypes = {name: presentation.expected(name, case.autocast) for name in OBSERVED}
    if case.rules == "cpu":
        dtypes["output of LayerNorm"] = case.autocast
    values = {"dtypes": dtypes | {name.replace("_", " "): dtype for name, dtype in other.items()}}
    return record_of("autocast_dtypes", case, Measurement(values=values))


def missing(case: Case) -> Record:
    return missing_record("autocast_dtypes", "toy-1c", dataclasses.asdict(case), TO_RUN)


def summary(*records: Record) -> pd.DataFrame:
    return experiment.summarise(records, PEAKS)


def test_a_table_has_a_row_per_tensor_and_a_column_per_autocast() -> None:
    table = presentation.table(summary(*map(record, CASES)))
    assert cells(table, "tensor") == list(OBSERVED)
    assert cells(table, "float16, CUDA's rules")[3] == "float32"
    assert cells(table, "bfloat16, a CPU's rules")[3] == "bfloat16"


def test_beside_each_tensor_stand_the_rules_of_what_makes_it() -> None:
    table = presentation.table(summary(*map(record, CASES)))
    (*_, loss, gradients) = cells(table, "CUDA's rules for what makes it")
    assert loss == "`cross_entropy_loss`: none; `log_softmax`: with a result in float32; `nll_loss`: in float32"
    assert gradients == "not cast"


def test_what_agrees_with_the_rules_is_said_so_and_a_cpu_differs_in_the_norm() -> None:
    found = presentation.findings(summary(*map(record, CASES)))
    assert [finding.holds for finding in found] == [True] * 2
    assert "logits bfloat16" in found[0].text
    assert "to 2 of 14 tensors" in found[1].text


def test_what_contradicts_the_rules_is_named() -> None:
    cases: list[Any] = [record(CASES[0], logits="float32"), *map(record, CASES[1:])]
    found = presentation.findings(summary(*cases))
    assert found[0].holds is False
    assert found[0].text.endswith("By the rules of the operators it is otherwise for: logits under float16.")


def test_a_missing_record_leaves_its_column_and_says_what_to_run() -> None:
    rows = summary(missing(CASES[0]), *map(record, CASES[1:]))
    table = presentation.table(rows)
    assert set(cells(table, "float16, CUDA's rules")) == {"missing"}
    texts = [finding.text for finding in presentation.findings(rows)]
    assert f"no record of 1 of 2 cases; {TO_RUN}" in texts[0]
    assert f"no record of 1 of 4 cases; {TO_RUN}" in texts[1]


def test_without_a_cpus_rules_nothing_is_said_of_them() -> None:
    assert len(presentation.findings(summary(*map(record, CASES[:2])))) == 1


def test_without_cases_it_is_said_what_to_run() -> None:
    (only,) = presentation.findings(pd.DataFrame())
    assert "scripts/measure.py autocast_dtypes" in only.text

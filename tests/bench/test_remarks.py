"""Below every table stand the marks it uses, and why a row has no time."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from cs336_systems.bench.remarks import by_machine, circumstances, enumerated, marks, notes_below, staleness
from cs336_systems.bench.report import Column, Finding, Table

NAN = float("nan")


def row(name: str = "a", case: str = "one", **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": name,
        "case": case,
        "machine": "toy-1c",
        "threads": 2,
        "torch": "2.13.0",
        "status": "ok",
        "reason": None,
        "noise": "",
        "stale": "",
    }
    return content | changes


def summary(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def notes(*rows: dict[str, Any], by_case: bool = False) -> list[str]:
    of_case = (lambda each: f"case {each['case']}") if by_case else None
    return notes_below(summary(*rows), lambda each: f"{each['name']} of {each['case']}", of_case)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([row(), row()], "toy-1c, 2 threads, PyTorch 2.13.0"),
        ([row(threads=1)], "toy-1c, 1 thread, PyTorch 2.13.0"),
        ([row(), row(threads=4)], "toy-1c, 2 threads or 4 threads, PyTorch 2.13.0"),
        ([row(), row(machine="other", torch="2.12.0")], "toy-1c and other, 2 threads, PyTorch 2.13.0 and 2.12.0"),
        ([row(), row(threads=NAN, torch=None)], "toy-1c, 2 threads, PyTorch 2.13.0"),
        ([row(threads=NAN, torch=None)], "toy-1c"),
    ],
)
def test_the_circumstances_are_what_the_records_tell_each_once(rows: list[dict[str, Any]], text: str) -> None:
    assert circumstances(summary(*rows)) == text


@pytest.mark.parametrize(
    ("noise", "stale", "text"), [("", "", ""), ("x", "", " ~"), ("", "y", " †"), ("x", "y", " ~ †")]
)
def test_a_disturbed_number_and_one_of_an_earlier_source_have_a_mark_each(noise: str, stale: str, text: str) -> None:
    (each,) = summary(row(noise=noise, stale=stale)).itertuples()
    assert marks(each) == text


def test_rows_that_are_in_order_need_no_note() -> None:
    assert notes(row(), row("b")) == []


def test_noise_is_told_of_each_row_or_once_of_each_case_where_rows_share_a_record() -> None:
    noisy = [row(name, noise="spread of 40%") for name in ("a", "b")]
    quiet = [row(name, case="two") for name in ("a", "b")]
    assert notes(*noisy, *quiet) == ["~ noisy, 2 of 4 cases: a of one (spread of 40%); b of one (spread of 40%)"]
    assert notes(*noisy, *quiet, by_case=True) == ["~ noisy, 1 of 2 cases: case one (spread of 40%)"]


def test_reasons_for_staleness_are_told_once_each_in_order() -> None:
    rows = [row(stale=reason) for reason in ("model changed", "", "loss changed", "model changed")]
    assert notes(*rows) == ["† stale: loss changed; model changed"]


def test_what_has_no_time_is_told_once_per_reason_and_rows_are_named_not_cases() -> None:
    rows = [
        row("a", status="oom", reason="needs *9* GiB"),
        row("b", status="oom", reason="needs *9* GiB"),
        row("c", status="skipped", reason="needs *9* GiB"),
        row("d", status="missing", reason="run `this`"),
        row("e", status="failed", reason=None),
        row("f", status="failed", reason=""),
    ]
    expected = [
        "oom: a of one; b of one: `needs *9* GiB`",
        "skipped: c of one: `needs *9* GiB`",
        "missing: d of one: run `this`",
        "failed: e of one: `no reason was recorded`",
        "failed: f of one: `no reason was recorded`",
    ]
    assert sorted(notes(*rows)) == sorted(expected)
    assert notes(*rows, by_case=True) == notes(*rows)


def test_of_many_the_first_are_named_and_the_rest_counted() -> None:
    texts = [str(number) for number in range(15)]
    assert enumerated(texts[:12]) == "; ".join(texts[:12])
    assert enumerated(texts) == "; ".join(texts[:12]) + "; and 3 more"
    assert enumerated(texts, most=1) == "0; and 14 more"


def test_staleness_is_a_sentence_only_where_something_is_stale() -> None:
    assert staleness(summary(row(), row())) == []
    (found,) = staleness(
        summary(row(case="a"), row(case="b", stale="model changed"), row(case="c", stale="torch 1 → 2"))
    )
    assert str(found) == "Stale (†) are 2 of 3 cases: they say nothing of today's source."
    assert found.holds is None


def table(rows: pd.DataFrame) -> Table:
    return Table.of(rows, [Column("name", lambda each: each.name, "left")], caption="Names", notes=["a note"])


def test_the_table_of_several_machines_has_the_machine_in_front_of_each_row() -> None:
    made = by_machine(summary(row("a"), row("b", machine="other")), table)
    assert isinstance(made, Table)
    assert made.headings == ("machine", "name")
    assert made.rows == (("toy-1c", "a"), ("other", "b"))
    assert (made.caption, made.notes) == ("Names", ("a note",))
    assert len(made.alignments) == 2


def test_without_a_machine_it_is_a_sentence_that_names_the_command() -> None:
    found = by_machine(pd.DataFrame(), table)
    assert isinstance(found, Finding)
    assert "No machine has published records" in str(found)
    assert "scripts/publish_records.py" in str(found)

"""Numbers, tables and figures say what they should, the same each time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from cs336_systems.bench.report import (
    COLOURS,
    MISSING,
    Column,
    Finding,
    Findings,
    Table,
    bytes_in_words,
    figure_style,
    logarithmic,
    number,
    percent,
    plural,
    save_figure,
    seconds_in_words,
    with_deviation,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.00123"), (1.2345, "1.23"), (99.95, "100.0"), (1234.5, "1,234"), (0, "0"), (NAN, MISSING)],
)
def test_a_number_has_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (40.4321, 0.3149, "40.43 ± 0.31"),
        (1234.5, 36.0, "1,234 ± 36"),
        (0.5, 12.0, "0 ± 12"),
        (2.5, NAN, "2.50"),
        (2.5, 0.0, "2.50"),
        (NAN, NAN, MISSING),
    ],
)
def test_a_mean_is_rounded_by_its_deviation(mean: float, std: float, text: str) -> None:
    assert with_deviation(mean, std) == text


def test_units_are_chosen_by_size() -> None:
    assert [bytes_in_words(count) for count in (12, 3 * 2**10, 2**20, 5 * 2**30, NAN)] == [
        "12 B",
        "3.00 KiB",
        "1.00 MiB",
        "5.00 GiB",
        MISSING,
    ]
    assert [seconds_in_words(seconds) for seconds in (4.0, 120.0, 7200.0)] == ["4.0 s", "2.0 min", "2.0 h"]
    assert percent(0.0123) == "1.2 %"


def rows() -> pd.DataFrame:
    return pd.DataFrame({"name": ["a", "b|c"], "time": [1.0, 200.0], "nothing": [NAN, NAN]})


def test_a_table_is_aligned_markdown_and_leaves_empty_columns_out() -> None:
    columns = [
        Column("name", lambda row: row.name, "left"),
        Column("time (ms)", lambda row: number(row.time)),
        Column("nothing", lambda row: number(row.nothing)),
    ]
    text = str(Table.of(rows(), columns, caption="Times", notes=["a note"]))
    assert text.splitlines() == [
        "**Times**",
        "",
        "| name | time (ms) |",
        "| ---- | --------: |",
        "| a    |      1.00 |",
        r"| b\|c |       200 |",
        "",
        "a note",
    ]
    assert len({len(line) for line in text.splitlines()[2:6]}) == 1


def test_a_table_without_rows_is_still_a_table() -> None:
    table = Table.of(rows().iloc[:0], [Column("name", lambda row: row.name)], caption="None")
    assert "**None**" in str(table)


def test_what_a_finding_says_beside_its_numbers_depends_on_them() -> None:
    wordings = {"so": ", as expected.", "but": ", which was not expected."}
    assert str(Finding.checked("Twice", True, **wordings)) == "Twice, as expected."
    assert str(Finding.checked("Twice", False, **wordings)) == "Twice, which was not expected."
    assert str(Findings([Finding("One."), Finding("Two.")])) == "- One.\n- Two."
    assert [plural(count, "case") for count in (1, 2)] == ["1 case", "2 cases"]


def figure() -> Figure:
    with figure_style():
        drawing = Figure(figsize=(3, 2))
        axes = drawing.subplots()
        axes.plot([1, 2, 3], [1.0, 20.0, 300.0], label="measured")
        logarithmic(axes.yaxis)
        axes.legend()
    return drawing


def test_the_same_figure_gives_the_same_bytes_as_svg_and_png(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in save_figure(figure(), tmp_path / "one" / "figure")]
    second = [path.read_bytes() for path in save_figure(figure(), tmp_path / "two" / "figure")]
    assert first == second
    assert first[0].startswith(b"<?xml")
    assert first[1].startswith(b"\x89PNG")


def test_colours_stay_apart_in_grey() -> None:
    lightness = sorted(
        0.2126 * int(colour[1:3], 16) + 0.7152 * int(colour[3:5], 16) + 0.0722 * int(colour[5:7], 16)
        for colour in COLOURS
    )
    assert all(after - before > 10 for before, after in itertools.pairwise(lightness))

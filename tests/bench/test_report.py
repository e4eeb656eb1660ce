"""Numbers, tables and figures say what they should, the same each time."""

from __future__ import annotations

import base64
import itertools
import random
import re
import xml.etree.ElementTree as ET
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from cs336_systems.bench.report import (
    COLOURS,
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    bytes_in_words,
    escaped,
    figure_style,
    lengths,
    logarithmic,
    number,
    percent,
    plural,
    seconds_in_words,
    verbatim,
    with_deviation,
    within,
)

NAN = float("nan")
# What stands in the place of a digit, of a point or comma, and of a space.
DIGIT, POINT, SPACE = "\u2007", "\u2008", "\u00a0"


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


@pytest.mark.parametrize(("mean", "std"), [(40.4321, 0.3149), (1234.5, 36.0), (0.5, 12.0), (2.5, NAN), (NAN, 0.1)])
def test_a_value_within_its_deviation_is_written_as_in_front_of_it(mean: float, std: float) -> None:
    assert within(mean, std) == with_deviation(mean, std).partition(" ± ")[0]


def test_what_lies_below_the_deviation_of_a_value_is_not_written() -> None:
    assert [within(1234.5678, std) for std in (250.0, 1.5, 0.015)] == ["1,235", "1,234.6", "1,234.568"]
    assert within(2.5, NAN) == number(2.5)
    assert within(None, 0.1) == within(NAN, 0.1) == MISSING


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
        "| :--- | --------: |",
        "| a    |      1.00 |",
        rf"| b\|c |    200{POINT}{DIGIT}{DIGIT} |",
        "",
        "a note",
    ]
    assert len({len(line) for line in text.splitlines()[2:6]}) == 1


def test_a_table_without_rows_is_still_a_table() -> None:
    table = Table.of(rows().iloc[:0], [Column("name", lambda row: row.name)], caption="None")
    assert "**None**" in str(table)


def test_the_pipe_table_is_the_text_without_caption_and_notes() -> None:
    columns = [Column("name", lambda row: row.name, "left"), Column("time (ms)", lambda row: number(row.time))]
    table = Table.of(rows(), columns, caption="Times", notes=["a note", "another"])
    assert str(table) == f"**Times**\n\n{table.pipe_table()}\n\na note\n\nanother"


def column_of(*texts: str, align: str = "right") -> list[str]:
    """The cells of a column of these texts, as a table holds them, padded to the width of the column."""
    summary = pd.DataFrame({"text": list(texts)})
    lines = Table.of(summary, [Column("x", lambda row: row.text, align)], caption="").pipe_table().splitlines()
    return [line.removeprefix("| ").removesuffix(" |") for line in lines[2:]]


def as_plain(cell: str) -> str:
    """A cell with ordinary characters in the place of the blanks that are as wide as they."""
    return cell.replace(DIGIT, " ").replace(POINT, " ").replace(SPACE, " ")


def points_of(cell: str) -> list[int]:
    """Where the figures of a cell have their point, or would have it."""
    figures = re.finditer(r"[\d,]+(\.\d+)?", as_plain(cell))
    return [figure.start(1) if figure[1] else figure.end() for figure in figures]


@pytest.mark.parametrize(
    "texts",
    [
        ("1.00", "200", "0.00123", "1,234", "12.5"),
        ("40.43 ± 0.31", "1,234 ± 36", "0.5123 ± 0.0012", "1,234,567.8 ± 1,200.0"),
        ("40.43 ± 0.31", "2.50", "1,234"),
        ("40.43 ± 0.31 ~", "1,234 ± 36 †", "9.1 ± 1.1 ~ †", "2.50 ~", "7.0 ± 2.0"),
        ("3.2", "oom", "10.25", MISSING, "missing"),
    ],
    ids=["numbers", "with deviations", "some without", "with marks", "with statuses"],
)
def test_decimal_points_stand_below_one_another(texts: tuple[str, ...]) -> None:
    cells = column_of(*texts)
    quantities = [points_of(cell) for cell in cells if re.search(r"\d", cell)]
    assert len({points[0] for points in quantities}) == 1
    assert len({points[1] for points in quantities if len(points) > 1}) <= 1
    assert len({len(cell) for cell in cells}) == 1
    # Nothing but blanks was added: neither a figure nor a mark was lost or moved.
    assert [as_plain(cell).split() for cell in cells] == [text.split() for text in texts]


def test_blanks_are_as_wide_as_what_they_stand_for() -> None:
    """A digit's blank below a digit, a point's below a point: in a proportional font they differ in width."""
    for texts in (("0.00123", "7"), ("40.43 ± 0.31", "2"), ("1.0 ± 1,200.5", "1.0 ± 3"), ("2.5 ~ †", "2.5")):
        longest, padded = column_of(*texts)
        for above, below in zip(longest, padded, strict=True):
            if below in (DIGIT, POINT, SPACE):
                expected = POINT if above in ".," else SPACE if above in " \u00a0" else DIGIT
                assert below == expected, (above, texts)


@pytest.mark.parametrize("text", ["oom", "missing", MISSING, "failed", "1.5 GiB", "12 %", "reference"])
def test_what_is_no_quantity_stays_as_it_is(text: str) -> None:
    assert column_of(text, "12.345")[0].strip(" ") == text
    assert [cell.strip(" ") for cell in column_of("1.5 ± 0.1 ~", text, text)[1:]] == [text] * 2


def test_a_column_of_names_has_no_blanks_put_in() -> None:
    assert column_of("1.5", "20", align="left") == ["1.5", "20 "]


def test_what_a_finding_says_beside_its_numbers_depends_on_them() -> None:
    wordings = {"so": ", as expected.", "but": ", which was not expected."}
    assert str(Finding.checked("Twice", True, **wordings)) == "Twice, as expected."
    assert str(Finding.checked("Twice", False, **wordings)) == "Twice, which was not expected."
    assert str(Findings([Finding("One."), Finding("Two.")])) == "- One.\n- Two."
    assert [plural(count, "case") for count in (1, 2)] == ["1 case", "2 cases"]


def records(*reasons: str | None) -> pd.DataFrame:
    """A row per record; one with a reason is missing."""
    statuses = ["ok" if reason is None else "missing" for reason in reasons]
    return pd.DataFrame({"status": statuses, "reason": reasons, "time": range(len(reasons))})


def sum_of(rows: pd.DataFrame) -> Finding | None:
    return Finding(f"The sum is {rows['time'].sum()}.") if len(rows) > 1 else None


def test_a_sentence_about_all_records_is_said_where_all_are_there() -> None:
    assert Finding.from_all(records(None, None, None), "The sum", sum_of) == [Finding("The sum is 3.")]


def test_one_missing_record_turns_a_sentence_into_what_to_run() -> None:
    (finding,) = Finding.from_all(records(None, "run `a`", None), "The sum", sum_of)
    assert str(finding) == "The sum cannot be told: no record of 1 of 3 cases; run `a`."
    assert finding.holds is None


def test_what_to_run_for_several_missing_records_is_said_once() -> None:
    (finding,) = Finding.from_all(records("run `a`", "run `b`", "run `a`"), "The sum", sum_of)
    assert str(finding) == "The sum cannot be told: no record of 3 of 3 cases; run `a`; run `b`."


def test_a_sentence_that_has_nothing_to_say_is_none() -> None:
    assert Finding.from_all(records(None), "The sum", sum_of) == []
    assert Finding.from_all(records(), "The sum", sum_of) == []


def figure() -> Figure:
    with figure_style():
        drawing = Figure(figsize=(3, 2))
        axes = drawing.subplots()
        axes.plot([1, 2, 3], [1.0, 20.0, 300.0], label="measured")
        logarithmic(axes.yaxis)
        axes.legend()
    return drawing


CAPTION = 'Times <fast> & "slow"'


def test_the_same_figure_gives_the_same_bytes_as_svg_and_png() -> None:
    one, two = Picture(CAPTION, figure), Picture(CAPTION, figure)
    assert (one.svg(), one.png()) == (one.svg(), one.png()) == (two.svg(), two.png())


def test_a_picture_is_well_formed_svg_titled_by_its_caption_or_png() -> None:
    picture = Picture(CAPTION, figure)
    root = ET.fromstring(picture.svg())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert CAPTION in [element.text for element in root.iter("{http://purl.org/dc/elements/1.1/}title")]
    assert picture.png().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_text_of_a_picture_is_outlines_and_nothing_is_fetched_for_it() -> None:
    svg = Picture(CAPTION, figure).svg()
    assert b"<text" not in svg
    assert b"font-face" not in svg
    references = re.findall(rb'href="([^"]*)"', svg)
    assert references
    assert [reference for reference in references if not reference.startswith(b"#")] == []


def test_jupyter_gets_the_svg_with_the_caption_escaped_below_it_and_a_console_the_caption() -> None:
    picture = Picture(CAPTION, figure)
    bundle = picture._repr_mimebundle_()
    source = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', bundle["text/html"])
    assert source is not None
    assert base64.b64decode(source[1]) == picture.svg()
    escaped = "Times &lt;fast&gt; &amp; &quot;slow&quot;"
    assert f"<figcaption>{escaped}</figcaption>" in bundle["text/html"]
    assert f'alt="{escaped}"' in bundle["text/html"]
    assert "<fast>" not in bundle["text/html"]
    assert base64.b64decode(bundle["image/png"]) == picture.png()
    assert bundle["text/plain"] == repr(picture) == CAPTION


def test_nothing_is_drawn_before_it_is_looked_at() -> None:
    drawn: list[int] = []

    def draw() -> Figure:
        drawn.append(1)
        return figure()

    picture = Picture(CAPTION, draw)
    assert repr(picture) == picture.caption
    assert drawn == []
    picture.svg()
    assert drawn == [1]


def test_colours_stay_apart_in_grey() -> None:
    lightness = sorted(
        0.2126 * int(colour[1:3], 16) + 0.7152 * int(colour[3:5], 16) + 0.0722 * int(colour[5:7], 16)
        for colour in COLOURS
    )
    assert all(after - before > 10 for before, after in itertools.pairwise(lightness))


# Text from elsewhere -------------------------------------------------------------------------------------------

# As the writeup is read, but for typographic quotes and dashes, and as GitHub reads it.
READERS = ("markdown-citations-subscript-superscript-strikeout-example_lists-smart", "gfm")
SIGNS = "ab1 `*_[](){}<>$|#~^!+-=.,:;/@%?'\"\\é±"


def shown_by_pandoc(texts: list[str], reader: str) -> list[str]:
    """What a reader sees of pieces of Markdown, each in a bold text of its own as a caption is."""
    import pypandoc

    source = "\n\n".join(f"**Table 1. {text}.**" for text in texts)
    plain = pypandoc.convert_text(source, "html", format=reader, extra_args=["--wrap=none"])
    parts = ET.fromstring(f"<body>{plain}</body>").findall("p")
    return ["".join(part.itertext()).removeprefix("Table 1. ").removesuffix(".") for part in parts]


def pieces_of_text() -> list[str]:
    """Texts of signs that mean something in Markdown, alone, in pairs, and at random; the same each time."""
    source = random.Random(336)
    mixed = ["".join(source.choices(SIGNS, k=source.randint(1, 12))) for _ in range(300)]
    pairs = [f"x{sign}y{sign} {sign}{sign}z{sign}{sign} {sign}" for sign in SIGNS]
    known = [
        "my_model:f [2*3]",
        "a | b",
        "[x](y)",
        "![x](y)",
        "<b>x</b>",
        "$x$",
        "~~x~~",
        "x^2^",
        "`x`",
        "{#id}",
        "\\*",
    ]
    return [" ".join(text.split()) for text in (*known, *pairs, *mixed) if text.strip()]


@pytest.mark.parametrize("reader", READERS)
def test_a_plain_text_that_is_escaped_is_shown_as_it_stands(reader: str) -> None:
    texts = pieces_of_text()
    assert shown_by_pandoc([escaped(text) for text in texts], reader) == texts


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["a &lt; b", "&amp;", "R&D", "&copy;", "&#65;"])
def test_what_looks_like_an_entity_is_shown_as_it_stands_when_escaped(text: str, reader: str) -> None:
    assert shown_by_pandoc([escaped(text)], reader) == [text]


@pytest.mark.parametrize("reader", READERS)
def test_a_text_from_elsewhere_is_shown_as_code_as_it_stands(reader: str) -> None:
    texts = [*pieces_of_text(), "a &lt; b", "``", "`", "x``y`z", "```", "ends with `"]
    assert shown_by_pandoc([verbatim(text) for text in texts], reader) == texts


def test_a_text_from_elsewhere_becomes_one_line_and_of_nothing_a_dash() -> None:
    assert verbatim("first\n  second\tthird ") == "`first second third`"
    assert verbatim("") == verbatim(" \n ") == MISSING
    assert escaped("first\n\n# second") == r"first \# second"


def test_a_caption_is_plain_text_and_a_note_is_markdown() -> None:
    table = Table.of(rows(), [Column("name", lambda row: row.name)], caption="of my_model_2 [*]", notes=["`run` *it*"])
    assert str(table).startswith(r"**of my\_model\_2 \[\*\]**")
    assert str(table).endswith("`run` *it*")
    assert table.caption == "of my_model_2 [*]"


# Axes of lengths -----------------------------------------------------------------------------------------------


def panel_of(measured: list[int]) -> Any:
    """A panel whose horizontal axis is one of lengths."""
    with figure_style():
        drawing = Figure(figsize=(3, 2))
        panel = drawing.subplots()
        panel.plot(measured, [1.0] * len(measured), marker="o")
        lengths(panel.xaxis, measured)
    drawing.draw_without_rendering()
    return panel


@pytest.mark.parametrize(
    ("measured", "names"),
    [
        ([256, 1024, 16_384], ["256", "1k", "16k"]),
        ([16_384, 256, 256, 1024], ["256", "1k", "16k"]),
        ([1000, 1536, 2048], ["1000", "1536", "2k"]),
        ([512], ["512"]),
        ([], []),
    ],
)
def test_an_axis_of_lengths_names_what_was_measured_each_once_and_nothing_else(
    measured: list[int], names: list[str]
) -> None:
    axis = panel_of(measured).xaxis
    assert [text.get_text() for text in axis.get_ticklabels()] == names
    assert list(axis.get_ticklocs()) == sorted(set(measured))
    assert list(axis.get_ticklocs(minor=True)) == []


def test_lengths_that_double_are_equally_far_apart() -> None:
    panel = panel_of([128, 256, 512, 1024])
    places = [panel.transData.transform((length, 1.0))[0] for length in (128, 256, 512, 1024)]
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert steps[0] > 0


def test_the_names_of_many_lengths_are_smaller_and_do_not_meet() -> None:
    many, few = panel_of([128 * 2**power for power in range(8)]), panel_of([128, 256])
    sizes = [panel.xaxis.get_ticklabels()[0].get_fontsize() for panel in (many, few)]
    assert sizes[0] < sizes[1]
    boxes = [text.get_window_extent() for text in many.xaxis.get_ticklabels()]
    assert all(before.x1 < after.x0 for before, after in itertools.pairwise(boxes))

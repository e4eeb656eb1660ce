"""What is wrong with a template is told by its file and line, and what is right becomes Markdown for each reader."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from step_records import record_of
from writeup_records import (
    TOY,
    anchors_of,
    copy_of_published,
    laptop_case,
    links_of,
    peak_records,
    publish,
    published_cpu,
    record_here,
    small_draft,
)

from cs336_systems.bench.fingerprint import source_hashes
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.errors import UserError, WorkbookWarning
from cs336_systems.experiments import transformer_step
from cs336_systems.presentation import transformer_step as presentation
from cs336_systems.repository import repository_root
from cs336_systems.workbook.draft import Draft
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.writeup import draft

INDEX = load_index()
EVERYTHING = '<% set here = machines("transformer_step", "p")[0] %>\n'
HERE = EVERYTHING.replace(" %>", '.where(autocast="none") %>')
MEASURED = 'here.case(size="tiny", context_length=128, phase="step")'
Render = Callable[..., Draft]


@pytest.fixture
def render(store: Store, tmp_path: Path) -> Render:
    """Renders a template, with others beside it, from one machine's record of one case."""
    publish(store, TOY, [record_of(laptop_case())])
    publish(store, TOY, peak_records(TOY), "machine_peaks")

    def rendered(text: str, others: dict[str, str] | None = None, **options: Any) -> Draft:
        for name, content in {"page.md": text, **(others or {})}.items():
            path = tmp_path / "templates" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        archive = Archive(store, INDEX, handout=options.get("handout"))
        return draft(archive, folder=tmp_path, template="page.md", templates=tmp_path / "templates")

    return rendered


# Faults of templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("<< nothing >>", "'nothing' is undefined"),
        ("<< handout.year >>", "'None' has no attribute 'year'"),
        ("<% if %>", "Expected an expression"),
        ("<% endfor %>", "unknown tag 'endfor'"),
        ("<< 1 | nofilter >>", "nofilter"),
        ('<% for here in machines("warmpu", "p") %><% endfor %>', "unknown experiment 'warmpu': did you mean 'warmup'"),
        ('<< presentation("warmpu").table >>', "warmpu"),
        ('<% include "problems/none.md" %>', "there is no template problems/none.md"),
        ("<< machines() >>", "missing"),
        ("<< 1 + 'a' >>", "TypeError"),
        ("<< 1 // 0 >>", "ZeroDivisionError"),
        ('<< link("none.py") >>', "there is no none.py to link to"),
        ('<< index.handout("2027") >>', "unknown year '2027'"),
        (f"<< {MEASURED}.mean_mss >>", "mean_mss"),
        ('<< here.case(siz="tiny") >>', "unknown column 'siz'"),
        ('<< here.case(size="tiny") >>', "say which"),
        ('<< here.where(siz="tiny").table() >>', "unknown column 'siz'"),
        ("<< here.tabel() >>", "tabel"),
        ('<< here.table("tabel") >>', "tabel"),
        ('<< together("transformer_step", siz="tiny") >>', "siz"),
        ('<< here.case(size="mini", phase="step").mean_ms >>', "between <% sentence %> and <% endsentence %>"),
        ("<< here.table() >><< here.table() >>", "two tables or figures are called 'tbl-p-transformer_step-toy-1c'"),
    ],
)
def test_a_fault_of_a_template_is_one_line_that_names_its_file_and_line(render: Render, line: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        render(f"{HERE}\nA paragraph.\n{line}\n")
    message = str(caught.value)
    assert message.startswith("page.md, line 4: ")
    assert told in message
    assert "\n" not in message


def test_a_fault_of_an_included_template_names_the_included_one(render: Render) -> None:
    with pytest.raises(UserError, match=r"^problems/part\.md, line 2: .*'nothing' is undefined$"):
        render('<% include "problems/part.md" %>\n', {"problems/part.md": "A line.\n<< nothing >>\n"})


def test_a_syntax_error_of_an_included_template_names_the_included_one(render: Render) -> None:
    with pytest.raises(UserError, match=r"^problems/part\.md, line 2: "):
        render('<% include "problems/part.md" %>\n', {"problems/part.md": "A line.\n<% if %>\n"})


def test_a_document_whose_template_is_not_there_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no template none\.md"):
        draft(Archive(store, INDEX), folder=tmp_path, template="none.md", templates=tmp_path)


def test_a_template_that_is_no_utf_8_is_an_error(store: Store, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"page\.md"):
        draft(Archive(store, INDEX), folder=tmp_path, template="page.md", templates=tmp_path)


@pytest.mark.parametrize("name", ["tbl-p-transformer_step-toy-1c", "fig-none"])
def test_a_reference_to_what_is_not_shown_names_template_and_line(render: Render, name: str) -> None:
    with pytest.raises(UserError, match=rf"^page\.md, line 2.*'{name}' is referred to and not shown: "):
        render(f'A line.\n<< ref("{name}") >>\n')


def test_a_reference_that_is_put_together_is_an_error_too(render: Render) -> None:
    with pytest.raises(UserError, match="'tbl-p-transformer_step-toy-1c' is referred to and not shown"):
        render(f'{HERE}<< here.ref("tbl") >>\n')


def test_a_table_and_a_figure_may_have_one_name(render: Render) -> None:
    assert list(render(f"{HERE}<< here.table() >>\n\n<< here.figure() >>\n").blocks) == [
        "tbl-p-transformer_step-toy-1c",
        "fig-p-transformer_step-toy-1c",
    ]


@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError, AttributeError, RuntimeError])
def test_a_defect_of_the_package_keeps_its_traceback(
    render: Render, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def defective(_: object) -> None:
        raise error("a defect")

    monkeypatch.setattr(presentation, "table", defective)
    with pytest.raises(error, match="a defect") as caught:
        render(f"{HERE}<< here.table() >>\n")
    assert not isinstance(caught.value, UserError)


# Sentences -----------------------------------------------------------------------------------------------------


def test_a_sentence_with_its_record_is_said(render: Render) -> None:
    text = f"{HERE}<% sentence %>\nIt took << number({MEASURED}.mean_ms) >> ms.\n<% endsentence %>\n"
    assert render(text).text == "It took 3.00 ms.\n"


def test_a_sentence_that_lacks_its_record_says_what_to_run_and_nothing_else(render: Render) -> None:
    case = 'here.case(size="mini", phase="step")'
    text = f"{HERE}<% sentence %>\nIt took << number({case}.mean_ms) >> ms.\n<% endsentence %>\nThe end.\n"
    said = render(text).text
    assert "It took" not in said
    assert "run `python scripts/measure.py transformer_step` on toy-1c" in said
    assert said.endswith("The end.\n")


def test_a_sentence_with_a_misspelt_name_is_a_fault_and_no_missing_record(render: Render) -> None:
    with pytest.raises(UserError, match=r"^page\.md, line 3: .*'nothing' is undefined$"):
        render(f"{HERE}<% sentence %>\n<< nothing >>\n<% endsentence %>\n")


def test_there_is_no_figure_of_a_grid_without_a_single_time(render: Render) -> None:
    document = render(f'{HERE}<< here.where(size="mini").figure() >>\nThe end.\n')
    assert document.blocks == {}
    assert document.text == "The end.\n"


def test_own_records_say_so_in_title_and_captions(render: Render, store: Store) -> None:
    record_here(store, [record_of(laptop_case())], machine=TOY)
    text = (
        '<% for here in machines("transformer_step", "p") %>\n# << here.title >>\n\n<< here.table() >>\n<% endfor %>\n'
    )
    shown = render(text).markdown("github", "figures")
    assert [line for line in shown.splitlines() if line.startswith("# ")] == [
        "# toy-1c, this checkout",
        "# toy-1c, published",
    ]
    assert [line.endswith("(this checkout)") for line in shown.splitlines() if line.startswith("**Table")] == [
        True,
        False,
    ]


def test_a_sentence_of_a_case_that_is_not_asked_for_is_dropped_without_a_word(render: Render) -> None:
    case = 'here.case(size="xl", phase="step")'
    text = f"{HERE}Before.\n<% sentence %>\nIt took << number({case}.mean_ms) >> ms.\n<% endsentence %>\nAfter.\n"
    assert render(text).text == "Before.\nAfter.\n"


@pytest.mark.parametrize("status", ["oom", "failed", "skipped"])
def test_a_sentence_of_a_case_without_a_time_says_how_it_ended(render: Render, store: Store, status: str) -> None:
    publish(store, TOY, [record_of(laptop_case(), status=status, reason="*too* large")])
    text = f"{HERE}<% sentence %>\nIt took << number({MEASURED}.mean_ms) >> ms.\n<% endsentence %>\n"
    assert render(text).text == (
        f"transformer_step (size tiny, context_length 128, phase step) on toy-1c ended as {status}: `*too* large`.\n"
    )


def test_a_sentence_with_the_deviation_of_a_single_step_is_said(render: Render, store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case(), measurement=Measurement({"step_ms": [3.0]}))])
    body = f"<% set step = {MEASURED} %>\nIt took << with_deviation(step.mean_ms, step.std_ms) >> ms."
    assert render(f"{HERE}<% sentence %>\n{body}\n<% endsentence %>\n").text == "It took 3.00 ms.\n"


@pytest.mark.parametrize("origin", ["this checkout", "published"])
def test_a_sentence_that_lacks_its_floor_names_the_command_of_the_ceilings(
    render: Render, store: Store, origin: str
) -> None:
    (store.published / TOY.name / "machine_peaks.jsonl").unlink()
    told = "run `python scripts/measure.py machine_peaks`"
    if origin == "published":
        told += " on toy-1c, then `python scripts/publish_records.py`"
    else:
        record_here(store, [record_of(laptop_case())], machine=TOY)
    text = f"{HERE}<% sentence %>\nIts floor is << number({MEASURED}.bound_ms) >> ms.\n<% endsentence %>\n"
    said = render(text).text
    assert said.startswith("The bound_ms of transformer_step (size tiny, ")
    assert said.endswith(f" is not known: not all ceilings of the machine are measured; {told}.\n")


# The writeup's own sentences -----------------------------------------------------------------------------------


def whole(store: Store, template: str = "writeup.md", **options: Any) -> str:
    return draft(Archive(store, INDEX, **options), folder=repository_root() / "writeup", template=template).text


SMALL = laptop_case("small")
STALE = {"source": {"measure": "another"}}


def laptop_records(**changes: Any) -> list[Record]:
    """Every case of the laptop's grid with a record of today's source, that of `small` in a step with changes."""
    now = {"source": source_hashes(transformer_step)}
    cases = [cell.case for cell in transformer_step.grid(device="cpu")]
    records = [record_of(case, fingerprint=now) for case in cases]
    assert SMALL in cases
    return [
        dataclasses.replace(each, **changes) if case == SMALL else each
        for case, each in zip(cases, records, strict=True)
    ]


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, ""),
        ({"noise": {"flags": ["disturbed"]}}, " ~"),
        ({"fingerprint": STALE}, " †"),
        ({"noise": {"flags": ["disturbed"]}, "fingerprint": STALE}, " ~ †"),
    ],
)
def test_the_sentence_of_a_noisy_or_stale_step_is_marked(store: Store, changes: dict[str, Any], marks: str) -> None:
    publish(store, TOY, laptop_records(**changes))
    publish(store, TOY, peak_records(TOY), "machine_peaks")
    text = whole(store)
    assert f"a full training step of `small` at context 128 takes 3.0 ± 1.0{marks} ms (" in text
    stale = [line for line in text.splitlines() if "Stale (†)" in line]
    expected = "- Stale (†) are 1 of 12 cases: they say nothing of today's source."
    assert stale == ([expected] if "†" in marks else [])


def test_how_many_cases_are_stale_is_counted(store: Store) -> None:
    records = laptop_records()
    records[:5] = [dataclasses.replace(each, fingerprint=STALE) for each in records[:5]]
    publish(store, TOY, records)
    assert "- Stale (†) are 5 of 12 cases: " in whole(store)


@pytest.mark.parametrize("origin", ["this checkout", "published"])
@pytest.mark.parametrize(
    ("known", "other", "cases"), [("transformer_step", "warmup", 4), ("warmup", "transformer_step", 12)]
)
def test_a_machine_without_a_record_of_an_experiment_appears_in_its_section_with_what_to_run(
    store: Store, origin: str, known: str, other: str, cases: int
) -> None:
    if origin == "published":
        publish(store, TOY, [record_of(laptop_case())], known)
    else:
        record_here(store, [record_of(laptop_case())], machine=TOY, experiment=known)
    text = whole(store)
    begin, end = ("### (b)", "### (c)") if other == "transformer_step" else ("### (c)", "On an A100")
    section = text[text.index(begin) : text.index(end)]
    told = f"run `python scripts/measure.py {other}`"
    told += " on toy-1c, then `python scripts/publish_records.py`" if origin == "published" else ""
    assert f"#### toy-1c, {origin}\n" in section
    assert f"\nNone of the {cases} cases that toy-1c is asked for is recorded: {told}.\n" in section
    assert "No machine has measured this" not in section


@pytest.mark.parametrize("experiment", ["machine_peaks", "transformer_step", "warmup"])
def test_without_the_last_record_of_an_experiment_its_section_says_what_to_run(tmp_path: Path, experiment: str) -> None:
    store = copy_of_published(tmp_path)
    sections = (
        draft(Archive(store, INDEX), folder=tmp_path).markdown("github", "figures").count(f"# {published_cpu()}, publ")
    )
    (store.published / published_cpu() / f"{experiment}.jsonl").unlink()
    text = draft(Archive(store, INDEX), folder=tmp_path).markdown("github", "figures")
    told = (
        f"run `python scripts/measure.py {experiment}` on {published_cpu()}, then `python scripts/publish_records.py`"
    )
    assert told in text
    assert text.count(f"# {published_cpu()}, published") == sections > 2
    if experiment == "machine_peaks":
        assert f"**Table 1.** The ceilings of {published_cpu()}\n" in text
        assert f"\nNot known: bfloat16 products, float32 products, memory; {told}.\n" in text
    else:
        assert re.search(
            rf"\nNone of the \d+ cases that {published_cpu()} is asked for is recorded: {re.escape(told)}\.\n", text
        )


def test_the_rest_is_rendered_where_a_folder_of_records_lacks_its_machine(store: Store) -> None:
    record_here(store, [record_of(laptop_case())])
    record_here(store, [record_of(laptop_case())], machine=TOY)
    (store.local / "toy-1c" / "machine.json").unlink()
    with pytest.warns(WorkbookWarning, match=r"^the records of toy-1c are left out: "):
        text = whole(store)
    assert f"#### {this_machine('cpu').name}, this checkout" in text
    assert "toy-1c" not in text


# Numbers and references ----------------------------------------------------------------------------------------

SEVERAL = (
    f"{HERE}See << here.ref('tbl') >> and << here.ref('fig') >> and << ref('tbl-first') >>.\n\n"
    "<< show('first', presentation('transformer_step').table(here.evidence.summary)) >>\n\n"
    "<< here.figure() >>\n\n<< here.table() >>\n\nAbove: << ref('tbl-first') >>.\n"
)


def test_tables_and_figures_are_numbered_apart_as_they_appear(render: Render) -> None:
    document = render(SEVERAL)
    assert [(name, document.label(name)) for name in document.blocks] == [
        ("tbl-first", "Table 1"),
        ("fig-p-transformer_step-toy-1c", "Figure 1"),
        ("tbl-p-transformer_step-toy-1c", "Table 2"),
    ]


def test_the_order_of_numbers_is_that_of_the_text_and_not_that_of_the_calls(render: Render) -> None:
    document = render(
        f"{HERE}<% set late = here.table() %>\n"
        "<< show('first', presentation('transformer_step').table(here.evidence.summary)) >>\n\n<< late >>\n"
    )
    assert [document.label(name) for name in ("tbl-first", "tbl-p-transformer_step-toy-1c")] == ["Table 1", "Table 2"]


PARTS = (
    f"{HERE}"
    '<% for size in ("tiny", "mini") %><% set part = here.where(size=size).called(size) %>\n'
    "See << part.ref('tbl') >> and << part.ref('fig') >>.\n\n<< part.table() >>\n\n<< part.figure() >>\n\n"
    "<% endfor %>\n"
)


@pytest.mark.parametrize("flavour", ["github", "html", "typst"])
def test_two_parts_of_a_grid_have_names_of_their_own_and_references_to_each(
    render: Render, store: Store, flavour: Any
) -> None:
    publish(store, TOY, [record_of(laptop_case()), record_of(laptop_case("mini"))])
    document = render(PARTS)
    names = [f"{kind}-p-transformer_step-{size}-toy-1c" for size in ("tiny", "mini") for kind in ("tbl", "fig")]
    assert list(document.blocks) == names
    assert [{row[0] for row in document.tables[name].rows} for name in names[::2]] == [{"tiny"}, {"mini"}]
    text = document.markdown(flavour, "figures")
    for number, (table, figure) in enumerate(zip(names[::2], names[1::2], strict=True), start=1):
        assert f"See [Table {number}](#{table}) and [Figure {number}](#{figure})." in text


def test_two_parts_without_names_of_their_own_are_a_fault(render: Render) -> None:
    with pytest.raises(UserError, match="two tables or figures are called 'tbl-p-transformer_step-toy-1c'"):
        render(PARTS.replace(".called(size)", ""))


def test_records_can_be_shown_by_another_presentation_under_its_name(render: Render, store: Store) -> None:
    publish(store, TOY, [record_of(laptop_case(autocast=each)) for each in ("none", "bfloat16")])
    shown = f"{EVERYTHING}<< here.table() >>\n\n<< here.presented_by('mixed_precision').table() >>\n"
    document = render(shown)
    own, other = document.tables.values()
    assert list(document.blocks) == [
        "tbl-p-transformer_step-toy-1c",
        "tbl-p-transformer_step-mixed_precision-toy-1c",
    ]
    assert "times as fast" in other.headings
    assert "times as fast" not in own.headings
    with pytest.raises(UserError, match="unknown experiment 'mixed'"):
        render(shown.replace("mixed_precision", "mixed"))


@pytest.mark.parametrize("flavour", ["github", "html", "typst"])
def test_references_carry_the_numbers_of_what_they_name_forward_ones_too(render: Render, flavour: Any) -> None:
    text = render(SEVERAL).markdown(flavour, "figures")
    assert (
        "See [Table 2](#tbl-p-transformer_step-toy-1c) and [Figure 1](#fig-p-transformer_step-toy-1c) "
        "and [Table 1](#tbl-first)." in text
    )
    assert "Above: [Table 1](#tbl-first)." in text
    assert [text.count(f"**{label}.**") for label in ("Table 1", "Table 2", "Figure 1")] == [1, 1, 1]


# Flavours ------------------------------------------------------------------------------------------------------


def test_for_github_no_attribute_or_div_of_pandoc_is_left() -> None:
    text = small_draft().markdown("github", "figures")
    assert "{#" not in text
    assert ":::" not in text


def test_for_github_every_link_within_the_text_has_its_anchor() -> None:
    text = small_draft().markdown("github", "figures")
    inside = {target[1:] for target in links_of(text) if target.startswith("#")}
    assert inside == {"fig-line", "tbl-squares", "end"}
    assert inside <= anchors_of(text)


def test_for_github_an_anchor_stands_before_its_heading() -> None:
    text = small_draft().markdown("github", "figures")
    assert '<a id="first"></a>\n\n# First\n' in text


@pytest.mark.parametrize("flavour", ["html", "typst"])
def test_for_pandoc_headings_tables_and_figures_keep_their_ids(flavour: Any) -> None:
    text = small_draft().markdown(flavour, "figures")
    for each in ("# First {#first}", "::: {#tbl-squares ", "(figures/line.svg){#fig-line}"):
        assert each in text


@pytest.mark.parametrize("flavour", ["github", "html", "typst"])
def test_figures_are_looked_for_in_the_folder_that_is_named(flavour: Any) -> None:
    assert "(some/where/line.svg)" in small_draft().markdown(flavour, "some/where")


@pytest.mark.parametrize("flavour", ["github", "html", "typst"])
def test_no_mark_is_left_and_what_stands_below_a_table_is_told_once(flavour: Any) -> None:
    text = small_draft().markdown(flavour, "figures")
    assert not set("\ue000\ue001\ue002") & set(text)
    assert text.count("A note below.") == 1

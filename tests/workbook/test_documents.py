"""One draft becomes Markdown, an HTML file that needs nothing beside it, and a PDF: all of them whole, or an error."""

from __future__ import annotations

import dataclasses
import html as html_module
import io
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import nbformat
import pypandoc
import pytest
from pypdf import PdfReader
from step_records import record_of
from writeup_records import TOY, draw_a_line, laptop_case, peak_records, publish, small_draft, small_table

from cs336_systems.bench.records import Store
from cs336_systems.bench.report import Picture, Table
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root
from cs336_systems.workbook import documents
from cs336_systems.workbook.documents import converted, notebook_page, write_all
from cs336_systems.workbook.draft import Draft, block_mark
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.writeup import draft


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return converted(small_draft(), "page")


@pytest.fixture(scope="module")
def html(files: dict[str, bytes]) -> str:
    return files["page.html"].decode()


@pytest.fixture(scope="module")
def pdf(files: dict[str, bytes]) -> PdfReader:
    return PdfReader(io.BytesIO(files["page.pdf"]))


def values(html: str, attribute: str) -> list[str]:
    return re.findall(rf'\s{attribute}="([^"]*)"', html)


# Files ---------------------------------------------------------------------------------------------------------


def test_a_draft_becomes_a_file_per_format_and_one_per_figure(files: dict[str, bytes]) -> None:
    assert sorted(files) == ["figures/line.svg", "page.html", "page.md", "page.pdf"]


def test_only_what_is_asked_for_is_converted() -> None:
    assert sorted(converted(small_draft(), "page", ["md"])) == ["figures/line.svg", "page.md"]


def test_an_unknown_format_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown format 'docx'.*md, html, pdf"):
        converted(small_draft(), "page", ["docx"])  # type: ignore[list-item]


def test_the_same_draft_gives_the_same_bytes(files: dict[str, bytes]) -> None:
    again = converted(small_draft(), "page")
    assert {name for name in files if again[name] != files[name]} == set()


def test_a_figure_is_svg_that_refers_to_nothing_outside(files: dict[str, bytes]) -> None:
    root = xml.etree.ElementTree.fromstring(files["figures/line.svg"])
    links = [value for each in root.iter() for name, value in each.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)


# HTML ----------------------------------------------------------------------------------------------------------


def test_the_html_file_loads_nothing_from_elsewhere(html: str) -> None:
    assert [value for value in values(html, "src") if not value.startswith("data:")] == []
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\((?!['\"]?(?:data:|#))", html)
    assert [value for value in values(html, "href") if re.match(r"\w+:|//|/", value)] == []


def test_every_link_within_the_html_file_has_its_place(html: str) -> None:
    inside = {value[1:] for value in values(html, "href") if value.startswith("#")}
    assert inside >= {"tbl-squares", "fig-line", "end", "first"}
    assert inside <= set(values(html, "id"))
    assert len(values(html, "id")) == len(set(values(html, "id")))


def test_mathematics_is_mathml_and_no_tex(html: str) -> None:
    assert html.count("<math") == 2
    assert "$" not in re.sub(r"<annotation.*?</annotation>", "", html, flags=re.DOTALL)


def test_the_html_file_has_the_title_the_table_and_its_note(html: str) -> None:
    assert "<title>A small document</title>" in html
    assert re.search(r"<caption>.*Table 1\..*Squares.*</caption>", html, flags=re.DOTALL)
    assert "row-1" in html
    assert "A note below." in html


# PDF -----------------------------------------------------------------------------------------------------------


def test_the_pdf_has_the_title_the_table_and_the_captions(pdf: PdfReader) -> None:
    text = "\n".join(page.extract_text() for page in pdf.pages).replace("\u2011", "-")
    for each in ("A small document", "Table 1", "Squares", "row-1", "A note below.", "Figure 1", "A line"):
        assert each in text


def test_every_link_within_the_pdf_leads_to_a_page(pdf: PdfReader) -> None:
    names = pdf.named_destinations
    pages = {page.indirect_reference for page in pdf.pages}
    found = 0
    for page in pdf.pages:
        for annotation in (each.get_object() for each in page.get("/Annots", [])):
            target = annotation.get("/Dest", annotation.get("/A", {}).get("/D") if "/A" in annotation else None)
            if target is None:
                continue
            found += 1
            if isinstance(target, str):
                assert target in names
            else:
                assert target[0].indirect_reference in pages if hasattr(target[0], "indirect_reference") else True
    assert found >= 4


def test_a_long_table_repeats_its_heading_on_every_page_that_it_spans() -> None:
    content = converted(small_draft(rows=150), "page", ["pdf"])["page.pdf"]
    pages = [page.extract_text().replace("\u2011", "-") for page in PdfReader(io.BytesIO(content)).pages]
    spanned = [text for text in pages if re.search(r"row-\d", text)]
    assert len(spanned) > 1
    assert all("its square" in text for text in spanned)
    assert {f"row-{number}" for number in range(150)} <= set(re.findall(r"row-\d+", "\n".join(pages)))


# Faults --------------------------------------------------------------------------------------------------------


def test_a_font_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="no such font"):
        converted(small_draft(), "page", ["pdf"], font="No Such Font")


@pytest.mark.parametrize("format", ["html", "pdf"])
def test_mathematics_that_pandoc_cannot_read_is_an_error(format: documents.Format) -> None:
    with pytest.raises(UserError, match=r"pandoc cannot convert the writeup to (html5|typst): .*frac"):
        converted(small_draft(more="$$ \\frac{1 $$"), "page", [format])


@pytest.mark.parametrize("format", ["html", "pdf"])
def test_a_figure_that_is_not_there_is_an_error(format: documents.Format) -> None:
    with pytest.raises(UserError, match=r"none\.svg"):
        converted(small_draft(more="![A figure](figures/none.svg)"), "page", [format])


def test_what_typst_cannot_set_is_an_error() -> None:
    with pytest.raises(UserError, match="Typst cannot set the PDF: "):
        converted(small_draft(more="```{=typst}\n#nothing()\n```"), "page", ["pdf"])


def test_a_document_without_a_title_is_an_error() -> None:
    with pytest.raises(UserError, match="must begin with its title"):
        converted(Draft("A line.\n", {}), "page", ["html"])


@pytest.mark.parametrize("tool", ["typst", "pypandoc", "jinja2"])
def test_a_tool_that_is_missing_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(UserError, match=rf"{tool}.*pip install -e '\.\[writeup\]'"):
        converted(small_draft(), "page", ["md"])


def test_every_character_that_a_table_may_hold_comes_through() -> None:
    odd = dataclasses.replace(small_table(), rows=(("a|b * _c_ <d> $e$ #f @g ~h^i", "1"),), caption="Odd: 100 % of $5")
    files = converted(Draft(f"# Odd\n\n{block_mark('tbl-odd')}\n", {"tbl-odd": odd}), "page", ["html", "pdf"])
    pdf = "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(files["page.pdf"])).pages)
    assert "100 % of $5" in pdf
    assert "100 % of $5" in files["page.html"].decode()


LONG = "w" * 300
ODD = "|pipe| *x* <b> $a$ {#z} `tick` @y"
"""A message as programs write them, full of what is markup elsewhere."""


@pytest.fixture(scope="module")
def with_reason(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The writeup of a machine one of whose cases failed, with a reason of two lines and a very long word."""
    published = tmp_path_factory.mktemp("published")
    (published / "reference").symlink_to(repository_root() / "data" / "reference")
    store = Store(local=published / "none", published=published)
    failed = record_of(laptop_case("small"), status="failed", reason=f"{ODD}\n\n  and {LONG} \n# end")
    publish(store, TOY, [record_of(laptop_case()), failed])
    publish(store, TOY, peak_records(TOY), "machine_peaks")
    return converted(draft(Archive(store, load_index()), folder=repository_root() / "writeup"), "page")


AS_CODE = f"`` {ODD} and {LONG} # end ``"


def told_times(files: dict[str, bytes]) -> int:
    """How often the writeup tells the reason: once per table and sentence, of every section on steps."""
    return files["page.md"].decode().count(AS_CODE)


def test_a_reason_of_a_record_is_code_for_github(with_reason: dict[str, bytes]) -> None:
    text = with_reason["page.md"].decode()
    assert f"failed: step of small at context 128: {AS_CODE}\n" in text
    assert f" on toy-1c ended as failed: {AS_CODE}.\n" in text


def test_a_reason_of_a_record_is_verbatim_in_html(with_reason: dict[str, bytes]) -> None:
    text = with_reason["page.html"].decode()
    codes = [html_module.unescape(code) for code in re.findall(r"<code>([^<]*)</code>", text)]
    assert codes.count(f"{ODD} and {LONG} # end") == told_times(with_reason)


def test_a_reason_of_a_record_is_verbatim_in_the_pdf(with_reason: dict[str, bytes]) -> None:
    reader = PdfReader(io.BytesIO(with_reason["page.pdf"]))
    text = "".join(page.extract_text() for page in reader.pages)
    assert re.sub(r"\s", "", text).count(re.sub(r"\s", "", f"{ODD} and {LONG} # end")) == told_times(with_reason)


def test_a_long_word_of_a_reason_stays_on_the_page(with_reason: dict[str, bytes]) -> None:
    text = "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(with_reason["page.pdf"])).pages)
    words = [len(word) for word in text.replace("\u200b", "").split() if set(word) == {"w"}]
    assert sum(words) == told_times(with_reason) * len(LONG)
    assert max(words) <= len(LONG) / 2, "the word goes on over several lines"


@pytest.fixture(scope="module")
def with_caption() -> dict[str, bytes]:
    odd = "Odd [x]_y_* and *a* <b> `c` $d$ {#e} @f |g| 100 % #h ~i ^j \\k 1_000_000"
    blocks: dict[str, Table | Picture] = {
        "tbl-odd": dataclasses.replace(small_table(), caption=odd),
        "fig-odd": Picture(odd, draw_a_line),
    }
    return converted(Draft(f"# Odd\n\n{block_mark('tbl-odd')}\n\n{block_mark('fig-odd')}\n", blocks), "page")


SHOWN = "Odd [x]_y_* and *a* <b> `c` $d$ {#e} @f |g| 100 % #h ~i ^j \\k 1_000_000"


def test_a_caption_comes_through_for_github(with_caption: dict[str, bytes]) -> None:
    text = with_caption["page.md"].decode()
    for label in ("Table 1", "Figure 1"):
        (line,) = re.findall(rf"\*\*{label}\.\*\* (.*)\n", text)
        assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line) == SHOWN
        # As CommonMark reads it, by another reader than ours.
        page = pypandoc.convert_text(line, "html", format="gfm", extra_args=["--wrap=none"])
        assert html_module.unescape(page.strip()) == f"<p>{SHOWN}</p>"


def test_a_caption_comes_through_in_html(with_caption: dict[str, bytes]) -> None:
    text = with_caption["page.html"].decode()
    for label, tag in (("Table 1", "caption"), ("Figure 1", "figcaption")):
        (caption,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, flags=re.DOTALL)
        plain = html_module.unescape(re.sub(r"</?(?:strong|span|p)\b[^>]*>", "", caption))
        assert " ".join(plain.split()) == f"{label}. {SHOWN}"


def test_a_caption_comes_through_in_the_pdf(with_caption: dict[str, bytes]) -> None:
    text = "".join(page.extract_text() for page in PdfReader(io.BytesIO(with_caption["page.pdf"])).pages)
    bare = re.sub(r"\s", "", text.replace("\u2011", "-"))
    for label in ("Table 1", "Figure 1"):
        assert re.sub(r"\s", "", f"{label}. {SHOWN}") in bare


# Writing -------------------------------------------------------------------------------------------------------


def test_files_are_written_below_the_folder_with_their_content(tmp_path: Path) -> None:
    write_all({"page.md": b"1", "figures/line.svg": b"2"}, tmp_path / "new")
    assert (tmp_path / "new" / "page.md").read_bytes() == b"1"
    assert (tmp_path / "new" / "figures" / "line.svg").read_bytes() == b"2"


def test_where_a_file_cannot_be_written_it_is_named_and_the_documents_are_those_of_before(tmp_path: Path) -> None:
    write_all({"page.md": b"old", "page.html": b"old"}, tmp_path)
    (tmp_path / "figures" / "line.svg").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*figures/line\.svg"):
        write_all({"page.md": b"new", "page.html": b"new", "figures/line.svg": b"new"}, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("page.md", "page.html")] == [b"old", b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "page.html", "page.md"]


def test_a_document_that_cannot_be_written_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "page.pdf").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*page\.pdf"):
        write_all({"page.pdf": b"new", "page.html": b"new"}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.pdf"]
    assert (tmp_path / "page.html").read_bytes() == b"new"


def test_a_figure_that_cannot_be_drawn_is_found_before_anything_is_converted() -> None:
    def fails() -> None:
        raise RuntimeError("a defect")

    broken = dataclasses.replace(small_draft(), blocks={"fig-line": Picture("A line", fails)})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a defect"):
        converted(broken, "page")


# Notebooks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("executed") / "01.ipynb"
    table = "**Squares**\n\n| number | square |\n| ---: | ---: |\n| 12 | 144 |\n"
    cells = [
        nbformat.v4.new_markdown_cell("# A heading\n\nA floor $t \\ge F$ and\n\n$$ \\frac{F}{R} $$"),
        nbformat.v4.new_code_cell(
            "table",
            execution_count=1,
            outputs=[nbformat.v4.new_output("display_data", data={"text/markdown": table, "text/plain": "table"})],
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return notebook_page(path, "A notebook").decode()


def test_the_page_of_a_notebook_has_its_mathematics_as_mathml(page: str) -> None:
    assert page.count("<math") == 2
    assert "mathjax" not in page.lower()


def test_the_page_of_a_notebook_has_its_tables_and_its_title(page: str) -> None:
    assert re.search(r"<td[^>]*>144</td>", page)
    assert "<title>A notebook</title>" in page


def test_the_page_of_a_notebook_asks_the_network_for_nothing(page: str) -> None:
    assert "<script" not in page
    loading = re.findall(r"<(?:link|img|iframe|script)\b[^>]*>", page)
    assert [tag for tag in loading if re.search(r"https?:|//", re.sub(r'"data:[^"]*"', "", tag))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?:https?:|//)", page)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe", b'{"nbformat": 4}', b""])
def test_a_notebook_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "01.ipynb"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the executed notebook .*01\.ipynb"):
        notebook_page(path, "A notebook")


def test_a_notebook_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the executed notebook .*none\.ipynb"):
        notebook_page(tmp_path / "none.ipynb", "A notebook")


def test_without_nbconvert_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbconvert", None)
    with pytest.raises(UserError, match=r"nbconvert.*pip install -e '\.\[notebooks\]'"):
        notebook_page(tmp_path / "none.ipynb", "A notebook")

"""A draft to files that people open: Markdown, one HTML file that works offline, and PDF.

Pandoc turns Markdown into HTML (mathematics as MathML, pictures inside the file) and into Typst, and Typst sets the
PDF with the fonts that come with it. Both are wheels: no LaTeX, no network, under a second. Everything is converted
before the first file is written, so that a fault leaves the documents of the last time whole.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cs336_systems.errors import UserError, first_line, unknown_name
from cs336_systems.files import write_atomically
from cs336_systems.workbook.draft import Draft, picture_file
from cs336_systems.workbook.writeup import templates_folder

Format = Literal["md", "html", "pdf"]
FORMATS: tuple[Format, ...] = get_args(Format)
FONT = "Libertinus Serif"
"""Comes with Typst, so that the PDF is the same everywhere."""
_FIGURES = "figures"
# `@name` is no citation here, and single tildes and carets are no sub- and superscripts but our marks.
_READER = "markdown-citations-subscript-superscript-strikeout-example_lists"
_OPTIONS = ("--standalone", "--wrap=none", "--columns=10000", "--fail-if-warnings=true", "--syntax-highlighting=none")


def require_tools(formats: Iterable[str] = FORMATS) -> None:
    """Raise a UserError for an unknown format, or where what the formats need is not installed."""
    for format in formats:
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
    try:
        import jinja2
        import pypandoc
        import typst

        pypandoc.get_pandoc_version()
    except (ImportError, OSError) as error:
        message = str(error).strip().partition("\n")[0]
        raise UserError(f"the writeup needs its tools ({message}): pip install -e '.[writeup]'") from error
    del jinja2, typst


def converted(draft: Draft, name: str, formats: Iterable[Format] = FORMATS, *, font: str = FONT) -> dict[str, bytes]:
    """The files of a document by their names: `name.md`, `name.html`, `name.pdf`, and for Markdown its figures.

    Raises:
        UserError: pandoc or Typst cannot convert it, or a font is missing; the message is theirs.
    """
    require_tools(formats)
    svgs = {picture_file(block): picture.svg() for block, picture in draft.pictures.items()}
    files: dict[str, bytes] = {}
    if "md" in formats:
        files[f"{name}.md"] = draft.markdown("github", _FIGURES).encode()
        files |= {f"{_FIGURES}/{file}": svg for file, svg in svgs.items()}
    with tempfile.TemporaryDirectory(prefix="cs336-writeup-") as scratch:
        folder = Path(scratch)
        for file, svg in svgs.items():
            write_atomically(folder / _FIGURES / file, svg)
        if "html" in formats:
            files[f"{name}.html"] = _html(draft, folder).encode()
        if "pdf" in formats:
            files[f"{name}.pdf"] = _pdf(draft, folder, font)
    return files


def write_all(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files below `folder`, each whole, the documents after the figures they show.

    Raises:
        UserError: one cannot be written; the old one of that name is untouched.
    """
    for name in sorted(files, key=lambda name: ("/" not in name, name)):
        write_atomically(folder / name, files[name])


def _html(draft: Draft, folder: Path) -> str:
    options = ("--mathml", "--embed-resources", "--toc", "--toc-depth=3")
    return _pandoc(draft.markdown("html", _FIGURES), "html5", "page.html", folder, *options)


def _pdf(draft: Draft, folder: Path, font: str) -> bytes:
    source = _pandoc(draft.markdown("typst", _FIGURES), "typst", "page.typ", folder, "--variable", f"mainfont={font}")
    (folder / "main.typ").write_text(source, encoding="utf-8")
    return _typeset(folder / "main.typ", system_fonts=font != FONT)


def _typeset(source: Path, *, system_fonts: bool) -> bytes:
    """The PDF of a Typst file; without the system's fonts it is the same on every machine.

    Raises:
        UserError: Typst cannot set it, or warns of something, such as a font that is missing: it would take another.
    """
    import typst

    try:
        content, warnings = typst.compile_with_warnings(
            source, root=source.parent, format="pdf", ignore_system_fonts=not system_fonts
        )
    except typst.TypstError as error:
        raise UserError(f"Typst cannot set the PDF: {_told(error)}") from error
    if warnings:
        raise UserError(f"Typst would not set the PDF as asked: {'; '.join(map(_told, warnings))}")
    return bytes(content)


def _told(problem: Any) -> str:
    """A message of Typst's with its hints, in one line."""
    hints = [str(hint) for hint in getattr(problem, "hints", [])]
    return "; ".join([str(getattr(problem, "message", problem)).partition("\n")[0], *hints])


def _pandoc(markdown: str, to: str, template: str, folder: Path, *options: str) -> str:
    """`markdown` in another format, its title taken from its first heading."""
    import pypandoc

    title, body = _split_title(markdown)
    arguments = [
        *_OPTIONS,
        *options,
        f"--template={templates_folder() / template}",
        f"--resource-path={folder}",
        f"--metadata=title={title}",
    ]
    try:
        return str(pypandoc.convert_text(body, to, format=_READER, extra_args=arguments))
    except (RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"pandoc cannot convert the writeup to {to}: {message}") from error


def _split_title(markdown: str) -> tuple[str, str]:
    found = re.match(r"# (.+)\n", markdown)
    if found is None:
        raise UserError("a document must begin with its title, a line like `# Title`")
    return found[1], markdown[found.end() :]


# Executed notebooks --------------------------------------------------------------------------------------------

_MATHEMATICS = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\begin\{")


def notebook_page(executed: Path, title: str) -> bytes:
    """An executed notebook as one HTML file that works offline.

    nbconvert's own page loads MathJax, RequireJS and widgets from elsewhere; here pandoc writes mathematics as MathML.

    Raises:
        UserError: nbconvert is not installed, or the notebook cannot be read.
    """
    try:
        import nbformat
        from jinja2 import pass_context
        from nbconvert import HTMLExporter
    except ImportError as error:
        raise UserError(f"pages of notebooks need nbconvert ({error}): pip install -e '.[notebooks]'") from error

    try:
        notebook = nbformat.read(executed, as_version=4)
    except Exception as error:  # of a damaged file nbformat raises errors of many kinds
        raise UserError(f"cannot read the executed notebook {executed}: {first_line(error)}") from error
    if not (templates_folder() / "notebook").is_dir():
        raise UserError(f"pages of notebooks need their template, the folder {templates_folder() / 'notebook'}")
    exporter = HTMLExporter(template_name="notebook", extra_template_basedirs=[str(templates_folder())])
    stock = exporter.markdown2html

    @pass_context
    def markdown2html(context: Any, source: str) -> str:
        return _with_mathml(source) if _MATHEMATICS.search(source) else str(stock(context, source))

    exporter.register_filter("markdown2html", markdown2html)
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    return page.encode()


def _with_mathml(markdown: str) -> str:
    import pypandoc

    options = ["--mathml", "--wrap=none", "--columns=10000"]
    return str(pypandoc.convert_text(markdown, "html5", format=_READER, extra_args=options))

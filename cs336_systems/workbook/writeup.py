"""The writeup as a text: Jinja2 templates whose tables, figures and numbers come from the records.

    writeup/templates/writeup.md            the whole; one section per problem, in the handouts' order
    writeup/templates/problems/<id>.md      the section of a problem that is built, or of the part that is
    writeup/templates/headline.md           the head of the README

A template asks for evidence, `<% for here in machines("warmup") %>`, and shows it: `<< here.table() >>`,
`<< here.findings() >>`. A sentence with numbers of its own stands in `<% sentence %> … <% endsentence %>` and takes
them by `here.case(size="small", …)`: where the record is missing, the whole sentence becomes a statement of what to
run. Undefined names, unknown experiments and references to what is not shown are errors that name file and line.

The delimiters `<< >>` and `<% %>` leave `{#…}` to pandoc. What comes out is a `Draft`.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cs336_systems.bench import report
from cs336_systems.bench.report import Finding, Findings, Picture, Table
from cs336_systems.errors import UserError, first_line, unknown_name
from cs336_systems.experiments import load_experiment
from cs336_systems.presentation import load_presentation
from cs336_systems.repository import repository_root
from cs336_systems.workbook.draft import DanglingReference, Draft, block_mark, reference_mark
from cs336_systems.workbook.evidence import Archive, Evidence, NotAsked, Unmeasured
from cs336_systems.workbook.index import Problem

if TYPE_CHECKING:
    import jinja2


def templates_folder() -> Path:
    return repository_root() / "writeup" / "templates"


class _Blocks:
    """Tables and figures as a template shows them; each gets a mark in the text."""

    def __init__(self) -> None:
        self.shown: dict[str, Table | Picture] = {}

    def show(self, name: str, content: Table | Picture | Finding | Findings) -> str:
        """The mark of a table or figure called `name`, or the sentences themselves.

        Raises:
            UserError: another of that kind has the name.
        """
        if isinstance(content, Finding | Findings):
            return str(content)
        known = f"{'tbl' if isinstance(content, Table) else 'fig'}-{name}"
        if known in self.shown:
            raise UserError(f"two tables or figures are called {known!r}: give one another name")
        self.shown[known] = content
        return block_mark(known)


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """One machine's evidence as a template sees it; `problem` is part of the names of what it shows."""

    evidence: Evidence
    problem: str
    _blocks: _Blocks
    part: str = ""
    presenter: str = ""
    """The module of `presentation/` that shows it, where that is not the experiment's own."""

    @property
    def machine(self) -> str:
        return self.evidence.machine

    @property
    def title(self) -> str:
        return f"{self.machine}, {self.evidence.origin}"

    @property
    def is_own(self) -> bool:
        """Whether these are this checkout's records, not the published."""
        return self.evidence.origin == "this checkout"

    @property
    def beyond(self) -> int:
        return self.evidence.beyond

    @property
    def measured(self) -> int:
        """How many of the cases have a time."""
        return int(self.evidence.shown["status"].eq("ok").sum()) if len(self.evidence.shown) else 0

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.problem, self.evidence.experiment, self.part, self.evidence.name)))

    @property
    def recorded(self) -> int:
        """How many of the cases have a record."""
        return self.evidence.recorded

    def where(self, **fields: Any) -> Exhibit:
        """The part of the evidence whose columns have these values, where a problem asks for a part of a grid."""
        return dataclasses.replace(self, evidence=self.evidence.where(**fields))

    def presented_by(self, presenter: str) -> Exhibit:
        """The same shown by another module of `presentation/`, whose name becomes part of its table's and figure's."""
        return dataclasses.replace(self, presenter=presenter, part=presenter)

    def called(self, part: str) -> Exhibit:
        """The same with another name for its table and figure, where one problem shows several parts of a grid."""
        return dataclasses.replace(self, part=part)

    def table(self, function: str = "table") -> str:
        """The table that the experiment's presentation makes of this evidence; nothing if no case has a record."""
        return self._blocks.show(self.name, self._present(function)) if self._to_show else ""

    def figure(self, function: str = "figure") -> str:
        """Its figure; nothing if no case has a time."""
        return self._blocks.show(self.name, self._present(function)) if self.measured else ""

    def ceilings(self) -> str:
        """The table of what this machine's times are bounded with."""
        made = load_presentation("machine_peaks").ceilings(self.evidence.shown, self.evidence.peaks, self.machine)
        return self._blocks.show(self.name, self._told_apart(made))

    def findings(self, function: str = "findings") -> str:
        """The sentences about this evidence, or what to run where there is none of it."""
        cases = report.plural(report.number_of_cases(self.evidence.shown), "case")
        if not len(self.evidence.shown):
            return f"No case is asked of {self.machine}."
        if not self.recorded:
            return f"None of the {cases} that {self.machine} is asked for is recorded: {self.evidence.what_to_run}."
        return str(self._present(function))

    @property
    def _to_show(self) -> bool:
        return bool(self.recorded and len(self.evidence.shown))

    def _present(self, function: str) -> Any:
        module = load_presentation(self.presenter or self.evidence.experiment)
        if not hasattr(module, function):
            known = [
                name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
            ]
            raise unknown_name("function", function, [name for name in known if not name.startswith("_")])
        return self._told_apart(getattr(module, function)(self.evidence.shown))

    def _told_apart(self, content: Any) -> Any:
        """With a caption that tells this checkout's records from those the same machine has published."""
        if self.evidence.origin == "published" or not isinstance(content, Table | Picture):
            return content
        return dataclasses.replace(content, caption=f"{content.caption} (this checkout)")

    def case(self, **fields: Any) -> Any:
        """The one row with these values; see `Evidence.case`."""
        return self.evidence.case(**fields)

    def ref(self, kind: Literal["tbl", "fig"]) -> str:
        """`Table 3` with a link, for this evidence's table or figure."""
        return reference_mark(f"{kind}-{self.name}")


def draft(
    archive: Archive,
    *,
    folder: Path,
    template: str = "writeup.md",
    pages: Mapping[str, Path] | None = None,
    templates: Path | None = None,
) -> Draft:
    """Render `template` with what `archive` holds, for its handout or, without one, for everything.

    Args:
        folder: where the document will lie; its links are relative to that.
        pages: executed notebooks as HTML, by notebook; the others are linked as they are in notebooks/.

    Raises:
        UserError: Jinja2 is missing, or the template is at fault; the message names file and line.
    """
    templates = templates or templates_folder()
    blocks = _Blocks()
    store, index, handout = archive.store, archive.index, archive.handout
    environment = _environment(templates)
    problems = index.problems_of(handout.year if handout else None)

    def machines(experiment: str, problem: str) -> list[Exhibit]:
        return [Exhibit(evidence, problem, blocks) for evidence in archive.machines(experiment)]

    def link(path: str, text: str | None = None) -> str:
        target = repository_root() / path
        if not target.exists():
            raise UserError(f"there is no {path} to link to")
        return f"[{text or Path(path).name}]({_relative(target, folder)})"

    def notebook(problem: Problem) -> str:
        known = index.notebooks[problem.notebook]
        if not known.path.is_file():
            return f"{known.number}, {known.title} (planned)"
        return f"[{known.title}]({_relative((pages or {}).get(known.name, known.path), folder)})"

    environment.globals |= {
        **{name: getattr(report, name) for name in ("number", "percent", "plural", "with_deviation", "within")},
        "experiment": load_experiment,
        "from_any": archive.from_any,
        "has_section": lambda problem: (templates / "problems" / f"{problem.id}.md").is_file(),
        "handout": handout,
        "handouts": index.handouts,
        "index": index,
        "len": len,
        "link": link,
        "machines": machines,
        "named": archive.named,
        "notebook": notebook,
        "presentation": load_presentation,
        "problems": problems,
        "ref": reference_mark,
        "show": blocks.show,
        "store": store,
        "together": archive.together,
    }
    text = _rendered(environment, template, templates)
    try:
        return Draft.of(text, blocks.shown)
    except DanglingReference as error:
        raise UserError(f"{_where_named(error.name, templates)}: {error}") from error


def _relative(target: Path, folder: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


def _environment(templates: Path) -> jinja2.Environment:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
    except ImportError as error:
        raise UserError(f"the writeup needs Jinja2 ({error}): pip install -e '.[writeup]'") from error

    class Sentence(Extension):
        """`<% sentence %> … <% endsentence %>`: the sentence, or what to run for the number that it lacks."""

        tags = {"sentence"}  # noqa: RUF012 (Jinja2's own interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endsentence",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        @staticmethod
        def _said(caller: Callable[[], str]) -> str:
            try:
                return caller()
            except NotAsked:
                return ""
            except Unmeasured as missing:
                return f"{missing}.\n"

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=[Sentence],
    )


def _rendered(environment: jinja2.Environment, template: str, templates: Path) -> str:
    import jinja2

    try:
        return environment.get_template(template).render()
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{error.name or template}, line {error.lineno}: {error.message}") from error
    except jinja2.TemplateNotFound as error:
        raise UserError(f"{_place(error, templates) or templates}: there is no template {error.name}") from error
    except Unmeasured as error:
        raise UserError(
            f"{_place(error, templates)}: {error}. Put the sentence between <% sentence %> and <% endsentence %>"
        ) from error
    except UserError as error:
        place = _place(error, templates)
        raise UserError(f"{place}: {error}" if place else str(error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_place(error, templates) or template}: a template is not UTF-8: {error}") from error
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        place, arose_in = _place(error, templates), Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if place is None or not (arose_in.is_relative_to(templates) or "jinja2" in arose_in.parts):
            raise  # a fault of the package's code, not of a template
        raise UserError(f"{place}: {first_line(error)}") from error


def _place(error: BaseException, templates: Path) -> str | None:
    """`problems/warmup.md, line 3`: the innermost template that the error passed through; None outside of any."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(templates)]
    return f"{Path(inside[-1].filename).relative_to(templates)}, line {inside[-1].lineno}" if inside else None


def _where_named(reference: str, templates: Path) -> str:
    """The template and line that name `reference`; of a name that was put together, the section it begins with."""
    for path in sorted(templates.rglob("*.md")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if reference in line:
                return f"{path.relative_to(templates)}, line {number}"
        if reference.partition("-")[2].startswith(f"{path.stem}-"):
            return str(path.relative_to(templates))
    return "a template"

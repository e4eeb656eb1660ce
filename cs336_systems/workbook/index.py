"""The problem index: what problems.toml says, checked, and as tables.

The problem id is the primary key for readers: searching the repository for one tells its whole story.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cs336_systems.bench.report import MISSING
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.model import SIZES
from cs336_systems.repository import MARKER, repository_root

YEARS = ("2025", "2026")
STATES = ("built", "planned")
README_BEGIN = "<!-- problem index: begin, written by scripts/problems.py --write-readme -->"
README_END = "<!-- problem index: end -->"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of the assignment, or a neighbouring system."""

    id: str
    title: str
    state: str
    notebook: str
    points: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By year; a year that does not ask it is absent."""
    code: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One notebook, there or planned."""

    name: str
    title: str
    experiments: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """Its place in the reading order, as its name begins: `01`."""
        return self.name.partition("_")[0]

    @property
    def path(self) -> Path:
        return repository_root() / "notebooks" / f"{self.name}.ipynb"


@dataclasses.dataclass(frozen=True)
class Handout:
    """One published form of the assignment."""

    year: str
    version: str
    sizes: Mapping[str, str]
    """What it calls the sizes it asks for, by this workbook's names of them."""


@dataclasses.dataclass(frozen=True)
class Index:
    """All problems and notebooks, in the handouts' order."""

    problems: Mapping[str, Problem]
    notebooks: Mapping[str, Notebook]
    handouts: Mapping[str, Handout] = dataclasses.field(default_factory=dict)
    """By year."""

    def handout(self, year: str) -> Handout:
        """The handout of a year; one of another year is an error that lists the known."""
        if year not in self.handouts:
            raise unknown_name("year", year, self.handouts)
        return self.handouts[year]

    def problems_of(self, year: str | None) -> list[Problem]:
        """What the handout of `year` asks, in its order; without a year, everything."""
        return [problem for problem in self.problems.values() if year is None or year in problem.points]

    def notebooks_there(self) -> list[Notebook]:
        return [notebook for notebook in self.notebooks.values() if notebook.path.is_file()]

    def notebook(self, name_or_number: str) -> Notebook:
        """A notebook that is there, by its name, its number (`1`, `01`) or its file.

        Raises:
            UserError: there is none; the message lists those that are.
        """
        wanted = Path(name_or_number).name.removesuffix(".ipynb")
        there = self.notebooks_there()
        for notebook in there:
            if wanted == notebook.name or (wanted.isdigit() and int(wanted) == int(notebook.number)):
                return notebook
        planned = next((name for name in self.notebooks if name.startswith(f"{wanted}_") or name == wanted), None)
        if planned is not None:
            raise UserError(f"{planned} is planned and not there yet: {', '.join(each.name for each in there)} are")
        raise unknown_name("notebook", name_or_number, [notebook.name for notebook in there])


def load_index(path: Path | None = None) -> Index:
    """problems.toml, checked.

    Raises:
        UserError: it cannot be read, or an entry is not as it should be; the message names the place.
    """
    path = path or repository_root() / MARKER
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    notebooks = {
        name: _entry(Notebook, {"name": name}, entry, path) for name, entry in _section(content, "notebooks", path)
    }
    handouts = {
        year: _entry(Handout, {"year": year}, entry, path)
        for year, entry in (_section(content, "handouts", path) if "handouts" in content else [])
    }
    problems = {name: _entry(Problem, {"id": name}, entry, path) for name, entry in _section(content, "problems", path)}
    for handout in handouts.values():
        if handout.year not in YEARS:
            raise unknown_name("year", handout.year, YEARS, where=f"of [handouts] in {path}")
        for size in handout.sizes:
            if size not in SIZES:
                raise unknown_name("size", size, SIZES, where=f"of handouts.{handout.year} in {path}")
    for problem in problems.values():
        if problem.state not in STATES:
            raise unknown_name("state", problem.state, STATES, where=f"of {problem.id} in {path}")
        if problem.notebook not in notebooks:
            raise unknown_name("notebook", problem.notebook, notebooks, where=f"of {problem.id} in {path}")
        if not isinstance(problem.points, dict):
            raise UserError(f"{path}: points of {problem.id} must map years to whole numbers, found {problem.points!r}")
        for year, points in problem.points.items():
            if year not in YEARS:
                raise unknown_name("year", year, YEARS, where=f"of {problem.id} in {path}")
            if not isinstance(points, int) or isinstance(points, bool):
                raise UserError(f"{path}: points of {problem.id} in {year} must be a whole number, found {points!r}")
    return Index(problems, notebooks, handouts)


def _section(content: dict[str, Any], name: str, path: Path) -> list[tuple[str, Any]]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise UserError(f"{path} must have a table [{name}]")
    return list(section.items())


def _entry(kind: type[Any], identity: dict[str, str], entry: Any, path: Path) -> Any:
    """A notebook or problem from its table; its name is the table's, so no key may give another."""
    (name,) = identity.values()
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {name!r} must be a table, found {entry!r}")
    known = [field.name for field in dataclasses.fields(kind) if field.name not in identity]
    for key in entry:
        if key not in known:
            raise unknown_name("key", key, known, where=f"of {name} in {path}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    try:
        return kind(**identity, **values)
    except TypeError as error:
        raise UserError(f"{path}: {name!r} is incomplete: {error}") from error


def points_text(problem: Problem, year: str) -> str:
    return str(problem.points[year]) if year in problem.points else MISSING


def readme_index(index: Index) -> str:
    """The index as the README has it: a Markdown table with links."""
    lines = [
        "| problem | 2025 | 2026 | notebook | code | tests | writeup | state |",
        "| --- | ---: | ---: | --- | --- | --- | --- | --- |",
    ]
    for problem in index.problems.values():
        notebook = index.notebooks[problem.notebook]
        number = notebook.number
        shown = f"[{number}](notebooks/{notebook.name}.ipynb)" if notebook.path.is_file() else number
        cells = (
            f"`{problem.id}`",
            points_text(problem, "2025"),
            points_text(problem, "2026"),
            shown,
            _links(problem.code),
            _links(problem.tests),
            f"[section](writeup/writeup.md#{problem.id})",
            problem.state,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _links(paths: tuple[str, ...]) -> str:
    return ", ".join(f"[{Path(path).stem}]({path})" for path in paths) or MISSING


def between_markers(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` between two of its lines, in the place of whatever stood there.

    Raises:
        UserError: the markers are missing.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"the README lacks the lines {begin!r} and {end!r} around what is generated")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def with_readme_index(readme: str, index: Index) -> str:
    """`readme` with the generated index between its markers.

    Raises:
        UserError: the markers are missing.
    """
    return between_markers(readme, README_BEGIN, README_END, readme_index(index))

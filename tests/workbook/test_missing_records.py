"""Whichever published record is taken away, the writeup says that it is missing and changes nothing else."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from writeup_records import copy_of_published

from cs336_systems.bench.records import Store, case_key
from cs336_systems.repository import repository_root
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.writeup import draft

INDEX = load_index()
IDENTITY = ("machine", "size", "context", "phase", "warm-ups", "ceiling", "by", "dtype", "autocast")
TO_RUN = "python scripts/"
Row = dict[str, str]


def record_places() -> list[tuple[str, str]]:
    """File and key of every published record."""
    data = repository_root() / "data"
    return [
        (path.relative_to(data).as_posix(), case_key(line["case"]))
        for path in sorted(data.glob("*/*.jsonl"))
        if path.parent.name != "local"
        for line in map(json.loads, path.read_text().splitlines())
        if line["kind"] == "case"
    ]


def _number(place: tuple[str, str]) -> int:
    """Which record of its file it is."""
    return [key for file, key in record_places() if file == place[0]].index(place[1]) + 1


def rendered(store: Store) -> str:
    """The writeup and the head of the README as GitHub shows them; the figures are not drawn."""
    archive = Archive(store, INDEX, profile=None)
    folder = repository_root() / "writeup"
    texts = [
        draft(archive, folder=folder, template=template).markdown("github", "figures")
        for template in ("writeup.md", "headline.md")
    ]
    return "\n".join(texts)


@functools.cache
def base() -> str:
    folder = Path(tempfile.mkdtemp())
    try:
        return rendered(copy_of_published(folder))
    finally:
        shutil.rmtree(folder)


def plain(text: str) -> str:
    """Without the blanks that align numbers."""
    return re.sub(r"[\s\u2007\u2008\u00a0]+", " ", text).strip()


def prose(text: str) -> list[str]:
    """Every line that is no row of a table."""
    return [plain(line) for line in text.splitlines() if line.strip() and not line.startswith("|")]


def tables(text: str) -> list[list[Row]]:
    """The rows of every table, by heading."""
    found: list[list[Row]] = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        heading, _, *rows = ([plain(cell) for cell in line[1:-1].split(" | ")] for line in block.strip().splitlines())
        found.append([dict(zip(heading, row, strict=True)) for row in rows])
    return found


def identity(row: Row) -> Row:
    return {name: cell for name, cell in row.items() if name in IDENTITY}


def noisy_cases(line: str) -> set[str]:
    """The cases that a note below a table calls noisy."""
    return set(line.partition(": ")[2].split("; "))


def is_told_of_what_is_left(line: str) -> bool:
    """Whether a note lists part of the noisy cases that the base lists, and none besides."""
    known = [each for each in prose(base()) if each.startswith("~ noisy")]
    return line.startswith("~ noisy") and any(noisy_cases(line) < noisy_cases(each) for each in known)


@pytest.fixture(scope="module", params=record_places(), ids=lambda place: f"{Path(place[0]).stem}-{_number(place)}")
def without_one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bool]:
    """The text without one record, and whether that was one with a measurement."""
    file, key = request.param
    store = copy_of_published(tmp_path_factory.mktemp("checkout"))
    path = store.published / file
    kept: list[str] = []
    taken: list[str] = []
    for line in path.read_text().splitlines():
        content = json.loads(line)
        is_it = content["kind"] == "case" and case_key(content["case"]) == key
        (taken if is_it else kept).append(line)
    assert len(taken) == 1
    path.write_text("".join(f"{line}\n" for line in kept))
    return rendered(store), json.loads(taken[0])["status"] != "skipped"


def test_every_sentence_is_one_of_before_or_says_what_to_run(without_one: tuple[str, bool]) -> None:
    text, _ = without_one
    known = set(prose(base()))
    new = [line for line in prose(text) if line not in known and TO_RUN not in line]
    assert [line for line in new if not is_told_of_what_is_left(line)] == []


def test_something_says_that_the_record_is_missing(without_one: tuple[str, bool]) -> None:
    text, was_measured = without_one
    assert (text != base()) == was_measured


def test_every_table_keeps_its_rows_and_a_cell_stays_or_becomes_a_dash(without_one: tuple[str, bool]) -> None:
    text, _ = without_one
    before, after = tables(base()), tables(text)
    assert [list(map(identity, rows)) for rows in after] == [list(map(identity, rows)) for rows in before]
    for rows, old_rows in zip(after, before, strict=True):
        for row, old in zip(rows, old_rows, strict=True):
            assert row.keys() <= old.keys()
            changed = {name: cell for name, cell in row.items() if cell != old[name]}
            assert set(changed.values()) <= {"–", "missing"}, f"{identity(row)}: {changed} instead of {old}"


def test_captions_headings_and_anchors_stay(without_one: tuple[str, bool]) -> None:
    text, _ = without_one

    def fixed(lines: list[str]) -> list[str]:
        return [line for line in lines if re.match(r"#|\*\*(Table|Figure) \d|!\[|<a id", line)]

    assert fixed(prose(text)) == fixed(prose(base()))


def test_without_any_machine_each_built_problem_says_what_to_run(tmp_path: Path) -> None:
    published = tmp_path / "data"
    published.mkdir()
    (published / "reference").symlink_to(repository_root() / "data" / "reference")
    text = rendered(Store(local=tmp_path / "none", published=published))
    sections = re.split(r'<a id="([\w:.-]+)"></a>\n\n##? ', text)
    by_id = dict(zip(sections[1::2], sections[2::2], strict=True))
    for problem in INDEX.problems.values():
        if problem.state == "built":
            assert TO_RUN in by_id[problem.id].replace("python scripts/benchmark_step.py", "")
    assert TO_RUN in by_id["machines"]
    assert text.count("run `python scripts/measure.py transformer_step`, then") == 2  # the head of the README too

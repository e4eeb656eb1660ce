"""Whichever published record is taken away, the writeup says that it is missing and changes nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from writeup_records import copy_of_published

from cs336_systems.bench.records import Status, Store, case_key
from cs336_systems.repository import repository_root
from cs336_systems.workbook.draft import Draft
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index
from cs336_systems.workbook.writeup import draft, templates_folder

INDEX = load_index()
IDENTITY = ("machine", "size", "context", "phase", "warm-ups", "ceiling", "by", "dtype", "autocast")
TO_RUN = "python scripts/"
MOST_DETAILS = 3
"""How many tables of the details of one record an experiment may show."""
Row = dict[str, str]


def record_places() -> list[tuple[str, str]]:
    """File and key of every published record that is not the only one of its file.

    Without its only record an experiment has no tables: test_writeup.py says what is told then.
    """
    data = repository_root() / "data"
    places = [
        (path.relative_to(data).as_posix(), case_key(line["case"]))
        for path in sorted(data.glob("*/*.jsonl"))
        if path.parent.name != "local"
        for line in map(json.loads, path.read_text().splitlines())
        if line["kind"] == "case"
    ]
    counts = Counter(file for file, _ in places)
    return [(file, key) for file, key in places if counts[file] > 1]


def _number(place: tuple[str, str]) -> int:
    """Which record of its file it is."""
    return [key for file, key in record_places() if file == place[0]].index(place[1]) + 1


def drafts(store: Store) -> list[Draft]:
    archive = Archive(store, INDEX, own=False)
    folder = repository_root() / "writeup"
    return [draft(archive, folder=folder, template=template) for template in ("writeup.md", "headline.md")]


def rendered(store: Store) -> str:
    """The writeup and the head of the README as GitHub shows them; the figures are not drawn."""
    return "\n".join(each.markdown("github", "figures") for each in drafts(store))


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


def untimed_rows(line: str) -> tuple[str, set[str], str] | None:
    """Status, rows and reason of a note on rows without a time: "oom: a at d 16; b at d 16: `why`"."""
    found = re.fullmatch(r"(oom|skipped|failed): (.*?): (`.*`)", line)
    return (found[1], set(found[2].split("; ")), found[3]) if found else None


def is_told_of_what_is_left(line: str) -> bool:
    """Whether a note lists part of the noisy cases, or of the rows without a time, that the base lists, no others."""
    if line.startswith("~ noisy"):
        known = [each for each in prose(base()) if each.startswith("~ noisy")]
        return any(noisy_cases(line) < noisy_cases(each) for each in known)
    told = untimed_rows(line)
    return told is not None and any(
        (told[0], told[2]) == (each[0], each[2]) and told[1] < each[1]
        for each in map(untimed_rows, prose(base()))
        if each is not None
    )


def is_statement_of_a_hole(line: str, experiment: str, machine: str) -> bool:
    """Whether a line says that one record of `experiment` is missing and what to run for it, and tells no result."""
    publish = "then `python scripts/publish_records.py`"
    commands = (
        f"run `python scripts/measure.py {experiment}` on {machine}, {publish}",
        f"run `python scripts/measure.py {experiment} --profile planned` on any machine, {publish}",
    )
    if line.count("`") != 4 or sum(line.count(command) for command in commands) != 1:
        return False
    rest = line.replace(commands[0], "").replace(commands[1], "").replace(machine, "")
    counts = re.findall(r"no record of (\d+) of \d+ cases", rest)
    names = r"context(_length)? \d+|\b(bfloat|float)\d+( products)?|\bd \d+|length [\d,]+\d|scale [\d,.]*\d"
    names += r"|gpt2-xl|every-\d+|\d+ blocks|[\d.]+ MB|\d+ ranks"
    rest = re.sub(rf"no record of \d+ of \d+ cases|{names}", "", rest)
    return set(counts) <= {"1"} and not re.search(r"\d", rest)


def take_away(store: Store, file: str, key: str) -> Status:
    """Remove one published record; returns what became of its case."""
    path = store.published / file
    kept: list[str] = []
    taken: list[str] = []
    for line in path.read_text().splitlines():
        content = json.loads(line)
        is_it = content["kind"] == "case" and case_key(content["case"]) == key
        (taken if is_it else kept).append(line)
    assert len(taken) == 1
    path.write_text("".join(f"{line}\n" for line in kept))
    status: Status = json.loads(taken[0])["status"]
    return status


@dataclasses.dataclass(frozen=True)
class Without:
    """The text without one record."""

    text: str
    experiment: str
    machine: str
    was_measured: bool


@pytest.fixture(scope="module", params=record_places(), ids=lambda place: f"{Path(place[0]).stem}-{_number(place)}")
def without_one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Without:
    file, key = request.param
    store = copy_of_published(tmp_path_factory.mktemp("checkout"))
    was_measured = take_away(store, file, key) != "skipped"
    return Without(rendered(store), Path(file).stem, Path(file).parent.name, was_measured)


def test_every_sentence_is_one_of_before_or_says_what_to_run(without_one: Without) -> None:
    known = set(prose(base()))
    new = [line for line in prose(without_one.text) if line not in known and not is_told_of_what_is_left(line)]
    assert [line for line in new if not is_statement_of_a_hole(line, without_one.experiment, without_one.machine)] == []


def test_something_says_that_the_record_is_missing(without_one: Without) -> None:
    assert (without_one.text != base()) == without_one.was_measured
    new = set(prose(without_one.text)) - set(prose(base()))
    told = [line for line in new if is_statement_of_a_hole(line, without_one.experiment, without_one.machine)]
    assert bool(told) == without_one.was_measured


@pytest.mark.parametrize("experiment", sorted({Path(file).stem for file, _ in record_places()}))
def test_every_figure_with_a_hole_can_be_drawn(tmp_path: Path, experiment: str) -> None:
    store = copy_of_published(tmp_path)
    for file, key in record_places():
        if Path(file).stem == experiment and take_away(store, file, key) == "ok":
            break
    pictures = [picture for each in drafts(store) for picture in each.pictures.values()]
    assert pictures
    for picture in pictures:
        assert picture.draw().axes


def test_every_table_keeps_its_rows_and_a_cell_stays_or_becomes_a_dash(without_one: Without) -> None:
    before, after = tables(base()), tables(without_one.text)
    # A table of one record's details has nothing left but that.
    pairs = [(rows, old) for rows, old in zip(after, before, strict=True) if rows != [{"record": "missing"}]]
    assert len(pairs) >= len(before) - MOST_DETAILS
    after, before = [rows for rows, _ in pairs], [old for _, old in pairs]
    assert [list(map(identity, rows)) for rows in after] == [list(map(identity, rows)) for rows in before]
    for rows, old_rows in zip(after, before, strict=True):
        for row, old in zip(rows, old_rows, strict=True):
            assert row.keys() <= old.keys()
            changed = {name: cell for name, cell in row.items() if cell != old[name]}
            assert set(changed.values()) <= {"–", "missing"}, f"{identity(row)}: {changed} instead of {old}"


def test_captions_headings_and_anchors_stay(without_one: Without) -> None:
    def fixed(lines: list[str]) -> list[str]:
        return [line for line in lines if re.match(r"#|\*\*(Table|Figure) \d|!\[|<a id", line)]

    assert fixed(prose(without_one.text)) == fixed(prose(base()))


def test_without_any_machine_each_built_problem_that_measures_says_what_to_run(tmp_path: Path) -> None:
    published = tmp_path / "data"
    published.mkdir()
    (published / "reference").symlink_to(repository_root() / "data" / "reference")
    text = rendered(Store(local=tmp_path / "none", published=published))
    sections = re.split(r'<a id="([\w:.-]+)"></a>\n\n##? ', text)
    by_id = dict(zip(sections[1::2], sections[2::2], strict=True))
    templates = {name: templates_folder() / "problems" / f"{name}.md" for name in INDEX.problems}
    measured = [name for name, path in templates.items() if path.is_file() and "machines(" in path.read_text()]
    assert set(measured) >= {"benchmarking_script", "pytorch_attention", "flash_benchmarking"}
    for name in measured:
        assert TO_RUN in by_id[name].replace("python scripts/benchmark_step.py", "")
    assert TO_RUN in by_id["machines"]
    # For two problems, and the head of the README.
    assert text.count("run `python scripts/measure.py transformer_step`, then") == 3

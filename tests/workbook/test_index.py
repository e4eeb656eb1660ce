"""problems.toml says what the handouts of both years say, points at what is there, and its mistakes are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cs336_systems.errors import UserError
from cs336_systems.model import SIZES
from cs336_systems.repository import repository_root
from cs336_systems.workbook import index as indices
from cs336_systems.workbook.index import (
    README_BEGIN,
    README_END,
    Handout,
    Index,
    Notebook,
    Problem,
    between_markers,
    load_index,
    readme_index,
    with_readme_index,
)

# The specification, by hand: points in the handouts of spring 2025 and spring 2026, None where a year does not ask.
POINTS: dict[str, tuple[int | None, int | None]] = {
    "benchmarking_script": (4, 4),
    "nsys_profile": (5, 5),
    "mixed_precision_accumulation": (1, 1),
    "benchmarking_mixed_precision": (2, 2),
    "memory_profiling": (4, 4),
    "gradient_checkpointing": (None, 4),
    "pytorch_attention": (2, 2),
    "torch_compile": (2, 2),
    "flash_forward": (15, 15),
    "flash_backward": (5, 5),
    "flash_benchmarking": (5, 5),
    "distributed_communication_single_node": (5, 5),
    "naive_ddp": (5, 5),
    "naive_ddp_benchmarking": (3, 3),
    "minimal_ddp_flat_benchmarking": (2, 2),
    "ddp_overlap_individual_parameters": (5, 5),
    "ddp_overlap_individual_parameters_benchmarking": (1, 1),
    "ddp_overlap_bucketed": (8, None),
    "ddp_bucketed_benchmarking": (3, None),
    "communication_accounting": (10, None),
    "optimizer_state_sharding": (15, 15),
    "optimizer_state_sharding_accounting": (5, 5),
    "fsdp": (None, 15),
    "fsdp_accounting": (None, 5),
    "alternate_ring_all_reduce": (None, 1),
    "data_parallel_calcs": (None, 3),
    "fsdp_calcs": (None, 3),
    "tp_calcs": (None, 4),
    "fsdp_tp_calcs": (None, 6),
    "leaderboard": (None, 10),
    # The neighbouring systems earn no points.
    "fusion_ablation": (None, None),
    "surgical_compile": (None, None),
    "olmo_inference": (None, None),
    "attention_patterns": (None, None),
}

# A whole, correct file; each mistake below changes one thing in it.
CORRECT = """\
[handouts.2025]
version = "1.0"
sizes = { small = "little" }

[notebooks]
01_first = { title = "First", experiments = ["warmup"] }

[problems.one]
title = "One"
points = { 2025 = 1, 2026 = 2 }
state = "planned"
notebook = "01_first"
"""


def problems(state: str) -> list[Problem]:
    return [problem for problem in load_index().problems.values() if problem.state == state]


def index_of(tmp_path: Path, content: str) -> Index:
    path = tmp_path / "problems.toml"
    path.write_text(content, encoding="utf-8")
    return load_index(path)


def test_the_index_has_exactly_the_problems_of_both_years_and_the_neighbours() -> None:
    assert set(load_index().problems) == set(POINTS)


@pytest.mark.parametrize("name", POINTS)
def test_a_problem_has_the_points_of_the_handouts(name: str) -> None:
    expected = {year: points for year, points in zip(("2025", "2026"), POINTS[name], strict=True) if points is not None}
    assert load_index().problems[name].points == expected


def test_built_problems_name_code_and_tests_that_exist() -> None:
    assert problems("built"), "without a built problem nothing is checked here"
    for problem in problems("built"):
        assert problem.code, f"{problem.id} is built and names no code"
        assert problem.tests, f"{problem.id} is built and names no tests"
        missing = [path for path in (*problem.code, *problem.tests) if not (repository_root() / path).is_file()]
        assert not missing, f"{problem.id} names files that are not there: {missing}"


def test_built_problems_have_a_notebook_that_is_there_or_one_that_measures_nothing_yet() -> None:
    index = load_index()
    for problem in problems("built"):
        notebook = index.notebooks[problem.notebook]
        assert notebook.path.is_file() or not notebook.experiments, problem.id


def test_built_problems_have_a_test_marked_with_their_id_among_the_tests_they_name() -> None:
    for problem in problems("built"):
        sources = [(repository_root() / path).read_text(encoding="utf-8") for path in problem.tests]
        assert any(f'problem("{problem.id}")' in source for source in sources), problem.id


def test_tests_are_marked_with_ids_of_the_index_only() -> None:
    known = load_index().problems
    for path in (repository_root() / "tests").rglob("test_*.py"):
        marked = re.findall(r'pytest\.mark\.problem\("(\w+)"\)', path.read_text(encoding="utf-8"))
        # The test of the points table marks made-up problems in files that it generates.
        if path.name != "test_points_table.py":
            assert set(marked) <= set(known), path


def test_planned_problems_name_a_notebook_of_the_index() -> None:
    index = load_index()
    for problem in problems("planned"):
        assert problem.notebook in index.notebooks, problem.id


def test_notebooks_are_numbered_in_reading_order_without_gaps() -> None:
    numbers = [int(name.partition("_")[0]) for name in load_index().notebooks]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_notebook_of_the_index_answers_a_problem() -> None:
    index = load_index()
    assert {problem.notebook for problem in index.problems.values()} == set(index.notebooks)


def test_every_notebook_file_is_in_the_index() -> None:
    files = {path.stem for path in (repository_root() / "notebooks").glob("*.ipynb")}
    assert files
    assert files <= set(load_index().notebooks)


def test_the_index_has_the_handouts_of_both_years_and_their_sizes_are_sizes_of_ours() -> None:
    handouts = load_index().handouts
    assert set(handouts) == set(indices.YEARS) == {"2025", "2026"}
    for year, handout in handouts.items():
        assert handout.year == year
        assert handout.version
        assert set(handout.sizes) <= set(SIZES)
        assert len(set(handout.sizes.values())) == len(handout.sizes), "two sizes of one name cannot be told apart"


def test_a_name_that_both_years_give_may_be_of_two_sizes() -> None:
    """What 2025 calls "xl" is GPT-2 XL, and what it calls "2.7B" is the "xl" of 2026."""
    index = load_index()
    ours = {year: {name: size for size, name in index.handout(year).sizes.items()} for year in indices.YEARS}
    assert (ours["2025"]["xl"], ours["2025"]["2.7B"], ours["2026"]["xl"]) == ("gpt2-xl", "xl", "xl")


def test_a_handout_of_another_year_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown year '2024'.*[Kk]nown: 2025, 2026"):
        load_index().handout("2024")


@pytest.mark.parametrize(("column", "year"), [*enumerate(indices.YEARS)])
def test_the_problems_of_a_year_are_those_that_its_handout_gives_points_for(column: int, year: str) -> None:
    asked = {name for name, points in POINTS.items() if points[column] is not None}
    found = [problem.id for problem in load_index().problems_of(year)]
    assert set(found) == asked
    assert found == [name for name in load_index().problems if name in asked]


def test_without_a_year_all_problems_are_asked_the_neighbours_too() -> None:
    index = load_index()
    assert index.problems_of(None) == list(index.problems.values())


def test_the_problems_of_2026_come_in_the_order_of_its_handout() -> None:
    names = [problem.id for problem in load_index().problems_of("2026")]
    assert names.index("alternate_ring_all_reduce") == names.index("fsdp_accounting") + 1
    assert (names[0], names[-1]) == ("benchmarking_script", "leaderboard")


def test_a_correct_file_is_read_as_written(tmp_path: Path) -> None:
    index = index_of(tmp_path, CORRECT)
    assert index.notebooks == {"01_first": Notebook("01_first", "First", ("warmup",))}
    assert index.problems == {"one": Problem("one", "One", "planned", "01_first", {"2025": 1, "2026": 2})}
    assert index.handouts == {"2025": Handout("2025", "1.0", {"small": "little"})}


def test_a_file_may_have_no_handouts(tmp_path: Path) -> None:
    assert index_of(tmp_path, CORRECT.partition("\n\n")[2]).handouts == {}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("[problems.one]", "[problems.one", r"cannot read .*problems\.toml.*line 8"),
        ('title = "One"', 'titel = "One"', r"unknown key 'titel' of one .*did you mean 'title'"),
        ("experiments =", "experiment =", r"unknown key 'experiment' of 01_first .*did you mean 'experiments'"),
        ('"planned"', '"planed"', r"unknown state 'planed' of one .*Known: built, planned"),
        ("2025 = 1", "2024 = 1", r"unknown year '2024' of one .*Known: 2025, 2026"),
        ('notebook = "01_first"', 'notebook = "02_first"', r"unknown notebook '02_first' of one .*Known: 01_first"),
        ('title = "One"\n', "", r"problems\.toml: 'one' is incomplete.*'title'"),
        ("points = { 2025 = 1, 2026 = 2 }", "points = 3", r"\bone\b"),
        (
            'points = { 2025 = 1, 2026 = 2 }\nstate = "planned"',
            'points = { 2025 = "1" }\nstate = "planned"',
            r"\bone\b",
        ),
        ("[notebooks]", "[notebook]", r"\bnotebooks?\b"),
        ("[problems.one]", "[problem.one]", r"\bproblems?\b(?!\.toml)"),
        ("[problems.one]", "[problems]", r"'title'"),
        ('title = "One"', 'id = "two"\ntitle = "One"', r"'id'|\bone\b"),
        ('title = "One"', 'path = "two"\ntitle = "One"', r"'path'"),
        ('{ title = "First", experiments = ["warmup"] }', '"First"', r"01_first"),
        ("handouts.2025", "handouts.2024", r"unknown year '2024' of \[handouts\] .*Known: 2025, 2026"),
        ("small =", "smal =", r"unknown size 'smal' of handouts\.2025 .*did you mean 'small'"),
        ('version = "1.0"\n', "", r"'2025' is incomplete.*'version'"),
        ('version = "1.0"', 'versions = "1.0"', r"unknown key 'versions' of 2025 .*did you mean 'version'"),
        ("[handouts.2025]", "[[handouts]]", r"\[handouts\]"),
    ],
    ids=[
        "not TOML",
        "unknown key of a problem",
        "unknown key of a notebook",
        "unknown state",
        "unknown year",
        "unknown notebook",
        "missing key",
        "points without years",
        "points that are no number",
        "no table of notebooks",
        "no table of problems",
        "problems without ids",
        "an id inside the entry",
        "a key that is a name of ours",
        "an entry that is no table",
        "a handout of an unknown year",
        "an unknown size of a handout",
        "a handout without its version",
        "an unknown key of a handout",
        "handouts that are no table",
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_that_names_the_place(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    assert before in CORRECT
    with pytest.raises(UserError, match=told) as caught:
        index_of(tmp_path, CORRECT.replace(before, after))
    assert "problems.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.toml"):
        load_index(tmp_path / "nowhere.toml")


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "problems.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*problems\.toml"):
        load_index(path)


@pytest.mark.parametrize("name", ["01_end_to_end_timing", "01", "1", "notebooks/01_end_to_end_timing.ipynb"])
def test_a_notebook_is_found_by_its_name_its_number_and_its_file(name: str) -> None:
    assert load_index().notebook(name).name == "01_end_to_end_timing"


@pytest.mark.parametrize("name", ["01_end_to_end_timin", "99", "0", "", "end_to_end"])
def test_an_unknown_notebook_is_an_error_that_lists_those_that_are_there(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown notebook .*[Kk]nown: 01_end_to_end_timing"):
        load_index().notebook(name)


def test_a_planned_notebook_is_not_listed_as_one_that_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(tmp_path, CORRECT)
    monkeypatch.setattr(indices, "repository_root", lambda: tmp_path)
    assert index.notebooks_there() == []
    with pytest.raises(UserError, match=r"unknown notebook '1'; known: none"):
        index.notebook("1")


def test_the_readme_has_the_generated_index() -> None:
    readme = (repository_root() / "README.md").read_text(encoding="utf-8")
    assert with_readme_index(readme, load_index()) == readme, "bring it up to date: scripts/problems.py --write-readme"


def test_the_generated_index_links_only_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme_index(load_index()))
    assert links
    assert [link for link in links if not (repository_root() / link).is_file()] == []


def test_the_generated_index_links_every_problem_to_its_section_of_the_writeup() -> None:
    linked = re.findall(r"\(writeup/writeup\.md#([\w:.-]+)\)", readme_index(load_index()))
    assert linked == list(load_index().problems)
    writeup = (repository_root() / "writeup" / "writeup.md").read_text(encoding="utf-8")
    assert [section for section in linked if f'<a id="{section}"></a>' not in writeup] == []


def test_the_generated_index_has_a_row_for_every_problem() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", readme_index(load_index()), flags=re.MULTILINE)
    assert rows == list(load_index().problems)


def test_the_index_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    index = load_index()
    written = with_readme_index(f"# Title\n\n{README_BEGIN}\nold\n{README_END}\n\nThe end\n", index)
    assert written == f"# Title\n\n{README_BEGIN}\n\n{readme_index(index)}\n\n{README_END}\n\nThe end\n"
    assert with_readme_index(written, index) == written


@pytest.mark.parametrize("readme", ["", f"{README_BEGIN}\n", f"{README_END}\n", f"{README_END}\n{README_BEGIN}\n"])
def test_a_readme_without_both_markers_in_order_is_an_error(readme: str) -> None:
    with pytest.raises(UserError, match="lacks the lines"):
        with_readme_index(readme, load_index())


def test_what_is_between_two_markers_is_replaced_and_nothing_else() -> None:
    text = "before\n<b>\nold\n<e>\nafter <b> again\n"
    written = between_markers(text, "<b>", "<e>", "\n\nnew\nlines\n\n")
    assert written == "before\n<b>\n\nnew\nlines\n\n<e>\nafter <b> again\n"
    assert between_markers(written, "<b>", "<e>", "new\nlines") == written


def test_the_generated_index_carries_no_markers_of_its_own() -> None:
    text = readme_index(load_index())
    assert README_BEGIN not in text
    assert README_END not in text


def test_the_readme_has_no_gap_where_a_number_should_be() -> None:
    readme = (repository_root() / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z]+@", readme) == []

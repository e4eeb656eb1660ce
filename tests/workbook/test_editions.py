"""The committed edition is what the published records give now; a build adds this checkout's own records to it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from step_records import record_of
from writeup_records import laptop_case, links_of, record_here

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root
from cs336_systems.workbook import editions
from cs336_systems.workbook.index import load_index

INDEX = load_index()
LINKED = ("cs336_systems", "scripts", "tests", "notebooks", "configs")


@pytest.fixture(scope="module")
def rendered() -> dict[Path, bytes]:
    """The committed edition as it is rendered now."""
    return editions.committed(Store.default(), INDEX)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose documents, templates and data can be changed; its code is this one's."""
    real, made = repository_root(), (tmp_path / "checkout").resolve()
    made.mkdir()
    for name in LINKED:
        (made / name).symlink_to(real / name)
    for name in ("problems.toml", "README.md"):
        shutil.copy(real / name, made)
    shutil.copytree(real / "writeup", made / "writeup", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(real / "data", made / "data", ignore=shutil.ignore_patterns("local"))
    monkeypatch.setenv("CS336_ROOT", str(made))
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The committed edition -----------------------------------------------------------------------------------------


def test_the_committed_edition_is_what_is_rendered_now(rendered: dict[Path, bytes]) -> None:
    out_of_date = [str(path.relative_to(repository_root())) for path in editions.differing(rendered)]
    assert out_of_date == [], "run `python scripts/writeup.py --committed` and commit what it writes"


def test_rendering_twice_gives_the_same_bytes(rendered: dict[Path, bytes]) -> None:
    assert editions.committed(Store.default(), INDEX) == rendered


def test_the_committed_edition_depends_on_no_record_of_this_checkout(rendered: dict[Path, bytes]) -> None:
    record_here(Store.default(), [record_of(laptop_case())])
    assert Store.default().local_machines()
    assert editions.committed(Store.default(), INDEX) == rendered


def test_the_committed_edition_is_one_text_its_tables_its_figures_and_the_head_of_the_readme(
    rendered: dict[Path, bytes],
) -> None:
    places = {path.relative_to(repository_root()).as_posix() for path in rendered}
    assert {"README.md", "writeup/writeup.md"} <= places
    assert all(
        re.match(r"writeup/(tables/.*\.md|figures/.*\.svg)$|README\.md$|writeup/writeup\.md$", each) for each in places
    )


@pytest.mark.parametrize("name", ["README.md", "writeup/writeup.md"])
def test_every_relative_link_points_at_a_file_that_is_there(name: str) -> None:
    path = repository_root() / name
    targets = [target.partition("#")[0] for target in links_of(path.read_text()) if not re.match(r"\w+:", target)]
    missing = [target for target in targets if target and not (path.parent / target).exists()]
    assert targets
    assert missing == []


@pytest.mark.parametrize("name", ["README.md", "writeup/writeup.md"])
def test_every_link_to_a_section_points_at_an_anchor_or_heading_that_is_there(name: str) -> None:
    path = repository_root() / name
    for target in links_of(path.read_text()):
        file, _, anchor = target.partition("#")
        if anchor and not re.match(r"\w+:", target):
            text = ((path.parent / file) if file else path).read_text()
            headings = {
                re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-")
                for each in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            }
            assert anchor in headings | set(re.findall(r'<a id="([^"]+)">', text)), target


def test_a_file_that_differs_one_that_lacks_and_one_too_many_are_told(checkout: Path) -> None:
    files = editions.committed(Store.default(), INDEX)
    editions.write_committed(files)
    assert editions.differing(files) == []
    (checkout / "writeup" / "writeup.md").write_text("changed")
    (checkout / "writeup" / "tables" / "orphan.md").write_text("shown no more")
    lacking = min(path for path in files if path.suffix == ".svg")
    lacking.unlink()
    assert editions.differing(files) == sorted(
        [checkout / "writeup" / "writeup.md", checkout / "writeup" / "tables" / "orphan.md", lacking]
    )
    editions.write_committed(files)
    assert editions.differing(files) == []


def test_writing_the_edition_changes_of_the_readme_only_what_is_between_the_markers(checkout: Path) -> None:
    readme = checkout / "README.md"
    text = readme.read_text()
    begin, end = (text.index(each) for each in (editions.HEADLINE_BEGIN, editions.HEADLINE_END))
    readme.write_text(f"Before.\n\n{editions.HEADLINE_BEGIN}\n\nOld.\n\n{text[end:]}After.\n")
    editions.write_committed(editions.committed(Store.default(), INDEX))
    assert readme.read_text() == f"Before.\n\n{text[begin:]}After.\n"


def test_a_readme_without_markers_is_an_error_and_nothing_is_written(checkout: Path) -> None:
    (checkout / "README.md").write_text("No markers.\n")
    before = content_of(checkout / "writeup")
    with pytest.raises(UserError, match="the README lacks the lines"):
        editions.write_committed(editions.committed(Store.default(), INDEX))
    assert content_of(checkout / "writeup") == before


# A build -------------------------------------------------------------------------------------------------------


def test_a_build_shows_this_checkouts_records_first_and_names_them(tmp_path: Path) -> None:
    store = Store.default()
    machine = record_here(store, [record_of(laptop_case())])
    (path,) = editions.build(store, INDEX, folder=tmp_path / "build", formats=["md"])
    text = path.read_text()
    assert text.index(f"#### {machine}, this checkout") < text.index("#### epyc-turin-2c, published")
    assert f'<a id="fig-benchmarking_script-transformer_step-{machine}-own"></a>' in text
    own = [line for line in text.splitlines() if line.startswith("**") and line.endswith("(this checkout)")]
    assert [line[:9] for line in own] == ["**Table 2", "**Figure "]


def test_a_build_without_records_of_its_own_says_what_the_committed_edition_says(
    tmp_path: Path, rendered: dict[Path, bytes]
) -> None:
    folder = repository_root() / "writeup"
    (path,) = editions.build(Store.default(), INDEX, folder=tmp_path, formats=["md"])
    there = os.path.relpath(repository_root(), tmp_path)
    assert path.read_text().replace(f"({there}/", "(../") == rendered[folder / "writeup.md"].decode()


def test_every_link_of_a_build_points_at_a_file_that_is_there(tmp_path: Path) -> None:
    (path,) = editions.build(Store.default(), INDEX, folder=tmp_path / "build", formats=["md"])
    targets = [target.partition("#")[0] for target in links_of(path.read_text()) if not re.match(r"\w+:", target)]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("broken", ["<< nothing >>", "<% if %>", '<% include "none.md" %>', '<< ref("tbl-none") >>'])
def test_a_template_with_an_error_leaves_the_documents_of_the_last_build(checkout: Path, broken: str) -> None:
    folder = checkout / "writeup" / "build"
    editions.build(Store.default(), INDEX, folder=folder, formats=["md", "html"])
    before = content_of(folder)
    template = checkout / "writeup" / "templates" / "problems" / "benchmarking_script.md"
    template.write_text(f"{broken}\n{template.read_text()}")
    with pytest.raises(UserError, match=r"benchmarking_script\.md, line 1"):
        editions.build(Store.default(), INDEX, folder=folder, formats=["md", "html"])
    assert content_of(folder) == before


@pytest.mark.parametrize("year", ["2025", "2026"])
def test_a_handouts_edition_has_exactly_its_problems_in_its_order(tmp_path: Path, year: str) -> None:
    (path,) = editions.build(Store.default(), INDEX, folder=tmp_path, formats=["md"], year=year)
    text = path.read_text()
    shown = [each for each in re.findall(r'<a id="([^"]+)"></a>', text) if each in INDEX.problems]
    assert shown == [name for name, problem in INDEX.problems.items() if year in problem.points]
    others = INDEX.problems.keys() - set(shown)
    assert others
    assert not [name for name in others if f"`{name}`" in text]
    assert f"spring {year}" in text
    assert f"in {({'2025', '2026'} - {year}).pop()}" not in text


def test_a_year_without_a_handout_is_an_error_that_lists_those_with_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown year '2027'.*2025, 2026"):
        editions.build(Store.default(), INDEX, folder=tmp_path, year="2027")
    assert list(tmp_path.iterdir()) == []

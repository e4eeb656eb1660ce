"""The committed edition is what the published records give now; a build adds this checkout's own records to it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkouts import changeable_checkout, content_of
from step_records import record_of
from writeup_records import laptop_case, links_of, published_cpu, record_here

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root
from cs336_systems.workbook import editions
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index

INDEX = load_index()
rendered_from = repository_root()


@pytest.fixture(scope="module")
def rendered() -> dict[Path, bytes]:
    """The committed edition as it is rendered now."""
    return editions.committed(Store.default(), INDEX)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return changeable_checkout(tmp_path, monkeypatch)


@pytest.fixture
def files(rendered: dict[Path, bytes], checkout: Path) -> dict[Path, bytes]:
    """The committed edition, for a checkout that can be changed: its links are relative, so that its bytes are same."""
    return {checkout / path.relative_to(rendered_from): content for path, content in rendered.items()}


def archive(**options: Any) -> Archive:
    return Archive(Store.default(), INDEX, **options)


# The committed edition -----------------------------------------------------------------------------------------


def test_the_committed_edition_is_what_is_rendered_now(rendered: dict[Path, bytes]) -> None:
    out_of_date = [str(path.relative_to(repository_root())) for path in editions.differing(rendered)]
    assert out_of_date == [], "run `python scripts/writeup.py --committed` and commit what it writes"


def test_rendering_twice_gives_the_same_bytes(rendered: dict[Path, bytes]) -> None:
    assert editions.committed(Store.default(), INDEX) == rendered


@pytest.mark.usefixtures("undrawn")
def test_the_committed_edition_depends_on_no_record_of_this_checkout() -> None:
    before = editions.committed(Store.default(), INDEX)
    record_here(Store.default(), [record_of(laptop_case())])
    assert Store.default().local_machines()
    assert editions.committed(Store.default(), INDEX) == before


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


def test_a_file_that_differs_one_that_lacks_and_one_too_many_are_told(checkout: Path, files: dict[Path, bytes]) -> None:
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


@pytest.mark.parametrize("folder", ["tables", "figures"])
def test_hidden_files_and_folders_and_files_of_other_kinds_are_neither_orphans_nor_removed(
    checkout: Path, files: dict[Path, bytes], folder: str
) -> None:
    editions.write_committed(files)
    place = checkout / "writeup" / folder
    kept = [place / name for name in (".hidden.md", ".hidden.svg", ".DS_Store", "notes.txt")]
    kept += [place / "sub" / f"inside.{end}" for end in ("md", "svg")]
    folders = [place / f"{name}.{end}" for name in ("folder", ".folder") for end in ("md", "svg")]
    for each in (place / "sub", *folders):
        each.mkdir()
    for each in kept:
        each.write_text("somebody's")
    assert editions.differing(files) == []
    editions.write_committed(files)
    assert [each.read_text() for each in kept] == ["somebody's"] * len(kept)
    assert all(each.is_dir() for each in folders)


@pytest.mark.usefixtures("undrawn")
def test_writing_the_edition_changes_of_the_readme_only_what_is_between_the_markers(checkout: Path) -> None:
    readme = checkout / "README.md"
    text = readme.read_text()
    begin, end = (text.index(each) for each in (editions.HEADLINE_BEGIN, editions.HEADLINE_END))
    readme.write_text(f"Before.\n\n{editions.HEADLINE_BEGIN}\n\nOld.\n\n{text[end:]}After.\n")
    editions.write_committed(editions.committed(Store.default(), INDEX))
    assert readme.read_text() == f"Before.\n\n{text[begin:]}After.\n"


@pytest.mark.usefixtures("undrawn")
def test_a_readme_without_markers_is_an_error_and_nothing_is_written(checkout: Path) -> None:
    (checkout / "README.md").write_text("No markers.\n")
    before = content_of(checkout / "writeup")
    with pytest.raises(UserError, match="the README lacks the lines"):
        editions.write_committed(editions.committed(Store.default(), INDEX))
    assert content_of(checkout / "writeup") == before


# A build -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_build_shows_this_checkouts_records_first_and_names_them(tmp_path: Path) -> None:
    store = Store.default()
    machine = record_here(store, [record_of(laptop_case())])
    (path,) = editions.build(Archive(store, INDEX), folder=tmp_path / "build", formats=["md"])
    text = path.read_text()
    assert text.index(f"#### {machine}, this checkout") < text.index(f"#### {published_cpu()}, published")
    assert f'<a id="fig-benchmarking_script-transformer_step-{machine}-own"></a>' in text
    section = text[: text.index('<a id="nsys_profile"></a>')]
    own = [line for line in section.splitlines() if line.startswith("**") and line.endswith("(this checkout)")]
    assert [line.partition(".")[0] for line in own] == ["**Table 1", "**Table 3", "**Figure 1"]  # Table 2: published


@pytest.mark.usefixtures("undrawn")
def test_a_build_without_records_of_its_own_says_what_the_committed_edition_says(
    tmp_path: Path, rendered: dict[Path, bytes]
) -> None:
    folder = repository_root() / "writeup"
    (path,) = editions.build(archive(), folder=tmp_path, formats=["md"])
    there = os.path.relpath(repository_root(), tmp_path)
    assert path.read_text().replace(f"({there}/", "(../") == rendered[folder / "writeup.md"].decode()


@pytest.mark.usefixtures("undrawn")
def test_every_link_of_a_build_points_at_a_file_that_is_there(tmp_path: Path) -> None:
    (path,) = editions.build(archive(), folder=tmp_path / "build", formats=["md"])
    targets = [target.partition("#")[0] for target in links_of(path.read_text()) if not re.match(r"\w+:", target)]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


@pytest.mark.usefixtures("undrawn")
def test_a_template_with_an_error_leaves_the_documents_of_the_last_build(checkout: Path) -> None:
    folder = checkout / "writeup" / "build"
    editions.build(archive(), folder=folder, formats=["md", "html"])
    before = content_of(folder)
    template = checkout / "writeup" / "templates" / "problems" / "benchmarking_script.md"
    text = template.read_text()
    for broken in ("<< nothing >>", "<% if %>", '<% include "none.md" %>', '<< ref("tbl-none") >>'):
        template.write_text(f"{broken}\n{text}")
        with pytest.raises(UserError, match=r"benchmarking_script\.md, line 1"):
            editions.build(archive(), folder=folder, formats=["md", "html"])
        assert content_of(folder) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("year", ["2025", "2026"])
def test_a_handouts_edition_has_exactly_its_problems_in_its_order(tmp_path: Path, year: str) -> None:
    (path,) = editions.build(archive(handout=INDEX.handout(year)), folder=tmp_path, formats=["md"])
    text = path.read_text()
    shown = [each for each in re.findall(r'<a id="([^"]+)"></a>', text) if each in INDEX.problems]
    assert shown == [name for name, problem in INDEX.problems.items() if year in problem.points]
    others = INDEX.problems.keys() - set(shown)
    assert others
    assert not [name for name in others if f"`{name}`" in text]
    assert f"spring {year}" in text
    assert f"in {({'2025', '2026'} - {year}).pop()}" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_build_removes_the_figures_that_it_shows_no_more_and_nothing_else(tmp_path: Path) -> None:
    store = Store.default()
    machine = record_here(store, [record_of(laptop_case())])
    editions.build(archive(), folder=tmp_path, formats=["md"])
    own = tmp_path / "figures" / f"benchmarking_script-transformer_step-{machine}-own.svg"
    assert own.is_file()
    kept = [tmp_path / "figures" / ".hidden.svg", tmp_path / "figures" / "notes.txt", tmp_path / "other.svg"]
    for path in kept:
        path.write_text("somebody's")
    (tmp_path / "figures" / "folder.svg").mkdir()
    editions.build(archive(own=False), folder=tmp_path, formats=["md"])
    assert not own.exists()
    figures = {path.name for path in (tmp_path / "figures").glob("[!.]*.svg") if path.is_file()}
    assert figures == set(re.findall(r"\(figures/([^)]*)\)", (tmp_path / "writeup.md").read_text()))
    assert all(path.is_file() for path in kept)
    assert (tmp_path / "figures" / "folder.svg").is_dir()


@pytest.mark.usefixtures("undrawn")
def test_a_build_without_markdown_leaves_the_figures_of_the_last_markdown(tmp_path: Path) -> None:
    record_here(Store.default(), [record_of(laptop_case())])
    editions.build(archive(), folder=tmp_path, formats=["md"])
    before = content_of(tmp_path)
    editions.build(archive(own=False), folder=tmp_path, formats=["html"])
    assert before.items() <= content_of(tmp_path).items()

"""The two editions of the writeup: the one a run leaves behind, and the one that is committed.

    writeup/build/                     this checkout's own records beside the published; Markdown, HTML, PDF, notebooks
    writeup/{writeup.md,tables,figures}, the head of README.md     published records only, the same bytes every time

Whatever is wrong with a template, a record or a font is found before the first file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.files import write_atomically
from cs336_systems.repository import repository_root
from cs336_systems.workbook.documents import FONT, FORMATS, Format, converted, notebook_page, write_all
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import Index, between_markers
from cs336_systems.workbook.profiles import LAPTOP, SMOKE
from cs336_systems.workbook.writeup import draft

NAME = "writeup"
HEADLINE_BEGIN = "<!-- headline: begin, written by scripts/writeup.py --committed -->"
HEADLINE_END = "<!-- headline: end -->"


def build_folder(profile: str | None, year: str | None) -> Path:
    """Where an edition goes: a handout's own and the smoke profile's stay apart from the whole."""
    parts = [part for part in (SMOKE if profile == SMOKE else None, year) if part]
    return repository_root().joinpath("writeup", "build", *parts)


def build(
    store: Store,
    index: Index,
    *,
    folder: Path,
    profile: str | None = LAPTOP,
    grids: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    year: str | None = None,
    formats: Iterable[Format] = FORMATS,
    font: str = FONT,
    executed: Mapping[str, Path] = MappingProxyType({}),
) -> list[Path]:
    """Render the writeup with this checkout's records into `folder`; returns the documents.

    Args:
        profile, grids: what this checkout's records are asked for; see `Archive`.
        executed: executed notebooks by name, which become pages that the writeup links.

    Raises:
        UserError: nothing was written; the message says why.
    """
    handout = index.handout(year) if year is not None else None
    pages = {
        f"notebooks/{name}.html": notebook_page(path, index.notebooks[name].title) for name, path in executed.items()
    }
    text = draft(
        Archive(store, index, profile=profile, grids=grids, handout=handout),
        store,
        index,
        folder=folder,
        handout=handout,
        pages={name: folder / "notebooks" / f"{name}.html" for name in executed},
    )
    documents = converted(text, NAME, formats, font=font)
    write_all(pages | documents, folder)
    return [folder / name for name in documents if "/" not in name]


def executed_notebooks(store: Store, index: Index, profile: str) -> dict[str, Path]:
    """The last good executed copies that runs of `profile` left behind, by notebook."""
    folder = store.local / "notebooks" / profile
    paths = {name: folder / f"{name}.ipynb" for name in index.notebooks}
    return {name: path for name, path in paths.items() if path.is_file()}


# The committed edition -----------------------------------------------------------------------------------------


def committed(store: Store, index: Index) -> dict[Path, bytes]:
    """Every file of the committed edition, rendered from published records alone: path → content."""
    root = repository_root()
    folder = root / "writeup"
    archive = Archive(store, index, profile=None)
    text = draft(archive, store, index, folder=folder)
    files = {folder / name: content for name, content in converted(text, NAME, ["md"]).items()}
    for name, table in text.tables.items():
        files[folder / "tables" / f"{name.removeprefix('tbl-')}.md"] = f"{table}\n".encode()
    headline = draft(archive, store, index, folder=root, template="headline.md")
    for name in headline.pictures:
        if name not in text.blocks:
            known = ", ".join(text.pictures) or "no figure"
            raise UserError(f"headline.md shows {name!r}, which the writeup does not: {known} could be shown")
    try:
        readme = (root / "README.md").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {root / 'README.md'}: {error.strerror}") from error
    content = headline.markdown("github", "writeup/figures")
    files[root / "README.md"] = between_markers(readme, HEADLINE_BEGIN, HEADLINE_END, content).encode()
    return files


def differing(files: Mapping[Path, bytes]) -> list[Path]:
    """The files of the committed edition that are not as rendered, or that are there and should not be."""
    changed = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
    return sorted([*changed, *_orphans(files)])


def write_committed(files: Mapping[Path, bytes]) -> None:
    """Bring the checkout up to date with `files`, and remove tables and figures that are shown no more."""
    for path, content in files.items():
        write_atomically(path, content)
    for path in _orphans(files):
        path.unlink()


def _orphans(files: Mapping[Path, bytes]) -> list[Path]:
    folders = [repository_root() / "writeup" / name for name in ("tables", "figures")]
    return [path for folder in folders for path in sorted(folder.glob("*")) if path not in files]

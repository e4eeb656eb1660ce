"""The two editions of the writeup: the one a run leaves behind, and the one that is committed.

    writeup/build/                     this checkout's own records beside the published; Markdown, HTML, PDF, notebooks
    writeup/{writeup.md,tables,figures}, the head of README.md     published records only, the same bytes every time

Whatever is wrong with a template, a record or a font is found before the first file is written.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.files import write_atomically
from cs336_systems.repository import repository_root
from cs336_systems.workbook.documents import FONT, FORMATS, Format, converted, notebook_page, write_all
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import Index, between_markers
from cs336_systems.workbook.profiles import SMOKE
from cs336_systems.workbook.writeup import draft

NAME = "writeup"
HEADLINE_BEGIN = "<!-- headline: begin, written by scripts/writeup.py --committed -->"
HEADLINE_END = "<!-- headline: end -->"


def build_folder(profile: str | None, year: str | None) -> Path:
    """Where an edition goes: a handout's own and the smoke profile's stay apart from the whole."""
    parts = [part for part in (SMOKE if profile == SMOKE else None, year) if part]
    return repository_root().joinpath("writeup", "build", *parts)


def build(
    archive: Archive,
    *,
    folder: Path,
    formats: Iterable[Format] = FORMATS,
    font: str = FONT,
    executed: Mapping[str, Path] = MappingProxyType({}),
) -> list[Path]:
    """Render the writeup with what `archive` holds into `folder`; returns the documents.

    Args:
        executed: executed notebooks by name, which become pages that the writeup links.

    Raises:
        UserError: the message says why; every document that could not be written is the last one, whole.
    """
    titles = {name: archive.index.notebooks[name].title for name in executed}
    pages = {f"notebooks/{name}.html": notebook_page(path, titles[name]) for name, path in executed.items()}
    text = draft(
        archive,
        folder=folder,
        pages={name: folder / "notebooks" / f"{name}.html" for name in executed},
    )
    documents = converted(text, NAME, formats, font=font)
    write_all(pages | documents, folder)
    if "md" in formats:
        _remove(_orphans({folder / name for name in documents}, folder / "figures", "*.svg"))
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
    archive = Archive(store, index, own=False)
    text = draft(archive, folder=folder)
    files = {folder / name: content for name, content in converted(text, NAME, ["md"]).items()}
    for name, table in text.tables.items():
        files[folder / "tables" / f"{name.removeprefix('tbl-')}.md"] = f"{table}\n".encode()
    headline = draft(archive, folder=root, template="headline.md")
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
    return sorted([*changed, *_committed_orphans(files)])


def write_committed(files: Mapping[Path, bytes]) -> None:
    """Bring the checkout up to date with `files`, and remove tables and figures that are shown no more."""
    for path, content in files.items():
        write_atomically(path, content)
    _remove(_committed_orphans(files))


def _committed_orphans(files: Mapping[Path, bytes]) -> list[Path]:
    folder = repository_root() / "writeup"
    return [*_orphans(files, folder / "tables", "*.md"), *_orphans(files, folder / "figures", "*.svg")]


def _orphans(known: Container[Path], folder: Path, pattern: str) -> list[Path]:
    """The files of a kind in `folder` that are none of the known ones: no hidden ones, nothing of anybody else's."""
    found = [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
    return [path for path in found if path not in known]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {path}, which is shown no more: {error.strerror}") from error

"""A notebook is executed whole or not at all: whatever its kernel does, the last good copy stays one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from cs336_systems.bench.progress import EVENTS_VARIABLE, post_event
from cs336_systems.errors import UserError
from cs336_systems.workbook import run as runner
from cs336_systems.workbook.index import Notebook
from cs336_systems.workbook.run import NotebookRun, execute, shown_texts

# A kernel takes a second to start, so each of these is executed once, and several tests look at what it left.
GOOD = [
    "from IPython.display import Markdown, display\nfrom cs336_systems.bench.progress import Progress, announce",
    "with Progress(2, 'counting') as progress:\n    progress.label('first')\n    progress.advance(2)",
    "announce({'event': 'sweep', 'counts': {'ok': 2, 'reused': 1}})\nannounce({'event': 'sweep', 'counts': {'ok': 3}})",
    "display(Markdown(f'**{word}**'))\nprint('not a table')",
    "Markdown('second')",
]
RAISES = ["from IPython.display import Markdown\nMarkdown('before')", "raise ValueError('first\\nsecond')", "1 + 1"]
KILLED = ["1 + 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "2 + 2"]


def make_notebook(root: Path, sources: list[str]) -> Notebook:
    """A notebook of a checkout at `root`, with one parameter."""
    parameters = nbformat.v4.new_code_cell("word = 'laptop'", metadata={"tags": ["parameters"]})
    cells = [parameters, *map(nbformat.v4.new_code_cell, sources)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / "01_made.ipynb")
    return Notebook("01_made", "Made")


@dataclasses.dataclass(frozen=True)
class Executed:
    """What executing a notebook left behind."""

    run: NotebookRun
    folder: Path
    drawn: list[tuple[float, float, str]]
    """Updates of the progress bar: done, total and label."""
    closed: int

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


class Drawn:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float, str]] = []
        self.closed = 0

    def update(self, done: float, total: float, label: str) -> None:
        self.updates.append((done, total, label))

    def close(self) -> None:
        self.closed += 1


Execute = Callable[[list[str]], Executed]


@pytest.fixture(scope="module")
def execute_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execute]:
    """Executes a notebook of these cells in a folder that holds an earlier good copy."""
    done: dict[str, Executed] = {}
    with pytest.MonkeyPatch.context() as patch:

        def run(sources: list[str]) -> Executed:
            key = "\n".join(sources)
            if key not in done:
                root = tmp_path_factory.mktemp("checkout")
                patch.setattr("cs336_systems.workbook.index.repository_root", lambda: root)
                bar = Drawn()
                patch.setattr("cs336_systems.workbook.run.choose_sink", lambda *_, **__: bar)
                folder = root / "executed"
                folder.mkdir()
                (folder / "01_made.ipynb").write_text("an earlier good copy")
                outcome = execute(make_notebook(root, sources), {"word": "given"}, folder)
                done[key] = Executed(outcome, folder, bar.updates, bar.closed)
            return done[key]

        yield run


def test_a_good_notebook_replaces_the_earlier_copy_by_the_executed_one(execute_once: Execute) -> None:
    executed = execute_once(GOOD)
    assert executed.run.ok
    assert executed.run.error is None
    assert executed.files == ["01_made.ipynb"]
    assert executed.run.output == executed.folder / "01_made.ipynb"
    cells = nbformat.read(executed.run.output, as_version=4).cells
    assert all(cell.execution_count for cell in cells)


def test_the_parameters_given_are_those_the_notebook_sees_and_its_tables_come_back_in_order(
    execute_once: Execute,
) -> None:
    assert execute_once(GOOD).run.texts == ["**given**", "second"]


def test_the_cases_that_sweeps_announce_are_added_up(execute_once: Execute) -> None:
    assert dict(execute_once(GOOD).run.counts) == {"ok": 5, "reused": 1}


def test_the_progress_of_the_kernel_is_drawn_by_the_runner_and_closed(execute_once: Execute) -> None:
    executed = execute_once(GOOD)
    assert executed.drawn == [(0.0, 2, "counting"), (0.0, 2, "counting: first"), (2.0, 2, "counting: first")]
    assert executed.closed == 1


def test_the_progress_does_not_appear_in_the_executed_copy(execute_once: Execute) -> None:
    cells = nbformat.read(execute_once(GOOD).run.output, as_version=4).cells
    assert "counting" not in "".join(str(cell.get("outputs")) for cell in cells)


def test_the_source_notebook_is_not_changed_by_executing_it(execute_once: Execute) -> None:
    source = execute_once(GOOD).folder.parent / "notebooks" / "01_made.ipynb"
    assert all(cell.execution_count is None for cell in nbformat.read(source, as_version=4).cells)


def test_the_runner_forgets_where_the_kernel_posted_its_progress(execute_once: Execute) -> None:
    execute_once(GOOD)
    assert EVENTS_VARIABLE not in os.environ


def test_a_cell_that_raises_leaves_the_earlier_good_copy_and_a_failed_one_beside_it(execute_once: Execute) -> None:
    executed = execute_once(RAISES)
    assert not executed.run.ok
    assert executed.run.output == executed.folder / "01_made.failed.ipynb"
    assert executed.files == ["01_made.failed.ipynb", "01_made.ipynb"]
    assert (executed.folder / "01_made.ipynb").read_text() == "an earlier good copy"


def test_the_error_of_a_cell_is_told_in_one_line(execute_once: Execute) -> None:
    assert execute_once(RAISES).run.error == "ValueError: first"


def test_the_failed_copy_has_what_was_shown_before_the_error_and_the_error(execute_once: Execute) -> None:
    executed = execute_once(RAISES)
    assert executed.run.texts == ["before"]
    cells = nbformat.read(executed.run.output, as_version=4).cells
    errors = [output.ename for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert errors == ["ValueError"]


def test_a_kernel_that_is_killed_is_reported_and_leaves_the_earlier_good_copy(execute_once: Execute) -> None:
    executed = execute_once(KILLED)
    assert not executed.run.ok
    assert executed.run.error is not None
    assert "died" in executed.run.error.lower()
    assert executed.run.output == executed.folder / "01_made.failed.ipynb"
    assert (executed.folder / "01_made.ipynb").read_text() == "an earlier good copy"
    assert set(executed.files) <= {"01_made.failed.ipynb", "01_made.ipynb"}, "a partial file remained"


def test_a_notebook_with_failed_cases_is_not_ok_though_every_cell_ran(execute_once: Execute) -> None:
    whole = execute_once(GOOD).run
    assert not dataclasses.replace(whole, counts=whole.counts + type(whole.counts)(failed=1)).ok


def test_a_file_that_is_no_notebook_is_reported_and_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cs336_systems.workbook.index.repository_root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_made.ipynb").write_text("{")
    run = execute(Notebook("01_made", "Made"), {}, tmp_path / "executed")
    assert not run.ok
    assert run.error
    assert "\n" not in run.error
    assert list((tmp_path / "executed").iterdir()) == []


@pytest.mark.parametrize("content", [None, "nothing executed"])
def test_what_papermill_returns_from_without_executing_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """A killed kernel has been seen to leave papermill returning as after a success."""

    def returns(source: Path, output: Path, **_: Any) -> None:
        if content is not None:
            output.write_bytes(source.read_bytes())

    import papermill

    monkeypatch.setattr("cs336_systems.workbook.index.repository_root", lambda: tmp_path)
    monkeypatch.setattr(papermill, "execute_notebook", returns)
    folder = tmp_path / "executed"
    run = execute(make_notebook(tmp_path, ["1 + 1"]), {}, folder)
    assert run.error is not None
    assert "executed" in run.error
    assert [path.name for path in folder.iterdir()] == ([] if content is None else ["01_made.failed.ipynb"])


def test_ctrl_c_leaves_the_earlier_good_copy_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, output: Path, **_: Any) -> None:
        output.write_bytes(source.read_bytes())
        raise KeyboardInterrupt

    import papermill

    monkeypatch.setattr("cs336_systems.workbook.index.repository_root", lambda: tmp_path)
    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    folder = tmp_path / "executed"
    folder.mkdir()
    (folder / "01_made.ipynb").write_text("an earlier good copy")
    with pytest.raises(KeyboardInterrupt, match="01_made was stopped"):
        execute(make_notebook(tmp_path, ["1 + 1"]), {}, folder)
    assert [path.name for path in folder.iterdir()] == ["01_made.ipynb"]
    assert (folder / "01_made.ipynb").read_text() == "an earlier good copy"
    assert EVENTS_VARIABLE not in os.environ


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(UserError, match=r"cannot write executed notebooks to .*file/executed"):
        execute(Notebook("01_made", "Made"), {}, tmp_path / "file" / "executed")


def test_without_papermill_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(UserError, match=r"papermill.*pip install -e '\.\[notebooks\]'.*scripts/measure\.py"):
        execute(Notebook("01_made", "Made"), {}, tmp_path)


def test_texts_are_the_markdown_that_code_cells_display_and_nothing_else() -> None:
    outputs = [
        nbformat.v4.new_output("display_data", data={"text/markdown": "a table", "text/plain": "a table"}),
        nbformat.v4.new_output("display_data", data={"image/png": "", "text/plain": "a figure"}),
        nbformat.v4.new_output("stream", text="printed"),
    ]
    cells = [nbformat.v4.new_markdown_cell("prose"), nbformat.v4.new_code_cell("show()", outputs=outputs)]
    assert shown_texts(nbformat.v4.new_notebook(cells=cells)) == ["a table"]


def test_events_that_are_malformed_cost_no_count_of_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.jsonl"
    for event in ({"event": "progress", "done": 1}, {"nothing": 0}, {"event": "sweep"}, {"event": "end"}):
        post_event(events, event)
    post_event(events, {"event": "sweep", "counts": {"failed": 3}})
    with runner._ProgressDisplay(events, "notebook") as display:
        pass
    assert display.counts == {"failed": 3}
    assert "Traceback" not in capsys.readouterr().err


def test_a_copy_that_was_not_wholly_written_is_told_and_not_read(tmp_path: Path) -> None:
    half = tmp_path / "half.ipynb"
    half.write_text('{"cells": [')
    for path in (half, tmp_path / "none.ipynb"):
        notebook, why = runner._read(path)
        assert notebook.cells == []
        assert why is not None
        assert why.startswith("no executed copy was written")


def test_partial_copies_of_killed_runs_are_removed_and_those_of_running_ones_are_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    abandoned, running = (tmp_path / f".nb.{process}.partial.ipynb" for process in (ended.pid, os.getpid()))
    abandoned.touch()
    running.touch()
    runner._remove_abandoned(tmp_path, "nb")
    assert [abandoned.exists(), running.exists()] == [False, True]

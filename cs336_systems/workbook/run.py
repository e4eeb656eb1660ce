"""Execute a notebook with papermill: progress in the terminal, a whole executed copy or none.

A kernel that is killed leaves papermill's output file looking like a success, so a notebook is executed under a partial
name and renamed only after a clean return; one that failed is kept as `.failed.ipynb` beside the last good copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from cs336_systems.bench.progress import EVENTS_VARIABLE, EventReader, Sink, choose_sink
from cs336_systems.errors import UserError, first_line
from cs336_systems.workbook.index import Notebook


@dataclasses.dataclass(frozen=True)
class NotebookRun:
    """What became of one notebook."""

    notebook: Notebook
    error: str | None
    seconds: float
    output: Path
    """The executed copy; of a failed run, what there is of it."""
    counts: Counter[str]
    """Cases by what became of them, over the notebook's sweeps."""
    texts: list[str]
    """The tables and sentences it showed, in order."""

    @property
    def ok(self) -> bool:
        return self.error is None and not self.counts["failed"]


def execute(notebook: Notebook, parameters: Mapping[str, Any], folder: Path) -> NotebookRun:
    """Execute `notebook` into `folder`, drawing its progress here.

    Raises:
        UserError: the notebooks' extra is not installed, or the folder cannot be written.
        KeyboardInterrupt: after Ctrl-C, when the kernel is gone.
    """
    try:
        import papermill
        from traitlets.config import Config
    except ImportError as error:
        raise UserError(
            f"running notebooks needs papermill ({error}): pip install -e '.[notebooks]', "
            "or measure without notebooks by scripts/measure.py"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write executed notebooks to {folder}: {error.strerror}") from error
    _remove_abandoned(folder, notebook.name)
    output = folder / f"{notebook.name}.ipynb"
    partial = folder / f".{notebook.name}.{os.getpid()}.partial.ipynb"
    # The message of every start is about plain TCP; with this the traffic is encrypted instead.
    config = Config({"KernelManager": {"transport_encryption": "auto"}})
    logging.getLogger("papermill").setLevel(logging.ERROR)
    started = time.perf_counter()
    error_text: str | None = None
    with tempfile.TemporaryDirectory(prefix="cs336-progress-") as events_folder:
        events = Path(events_folder) / "events.jsonl"
        with _environment({EVENTS_VARIABLE: str(events)}), _ProgressDisplay(events, notebook.name) as display:
            try:
                papermill.execute_notebook(
                    notebook.path, partial, parameters=dict(parameters), progress_bar=False, config=config
                )
            except papermill.PapermillExecutionError as error:
                error_text = f"{error.ename}: {str(error.evalue).strip().partition(chr(10))[0]}"
            except KeyboardInterrupt:
                partial.unlink(missing_ok=True)
                raise KeyboardInterrupt(f"{notebook.name} was stopped; its finished cases are saved") from None
            except Exception as error:  # a dead kernel, a broken notebook file: told, and the next notebook runs
                error_text = first_line(error)
    executed, unreadable = _read(partial)
    error_text = error_text or unreadable or _unfinished(executed)
    if error_text is None and notebook.experiments and not display.sweeps:
        error_text = "its sweeps did not report what they measured (is the temporary folder full?)"
    if error_text is not None:
        output = folder / f"{notebook.name}.failed.ipynb"
    try:
        partial.replace(output)
    except OSError as error:
        error_text = error_text or f"the executed copy cannot be kept: {error.strerror}"
    seconds = time.perf_counter() - started
    return NotebookRun(notebook, error_text, seconds, output, display.counts, shown_texts(executed))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _read(path: Path) -> tuple[Any, str | None]:
    """The executed notebook; an empty one, and why, where none was written or not all of it."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4), None
    except (OSError, ValueError) as error:  # nbformat's own errors are ValueErrors
        return nbformat.v4.new_notebook(), f"no executed copy was written: {first_line(error)}"


def _remove_abandoned(folder: Path, name: str) -> None:
    """Partial copies of runs that were killed."""
    for path in folder.glob(f".{name}.*.partial.ipynb"):
        process = path.name.split(".")[-3]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


def _unfinished(executed: Any) -> str | None:
    """Why an executed notebook is not whole, though papermill returned."""
    cells = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    if not cells:
        return "nothing was executed"
    for number, cell in enumerate(cells, start=1):
        if cell.execution_count is None:
            return f"code cell {number} was not executed"
        for output in cell.outputs:
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"
    return None


def shown_texts(executed: Any) -> list[str]:
    """The Markdown that code cells displayed: tables and findings, which read well as plain text."""
    return [
        output.data["text/markdown"]
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]


class _ProgressDisplay:
    """Draws what a kernel posts to its events file, in a thread, and counts its cases."""

    INTERVAL_S = 0.1

    def __init__(self, events: Path, title: str) -> None:
        self.counts: Counter[str] = Counter()
        self.sweeps = 0
        self._reader = EventReader(events)
        self._title = title
        self._sink: Sink | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._draw()
        self._draw()
        if self._sink is not None:
            self._sink.close()

    def _draw(self) -> None:
        for event in self._reader.new_events():
            # What a kernel posts is not to be trusted to be well formed, nor a terminal to be still there.
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OSError):
                self._draw_one(event)

    def _draw_one(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            if self._sink is None:
                # The variable that sends a kernel's progress here must not send ours round in a circle.
                self._sink = choose_sink(self._title, event["total"], to_events=False)
            self._sink.update(event["done"], event["total"], event["label"])
        elif event["event"] == "sweep":
            self.counts.update(event["counts"])
            self.sweeps += 1
        elif event["event"] == "end" and self._sink is not None:
            self._sink.close()
            self._sink = None

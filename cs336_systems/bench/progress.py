"""Progress bars that suit where they are seen.

- In JupyterLab: tqdm's widget.
- In a terminal: tqdm's bar.
- In a file or a pipe: a line now and then, and one at the end; never a carriage return.
- Under the runner: events in the file that CS336_PROGRESS_FILE names, so that a notebook's bar is drawn in the
  runner's terminal and the executed notebook stays free of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from tqdm import tqdm

EVENTS_VARIABLE = "CS336_PROGRESS_FILE"


class Sink(Protocol):
    """Where progress is shown."""

    def update(self, done: float, total: float, label: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """A bar over `total` units of work.

    `with Progress(total, "…") as progress:`, then `progress.label("what")` and `progress.advance()`. A unit may be
    advanced in parts, so that a long case moves the bar.
    """

    def __init__(self, total: float, title: str, *, sink: Sink | None = None) -> None:
        self.total, self.title = total, title
        self.done = 0.0
        self._detail = ""
        self._sink = sink or choose_sink(title, total)

    def label(self, detail: str) -> None:
        """Say what is being worked on."""
        self._detail = detail
        self._show()

    def advance(self, amount: float = 1.0) -> None:
        self.done = min(self.total, self.done + amount)
        self._show()

    def advance_to(self, done: float) -> None:
        """Move to an absolute position, never back."""
        self.advance(max(0.0, done - self.done))

    def part_of(self, start: float) -> Callable[[float], None]:
        """What moves the bar through the unit that begins at `start`, told the share of it that is done."""
        return lambda share: self.advance_to(start + share)

    def _show(self) -> None:
        self._sink.update(self.done, self.total, f"{self.title}: {self._detail}" if self._detail else self.title)

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._sink.close()


class Bar:
    """A tqdm bar: in a terminal, or as a widget in a notebook."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, done: float, total: float, label: str) -> None:
        self._bar.total = total
        self._bar.set_description_str(label, refresh=False)
        self._bar.n = round(done, 2)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class Lines:
    """Plain lines for a log: the first, then when a tenth is done or half a minute has passed, and the last."""

    EVERY_S = 30.0

    def __init__(self, stream: TextIO, clock: Any = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._shown_at: float | None = None
        self._shown_tenth = -1
        self._last = ""

    def update(self, done: float, total: float, label: str) -> None:
        tenth = int(10 * done / total) if total else 10
        self._last = f"{label} [{done:.3g}/{total:.3g}]"
        now = self._clock()
        due = self._shown_at is None or now - self._shown_at >= self.EVERY_S or tenth > self._shown_tenth
        if due:
            self._print(self._last)
            self._shown_at, self._shown_tenth = now, tenth

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class Events:
    """Appends events to the runner's file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def update(self, done: float, total: float, label: str) -> None:
        post_event(self._path, {"event": "progress", "done": done, "total": total, "label": label})

    def close(self) -> None:
        post_event(self._path, {"event": "end"})


def choose_sink(title: str, total: float, *, to_events: bool = True) -> Sink:
    """The sink for where this process shows its output; the runner's events file, if there is one, comes first."""
    events = os.environ.get(EVENTS_VARIABLE)
    if events and to_events:
        return Events(Path(events))
    if in_notebook():
        from tqdm.notebook import tqdm as notebook_tqdm  # needs ipywidgets, which only notebooks have

        return Bar(notebook_tqdm(total=total, desc=title, bar_format=_FORMAT, leave=True))
    if sys.stderr.isatty():
        return Bar(terminal_bar(title, total))
    return Lines(sys.stderr)


_FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def terminal_bar(title: str, total: float) -> Any:
    """A tqdm bar on stderr that fits the terminal."""
    return tqdm(total=total, desc=title, bar_format=_FORMAT, dynamic_ncols=True, file=sys.stderr)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel with widgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None and find_spec("ipywidgets") is not None


# Events --------------------------------------------------------------------------------------------------------


def post_event(path: Path, event: dict[str, Any]) -> None:
    """Append one event; losing one is no reason to stop measuring."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    except OSError:
        pass


def announce(event: dict[str, Any]) -> None:
    """Tell the runner, if there is one."""
    events = os.environ.get(EVENTS_VARIABLE)
    if events:
        post_event(Path(events), event)


class EventReader:
    """Reads what is new in an events file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """The complete lines since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event

"""Progress suits where it is seen."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cs336_systems.bench import progress
from cs336_systems.bench.progress import Bar, EventReader, Events, Lines, Progress, choose_sink


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_now_and_then_not_ten_thousand() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10_000, "sweep", sink=Lines(stream, clock)) as bar:
        for _ in range(10_000):
            clock.now += 0.001
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "sweep [0/1e+04]"
    assert lines[-1] == "sweep [1e+04/1e+04]"
    assert "\r" not in stream.getvalue()


def test_a_log_gets_a_line_every_half_minute_of_a_long_case() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(1, "sweep", sink=Lines(stream, clock)) as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.advance(0.0001)
    assert len(stream.getvalue().splitlines()) == 4


def test_a_bar_never_goes_back_nor_past_its_end() -> None:
    stream = io.StringIO()
    bar = Progress(3, "sweep", sink=Lines(stream))
    bar.advance_to(2)
    bar.advance_to(1)
    assert bar.done == 2
    bar.part_of(2)(0.5)
    assert bar.done == 2.5
    bar.advance(10)
    assert bar.done == 3


def test_a_pipe_gets_lines_and_the_runner_gets_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.EVENTS_VARIABLE, raising=False)
    assert isinstance(choose_sink("sweep", 2), Lines)
    monkeypatch.setenv(progress.EVENTS_VARIABLE, str(tmp_path / "events"))
    assert isinstance(choose_sink("sweep", 2), Events)
    assert isinstance(choose_sink("sweep", 2, to_events=False), Lines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.delenv(progress.EVENTS_VARIABLE, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    sink = choose_sink("sweep", 2)
    assert isinstance(sink, Bar)
    with Progress(2, "sweep", sink=sink) as bar:
        bar.label("small")
        bar.advance()
    assert "sweep: small" in terminal.getvalue()
    assert "50%" in terminal.getvalue()


def test_events_are_read_once_each_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "events"
    reader = EventReader(path)
    assert list(reader.new_events()) == []
    progress.post_event(path, {"event": "progress", "done": 1})
    with path.open("a") as file:
        file.write('{"event": "hal')
    assert [event["done"] for event in reader.new_events()] == [1]
    with path.open("a") as file:
        file.write('f"}\nnot json\n[1]\n')
    assert list(reader.new_events()) == [{"event": "half"}]


def test_a_sweep_announces_itself_only_where_a_runner_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.EVENTS_VARIABLE, raising=False)
    progress.announce({"event": "sweep"})
    monkeypatch.setenv(progress.EVENTS_VARIABLE, str(tmp_path / "events"))
    progress.announce({"event": "sweep"})
    assert [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()] == [{"event": "sweep"}]


def test_an_events_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    progress.post_event(tmp_path / "file" / "events", {"event": "progress"})
    assert (tmp_path / "file").read_text() == ""

"""What every test shares: tests of a GPU are skipped where there is none, and a run ends with a table of points.

A problem's points are earned when every test of it that this machine can run passed, and at least one ran.
"""

from __future__ import annotations

import gc
import html
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from cs336_systems.bench.machine import usable_cores
from cs336_systems.bench.records import Store
from cs336_systems.bench.report import Picture
from cs336_systems.repository import repository_root
from cs336_systems.workbook.index import YEARS, load_index

pytest_plugins = ["pytester"]

OUTCOMES = pytest.StashKey[dict[str, list[str]]]()
"""Per problem, the outcomes of its tests: passed, failed or skipped."""

BRING_YOUR_OWN = {"--attention": "climbing", "--ddp": "wrapping"}
"""For each option that names somebody else's implementation, the argument of the tests that take it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--attention",
        metavar="MODULE:ATTRIBUTE",
        help="test this implementation of attention, and nothing else, on the rungs of cs336_systems.attention.ladder",
    )
    parser.addoption(
        "--ddp",
        metavar="MODULE:CLASS",
        help="test this data-parallel wrapper, and nothing else, on what the course asks of one",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else no child could be interrupted by a test
    if hasattr(config, "workerinput"):  # several workers with all threads each would only wait for one another
        threads = max(1, usable_cores() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for what a test starts
    config.stash[OUTCOMES] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = {fixture for option, fixture in BRING_YOUR_OWN.items() if config.getoption(option) is not None}
    if chosen:
        others = [item for item in items if not chosen & {*getattr(item, "fixturenames", ())}]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    known = load_index().problems
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for marker in item.iter_markers("problem"):
            (problem,) = marker.args
            if problem not in known:
                raise pytest.UsageError(f"{item.nodeid} is marked with the unknown problem {problem!r}")
            # Properties travel with the reports, from the workers of a parallel run too.
            item.user_properties.append(("problem", problem))


class PointsPlugin:
    """Collects outcomes where the terminal is: in the controller of a parallel run, or the only process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports: a skip or an error shows in set-up, a failure in the call or the tear-down.
        if report.when == "call" or report.outcome != "passed":
            for name, problem in report.user_properties:
                if name == "problem":
                    self.config.stash[OUTCOMES].setdefault(str(problem), []).append(report.outcome)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(PointsPlugin(session.config), "cs336-points")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes = terminalreporter.config.stash[OUTCOMES]
    if not outcomes:
        return
    problems = load_index().problems
    totals = dict.fromkeys(YEARS, 0)
    terminalreporter.section("points on this machine")
    for name, problem in problems.items():
        if name not in outcomes:
            continue
        earned = is_earned(outcomes[name])
        counted = {outcome: outcomes[name].count(outcome) for outcome in ("passed", "failed", "skipped")}
        for year in YEARS:
            totals[year] += problem.points.get(year, 0) if earned else 0
        points = "  ".join(
            f"{year}: {problem.points[year] if earned else 0:2}/{problem.points[year]:<2}"
            if year in problem.points
            else f"{year}:   –  "
            for year in YEARS
        )
        tests = ", ".join(f"{count} {outcome}" for outcome, count in counted.items() if count)
        terminalreporter.write_line(f"{name:48} {points}  ({tests})")
    sums = "  ".join(f"{year}: {total}" for year, total in totals.items())
    terminalreporter.write_line(f"{'earned in this run':48} {sums}")


def is_earned(outcomes: list[str]) -> bool:
    """Whether a problem's tests earn its points on this machine."""
    return "passed" in outcomes and "failed" not in outcomes


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that keeps its own records in a temporary folder, and has the repository's published figures."""
    published = tmp_path / "published"
    published.mkdir()
    (published / "reference").symlink_to(repository_root() / "data" / "reference")
    return Store(local=tmp_path / "local", published=published)


@pytest.fixture(autouse=True)
def _no_records_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the checkout's own records."""
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "local"))


@pytest.fixture(scope="module", autouse=True)
def _what_earlier_tests_left_is_not_collected_again() -> None:
    """In a process that has run thousands of tests a collection takes a second, and measuring collects all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty meanwhile: for tests of what stands around them, since drawing is most of rendering."""

    def frame(picture: Picture) -> bytes:
        title = html.escape(picture.caption)
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><title>{title}</title></svg>'.encode()

    monkeypatch.setattr(Picture, "svg", frame)


@pytest.fixture
def float64() -> Iterator[None]:
    """PyTorch's default precision is float64 meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """The shapes and types of calls are not checked meanwhile: the compiler cannot look through the check."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


_module_numbers = itertools.count()


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a student's module into the working directory and returns its name, which no other test has."""
    names: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        names.append(f"students_module_{next(_module_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(source, encoding="utf-8")
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)

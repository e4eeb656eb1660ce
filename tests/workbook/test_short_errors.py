"""In a notebook a user's mistake is one line, and any other exception keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

EXTENSION = "cs336_systems.workbook.short_errors"
MISTAKE = "from cs336_systems.errors import UserError\nraise UserError('no such size')"


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell of its own with the extension, which keeps nothing in anybody's home."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", EXTENSION)
    yield shell
    shell.run_line_magic("unload_ext", EXTENSION)
    shell.history_manager.end_session()


def ran(shell: InteractiveShell, source: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """What running a cell came to, and all that it showed."""
    capsys.readouterr()
    result = shell.run_cell(source)
    captured = capsys.readouterr()
    return result, captured.out + captured.err


def test_a_users_mistake_is_one_line_and_the_cell_failed(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    result, shown = ran(shell, MISTAKE, capsys)
    assert shown.splitlines() == ["error: no such size"]
    assert not result.success
    assert str(result.error_in_exec) == "no such size"


def test_a_mistake_of_a_class_derived_from_it_is_one_line_too(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from cs336_systems.errors import UserError\nclass Own(UserError): ...\nraise Own('no such size')"
    _, shown = ran(shell, source, capsys)
    assert shown.splitlines() == ["error: no such size"]


@pytest.mark.parametrize("source", ["1 / 0", "raise ValueError('no such size')"])
def test_any_other_exception_keeps_its_traceback(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    result, shown = ran(shell, source, capsys)
    assert "Traceback" in shown
    assert not result.success


def test_a_mistake_does_not_keep_the_next_cell_from_running(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(shell, MISTAKE, capsys)
    result, shown = ran(shell, "print(6 * 7)", capsys)
    assert result.success
    assert shown == "42\n"


def test_unloaded_a_mistake_has_its_traceback_again(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run_line_magic("unload_ext", EXTENSION)
    result, shown = ran(shell, MISTAKE, capsys)
    assert "Traceback" in shown
    assert "no such size" in shown
    assert not result.success

"""A user's mistake is told in one sentence with status 2; a defect keeps its traceback."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from cs336_systems.errors import UserError, WorkbookWarning, first_line, run_command, unknown_name


def test_a_misspelt_name_comes_with_the_nearest_and_all_known() -> None:
    found = unknown_name("size", "smal", ["small", "large"])
    assert isinstance(found, UserError)
    assert str(found) == "unknown size 'smal': did you mean 'small'? Known: small, large"


def test_a_name_near_none_comes_without_a_guess() -> None:
    assert str(unknown_name("size", "zzz", ["small", "large"])) == "unknown size 'zzz'; known: small, large"


def test_a_name_where_nothing_is_known_says_so() -> None:
    assert str(unknown_name("size", "small", [])) == "unknown size 'small'; known: none"


def test_names_may_come_from_an_iterator_and_need_not_be_strings() -> None:
    assert str(unknown_name("year", 2027, iter(["2025", "2026"]))).endswith("Known: 2025, 2026")


def test_a_users_error_is_a_value_error_and_a_workbook_warning_a_user_warning() -> None:
    with pytest.raises(ValueError, match="told"):
        raise UserError("told")
    with pytest.warns(UserWarning, match="told"):
        warnings.warn("told", WorkbookWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError("\n  first \nsecond"), "ValueError: first "),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n "), "RuntimeError"),
        (KeyError("name"), "KeyError: 'name'"),
    ],
)
def test_the_first_line_is_the_type_and_the_messages_first_line(error: BaseException, expected: str) -> None:
    assert first_line(error) == expected


def exit_of(outcome: int | BaseException) -> int:
    """The exit status of a command whose main returns or raises `outcome`."""
    received: list[list[str] | None] = []

    def main(arguments: list[str] | None) -> int:
        received.append(arguments)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert received == [None], "main must run once, on the command line's own arguments"
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("status", [0, 1, 7])
def test_a_command_exits_with_what_main_returns(status: int) -> None:
    assert exit_of(status) == status


def test_a_users_error_exits_with_2_and_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(UserError("no such size")) == 2
    assert capsys.readouterr() == ("", "error: no such size\n")


def test_ctrl_c_exits_with_130_and_tells_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(KeyboardInterrupt("3 of 9 saved")) == 130
    assert capsys.readouterr() == ("", "\ninterrupted: 3 of 9 saved\n")


def test_ctrl_c_with_nothing_to_tell_says_that_nothing_was_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was running\n"


def test_a_defect_keeps_its_traceback() -> None:
    def main(_: list[str] | None) -> int:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        run_command(main)


def test_a_reader_that_goes_away_ends_the_command_quietly_with_141() -> None:
    # In a process of its own, because the closed pipe is the process's standard output.
    program = (
        "import sys\n"
        "from cs336_systems.errors import run_command\n"
        "def main(arguments):\n"
        "    sys.stdin.read()\n"
        "    print('x' * 100_000)\n"
        "    return 0\n"
        "run_command(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    # The program waits for its input to end, so its first write certainly comes after the reader has gone.
    process.stdout.close()
    process.stdin.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert complaint == ""

"""A run ends with a table of points: earned where every test that could run passed, and at least one did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from cs336_systems.workbook.index import load_index

CONFTEST = Path(__file__).with_name("conftest.py")

PASSES = "    assert True"
FAILS = "    assert False"
SKIPS = "    pytest.skip('not on this machine')"


def source(*tests: tuple[str, str], setup: str = "") -> str:
    """A test file: per test its problem and body."""
    functions = [
        f'@pytest.mark.problem("{problem}")\ndef test_{number}({setup}):\n{body}\n'
        for number, (problem, body) in enumerate(tests)
    ]
    return "\n\n".join(["import pytest", *functions])


@pytest.fixture
def run(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with a copy of this project's conftest.py, to run generated tests in."""
    # A run inside this run may not look for the plugins it has turned on already.
    text = CONFTEST.read_text(encoding="utf-8").replace('pytest_plugins = ["pytester"]\n', "")
    pytester.makeconftest(text)
    pytester.makeini("[pytest]\nmarkers =\n    gpu: x\n    problem(id): x\n")
    return pytester


def points(result: pytest.RunResult) -> dict[str, dict[str, str]]:
    """Per problem, earned and possible points by year, and the counts of outcomes."""
    lines = result.stdout.str().partition("points on this machine")[2].splitlines()[1:]
    found = {}
    for line in lines:
        match = re.match(r"(\w+) +2025: +(\S+) +2026: +(\S+) +\((.*)\)$", line)
        if match:
            found[match[1]] = {"2025": match[2], "2026": match[3], "tests": match[4]}
    return found


def totals(result: pytest.RunResult) -> Mapping[str, int]:
    (line,) = (line for line in result.outlines if line.startswith("earned in this run"))
    return {year: int(total) for year, total in re.findall(r"(\d{4}): (\d+)", line)}


def outcome(run: pytest.Pytester, text: str, *arguments: str) -> pytest.RunResult:
    run.makepyfile(text)
    return run.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_a_problem_with_a_passed_and_a_skipped_test_earns_its_points(run: pytest.Pytester) -> None:
    result = outcome(run, source(("naive_ddp", PASSES), ("naive_ddp", SKIPS)))
    assert points(result) == {"naive_ddp": {"2025": "5/5", "2026": "5/5", "tests": "1 passed, 1 skipped"}}
    assert totals(result) == {"2025": 5, "2026": 5}


def test_a_problem_with_a_failed_test_earns_nothing(run: pytest.Pytester) -> None:
    result = outcome(run, source(("naive_ddp", PASSES), ("naive_ddp", FAILS)))
    assert points(result) == {"naive_ddp": {"2025": "0/5", "2026": "0/5", "tests": "1 passed, 1 failed"}}
    assert totals(result) == {"2025": 0, "2026": 0}


def test_a_problem_whose_tests_were_all_skipped_earns_nothing(run: pytest.Pytester) -> None:
    result = outcome(run, source(("naive_ddp", SKIPS), ("naive_ddp", SKIPS)))
    assert points(result) == {"naive_ddp": {"2025": "0/5", "2026": "0/5", "tests": "2 skipped"}}


@pytest.mark.parametrize(
    "fixture",
    [
        "@pytest.fixture\ndef broken():\n    raise RuntimeError",
        "@pytest.fixture\ndef broken():\n    yield\n    raise RuntimeError",
    ],
    ids=["set-up", "tear-down"],
)
def test_an_error_around_a_test_counts_as_a_failure(run: pytest.Pytester, fixture: str) -> None:
    result = outcome(run, source(("naive_ddp", PASSES), setup="broken") + "\n\n" + fixture)
    assert points(result)["naive_ddp"]["2025"] == "0/5"
    assert "1 failed" in points(result)["naive_ddp"]["tests"]


def test_a_test_that_was_expected_to_fail_is_no_pass(run: pytest.Pytester) -> None:
    text = source(("naive_ddp", FAILS)).replace("@pytest", "@pytest.mark.xfail(reason='known')\n@pytest", 1)
    assert points(outcome(run, text))["naive_ddp"]["2025"] == "0/5"


def test_a_test_of_a_gpu_is_skipped_where_there_is_none_and_keeps_no_points_back(
    run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = source(("naive_ddp", PASSES), ("naive_ddp", FAILS)).replace(
        '@pytest.mark.problem("naive_ddp")\ndef test_1',
        '@pytest.mark.gpu\n@pytest.mark.problem("naive_ddp")\ndef test_1',
    )
    result = outcome(run, text)
    assert points(result)["naive_ddp"] == {"2025": "5/5", "2026": "5/5", "tests": "1 passed, 1 skipped"}


def test_a_problem_that_one_year_does_not_ask_earns_nothing_there(run: pytest.Pytester) -> None:
    result = outcome(run, source(("fsdp", PASSES), ("ddp_overlap_bucketed", PASSES)))
    found = points(result)
    assert (found["fsdp"]["2025"], found["fsdp"]["2026"]) == ("–", "15/15")
    assert (found["ddp_overlap_bucketed"]["2025"], found["ddp_overlap_bucketed"]["2026"]) == ("8/8", "–")
    assert totals(result) == {"2025": 8, "2026": 15}


def test_a_test_of_two_problems_counts_for_both(run: pytest.Pytester) -> None:
    text = source(("naive_ddp", PASSES)).replace("@pytest", '@pytest.mark.problem("torch_compile")\n@pytest', 1)
    assert totals(outcome(run, text)) == {"2025": 7, "2026": 7}


def test_without_tests_of_problems_there_is_no_table(run: pytest.Pytester) -> None:
    result = outcome(run, "def test_nothing():\n    assert True\n")
    result.assert_outcomes(passed=1)
    assert "points on this machine" not in result.stdout.str()


def test_an_unknown_problem_is_an_error_that_names_the_test_and_the_problem(run: pytest.Pytester) -> None:
    assert "naive_dp" not in load_index().problems
    result = outcome(run, source(("naive_dp", PASSES)))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"test_0 is marked with the unknown problem 'naive_dp'", result.stderr.str())


def test_a_parallel_run_has_the_same_table(run: pytest.Pytester) -> None:
    """Outcomes travel from the workers to where the terminal is; each worker is a process of its own."""
    run.makepyfile(source(("naive_ddp", PASSES), ("naive_ddp", SKIPS), ("fsdp", PASSES), ("fsdp", FAILS)))
    result = run.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2")
    assert points(result) == {
        "naive_ddp": {"2025": "5/5", "2026": "5/5", "tests": "1 passed, 1 skipped"},
        "fsdp": {"2025": "–", "2026": "0/15", "tests": "1 passed, 1 failed"},
    }
    assert totals(result) == {"2025": 5, "2026": 5}

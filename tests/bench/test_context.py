"""What a run's context says, and what makes a record stale."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import toy_experiment

from cs336_systems.bench import context
from cs336_systems.bench.machine import this_machine
from cs336_systems.errors import UserError
from cs336_systems.experiments import experiment_names, load_experiment, transformer_step, warmup

SOURCE = '''"""A docstring."""

import math  # why


def area(radius):
    """What it does."""

    # a comment
    return math.pi * radius**2  # "not a # comment"
'''


def module_from(path: Path, name: str = "measured_somewhere") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_comments_docstrings_and_blank_lines_are_no_part_of_the_source() -> None:
    shorter = "import math\ndef area(radius):\n    return math.pi * radius**2\n"
    assert context.bare_source(SOURCE) == context.bare_source(shorter)


@pytest.mark.parametrize(
    "changed",
    [SOURCE.replace("radius**2", "radius**3"), SOURCE.replace("math.pi", "3"), SOURCE.replace("radius", "r")],
)
def test_any_other_change_changes_the_source(changed: str) -> None:
    assert context.bare_source(SOURCE) != context.bare_source(changed)


def test_a_hash_sign_in_a_string_is_no_comment() -> None:
    assert context.bare_source('x = "a # b"') == 'x = "a # b"'


def test_measure_is_hashed_with_what_it_calls_in_its_module_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "def helper():\n    return {helper}\n"
        "def summarise():\n    return {summary}\n"
        "def measure(case, on_part):\n    return helper()\n"
    )
    sources = []
    for index, values in enumerate(
        ({"helper": 1, "summary": 1}, {"helper": 1, "summary": 2}, {"helper": 2, "summary": 1})
    ):
        path = tmp_path / f"experiment_{index}.py"
        path.write_text(program.format(**values))
        sources.append(context.function_with_callees(module_from(path, f"experiment_{index}").measure))
    assert sources[0] == sources[1]
    assert sources[0] != sources[2]


def test_a_transformer_step_depends_on_the_systems_and_not_on_the_measuring_side() -> None:
    hashed = set(context.source_hashes(transformer_step))
    assert {"measure", "model", "loss", "optimizer", "attention.reference", "attention.backends"} <= hashed
    assert {"bench.timing", "bench.allocator"} <= hashed
    rooms = {name.partition(".")[0] for name in hashed}
    assert rooms.isdisjoint({"analysis", "presentation", "workbook", "errors"})
    assert "bench.report" not in hashed
    assert "bench.records" not in hashed


def test_an_experiment_that_measures_with_another_depends_on_its_measure_too() -> None:
    hashes = context.source_hashes(warmup)
    assert hashes["experiments.transformer_step"] == context.source_hashes(transformer_step)["measure"]
    assert hashes["model"] == context.source_hashes(transformer_step)["model"]


def test_every_experiment_has_a_source_to_hash() -> None:
    for name in experiment_names():
        assert len(context.source_hashes(load_experiment(name))) > 1


def test_somebody_elses_implementation_is_part_of_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_module_f.py").write_text("class Model:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = this_machine("cpu")
    before = context.fingerprint(toy_experiment, machine, ["their_module_f:Model"])
    (tmp_path / "their_module_f.py").write_text("class Model:\n    size = 1\n")
    after = context.fingerprint(toy_experiment, machine, ["their_module_f:Model"])
    assert before["source"]["their_module_f:Model"] != after["source"]["their_module_f:Model"]


def test_an_implementation_that_cannot_be_imported_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_module_anywhere'"):
        context.fingerprint(toy_experiment, this_machine("cpu"), ["no_such_module_anywhere:Model"])


def test_the_context_is_json_and_names_no_host_and_no_person() -> None:
    found = context.run_context(toy_experiment, this_machine("cpu"), {"sizes": ["small"]})
    text = json.dumps(found)
    for secret in (Path.home().name, __import__("platform").node()):
        if len(secret) > 4:  # "root" is in many words
            assert secret not in text
    assert found["parameters"] == {"sizes": ["small"]}
    assert found["versions"]["torch"]
    assert found["threads"]["intra_op"] >= 1


def test_times_in_utc_sort_as_text() -> None:
    first, second = context.utc_now(), context.utc_now()
    assert first <= second
    assert first.endswith("Z")


def test_the_spread_is_the_interquartile_range_over_the_median() -> None:
    assert context.relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.0 / 3.0)
    assert context.relative_spread([1.0, 5.0]) == 0.0
    # one slow first step is no noise
    assert context.relative_spread([90.0, *[1.0] * 9]) == 0.0


def test_a_wide_spread_is_flagged_and_a_narrow_one_is_not() -> None:
    with context.NoiseMonitor("cpu") as monitor:
        pass
    assert monitor.report({"step_ms": [1.0, 1.0, 1.0, 1.0]})["flags"] == []
    (flag,) = monitor.report({"step_ms": [1.0, 2.0, 3.0, 4.0]})["flags"]
    assert flag == "spread of 60% of the median"

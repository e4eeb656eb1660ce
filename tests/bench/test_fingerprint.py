"""What makes a record stale, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy_experiment
from source_files import load_file

from cs336_systems.bench import fingerprint
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


def test_comments_docstrings_and_blank_lines_are_no_part_of_the_source() -> None:
    shorter = "import math\ndef area(radius):\n    return math.pi * radius**2\n"
    assert fingerprint.bare_source(SOURCE) == fingerprint.bare_source(shorter)


@pytest.mark.parametrize(
    "changed",
    [SOURCE.replace("radius**2", "radius**3"), SOURCE.replace("math.pi", "3"), SOURCE.replace("radius", "r")],
)
def test_any_other_change_changes_the_source(changed: str) -> None:
    assert fingerprint.bare_source(SOURCE) != fingerprint.bare_source(changed)


def test_a_docstring_beside_its_code_takes_no_code_with_it() -> None:
    one, other = ('def f(): "doc"; return 3', 'def f(): "doc"; return 4')
    assert fingerprint.bare_source(one) != fingerprint.bare_source(other)


def test_a_line_separator_in_a_string_shifts_no_comment() -> None:
    source = 'x = "a\u2028b"\ny = 1  # why\n'
    assert fingerprint.bare_source(source) == fingerprint.bare_source(source.replace("  # why", ""))


def test_a_hash_sign_in_a_string_is_no_comment() -> None:
    assert fingerprint.bare_source('x = "a # b"') == 'x = "a # b"'


def test_measure_is_hashed_with_what_it_names_in_its_module_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import functools\n"
        "REPEATS, UNUSED = {repeats}, 0\n"
        "@functools.cache\n"
        "def helper():\n    return {helper} * REPEATS\n"
        "def summarise():\n    return {summary}\n"
        "def measure(case, on_part):\n    return helper()\n"
    )
    original = {"repeats": 1, "helper": 1, "summary": 1}
    sources = {}
    for changed in ("nothing", *original):
        path = tmp_path / f"experiment_{changed}.py"
        path.write_text(program.format(**(original | ({changed: 2} if changed in original else {}))))
        measure = load_file(path, path.stem).measure
        sources[changed] = fingerprint.function_with_callees(measure)
    assert sources["summary"] == sources["nothing"]
    assert sources["helper"] != sources["nothing"]
    assert sources["repeats"] != sources["nothing"]
    assert "functools.cache" in sources["nothing"]


def test_a_transformer_step_depends_on_the_systems_and_not_on_the_measuring_side() -> None:
    hashed = set(fingerprint.source_hashes(transformer_step))
    assert {"measure", "model", "loss", "optimizer", "attention.reference", "attention.backends"} <= hashed
    assert {"bench.timing", "bench.allocator"} <= hashed
    rooms = {name.partition(".")[0] for name in hashed}
    assert rooms.isdisjoint({"analysis", "presentation", "workbook", "errors"})
    # It reads the ceilings, but does not measure with them.
    assert "experiments.machine_peaks" not in hashed
    assert "bench.report" not in hashed
    assert "bench.records" not in hashed


def test_an_experiment_that_measures_with_another_depends_on_its_measure_too() -> None:
    hashes = fingerprint.source_hashes(warmup)
    assert hashes["experiments.transformer_step"] == fingerprint.source_hashes(transformer_step)["measure"]
    assert hashes["model"] == fingerprint.source_hashes(transformer_step)["model"]


def test_every_experiment_has_a_source_to_hash() -> None:
    for name in experiment_names():
        assert len(fingerprint.source_hashes(load_experiment(name))) > 1


def test_somebody_elses_implementation_is_part_of_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_module_f.py").write_text("class Model:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = this_machine("cpu")
    before = fingerprint.fingerprint(toy_experiment, machine, ["their_module_f:Model"])
    (tmp_path / "their_module_f.py").write_text("class Model:\n    size = 1\n")
    after = fingerprint.fingerprint(toy_experiment, machine, ["their_module_f:Model"])
    assert before["source"]["their_module_f:Model"] != after["source"]["their_module_f:Model"]


def test_what_somebody_elses_implementation_imports_from_beside_it_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_layers_g.py").write_text("SCALE = 1\n")
    (tmp_path / "their_model_g.py").write_text("import their_layers_g\nclass Model:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = this_machine("cpu")
    before = fingerprint.fingerprint(toy_experiment, machine, ["their_model_g:Model"])
    (tmp_path / "their_layers_g.py").write_text("SCALE = 2\n")
    assert fingerprint.fingerprint(toy_experiment, machine, ["their_model_g:Model"])["source"] != before["source"]


def test_on_a_cpu_the_number_of_threads_is_part_of_the_fingerprint() -> None:
    machine, threads = this_machine("cpu"), torch.get_num_threads()
    before = fingerprint.fingerprint(toy_experiment, machine)
    torch.set_num_threads(threads + 1)
    try:
        after = fingerprint.fingerprint(toy_experiment, machine)
    finally:
        torch.set_num_threads(threads)
    assert before["threads"] != after["threads"]


def test_an_implementation_that_cannot_be_imported_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_module_anywhere'"):
        fingerprint.fingerprint(toy_experiment, this_machine("cpu"), ["no_such_module_anywhere:Model"])


def test_a_line_separator_in_a_constant_moves_no_definition(tmp_path: Path) -> None:
    path = tmp_path / "experiment_separator.py"
    path.write_text('TEXT = "a\u2028b"\n\n\ndef measure(case, on_part):\n    return 1\n', encoding="utf-8")
    bare = fingerprint.function_with_callees(load_file(path, path.stem).measure)
    assert bare == "def measure(case, on_part):\n    return 1"

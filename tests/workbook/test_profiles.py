"""Profiles set a notebook's parameters and nothing else, and a mistake in one is told with its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cs336_systems.analysis.hardware import GPUS
from cs336_systems.errors import UserError
from cs336_systems.experiments import load_experiment
from cs336_systems.workbook import index as indices
from cs336_systems.workbook import profiles
from cs336_systems.workbook.index import Index, Notebook, load_index
from cs336_systems.workbook.profiles import (
    LAPTOP,
    SMOKE,
    experiment_arguments,
    experiments_of,
    load_profile,
    notebook_parameters,
    parse_overrides,
    profile_names,
    profile_parameters,
    profiles_folder,
    read_yaml,
)

COMMITTED = profile_names()
TIMING = "01_end_to_end_timing"
MIXED = "02_mixed_precision"

every_profile = pytest.mark.parametrize("name", COMMITTED)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one notebook and a profile named "made"."""
    root = tmp_path / "checkout"
    (root / "configs" / "profiles" / "made").mkdir(parents=True)
    (root / "notebooks").mkdir()
    write_notebook(root, ['contexts = {"tiny": [16]}\n', "steps = 3"])
    write_profile(root, "profile", "description: made for a test\n")
    for module in (indices, profiles):
        monkeypatch.setattr(module, "repository_root", lambda: root)
    return root


def write_notebook(
    root: Path, source: Sequence[str], tags: Sequence[str] = ("parameters",), name: str = TIMING
) -> None:
    cell = {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": list(source), "outputs": []}
    content = {"cells": [{"cell_type": "code", "metadata": {}, "source": ["1 / 0"]}, cell], "metadata": {}}
    (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")


def write_profile(root: Path, name: str, content: str) -> None:
    (root / "configs" / "profiles" / "made" / f"{name}.yaml").write_text(content, encoding="utf-8")


def notebook() -> Notebook:
    return Notebook(TIMING, "End-to-end timing", ("transformer_step", "warmup"))


# Those that are committed --------------------------------------------------------------------------------------


def test_the_laptop_and_the_smoke_profile_and_those_of_gpus_are_there() -> None:
    assert {LAPTOP, SMOKE, "a100-40gb", "h100", "h200"} <= set(COMMITTED)


@every_profile
def test_a_committed_profile_says_what_it_is_for(name: str) -> None:
    assert load_profile(name).description


@every_profile
def test_the_gpu_that_a_committed_profile_expects_is_one_whose_ceilings_are_known(name: str) -> None:
    assert load_profile(name).gpu in (None, *GPUS)


@every_profile
def test_a_committed_profile_sets_only_parameters_its_notebooks_have(name: str) -> None:
    for each in load_index().notebooks_there():
        assert set(profile_parameters(name, each)) <= set(notebook_parameters(each))


@every_profile
def test_the_files_of_a_committed_profile_are_named_after_notebooks(name: str) -> None:
    files = {path.stem for path in (profiles_folder() / name).glob("*")} - {"profile"}
    assert files <= set(load_index().notebooks)


@every_profile
def test_every_experiment_of_a_committed_profile_lays_out_a_grid_on_any_machine(name: str) -> None:
    """A profile for a GPU too, on a machine without: `this_machine` insists on the device, a grid does not."""
    found = experiments_of(name, load_index())
    assert next(iter(found)) == "machine_peaks"
    assert ("longest_context" if name == "planned" else "transformer_step") in found
    for experiment, grids in found.items():
        assert grids, experiment
        for arguments in grids:
            cells = load_experiment(experiment).grid(**arguments)
            assert cells, experiment
            if "device" in arguments and arguments["device"] != "auto":
                assert {cell.case.device for cell in cells} == {arguments["device"]}


def test_the_laptop_profile_is_the_notebooks_own_values() -> None:
    each = load_index().notebook("1")
    assert profile_parameters(LAPTOP, each) == {}


def test_what_measuring_without_notebooks_measures_is_the_notebooks_parameters_with_the_profiles_on_top() -> None:
    index = load_index()
    each = index.notebook("1")
    arguments = experiments_of(SMOKE, index)["transformer_step"][0]
    both = notebook_parameters(each) | profile_parameters(SMOKE, each)
    assert arguments == {name: both[name] for name in arguments}
    assert arguments["contexts"] == {"tiny": [16]}
    assert arguments["phases"] == notebook_parameters(each)["phases"]


def test_an_experiment_gets_no_parameter_of_another() -> None:
    arguments = experiment_arguments("warmup", {"warmup_counts": [0], "contexts": {"tiny": [16]}, "device": "cpu"})
    assert arguments == {"warmup_counts": [0], "device": "cpu"}


# Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h20", "", "..", "made/..", "/"])
def test_an_unknown_profile_is_an_error_that_lists_the_known_ones(checkout: Path, name: str) -> None:
    del checkout
    with pytest.raises(UserError, match=r"unknown profile .*[Kk]nown: laptop, made"):
        load_profile(name)


def test_an_unknown_key_of_what_a_profile_is_for_is_an_error_that_lists_the_known_ones(checkout: Path) -> None:
    write_profile(checkout, "profile", "descripton: made for a test\n")
    with pytest.raises(UserError, match=r"unknown key 'descripton' in .*made/profile\.yaml.*'description'"):
        load_profile("made")


def test_an_unknown_gpu_is_an_error_that_lists_the_known_ones(checkout: Path) -> None:
    write_profile(checkout, "profile", "gpu: h2000\n")
    with pytest.raises(UserError, match=r"h2000.*h200"):
        load_profile("made")


def test_a_profile_without_a_file_that_says_what_it_is_for_is_an_error(checkout: Path) -> None:
    (checkout / "configs" / "profiles" / "made" / "profile.yaml").unlink()
    with pytest.raises(UserError, match=r"cannot read .*made/profile\.yaml"):
        load_profile("made")


def test_a_parameter_the_notebook_does_not_have_is_an_error_that_names_file_and_known_ones(checkout: Path) -> None:
    write_profile(checkout, TIMING, "step: 3\n")
    with pytest.raises(UserError, match=rf"unknown parameter 'step' of {TIMING} in .*made/{TIMING}\.yaml") as caught:
        profile_parameters("made", notebook())
    assert "did you mean 'steps'? Known: contexts, steps" in str(caught.value)


def test_an_unknown_parameter_given_by_hand_is_an_error_that_lists_the_known_ones(checkout: Path) -> None:
    del checkout
    with pytest.raises(UserError, match=r"'stps' of \S+ given with -p: did you mean 'steps'\? Known: contexts, steps"):
        profile_parameters("made", notebook(), {"stps": 3})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("steps: [1, 2\nwarmup: 3\n", r"is not YAML at line \d"),
        ("steps: 'unclosed\n", r"is not YAML at line \d"),
        ("\tsteps: 3\n", r"is not YAML at line 1"),
        ("- steps\n- warmup\n", r"must map parameter names to values, found list"),
        ("steps\n", r"must map parameter names to values, found str"),
        ("3: steps\n", r"must map parameter names to values"),
        ("when: 2026-13-45\n", r"is not YAML"),
        ("steps: !!python/name:os.system\n", r"is not YAML at line 1"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_an_error_that_names_it(checkout: Path, content: str, told: str) -> None:
    write_profile(checkout, TIMING, content)
    with pytest.raises(UserError, match=rf"{TIMING}\.yaml {told}") as caught:
        profile_parameters("made", notebook())
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"steps: \xff\n")
    with pytest.raises(UserError, match=r"bytes\.yaml is not YAML"):
        read_yaml(path)


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_a_yaml_tag_that_would_build_an_object_is_refused_and_not_executed(checkout: Path) -> None:
    witness = checkout / "executed"
    write_profile(checkout, TIMING, f"steps: !!python/object/apply:os.system ['touch {witness}']\n")
    with pytest.raises(UserError, match=r"is not YAML at line 1.*could not determine a constructor"):
        profile_parameters("made", notebook())
    assert not witness.exists()


def test_a_tag_given_by_hand_is_refused_and_not_executed(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    with pytest.raises(UserError, match="the value of -p steps is not YAML"):
        parse_overrides([("steps", f"!!python/object/apply:os.system ['touch {witness}']")])
    assert not witness.exists()


# Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_sets_nothing(checkout: Path, content: str) -> None:
    write_profile(checkout, TIMING, content)
    assert profile_parameters("made", notebook()) == {}


def test_what_is_given_by_hand_wins_over_the_file(checkout: Path) -> None:
    write_profile(checkout, TIMING, "steps: 5\ncontexts: {mini: [8]}\n")
    assert profile_parameters("made", notebook(), {"steps": 7}) == {"steps": 7, "contexts": {"mini": [8]}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("cpu", "cpu"),
        ("'3'", "3"),
        ("[128, 256]", [128, 256]),
        ("{small: [128]}", {"small": [128]}),
        ("[none, bfloat16]", ["none", "bfloat16"]),
    ],
)
def test_a_value_given_by_hand_is_read_as_yaml(text: str, value: Any) -> None:
    read = parse_overrides([("name", text)])
    assert read == {"name": value}
    assert type(read["name"]) is type(value)


@pytest.mark.parametrize("text", ["[1, 2", "{a: ", "a: b: c", "2026-13-45"])
def test_a_value_given_by_hand_that_is_not_yaml_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="the value of -p steps is not YAML: ") as caught:
        parse_overrides([("steps", text)])
    assert "\n" not in str(caught.value)


def test_of_a_parameter_given_twice_the_last_counts() -> None:
    assert parse_overrides([("steps", "1"), ("steps", "2")]) == {"steps": 2}


# The parameters cell -------------------------------------------------------------------------------------------


def test_the_parameters_cell_is_read_without_executing_anything(checkout: Path) -> None:
    del checkout
    assert notebook_parameters(notebook()) == {"contexts": {"tiny": [16]}, "steps": 3}


def test_a_notebook_without_a_parameters_cell_has_no_parameters(checkout: Path) -> None:
    write_notebook(checkout, ["steps = 3"], tags=())
    assert notebook_parameters(notebook()) == {}


@pytest.mark.parametrize(
    "source", ["steps = 1 + x", "steps += 1", "a, b = 1, 2", "import os", "steps = open('f')", "steps ="]
)
def test_a_parameters_cell_with_anything_but_plain_values_is_an_error_that_names_the_notebook(
    checkout: Path, source: str
) -> None:
    write_notebook(checkout, [source])
    with pytest.raises(UserError, match=rf"the parameters cell of .*{TIMING}\.ipynb must hold assignments"):
        notebook_parameters(notebook())


def test_a_notebook_that_is_not_json_is_an_error_that_names_it(checkout: Path) -> None:
    (checkout / "notebooks" / f"{TIMING}.ipynb").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{TIMING}\.ipynb"):
        notebook_parameters(notebook())


def test_a_notebook_that_is_not_there_is_an_error_that_names_it(checkout: Path) -> None:
    (checkout / "notebooks" / f"{TIMING}.ipynb").unlink()
    with pytest.raises(UserError, match=rf"cannot read .*{TIMING}\.ipynb"):
        notebook_parameters(notebook())


def test_a_notebook_the_profile_has_no_file_for_is_left_out_of_its_experiments(checkout: Path) -> None:
    del checkout
    index = Index({}, {TIMING: notebook()})
    assert list(experiments_of("made", index)) == ["machine_peaks"]
    assert list(experiments_of(LAPTOP, index)) == ["machine_peaks", "transformer_step", "warmup"]


# An experiment that several notebooks read ---------------------------------------------------------------------


def two_notebooks(root: Path, *source: str) -> Index:
    """A further notebook that reads the steps too, but no warm-ups."""
    write_notebook(root, [f"{line}\n" for line in source], name=MIXED)
    return Index({}, {TIMING: notebook(), MIXED: Notebook(MIXED, "Mixed precision", ("transformer_step",))})


def test_an_experiment_that_two_notebooks_read_has_the_grids_of_both_in_their_order(checkout: Path) -> None:
    index = two_notebooks(checkout, 'autocast = ["none", "bfloat16"]', "steps = 7", "warmup_steps = 2")
    found = experiments_of(LAPTOP, index)
    assert found["transformer_step"] == [
        {"contexts": {"tiny": [16]}, "steps": 3},
        {"autocast": ["none", "bfloat16"], "steps": 7},  # none of the other notebook's contexts
    ]
    assert found["warmup"] == [{}]
    assert found["machine_peaks"] == [{}]


def test_two_notebooks_that_ask_for_the_same_are_one_grid(checkout: Path) -> None:
    index = two_notebooks(checkout, "steps = 3", 'contexts = {"tiny": [16]}', "warmup_counts = [0]")
    assert experiments_of(LAPTOP, index)["transformer_step"] == [{"contexts": {"tiny": [16]}, "steps": 3}]


def test_a_profile_changes_the_grid_of_the_notebook_that_it_names_and_leaves_the_others_out(checkout: Path) -> None:
    index = two_notebooks(checkout, "steps = 7")
    write_profile(checkout, MIXED, "steps: 1\n")
    assert experiments_of("made", index) == {"machine_peaks": [{}], "transformer_step": [{"steps": 1}]}
    write_profile(checkout, TIMING, "steps: 2\n")
    assert experiments_of("made", index)["transformer_step"] == [
        {"contexts": {"tiny": [16]}, "steps": 2},
        {"steps": 1},
    ]


def test_the_ceilings_are_asked_for_once_per_device_that_the_notebooks_name(checkout: Path) -> None:
    write_notebook(checkout, ['device = "cpu"'])
    assert experiments_of(LAPTOP, two_notebooks(checkout, 'device = "cpu"'))["machine_peaks"] == [{"device": "cpu"}]
    both = experiments_of(LAPTOP, two_notebooks(checkout, 'device = "cuda"'))
    assert both["machine_peaks"] == [{"device": "cpu"}, {"device": "cuda"}]
    assert next(iter(both)) == "machine_peaks"

"""The options of a step give every case there is, and those of a case give that case again."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.step_options import add_step_options, build_case, chosen_config, options_of, ranged_store

SMALLEST = Case(16, 32, 1, 2, 8, "cpu")
# Of every field another value than the default's and the smallest's.
OTHERS: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 1,
    "context_length": 24,
    "device": "cuda",
    "vocab_size": 77,
    "rope_theta": 12_345.678901,
    "batch_size": 9,
    "phase": "forward-backward",
    "dtype": "bfloat16",
    "autocast": "float16",
    "float32_matmul": "high",
    "compile": "model",
    "attention": "my_module:my_attention",
    "formulation": "fused",
    "optimizer": "fused",
    "rope": "2026",
    "checkpointing": "every-1",
    "model": "my_package.my_model:MyTransformer",
    "warmup": 0,
    "steps": 1,
    "seed": 11,
}


def case_of(options: list[str]) -> Case:
    parser = argparse.ArgumentParser()
    add_step_options(parser)
    arguments = parser.parse_args(options)
    (phase,) = arguments.phase
    return build_case(arguments, chosen_config(arguments, arguments.context), phase)


def test_the_options_of_a_case_give_that_case() -> None:
    assert case_of(options_of(SMALLEST)) == SMALLEST
    for name, value in OTHERS.items():
        case = dataclasses.replace(SMALLEST, **{name: value})
        assert case != SMALLEST
        assert case_of(options_of(case)) == case
    assert case_of(options_of(Case(**OTHERS))) == Case(**OTHERS)


def test_no_field_of_a_case_is_without_an_option() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Case)}


def test_the_default_number_of_steps_is_the_scripts_and_its_help_says_so() -> None:
    parser = argparse.ArgumentParser()
    add_step_options(parser, steps=7)
    assert parser.parse_args([]).steps == 7
    assert "measured steps (default: 7)" in parser.format_help()


def test_several_contexts_are_a_list() -> None:
    parser = argparse.ArgumentParser()
    add_step_options(parser, several_contexts=True)
    assert parser.parse_args(["--context", "128", "256"]).context == [128, 256]
    assert parser.parse_args([]).context == [512]


def test_a_size_is_changed_by_what_is_given_beside_it_and_missing_dimensions_are_named() -> None:
    assert case_of(["--size", "tiny", "--num-layers", "1", "--device", "cpu"]).num_layers == 1
    with pytest.raises(UserError, match="--d-ff, --num-layers missing"):
        case_of(["--d-model", "16", "--num-heads", "2"])


def test_records_of_steps_with_ranges_lie_where_no_timing_is_looked_for(tmp_path: Path) -> None:
    apart, timings = ranged_store(tmp_path), Store.default(tmp_path)
    record = apart.local / "toy-1c" / "transformer_step" / "run.jsonl"
    record.parent.mkdir(parents=True)
    record.touch()
    assert apart.local_run_names("toy-1c", "transformer_step") == ["run"]
    assert timings.local_run_names("toy-1c", "transformer_step") == []
    assert timings.local_machines() == {}

"""The interface of the course's own suites is exactly theirs, and what is not built yet says which problem that is."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from source_files import load_file

from cs336_systems.workbook.index import load_index

PATH = Path(__file__).with_name("adapters.py")
REQUIRED = inspect.Parameter.empty
NO_ARGUMENTS: dict[str, object] = {}
DDP_HOOK: dict[str, object] = {"ddp_model": REQUIRED, "optimizer": REQUIRED}

# The specification, by hand: the parameters and defaults with which the suites of both years call.
SIGNATURES: dict[str, dict[str, object]] = {
    "get_flashattention_autograd_function_pytorch": NO_ARGUMENTS,
    "get_flashattention_autograd_function_triton": NO_ARGUMENTS,
    "get_ddp_individual_parameters": {"module": REQUIRED},
    "ddp_individual_parameters_on_after_backward": DDP_HOOK,
    "get_ddp_bucketed": {"module": REQUIRED, "bucket_size_mb": REQUIRED},
    "ddp_bucketed_on_after_backward": DDP_HOOK,
    "ddp_bucketed_on_train_batch_start": DDP_HOOK,
    "get_ddp": {"module": REQUIRED},
    "ddp_on_after_backward": DDP_HOOK,
    "get_fsdp": {"module": REQUIRED, "compute_dtype": None},
    "fsdp_on_after_backward": {"fsdp_model": REQUIRED, "optimizer": REQUIRED},
    "fsdp_gather_full_params": {"fsdp_model": REQUIRED},
    "get_sharded_optimizer": {"params": REQUIRED, "optimizer_cls": REQUIRED},
}
# The problem that each answers.
PROBLEMS = {
    "get_flashattention_autograd_function_pytorch": "flash_forward",
    "get_flashattention_autograd_function_triton": "flash_forward",
    "get_ddp_individual_parameters": "ddp_overlap_individual_parameters",
    "ddp_individual_parameters_on_after_backward": "ddp_overlap_individual_parameters",
    "get_ddp_bucketed": "ddp_overlap_bucketed",
    "ddp_bucketed_on_after_backward": "ddp_overlap_bucketed",
    "ddp_bucketed_on_train_batch_start": "ddp_overlap_bucketed",
    "get_ddp": "ddp_overlap_individual_parameters",
    "ddp_on_after_backward": "ddp_overlap_individual_parameters",
    "get_fsdp": "fsdp",
    "fsdp_on_after_backward": "fsdp",
    "fsdp_gather_full_params": "fsdp",
    "get_sharded_optimizer": "optimizer_state_sharding",
}


@pytest.fixture(scope="module")
def adapters() -> ModuleType:
    return load_file(PATH, "adapters_of_the_suites")


def functions_of(module: ModuleType) -> dict[str, object]:
    """What a suite's `from .adapters import …` can name."""
    return {
        name: member
        for name, member in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(member) and member.__module__ == module.__name__
    }


def test_there_are_exactly_the_thirteen_functions_of_the_suites(adapters: ModuleType) -> None:
    assert len(SIGNATURES) == 13
    assert set(functions_of(adapters)) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_takes_the_arguments_that_the_suites_give(adapters: ModuleType, name: str) -> None:
    parameters = inspect.signature(getattr(adapters, name)).parameters.values()
    kinds = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert {each.name: each.default for each in parameters if each.kind not in kinds} == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_only_the_sharded_optimizer_takes_further_keywords(adapters: ModuleType, name: str) -> None:
    kinds = {each.kind for each in inspect.signature(getattr(adapters, name)).parameters.values()}
    assert (inspect.Parameter.VAR_KEYWORD in kinds) == (name == "get_sharded_optimizer")
    assert inspect.Parameter.VAR_POSITIONAL not in kinds


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_whose_problem_is_planned_says_which_and_one_whose_problem_is_built_does_not(
    adapters: ModuleType, name: str
) -> None:
    problem = load_index().problems[PROBLEMS[name]]
    function = getattr(adapters, name)
    says_so = "NotImplementedError" in inspect.getsource(function)
    assert says_so == (problem.state == "planned")
    if problem.state == "planned":
        arguments = [None for default in SIGNATURES[name].values() if default is REQUIRED]
        with pytest.raises(NotImplementedError) as caught:
            function(*arguments)
        assert re.findall(r"problem (\w+)", str(caught.value)) == [problem.id]


def test_the_adapters_import_nothing_but_torch_and_the_package() -> None:
    imported = set()
    for node in ast.walk(ast.parse(PATH.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would look in the suite's own package"
            imported.add(str(node.module).partition(".")[0])
    assert imported
    assert imported <= {"__future__", "typing", "collections", "torch", "cs336_systems"}

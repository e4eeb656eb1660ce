"""An implementation from outside is found by `module:attribute`, and a wrong reference says what is wrong."""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cs336_systems.errors import UserError
from cs336_systems.object_reference import is_object_reference, load_object, source_file_of


@pytest.mark.parametrize(("name", "expected"), [("my.module:Model", True), ("sdpa", False), ("", False)])
def test_a_reference_is_told_from_a_name_of_ours_by_its_colon(name: str, expected: bool) -> None:
    assert is_object_reference(name) is expected


def test_an_installed_modules_attribute_is_found() -> None:
    assert load_object("math:sqrt") is math.sqrt
    assert load_object("collections.abc:Mapping") is collections.abc.Mapping


def test_an_attribute_of_an_attribute_is_found() -> None:
    assert load_object("collections:OrderedDict.fromkeys")("ab") == collections.OrderedDict(a=None, b=None)


def test_a_file_in_the_working_directory_is_found(write_module: Callable[[str], str]) -> None:
    assert load_object(f"{write_module('answer = 42')}:answer") == 42


def test_a_file_written_after_the_first_look_is_found(write_module: Callable[[str], str]) -> None:
    first = write_module("answer = 1")
    assert load_object(f"{first}:answer") == 1
    # Python remembers a folder's listing for as long as its modification time seems not to change.
    assert load_object(f"{write_module('answer = 2')}:answer") == 2


def test_the_working_directory_never_hides_an_installed_module(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    write_module("")
    (tmp_path / "colorsys.py").write_text("rgb_to_hsv = None", encoding="utf-8")
    was_there = sys.modules.pop("colorsys", None)
    try:
        assert load_object("colorsys:rgb_to_hsv") is not None
    finally:
        sys.modules.pop("colorsys", None)
        if was_there is not None:
            sys.modules["colorsys"] = was_there


@pytest.mark.parametrize(
    "reference",
    ["", ":", "math", "math:", ":sqrt", "math:sqrt:again", "ma th:sqrt", "math:sqrt()", "a..b:c", "./a.py:b"],
)
def test_a_malformed_reference_is_an_error_with_an_example(reference: str) -> None:
    with pytest.raises(UserError, match=r"expected an object reference like 'my_package\.my_module:MyModel', found "):
        load_object(reference)


def test_a_module_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(
        UserError, match=r"cannot import 'no_such_module' for 'no_such_module:x': ModuleNotFoundError: "
    ):
        load_object("no_such_module:x")


def test_a_module_that_fails_on_import_is_an_error_that_says_why(write_module: Callable[[str], str]) -> None:
    name = write_module("raise RuntimeError('no licence\\nsecond line')")
    with pytest.raises(UserError, match=rf"cannot import '{name}' .*: RuntimeError: no licence$") as caught:
        load_object(f"{name}:x")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_missing_attribute_is_an_error_with_the_nearest_and_without_private_names(
    write_module: Callable[[str], str],
) -> None:
    name = write_module("my_model = 1\nother = 2\n_hidden = 3")
    with pytest.raises(
        UserError,
        match=rf"^unknown attribute 'my_modle' of '{name}': did you mean 'my_model'\? Known: my_model, other$",
    ):
        load_object(f"{name}:my_modle")


def test_the_source_file_of_a_function_is_the_file_that_defines_it(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    name = write_module("def f():\n    pass\n\nclass C:\n    pass\n")
    for attribute in ("f", "C"):
        found = source_file_of(f"{name}:{attribute}")
        assert found is not None
        assert found.samefile(tmp_path / f"{name}.py")


@pytest.mark.parametrize("reference", ["math:sqrt", "math:pi", "builtins:dict"])
def test_what_has_no_python_source_has_no_source_file(reference: str) -> None:
    assert source_file_of(reference) is None

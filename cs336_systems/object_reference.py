"""Bring your own: `module:attribute` names an implementation from outside.

Wherever the workbook lets an implementation be chosen by name, an object reference in the form of Python's
entry points (https://packaging.python.org/specifications/entry-points/) is accepted as well: a student's
model, attention or optimizer is then measured beside ours.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from cs336_systems.errors import UserError, first_line, unknown_name


def is_object_reference(name: str) -> bool:
    """Whether `name` is spelt `module:attribute`, as opposed to a name of ours."""
    return ":" in name


def load_object(reference: str) -> Any:
    """Import what `module:attribute` names.

    The working directory is importable, as it is for `python -m`, so that a file beside the user is found.

    Raises:
        UserError: the reference is malformed, its module cannot be imported, or it has no such attribute.
    """
    module_name, _, attribute_path = reference.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute_path.split("."))):
        raise UserError(f"expected an object reference like 'my_package.my_module:MyModel', found {reference!r}")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path and "" not in sys.path:
        sys.path.append(working_directory)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises on import is theirs to see
        raise UserError(f"cannot import {module_name!r} for {reference!r}: {first_line(error)}") from error
    for attribute in attribute_path.split("."):
        if not hasattr(found, attribute):
            public = [name for name, value in vars(found).items() if name[0] != "_" and not inspect.ismodule(value)]
            raise unknown_name("attribute", attribute, public, where=f"of {module_name!r}")
        found = getattr(found, attribute)
    return found


def source_file_of(reference: str) -> Path | None:
    """The file that defines the referenced object, or None for one without a Python source."""
    try:
        path = inspect.getsourcefile(load_object(reference))
    except TypeError:
        return None
    return Path(path) if path else None

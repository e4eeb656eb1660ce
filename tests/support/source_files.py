"""Files as modules: a script is loaded to be called, and a student's module is written to be named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cs336_systems.errors import run_command
from cs336_systems.repository import repository_root


def load_file(path: Path, name: str) -> ModuleType:
    """The module in `path`, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_script(name: str) -> ModuleType:
    """scripts/<name>.py, to call its `main` without the cost of a process."""
    return load_file(repository_root() / "scripts" / f"{name}.py", f"scripts_{name}")


def status_of(script: ModuleType, *arguments: str | Path) -> int:
    """The exit status that a script's command line ends with."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: script.main([str(argument) for argument in arguments]))
    assert isinstance(ended.value.code, int)
    return ended.value.code

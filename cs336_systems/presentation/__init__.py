"""Summaries to tables, figures and sentences: one module per experiment, each number computed."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from cs336_systems.errors import unknown_name


def load_presentation(experiment: str) -> ModuleType:
    """The module that presents `experiment`: `table(summary)`, and where it has them `figure` and `findings`.

    Raises:
        UserError: none presents it; the message lists those that there are.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if experiment not in known:
        raise unknown_name("experiment", experiment, known)
    return importlib.import_module(f"{__name__}.{experiment}")

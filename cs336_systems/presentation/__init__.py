"""Summaries to tables, figures and sentences: one module per experiment, each number computed."""

from __future__ import annotations

import importlib
from types import ModuleType


def load_presentation(experiment: str) -> ModuleType:
    """The module that presents `experiment`: `table(summary)`, and where it has them `figure` and `findings`."""
    return importlib.import_module(f"{__name__}.{experiment}")

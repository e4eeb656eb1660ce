"""One measured thing each: `Case`, `grid()`, `measure()`, `summarise()`; `presentation/` shows what they summarise.

An experiment is a module; its parameters are the keyword arguments of its `grid`, whose defaults are a laptop's.
Records are keyed by the module's name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from cs336_systems.errors import unknown_name


def experiment_names() -> list[str]:
    """Every experiment there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_experiment(name: str) -> ModuleType:
    """The module of experiment `name`; an unknown one is an error that lists the known."""
    if name not in experiment_names():
        raise unknown_name("experiment", name, experiment_names())
    return importlib.import_module(f"{__name__}.{name}")


def grid_parameters(experiment: ModuleType) -> dict[str, Any]:
    """The names and laptop defaults of an experiment's parameters."""
    return {name: value.default for name, value in inspect.signature(experiment.grid).parameters.items()}

"""One measured thing each: `Case`, `grid()`, `measure()`, `summarise()`; `presentation/` shows what they summarise.

An experiment is a module; its parameters are the keyword arguments of its `grid`, whose defaults are a laptop's.
Records are keyed by the module's name. A long one has parts: `data_parallel_ranks` is what `data_parallel` runs on each
rank.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from cs336_systems.errors import unknown_name


def experiment_names() -> list[str]:
    """Every experiment there is; a module whose name goes on where another's ends is a part of that one."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in names if not any(name.startswith(f"{other}_") for other in names))


def load_experiment(name: str) -> ModuleType:
    """The module of experiment `name`; an unknown one is an error that lists the known."""
    if name not in experiment_names():
        raise unknown_name("experiment", name, experiment_names())
    return importlib.import_module(f"{__name__}.{name}")


def grid_parameters(experiment: ModuleType) -> dict[str, Any]:
    """The names and laptop defaults of an experiment's parameters."""
    return {name: value.default for name, value in inspect.signature(experiment.grid).parameters.items()}

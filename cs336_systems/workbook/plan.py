"""What a run would do: how many cases it measures, and about how long that takes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cs336_systems.analysis.hardware import Peaks, gpu_peaks
from cs336_systems.bench.grid import Cell, runnable
from cs336_systems.bench.machine import resolve_device, this_machine
from cs336_systems.bench.records import Store, case_key
from cs336_systems.errors import UserError
from cs336_systems.experiments import load_experiment, machine_peaks, transformer_step
from cs336_systems.workbook.profiles import Profile

ASSUMED_SLOWDOWN = 3.0
"""How many times their floor steps are taken to need where no record says it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One experiment of a run, before it runs."""

    experiment: str
    cases: int
    skipped: int
    recorded: int
    """Cases with a good record here; whether it is still fresh is seen when it runs."""
    minutes: float
    """Predicted for the rest; NaN where no ceiling is known to predict from."""


def lay_out(name: str, arguments: Mapping[str, Any], *, here: bool = False) -> list[Cell[Any]]:
    """The cells of an experiment's grid, laid out before anything is measured.

    Raises:
        UserError: an argument does not fit the grid, or (`here`) this machine lacks the device of its cases.
    """
    try:
        cells: list[Cell[Any]] = load_experiment(name).grid(**arguments)
    except TypeError as error:
        raise UserError(f"the parameters of {name} do not fit its grid: {error}") from error
    if here:
        for device in {str(cell.case.device) for cell in cells}:
            this_machine(device)
    return cells


def lay_out_all(name: str, grids: Sequence[Mapping[str, Any]], *, here: bool = False) -> list[Cell[Any]]:
    """The cells of several grids of one experiment, a case that is in more than one once."""
    cells = [cell for arguments in grids for cell in lay_out(name, arguments, here=here)]
    return list({cell.case: cell for cell in cells}.values())


def plan_experiment(name: str, arguments: Mapping[str, Any], profile: Profile, store: Store) -> Plan:
    """Count the cases of an experiment's grid and predict their time.

    Raises:
        UserError: the grid cannot be laid out.
    """
    experiment = load_experiment(name)
    cells = lay_out(name, arguments)
    device = str(cells[0].case.device) if cells else "cpu"
    peaks, slowdown = _expected(device, profile, store)
    machine = _machine_name(device)
    known = store.local_records(machine, name) if machine else {}
    waiting = [case for case in runnable(cells) if not _recorded(known, case)]
    seconds = [experiment.predicted_seconds(case, peaks, slowdown) if peaks else math.nan for case in waiting]
    skipped = sum(cell.skip_reason is not None for cell in cells)
    return Plan(name, len(cells), skipped, len(cells) - skipped - len(waiting), sum(seconds) / 60)


def _recorded(known: Mapping[str, Any], case: Any) -> bool:
    record = known.get(case_key(dataclasses.asdict(case)))
    return record is not None and record.is_good


def _machine_name(device: str) -> str | None:
    """This machine's name if it has the device; a profile can be planned on a machine without."""
    try:
        return this_machine(device).name
    except UserError:
        return None


def _expected(device: str, profile: Profile, store: Store) -> tuple[Peaks | None, float]:
    """The ceilings to predict with, and how far above the floor this machine's records lie."""
    if profile.gpu is not None:
        peaks = gpu_peaks(profile.gpu)
    else:
        try:
            peaks = machine_peaks.peaks_of(this_machine(resolve_device(device)), store)
        except UserError:
            return None, ASSUMED_SLOWDOWN
    machine = _machine_name(device)
    records = [
        record
        for record in (store.local_records(machine, "transformer_step") if machine else {}).values()
        if record.status == "ok"
    ]
    if not records:
        return peaks, ASSUMED_SLOWDOWN
    ratios = list(transformer_step.summarise(records, peaks, store=store)["times_bound"].dropna())
    return peaks, statistics.median(ratios) if ratios else ASSUMED_SLOWDOWN

"""Run every case of a grid that has no fresh record, and let no case harm another.

Each finished case is on the disk before the next begins. Out of memory is an answer (`oom`), an exception a `failed`
record with its traceback; Ctrl-C, `kill -9` and a full disk end the run, and the next run measures what is missing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cs336_systems.bench.allocator import (
    available_bytes,
    heap_set_aside,
    is_out_of_memory,
    memory_cap,
    release_free_memory,
)
from cs336_systems.bench.context import run_context, utc_now
from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.noise import NoiseMonitor
from cs336_systems.bench.progress import Progress, announce
from cs336_systems.bench.records import Measurement, Record, RunWriter, Status, Store, case_key
from cs336_systems.errors import UserError, first_line
from cs336_systems.repository import keep_compiled_code_here, repository_root

OnPart = Callable[[float], object]
"""Called by `measure` with the share of the case that is done, 0 to 1."""


AVAILABLE = "available_bytes"
"""The value in a record that says how much memory there was when it did not suffice, for all of it or a part."""


class OutOfMemory(Exception):
    """Raised by an experiment that knows beforehand, or from a child process, that memory does not suffice."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a sweep leaves behind."""

    records: list[Record]
    """One per cell of the grid, in its order: measured now, reused, or skipped."""
    counts: Counter[str]
    """How many were reused, and how many ended in which status now."""

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.failures]


def run(
    experiment: ModuleType,
    cells: Iterable[Cell[Any]],
    *,
    store: Store | None = None,
    machine: Machine | None = None,
    remeasure: bool | None = None,
    parameters: dict[str, Any] | None = None,
) -> Outcome:
    """Measure the cells that have no fresh good record, and return the records of all.

    Args:
        experiment: a module of `experiments/`, with `measure(case, on_part)`.
        machine: whose records these are; by default the machine of the first case's device.
        remeasure: measure again what has a fresh record; by default only if CS336_REMEASURE is 1, which is how the
            runner reaches into a notebook.
        parameters: what the grid was made from, for the context; by default every field's values in the grid.

    Raises:
        UserError: records cannot be written, or the cases are of several devices.
        KeyboardInterrupt: after Ctrl-C, saying what was saved.
    """
    cells = list(cells)
    if not cells:
        return Outcome([], Counter())
    keep_compiled_code_here()
    if remeasure is None:
        remeasure = os.environ.get("CS336_REMEASURE") == "1"
    store = store or Store.default()
    machine = machine or this_machine(_device_of(cells))
    name = experiment.__name__.rpartition(".")[2]
    if (store.local / machine.name).is_dir():
        store.check_machine(machine)
    known = store.local_records(machine.name, name)
    fingerprints = _fingerprints(experiment, machine, cells)
    release_free_memory(machine.device)
    # Free memory is never twice the same: only a tenth more is more.
    available = available_bytes(machine.device) / 1.1
    waiting = [cell for cell in cells if remeasure or not _is_settled(known, cell, fingerprints[_key(cell)], available)]
    counts: Counter[str] = Counter(reused=len(cells) - len(waiting))
    if waiting:
        context = run_context(experiment, machine, parameters if parameters is not None else _axes(cells))
        with store.begin_run(machine, name, context) as writer, heap_set_aside():
            for record in _measure_all(experiment, waiting, fingerprints, machine, writer):
                known[record.key] = record
                counts[record.status] += 1
    announce({"event": "sweep", "experiment": name, "machine": machine.name, "counts": dict(counts)})
    return Outcome([known[_key(cell)] for cell in cells], counts)


def _measure_all(
    experiment: ModuleType,
    cells: Sequence[Cell[Any]],
    fingerprints: dict[str, dict[str, Any]],
    machine: Machine,
    writer: RunWriter,
) -> Iterator[Record]:
    """Measure one cell after the other; each record is on the disk before it is handed on."""
    title = writer.experiment
    with Progress(len(cells), title) as progress:
        for index, cell in enumerate(cells):
            progress.label(str(cell.case))
            try:
                record = _measure_one(
                    experiment,
                    cell,
                    fingerprints[_key(cell)],
                    machine,
                    writer,
                    on_part=progress.part_of(index),
                )
                writer.append(record)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{writer.records} of {len(cells)} cases of {title} were measured and are saved in {writer.path}; "
                    "run the same again for the rest"
                ) from None
            progress.advance_to(index + 1)
            yield record


def _measure_one(
    experiment: ModuleType,
    cell: Cell[Any],
    fingerprint_now: dict[str, Any],
    machine: Machine,
    writer: RunWriter,
    on_part: OnPart,
) -> Record:
    """One case to one record, whatever happens."""
    started = time.perf_counter()
    release_free_memory(machine.device)
    release_workspaces(machine.device)
    status: Status = "ok"
    reason, trace = None, None
    measurement = Measurement()
    noise: dict[str, Any] = {"flags": []}
    if cell.skip_reason is not None:
        status, reason = "skipped", cell.skip_reason
    else:
        try:
            with memory_cap(machine.device), NoiseMonitor(machine.device) as monitor:
                measurement = experiment.measure(cell.case, on_part)
            noise = monitor.report(_measured(measurement))
            case_key(dataclasses.asdict(measurement))  # refuses NaN: a hole has a status, not a number
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemory) or is_out_of_memory(error):
                status, reason = "oom", impersonal(str(error).strip().partition("\n")[0])
            else:
                status, reason, trace = "failed", impersonal(first_line(error)), impersonal(traceback.format_exc())
    if status != "ok":
        measurement = Measurement()
    if status == "oom":
        release_free_memory(machine.device)  # what the case held was held by its traceback
        # With more than this an out-of-memory case is worth another try.
        measurement = Measurement(values={AVAILABLE: available_bytes(machine.device)})
    return Record(
        experiment=writer.experiment,
        machine=writer.machine,
        run=writer.run,
        case=dataclasses.asdict(cell.case),
        status=status,
        reason=reason,
        measurement=measurement,
        noise=noise,
        fingerprint=fingerprint_now,
        finished_utc=utc_now(),
        seconds=time.perf_counter() - started,
        traceback=trace,
    )


def release_workspaces(device: str) -> None:
    """Let go of what the matrix library was given by earlier cases, which is no part of the next one's memory."""
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def impersonal(text: str) -> str:
    """`text` with the folders of this machine and its user made anonymous: records are published."""
    folders = {
        str(repository_root()): ".",
        sys.prefix: "<environment>",
        sys.base_prefix: "<python>",
        str(Path.home()): "~",
    }
    for folder, name in sorted(folders.items(), key=lambda item: -len(item[0])):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def _measured(measurement: Measurement) -> dict[str, list[float]]:
    """The samples whose spread tells of noise: warm-ups are expected to differ."""
    return {name: values for name, values in measurement.samples.items() if not name.startswith("warmup")}


def _axes(cells: Sequence[Cell[Any]]) -> dict[str, Any]:
    """The values that each field of the cases takes, in the order of the grid."""
    cases = [dataclasses.asdict(cell.case) for cell in cells]
    return {name: list(dict.fromkeys(case[name] for case in cases)) for name in cases[0]}


def _fingerprints(experiment: ModuleType, machine: Machine, cells: Sequence[Cell[Any]]) -> dict[str, dict[str, Any]]:
    """By case key. Hashing the source takes a tenth of a second, so it is done once per set of references."""
    by_references: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in cells:
        references = _references(cell)
        if references not in by_references:
            by_references[references] = fingerprint(experiment, machine, references)
    return {_key(cell): by_references[_references(cell)] for cell in cells}


def _references(cell: Cell[Any]) -> tuple[str, ...]:
    """The object references of somebody else's implementations that a case measures."""
    return tuple(getattr(cell.case, "object_references", ()))


def _is_settled(known: dict[str, Record], cell: Cell[Any], fingerprint_now: dict[str, Any], available: float) -> bool:
    """Whether a record says what measuring again would; one of running out of memory only while there is no more."""
    record = known.get(_key(cell))
    if record is None or not record.is_good:
        return False
    if cell.skip_reason is not None or record.status == "skipped":
        return record.status == "skipped" and record.reason == cell.skip_reason
    if record.stale_reasons(fingerprint_now):
        return False
    least = 0 if record.status == "oom" else math.inf
    return available <= record.measurement.values.get(AVAILABLE, least)


def _key(cell: Cell[Any]) -> str:
    return case_key(dataclasses.asdict(cell.case))


def _device_of(cells: Sequence[Cell[Any]]) -> str:
    devices = {str(cell.case.device) for cell in cells}
    if len(devices) > 1:
        raise UserError(f"a sweep runs on one device, found {', '.join(sorted(devices))}: sweep each on its own")
    return devices.pop()

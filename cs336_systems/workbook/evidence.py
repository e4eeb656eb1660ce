"""What there is to write about: per experiment and machine, one record for every case that is asked for.

A document speaks of grids, not of whatever happens to be recorded: the grid that a profile asks of a machine is laid
out, and a case without a record is there as `missing`, with the command that would measure it. So a table shows its
holes, and a sentence about a whole grid is only said of a whole grid.

Published records are asked for what the profile of their kind of machine asks (the notebooks' own values for a CPU);
this checkout's own, for the profile that was run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import pandas as pd

from cs336_systems.analysis.hardware import GPUS, Peaks, identify_gpu
from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Record, Store, case_key, missing_record
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.experiments import grid_parameters, load_experiment, machine_peaks
from cs336_systems.workbook.index import Handout, Index
from cs336_systems.workbook.plan import lay_out
from cs336_systems.workbook.profiles import LAPTOP, experiments_of, load_profile, profile_names

Origin = Literal["published", "this checkout"]


class Unmeasured(Exception):
    """A number was asked for whose case has no record; the message says which, and what to run."""


class Row:
    """A row of a summary by attribute; a value that is not there is `Unmeasured` instead of NaN."""

    def __init__(self, row: pd.Series, case: str) -> None:
        self._row, self._case = row, case

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._row:
            raise AttributeError(f"{self._case} has no {name!r}: it has {', '.join(map(str, self._row.index))}")
        value = self._row[name]
        if value is None or value != value:
            raise Unmeasured(
                f"{name} of {self._case} cannot be told from the records there are; a floor needs the machine's "
                "ceilings, `python scripts/measure.py machine_peaks`"
            )
        return value


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that one machine is asked to have measured of one experiment."""

    experiment: str
    machine: str
    origin: Origin
    summary: pd.DataFrame
    """One row per case of the grid, in its order; `status` is "missing" where there is no record."""
    beyond: int
    """How many further records there are, of cases that the grid does not ask for."""
    what_to_run: str
    handout: Handout | None = None
    """Whose names the sizes get where they are shown."""
    foreign_sizes: frozenset[str] = frozenset()
    """What only other handouts ask for."""

    @property
    def name(self) -> str:
        """The machine, and whose records these are: part of the names of its tables and figures."""
        return self.machine if self.origin == "published" else f"{self.machine}-own"

    @property
    def shown(self) -> pd.DataFrame:
        """The summary under the names of the handout that is answered; sizes of other handouts are left out."""
        return in_names_of(self.handout, self.summary, self.foreign_sizes)

    def where(self, **fields: Any) -> Evidence:
        """The part whose columns have these values.

        Raises:
            UserError: a column is unknown.
        """
        rows = self.summary
        for name, value in fields.items():
            if name not in rows:
                raise unknown_name("column", name, map(str, rows), where=f"of {self.experiment}")
            rows = rows[rows[name] == value]
        return dataclasses.replace(self, summary=rows.reset_index(drop=True))

    def case(self, **fields: Any) -> Any:
        """The one row whose columns have these values; a column of it that has no value is `Unmeasured` too.

        Raises:
            Unmeasured: it has no record, or the grid has no such case.
            UserError: a column is unknown, or several rows fit.
        """
        rows = self.where(**fields).summary
        wanted = ", ".join(f"{name} {value}" for name, value in fields.items())
        if len(rows) > 1:
            raise UserError(f"{len(rows)} cases of {self.experiment} on {self.machine} have {wanted}: say which")
        case = f"{self.experiment} ({wanted})"
        if not len(rows):
            raise Unmeasured(f"the grid of {self.machine} has no case of {case}")
        row = rows.iloc[0]
        if row["status"] == "missing":
            raise Unmeasured(f"{case} is not measured on {self.machine}; {self.what_to_run}")
        if row["status"] != "ok":
            raise Unmeasured(f"{case} on {self.machine} ended as {row['status']}: {row['reason']}")
        return Row(row, f"{case} on {self.machine}")


class Archive:
    """The records that a document draws on, each grid laid out and summarised once."""

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        profile: str | None = LAPTOP,
        grids: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        handout: Handout | None = None,
    ) -> None:
        """
        Args:
            profile: what this checkout's own records are asked for; None leaves them out.
            grids: arguments of experiments' grids in the place of the profile's, as a run was given them.
            handout: whose names the sizes get.
        """
        self._store, self._index, self._profile, self._grids, self._handout = store, index, profile, grids, handout
        self._found: dict[str, list[Evidence]] = {}

    def machines(self, experiment: str) -> list[Evidence]:
        """The evidence of every machine with records of `experiment`: this checkout's own first, then the published.

        Raises:
            UserError: the experiment is unknown, or its records cannot be read.
        """
        load_experiment(experiment)
        if experiment not in self._found:
            own = [name for name, names in self._store.local_machines().items() if experiment in names]
            self._found[experiment] = [
                *(self._evidence(experiment, name, "this checkout") for name in own if self._profile is not None),
                *(self._evidence(experiment, name, "published") for name in self._store.published_records(experiment)),
            ]
        return self._found[experiment]

    def named(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Any table with a column `size`, under the names of the handout that is answered."""
        return in_names_of(self._handout, rows, self._foreign_sizes)

    @property
    def _foreign_sizes(self) -> frozenset[str]:
        if self._handout is None:
            return frozenset()
        asked = {size for handout in self._index.handouts.values() for size in handout.sizes}
        return frozenset(asked - self._handout.sizes.keys())

    def _evidence(self, experiment: str, name: str, origin: Origin) -> Evidence:
        module = load_experiment(experiment)
        machine = self._store.machine(name, published=origin == "published")
        known = self._known(experiment, machine, origin)
        records = self._asked(experiment, machine, origin, known)
        peaks = self._peaks(machine, origin)
        summaries = [
            module.summarise(group, peaks, store=self._store, fingerprint=_now(module, machine, origin, outside))
            for outside, group in _by_source_outside(records).items()
        ]
        return Evidence(
            experiment=experiment,
            machine=name,
            origin=origin,
            summary=pd.concat(summaries, ignore_index=True) if summaries else pd.DataFrame(),
            beyond=len(known.keys() - {record.key for record in records}),
            what_to_run=self._what_to_run(experiment, machine, origin),
            handout=self._handout,
            foreign_sizes=self._foreign_sizes,
        )

    def _known(self, experiment: str, machine: Machine, origin: Origin) -> dict[str, Record]:
        if origin == "this checkout":
            return self._store.local_records(machine.name, experiment)
        return self._store.published_records(experiment).get(machine.name, {})

    def _asked(self, experiment: str, machine: Machine, origin: Origin, known: Mapping[str, Record]) -> list[Record]:
        """One record per case that the machine's profile asks for, missing ones included."""
        to_do = self._what_to_run(experiment, machine, origin)
        records = []
        for cell in self._grid(experiment, machine, origin):
            case = dataclasses.asdict(cell.case)
            record = known.get(case_key(case))
            if record is None and cell.skip_reason is None:
                record = missing_record(experiment, machine.name, case, to_do)
            # What this machine would skip another may have measured, and without a record nobody misses it.
            if record is not None:
                records.append(record)
        return records

    def _grid(self, experiment: str, machine: Machine, origin: Origin) -> list[Cell[Any]]:
        arguments: Mapping[str, Any] = experiments_of(self._asking(machine, origin), self._index).get(experiment, {})
        if origin == "this checkout":
            arguments = self._grids.get(experiment, arguments)
        # What a grid asks of the hardware is that machine's, not this one's.
        described = {name: machine.description.get(name) for name in grid_parameters(load_experiment(experiment))}
        own = {name: value for name, value in described.items() if value is not None}
        return lay_out(experiment, {**arguments, **own, "device": machine.device})

    def _asking(self, machine: Machine, origin: Origin) -> str:
        """The profile that asks a machine for records: for this checkout's, the one that was run, unless for a GPU."""
        run = self._profile
        if origin == "this checkout" and run is not None and (machine.device == "cuda" or not load_profile(run).gpu):
            return run
        gpu = identify_gpu(machine.device_name)
        return next((name for name in profile_names() if gpu is not None and load_profile(name).gpu == gpu), LAPTOP)

    def _what_to_run(self, experiment: str, machine: Machine, origin: Origin) -> str:
        profile = self._asking(machine, origin)
        command = f"python scripts/measure.py {experiment}" + ("" if profile == LAPTOP else f" --profile {profile}")
        if origin == "this checkout":
            return f"run `{command}`"
        return f"run `{command}` on {machine.name}, then `python scripts/publish_records.py`"

    def _peaks(self, machine: Machine, origin: Origin) -> Peaks:
        """The ceilings of a machine: the datasheet's of a known GPU, else its records'; unknown without all of them."""
        gpu = identify_gpu(machine.device_name)
        if gpu is not None:
            return GPUS[gpu]
        asked = self._asked("machine_peaks", machine, origin, self._known("machine_peaks", machine, origin))
        if origin == "this checkout":  # a further run can only raise a ceiling, so all of them count
            asked += self._store.all_local_records(machine.name, "machine_peaks")
        return machine_peaks.measured_peaks(asked, machine)


def in_names_of(handout: Handout | None, rows: pd.DataFrame, foreign: frozenset[str]) -> pd.DataFrame:
    """`rows` without sizes that are foreign to the handout, the others under its names; this workbook's own stay."""
    if handout is None or "size" not in rows:
        return rows
    kept = rows[~rows["size"].isin(foreign)]
    return kept.assign(size=[handout.sizes.get(size, size) for size in kept["size"]]).reset_index(drop=True)


def _by_source_outside(records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records by the implementations from outside that they measured, whose source is part of the fingerprint."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        case = load_experiment(record.experiment).Case(**record.case)
        groups.setdefault(tuple(getattr(case, "object_references", ())), []).append(record)
    return groups


def _now(module: ModuleType, machine: Machine, origin: Origin, outside: tuple[str, ...]) -> dict[str, Any]:
    """What a record must agree with not to be stale: of another machine's only the source is to be compared."""
    here = _this_machine(machine.device)
    today = fingerprint(module, machine, outside)
    return today if origin == "this checkout" and here == machine.name else {"source": today["source"]}


def _this_machine(device: str) -> str | None:
    try:
        return this_machine(device).name
    except UserError:
        return None

"""What there is to write about: per experiment and machine, one record for every case that is asked for.

A document speaks of grids, not of whatever happens to be recorded: the grid that a profile asks of a machine is laid
out, and a case without a record is there as `missing`, with the command that would measure it. So a table shows its
holes, and a sentence about a whole grid is only said of a whole grid.

Records are asked for what the profile of their kind of machine asks (the notebooks' own values for a CPU); this
checkout's own, after a run, for what that run asked.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import pandas as pd

from cs336_systems.analysis.hardware import GPUS, Peaks, identify_gpu
from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.grid import Cell
from cs336_systems.bench.machine import Machine, resolve_device, this_machine
from cs336_systems.bench.records import Record, Store, case_key, missing_record, newest_good
from cs336_systems.bench.report import verbatim
from cs336_systems.errors import UserError, WorkbookWarning, unknown_name
from cs336_systems.experiments import grid_parameters, load_experiment, machine_peaks
from cs336_systems.workbook.index import Handout, Index, load_index
from cs336_systems.workbook.plan import lay_out_all
from cs336_systems.workbook.profiles import LAPTOP, experiments_of, load_profile, profile_names

Origin = Literal["published", "this checkout"]


class Unmeasured(Exception):
    """A number was asked for that no record has; the message says why, and what to run where that helps."""


class NotAsked(Unmeasured):
    """The case is none of the grid, so that nobody need measure it."""


class Row:
    """A row of a summary by attribute; a value that is not there is `Unmeasured` instead of NaN.

    A deviation alone may be NaN: a single step has none.
    """

    def __init__(self, row: pd.Series, case: str, without_ceilings: str) -> None:
        self._row, self._case, self._without_ceilings = row, case, without_ceilings

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._row:
            raise AttributeError(f"{self._case} has no {name!r}: it has {', '.join(map(str, self._row.index))}")
        value = self._row[name]
        if (value is None or value != value) and not name.startswith("std"):
            lacks = self._without_ceilings if "bound" in name else "its record does not tell"
            raise Unmeasured(f"The {name} of {self._case} is not known: {lacks}")
        return value


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that one machine is asked to have measured of one experiment."""

    experiment: str
    machine: str
    origin: Origin
    summary: pd.DataFrame
    """One row per case of the grid, in its order; `status` is "missing" where there is no record."""
    recorded: int
    """How many of them have a record."""
    beyond: int
    """How many further records there are, of cases that the grid does not ask for."""
    peaks: Peaks
    """The ceilings that its floors were computed with."""
    what_to_run: str
    what_to_run_for_ceilings: str
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
            Unmeasured: it has no record, or no time.
            NotAsked: the grid has no such case.
            UserError: a column is unknown, or several rows fit.
        """
        rows = self.where(**fields).summary
        wanted = ", ".join(f"{name} {value}" for name, value in fields.items())
        if len(rows) > 1:
            raise UserError(f"{len(rows)} cases of {self.experiment} on {self.machine} have {wanted}: say which")
        case = f"{self.experiment} ({wanted}) on {self.machine}"
        if not len(rows):
            raise NotAsked(f"{case} is not asked for")
        row = rows.iloc[0]
        if row["status"] == "missing":
            raise Unmeasured(f"Not known yet: {case} is not measured; {self.what_to_run}")
        if row["status"] != "ok":
            raise Unmeasured(f"{case} ended as {row['status']}: {verbatim(str(row['reason']))}")
        return Row(row, case, f"not all ceilings of the machine are measured; {self.what_to_run_for_ceilings}")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of one machine's records."""

    machine: Machine
    origin: Origin
    grids: Mapping[str, Sequence[Mapping[str, Any]]]
    """By experiment, the arguments of the grids whose cases are asked for."""
    options: str = ""
    """Of scripts/measure.py, beside the experiment's name."""
    run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By experiment, the command of a run that asked for it in its own way."""

    def cells(self, experiment: str) -> list[Cell[Any]]:
        """The cases of an experiment, for this machine's device; what a grid asks of the hardware is this machine's."""
        described = {name: self.machine.description.get(name) for name in grid_parameters(load_experiment(experiment))}
        own = {name: value for name, value in described.items() if value is not None} | {"device": self.machine.device}
        return lay_out_all(experiment, [{**arguments, **own} for arguments in self.grids.get(experiment, [{}])])

    def what_to_run(self, experiment: str) -> str:
        command = self.run.get(experiment, f"python scripts/measure.py {experiment}{self.options}")
        if self.origin == "this checkout":
            return f"run `{command}`"
        return f"run `{command}` on {self.machine.name}, then `python scripts/publish_records.py`"


class Archive:
    """The records that a document draws on, each grid laid out and summarised once."""

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        own: bool = True,
        profile: str | None = None,
        run: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
        command: str | None = None,
        handout: Handout | None = None,
    ) -> None:
        """
        Args:
            own: whether this checkout's own records are part of it.
            profile: what they are asked for; by default what published records of such a machine are.
            run: grids by experiment in the place of the profile's, as a run was given them; they ask the machines of
                their device.
            command: the command of that run.
            handout: whose names the sizes get.
        """
        self.store, self.index, self.handout, self._profile = store, index, handout, profile
        self._run, self._command = run, command
        self._requests = [*(self._own_requests() if own else []), *self._published_requests()]
        self._found: dict[str, list[Evidence]] = {}

    def machines(self, experiment: str) -> list[Evidence]:
        """The evidence of every machine that is asked for `experiment`: this checkout's own first, then the published.

        Raises:
            UserError: the experiment is unknown, or its records cannot be read.
        """
        load_experiment(experiment)
        if experiment not in self._found:
            asked = [each for each in self._requests if experiment in each.grids or self._known(experiment, each)]
            self._found[experiment] = [self._evidence(experiment, request) for request in asked]
        return self._found[experiment]

    def together(self, experiment: str, **fields: Any) -> pd.DataFrame:
        """The rows of all machines whose columns have these values; machines stay apart by their column."""
        rows = [evidence.where(**fields).shown for evidence in self.machines(experiment)]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()

    def from_any(self, experiment: str, profile: str) -> pd.DataFrame:
        """One row per case that a profile asks for, of whichever machine has published it.

        For results that no machine changes, as plans are; without any published machine there are no rows.
        """
        published = [each for each in self._requests if each.origin == "published"]
        if not published:
            return pd.DataFrame()
        to_run = f"run `python scripts/measure.py {experiment} --profile {profile}` on any machine"
        to_run += ", then `python scripts/publish_records.py`"
        records = []
        for cell in self._cells_of(experiment, profile):
            case = dataclasses.asdict(cell.case)
            known = [
                self._known(experiment, each).get(case_key(case | {"device": each.machine.device}))
                for each in published
            ]
            missing = missing_record(experiment, "any machine", case, to_run)
            records.append(next((record for record in known if record is not None), missing))
        module, speaker = load_experiment(experiment), published[0]
        now = _now(module, speaker, ())
        return self.named(module.summarise(records, self._peaks(speaker), store=self.store, fingerprint=now))

    def _cells_of(self, experiment: str, profile: str) -> list[Cell[Any]]:
        """The cases of a profile's own grids, for no GPU."""
        grids = experiments_of(profile, self.index).get(experiment, [{}])
        return lay_out_all(experiment, [{**arguments, "device": "cpu"} for arguments in grids])

    def named(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Any table with a column `size`, under the names of the handout that is answered."""
        return in_names_of(self.handout, rows, self._foreign_sizes)

    @property
    def _foreign_sizes(self) -> frozenset[str]:
        if self.handout is None:
            return frozenset()
        asked = {size for handout in self.index.handouts.values() for size in handout.sizes}
        return frozenset(asked - self.handout.sizes.keys())

    def _own_requests(self) -> Iterator[Request]:
        for name in self.store.local_machines():
            try:
                machine = self.store.machine(name, published=False)
            except UserError as error:
                warnings.warn(f"the records of {name} are left out: {error}", WorkbookWarning, stacklevel=2)
                continue
            profile = self._profile
            if profile is None or (load_profile(profile).gpu and machine.device != "cuda"):
                profile = profile_for(machine)  # a profile for a GPU asks nothing of the CPU beside it
            request = self._request(machine, "this checkout", profile)
            given = {
                experiment: grids
                for experiment, grids in self._run.items()
                if all(resolve_device(str(each.get("device", "auto"))) == machine.device for each in grids)
            }
            run = dict.fromkeys(given, self._command) if self._command is not None else {}
            device = "" if machine.device == resolve_device("auto") else f" --device {machine.device}"
            options = request.options + device
            yield dataclasses.replace(request, grids={**request.grids, **given}, run=run, options=options)

    def _published_requests(self) -> Iterator[Request]:
        for name in self.store.published_machines():
            machine = self.store.machine(name, published=True)
            yield self._request(machine, "published", profile_for(machine))

    def _request(self, machine: Machine, origin: Origin, profile: str) -> Request:
        options = "" if profile == LAPTOP else f" --profile {profile}"
        return Request(machine, origin, experiments_of(profile, self.index), options)

    def _evidence(self, experiment: str, request: Request) -> Evidence:
        module = load_experiment(experiment)
        known = self._known(experiment, request)
        is_ceilings = module is machine_peaks
        records = self._ceilings(request) if is_ceilings else _completed(experiment, request, known)
        peaks = self._peaks(request)
        summaries = [
            module.summarise(group, peaks, store=self.store, fingerprint=_now(module, request, outside))
            for outside, group in _by_source_outside(records).items()
        ]
        return Evidence(
            experiment=experiment,
            machine=request.machine.name,
            origin=request.origin,
            summary=pd.concat(summaries, ignore_index=True) if summaries else pd.DataFrame(),
            recorded=sum(record.status != "missing" for record in records),
            beyond=len(known.keys() - {record.key for record in records}),
            peaks=peaks,
            what_to_run=request.what_to_run(experiment),
            what_to_run_for_ceilings=request.what_to_run("machine_peaks"),
            handout=self.handout,
            foreign_sizes=self._foreign_sizes,
        )

    def _known(self, experiment: str, request: Request) -> dict[str, Record]:
        if request.origin == "this checkout":
            return self.store.local_records(request.machine.name, experiment)
        return self.store.published_records(experiment).get(request.machine.name, {})

    def _peaks(self, request: Request) -> Peaks:
        """The ceilings of a machine: the datasheet's of a known GPU, else its records'; unknown without all of them."""
        gpu = identify_gpu(request.machine.device_name)
        return GPUS[gpu] if gpu is not None else machine_peaks.measured_peaks(self._ceilings(request), request.machine)

    def _ceilings(self, request: Request) -> list[Record]:
        """The records of a machine's ceilings: every fresh one of this checkout's, since a run can only raise them."""
        if request.origin == "published":
            return _completed("machine_peaks", request, self._known("machine_peaks", request))
        now = _now(machine_peaks, request, ())
        records = self.store.all_local_records(request.machine.name, "machine_peaks")
        fresh = [record for record in records if record.is_good and not record.stale_reasons(now)]
        missing = _completed("machine_peaks", request, newest_good(fresh))
        return fresh + [record for record in missing if record.status == "missing"]


def published_rows(experiment: str, store: Store | None = None) -> pd.DataFrame:
    """One row per case that is asked of each machine that has published: what a notebook shows beside its own."""
    return Archive(store or Store.default(), load_index(), own=False).together(experiment)


def published_by_any(experiment: str, profile: str, store: Store | None = None) -> pd.DataFrame:
    """What a profile asks for, of whichever machine has published it: see `Archive.from_any`."""
    return Archive(store or Store.default(), load_index(), own=False).from_any(experiment, profile)


def profile_for(machine: Machine) -> str:
    """The profile of a machine's GPU; the laptop's for a CPU, and for a GPU that has none."""
    gpu = identify_gpu(machine.device_name)
    return next((name for name in profile_names() if gpu is not None and load_profile(name).gpu == gpu), LAPTOP)


def _completed(experiment: str, request: Request, known: Mapping[str, Record]) -> list[Record]:
    """One record per case that is asked for, missing ones included."""
    records = []
    for cell in request.cells(experiment):
        case = dataclasses.asdict(cell.case)
        record = known.get(case_key(case))
        if record is None and cell.skip_reason is None:
            record = missing_record(experiment, request.machine.name, case, request.what_to_run(experiment))
        if record is not None:  # what is skipped without a record nobody misses
            records.append(record)
    return records


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


def _now(module: ModuleType, request: Request, outside: tuple[str, ...]) -> dict[str, Any]:
    """What a record must agree with not to be stale: of another machine's only the source is to be compared."""
    today = fingerprint(module, request.machine, outside)
    is_here = request.origin == "this checkout" and _this_machine(request.machine.device) == request.machine.name
    return today if is_here else {"source": today["source"]}


def _this_machine(device: str) -> str | None:
    try:
        return this_machine(device).name
    except UserError:
        return None

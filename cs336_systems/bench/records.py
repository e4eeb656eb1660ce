"""Records: append-only, self-describing, one file per run; the only room that touches `data/`.

    data/local/<machine>/<experiment>/<run>.jsonl   this checkout's own runs
    data/<machine>/<experiment>.jsonl               published, merged from chosen runs, committed
    data/reference/<name>.csv                       figures that others published

A run's file begins with its context, then has one line per finished case, synced to the disk before the next begins.
No two runs share a file, so any number may write at once, here or on a shared file system, and a run that is killed
can tear at most its own last line. Every record line carries what is needed to use it again (case, fingerprint), so
that it survives the loss of its context.

A reader merges runs: of a case's records the newest good one wins, good being ok, oom and skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cs336_systems.analysis.hardware import identify_gpu
from cs336_systems.bench.machine import Machine
from cs336_systems.errors import UserError, WorkbookWarning, unknown_name
from cs336_systems.files import write_atomically
from cs336_systems.repository import repository_root

SCHEMA = 1
DATA_VARIABLE = "CS336_DATA"
"""The environment variable that moves a checkout's own records elsewhere."""
Status = Literal["ok", "oom", "skipped", "failed", "missing"]
STATUSES: tuple[Status, ...] = ("ok", "oom", "skipped", "failed")
"""What a record in a file can be. "missing" stands for a record that is not there, where all of a grid are shown."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What measuring one case gave: raw samples by name (`forward_ms`, `warmup_ms`), and single values."""

    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished case."""

    experiment: str
    machine: str
    run: str
    case: dict[str, Any]
    status: Status
    reason: str | None
    measurement: Measurement
    noise: dict[str, Any]
    fingerprint: dict[str, Any]
    finished_utc: str
    seconds: float
    """How long the case took, set-up included."""
    traceback: str | None = None

    @property
    def key(self) -> str:
        return case_key(self.case)

    def circumstances(self, fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
        """What every summary says of a record beside its numbers: columns that tables, marks and notes rely on.

        `fingerprint`: the current one, or as much of it as is to be compared; with it, a stale record is marked.
        """
        return {
            "machine": self.machine,
            **{name: self.fingerprint.get(name) for name in ("torch", "triton", "threads")},
            "status": self.status,
            "reason": self.reason,
            "noise": "; ".join(self.noise.get("flags", [])),
            "stale": "; ".join(self.stale_reasons(fingerprint)) if fingerprint and self.status != "missing" else "",
        }

    @property
    def failures(self) -> list[str]:
        """What failed: the case, or contenders of a contest (`bench/contest.py`) whose others were measured."""
        if self.status == "failed":
            return [str(self.reason)]
        parts = {name: part for name, part in self.measurement.values.items() if isinstance(part, dict)}
        return [f"{name}: {part['reason']}" for name, part in parts.items() if part.get("status") == "failed"]

    @property
    def is_good(self) -> bool:
        return not self.failures

    def stale_reasons(self, current: Mapping[str, Any]) -> list[str]:
        """Why this record no longer speaks of the fingerprint `current`; empty if it does.

        Only what `current` has is compared. A record of another machine is asked for its source alone: other versions
        there are no fault of its own.
        """
        then, now = self.fingerprint.get("source") or {}, current["source"]
        reasons = [f"{name} changed" for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        reasons += [
            f"{name} {self.fingerprint.get(name)} → {current[name]}"
            for name in ("torch", "triton", "device", "threads")
            if name in current and self.fingerprint.get(name) != current[name]
        ]
        return reasons


def case_key(case: Mapping[str, Any]) -> str:
    """The identity of a case: its fields as JSON in a fixed order."""
    return json.dumps(case, sort_keys=True, separators=(",", ":"), allow_nan=False)


def missing_record(experiment: str, machine: str, case: Mapping[str, Any], what_to_do: str) -> Record:
    """What stands in a summary for a case without a record, so that its bound can be shown and its absence said."""
    nothing: dict[str, Any] = {}
    return Record(
        experiment, machine, "", dict(case), "missing", what_to_do, Measurement(), nothing, nothing, "", seconds=0.0
    )


def newest_good(records: Iterable[Record]) -> dict[str, Record]:
    """Per case the newest good record, or the newest failed one where none is good."""
    winners: dict[str, Record] = {}
    for record in records:
        rival = winners.get(record.key)
        if rival is None or _beats(record, rival):
            winners[record.key] = record
    return winners


def _beats(record: Record, rival: Record) -> bool:
    """The newer of two good ones wins, but what once fitted into memory does not cease to fit."""
    if {record.status, rival.status} == {"ok", "oom"} and record.fingerprint == rival.fingerprint:
        return record.status == "ok"
    return (record.is_good, record.finished_utc) > (rival.is_good, rival.finished_utc)


# Lines ---------------------------------------------------------------------------------------------------------


def _to_line(kind: str, content: Mapping[str, Any]) -> bytes:
    return (json.dumps({"schema": SCHEMA, "kind": kind, **content}, allow_nan=False) + "\n").encode()


def _record_line(record: Record) -> bytes:
    return _to_line("case", dataclasses.asdict(record))


def _record_from(line: dict[str, Any]) -> Record:
    fields = {field.name for field in dataclasses.fields(Record)}
    content = {name: value for name, value in line.items() if name in fields}
    content["measurement"] = Measurement(**content["measurement"])
    record = Record(**content)
    texts = (record.experiment, record.machine, record.run, record.finished_utc)
    tables = (record.case, record.noise, record.fingerprint, record.measurement.samples, record.measurement.values)
    if record.status not in STATUSES or not all(isinstance(text, str) for text in texts):
        raise ValueError("a field is not of its type")
    if not all(isinstance(table, dict) for table in tables) or not record.key:
        raise ValueError("a field is not of its type")
    return record


def read_lines(path: Path) -> tuple[dict[str, dict[str, Any]], list[Record]]:
    """The contexts by run, and the records, of one file; a damaged line is skipped with a warning.

    Raises:
        UserError: the file cannot be read, or was written by a newer version of the workbook.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the records {path}: {error.strerror}") from error
    contexts: dict[str, dict[str, Any]] = {}
    records: list[Record] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            schema = int(line["schema"])
        except (ValueError, TypeError, KeyError, RecursionError):
            warnings.warn(f"{path}:{number} is damaged and was skipped", WorkbookWarning, stacklevel=2)
            continue
        if schema > SCHEMA:
            raise UserError(
                f"{path}:{number} has schema {schema!r}, and this version of the workbook reads up to {SCHEMA}: "
                "update the checkout, or move the file away"
            )
        try:
            if line["kind"] == "context":
                contexts[line["run"]] = line
            else:
                records.append(_record_from(line))
        except (ValueError, TypeError, KeyError, RecursionError):
            warnings.warn(f"{path}:{number} is damaged and was skipped", WorkbookWarning, stacklevel=2)
    return contexts, records


class RunWriter:
    """Appends the records of one run to its own file."""

    def __init__(self, path: Path, experiment: str, machine: str, run: str, context: dict[str, Any]) -> None:
        self.path, self.experiment, self.machine, self.run = path, experiment, machine, run
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._good_bytes = self._context_bytes = 0
        self.records = 0
        try:
            self._append(_to_line("context", {"run": run, "experiment": experiment, "machine": machine, **context}))
            self._context_bytes = self._good_bytes
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on the disk.

        Raises:
            UserError: it could not be written; all records before it are safe, and nothing of it remains.
        """
        self._append(_record_line(record))
        self.records += 1

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._good_bytes)  # works on a full disk too
                os.lseek(self._descriptor, self._good_bytes, os.SEEK_SET)
            raise _cannot_write(self.path, error) from error
        self._good_bytes += len(line)

    def close(self) -> None:
        """Close the file; one without a single record is removed.

        What is in the file decides, not what was counted: Ctrl-C may come between writing a record and counting it.
        """
        holds_records = os.fstat(self._descriptor).st_size > self._context_bytes
        os.close(self._descriptor)
        if not holds_records:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}. Every record finished before is safe; "
        "make room or give a writable folder (--data-dir, CS336_DATA), and run again for what is missing"
    )


# The store -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Store:
    """The records of one checkout."""

    local: Path
    published: Path

    @classmethod
    def default(cls, local: Path | None = None) -> Store:
        """The checkout's own; `local`, or else the environment variable CS336_DATA, moves the local part elsewhere."""
        data = repository_root() / "data"
        told = local or os.environ.get(DATA_VARIABLE)
        return cls(local=Path(told).absolute() if told else data / "local", published=data)

    def begin_run(self, machine: Machine, experiment: str, context: dict[str, Any]) -> RunWriter:
        """A new file for a new run.

        Raises:
            UserError: the folder cannot be written, or its machine.json is of another machine.
        """
        folder = self.local / machine.name / experiment
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        self.check_machine(machine)
        run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        return RunWriter(folder / f"{run}.jsonl", experiment, machine.name, run, context)

    def check_machine(self, machine: Machine) -> None:
        """Raise a UserError if the records kept under this machine's name are of other hardware."""
        self._check_machine(self.local / machine.name / "machine.json", machine)

    @staticmethod
    def _check_machine(path: Path, machine: Machine) -> None:
        if not path.exists():
            content = {"name": machine.name, **machine.description}
            write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
            return
        known = _read_json(path)
        for name, value in machine.description.items():
            if known.get(name) != value:
                raise UserError(
                    f"{path} describes another machine: {name} is {known.get(name)!r} there and {value!r} here. "
                    "Give these records a folder of their own (--data-dir, CS336_DATA), or remove the old ones"
                )

    def local_records(self, machine: str, experiment: str) -> dict[str, Record]:
        """The winning record of every case that this checkout measured on `machine`, by case key."""
        return newest_good(self.all_local_records(machine, experiment))

    def all_local_records(self, machine: str, experiment: str) -> list[Record]:
        """Every record of an experiment, superseded ones too."""
        return [record for _, records in self._local_runs(machine, experiment) for record in records]

    def local_run_names(self, machine: str, experiment: str) -> list[str]:
        """The runs of an experiment, those whose every case was measured again later included."""
        return sorted(path.stem for path in (self.local / machine / experiment).glob("*.jsonl"))

    def _local_runs(self, machine: str, experiment: str) -> Iterator[tuple[dict[str, dict[str, Any]], list[Record]]]:
        for path in sorted((self.local / machine / experiment).glob("*.jsonl")):
            yield read_lines(path)

    def published_records(self, experiment: str) -> dict[str, dict[str, Record]]:
        """Per machine that published `experiment`, its records by case key."""
        return {
            path.parent.name: newest_good(read_lines(path)[1])
            for path in sorted(self.published.glob(f"*/{experiment}.jsonl"))
            if path.parent.name not in ("local", "reference")
        }

    def local_machines(self) -> dict[str, list[str]]:
        """The experiments this checkout has run files of, per machine."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.local.glob("*/*/*.jsonl")):
            experiments = found.setdefault(path.parents[1].name, [])
            if path.parent.name not in experiments:
                experiments.append(path.parent.name)
        return found

    def published_machines(self) -> list[str]:
        """Every machine that has published records of anything."""
        found = {path.parent.name for path in self.published.glob("*/*.jsonl")}
        return sorted(found - {"local", "reference"})

    def machine(self, name: str, *, published: bool) -> Machine:
        """A machine with records here, as its machine.json describes it."""
        path = (self.published if published else self.local) / name / "machine.json"
        description = _read_json(path)
        description.pop("name", None)
        device_name = description.get("device_name")
        if not isinstance(device_name, str):
            raise UserError(f"{path} has no text `device_name`, which says what hardware the records are of")
        is_gpu = "multiprocessors" in description or identify_gpu(device_name) is not None
        return Machine(name, "cuda" if is_gpu else "cpu", description)

    def published_context(self, machine: str, experiment: str) -> dict[str, dict[str, Any]]:
        """The contexts of the published runs of `experiment` on `machine`, by run."""
        path = self.published / machine / f"{experiment}.jsonl"
        return read_lines(path)[0] if path.is_file() else {}

    def publish(self, machine: str, experiment: str, runs: Iterable[str] | None = None) -> tuple[Path, int]:
        """Merge local runs (all, or those named) into the published file; returns it and its number of records.

        Deterministic: the same records give the same bytes.

        Raises:
            UserError: there is no such run, or the published machine.json is of another machine.
        """
        contexts: dict[str, dict[str, Any]] = {}
        records: list[Record] = []
        chosen = None if runs is None else set(runs)
        available: set[str] = set()
        for run_contexts, run_records in self._local_runs(machine, experiment):
            available |= {record.run for record in run_records}
            contexts |= run_contexts
            records += [record for record in run_records if chosen is None or record.run in chosen]
        missing = (chosen or set()) - available
        if missing:
            raise unknown_name("run", sorted(missing)[0], sorted(available), where=f"of {experiment} on {machine}")
        if not records:
            raise UserError(f"no records of {experiment} on {machine} in {self.local}: measure first")
        path = self.published / machine / f"{experiment}.jsonl"
        if path.is_file():
            published_contexts, published_records = read_lines(path)
            contexts = published_contexts | contexts
            records += published_records
        self._check_machine(path.with_name("machine.json"), self.machine(machine, published=False))
        winners = sorted(newest_good(records).values(), key=lambda record: record.key)
        used = sorted({record.run for record in winners} & contexts.keys())
        lines = [_to_line("context", _without_schema(contexts[run])) for run in used]
        # A traceback is for whoever can mend it, here.
        lines += [_record_line(dataclasses.replace(record, traceback=None)) for record in winners]
        write_atomically(path, b"".join(lines))
        return path, len(winners)

    def reference(self, name: str) -> pd.DataFrame:
        """A table that others published, as in data/reference/README.md."""
        folder = self.published / "reference"
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise unknown_name("reference table", name, sorted(found.stem for found in folder.glob("*.csv")))
        return pd.read_csv(path)


def _without_schema(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("schema", "kind")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it, and it is written anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: remove it, and it is written anew")
    return content

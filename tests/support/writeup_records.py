"""Records, machines and documents that tests of the writeup make up or take apart."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from step_records import record_of

from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.report import Picture, Table
from cs336_systems.experiments import machine_peaks, transformer_step
from cs336_systems.repository import repository_root
from cs336_systems.workbook.draft import Draft, block_mark, reference_mark

TOY = Machine("toy-1c", "cpu", {"device_name": "Toy", "device_count": 1, "cores": 1, "cache_bytes": 2**20})
H200 = Machine(
    "h200-x1",
    "cuda",
    {"device_name": "NVIDIA H200", "device_count": 1, "device_memory_gib": 140, "multiprocessors": 132},
)
_WORK = {"matmul": "flops", "copy": "bytes", "sum": "bytes"}
COMMAND = "python scripts/measure.py transformer_step"


def laptop_case(size: str = "tiny", context: int = 128, phase: str = "step", **choices: Any) -> transformer_step.Case:
    """A case of the laptop's grid, or near it."""
    (cell,) = transformer_step.grid(contexts={size: [context]}, phases=[phase], **{"device": "cpu", **choices})
    return cell.case


def peak_records(machine: Machine, *, speed: float = 1.0, **changes: Any) -> list[Record]:
    """The ceilings of a CPU: `speed` GFLOP/s and GB/s in round numbers of nothing measured."""
    return [
        dataclasses.replace(
            record_of(laptop_case()),
            experiment="machine_peaks",
            machine=machine.name,
            case=dataclasses.asdict(cell.case),
            measurement=Measurement({"operation_ms": [1000.0 / speed]}, {_WORK[cell.case.operation]: 10**9}),
            **changes,
        )
        for cell in machine_peaks.grid(device="cpu")
        if cell.skip_reason is None
    ]


def publish(store: Store, machine: Machine, records: Iterable[Record], experiment: str = "transformer_step") -> Path:
    """A file of published records, and their machine's; returns the records'."""
    folder = store.published / machine.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps({"name": machine.name, **machine.description}))
    owned = (dataclasses.replace(record, machine=machine.name, experiment=experiment) for record in records)
    lines = [json.dumps({"schema": 1, "kind": "case", **dataclasses.asdict(record)}) for record in owned]
    path = folder / f"{experiment}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def record_here(
    store: Store, records: Iterable[Record], *, machine: Machine | None = None, experiment: str = "transformer_step"
) -> str:
    """Records of this checkout's own, as a run writes them; returns the machine's name."""
    machine = machine or this_machine("cpu")
    with store.begin_run(machine, experiment, {}) as writer:
        for record in records:
            writer.append(dataclasses.replace(record, machine=machine.name, experiment=experiment, run=writer.run))
    return machine.name


def published_cpu() -> str:
    """A machine without a GPU that this repository has records of."""
    store = Store(local=repository_root() / "none", published=repository_root() / "data")
    machines = (store.machine(name, published=True) for name in store.published_machines())
    return next(machine.name for machine in machines if machine.device == "cpu")


def copy_of_published(folder: Path) -> Store:
    """A store with a copy of the checkout's published records, and none of its own."""
    shutil.copytree(repository_root() / "data", folder / "data", ignore=shutil.ignore_patterns("local"))
    return Store(local=folder / "none", published=folder / "data")


# Documents -----------------------------------------------------------------------------------------------------


def small_table(rows: int = 2, caption: str = "Squares") -> Table:
    cells = tuple((f"row-{number}", str(number**2)) for number in range(rows))
    return Table(caption, ("number", "its square"), cells, ("left", "right"), ("A note below.",))


def draw_a_line() -> Figure:
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([1, 2], [3, 4])
    return figure


def small_draft(*, rows: int = 2, more: str = "") -> Draft:
    """A document with a heading of each kind, mathematics, a table, a figure and references to both."""
    text = (
        "# A small document\n\n"
        f"See {reference_mark('fig-line')} and {reference_mark('tbl-squares')}, and [the end](#end).\n\n"
        "# First {#first}\n\n$$ t \\ge \\frac{F}{R} $$\n\nwith $F$ the work.\n\n"
        f"{block_mark('tbl-squares')}\n\n{block_mark('fig-line')}\n\n{more}\n\n"
        "# The end {#end}\n\nA word and [back](#end).\n"
    )
    blocks: dict[str, Table | Picture] = {"tbl-squares": small_table(rows), "fig-line": Picture("A line", draw_a_line)}
    return Draft(text, blocks)


def anchors_of(markdown: str) -> set[str]:
    return set(re.findall(r'<a id="([^"]+)"></a>', markdown))


def links_of(markdown: str) -> list[str]:
    """The targets of all links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", markdown)

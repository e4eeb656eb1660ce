"""Profiles that Nsight Systems captured: which there are, of what, and how to read each."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from cs336_systems.bench.records import Store
from cs336_systems.bench.report import MISSING, Column, Finding, Table, bytes_in_words, number, plural, verbatim
from cs336_systems.bench.timing import describe
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.profiling.catalogue import Profile, profiles
from cs336_systems.repository import shown_path

IN_THE_GUI = """\
In the GUI: open the .nsys-rep beside the .sqlite with nsys-ui; in the row NVTX of the timeline right click on a range,
Filter and Zoom in (or Apply Filter); below, choose Stats System View, and in it CUDA GPU Kernel Summary."""
WITHOUT_KERNELS = """\
These are profiles of a CPU: they have the ranges, and no kernels to summarise. In the GUI: Stats System View, and in it
NVTX Push/Pop Range Summary."""


def listing(found: Sequence[Profile] | None = None, folder: Path | None = None) -> Table | Finding:
    """These profiles of `folder`, by default every one of this checkout; or how to make one."""
    found = kept() if found is None else found
    if found:
        return table(found)
    where = shown_path(folder or Store.default().local)
    return Finding(f"No profiles in {where}: scripts/profile_step.py --size small makes one.")


def kept(folder: Path | None = None) -> list[Profile]:
    """The profiles of `folder`, by default of all machines that this checkout keeps some of."""
    folders = [folder] if folder else sorted(Store.default().local.glob("*/profiles"))
    return [profile for each in folders for profile in profiles(each)]


def table(found: Sequence[Profile]) -> Table:
    """A row per profile: its case, what it cost, and what to type to read it."""
    columns = [
        Column("machine", lambda row: row.profile.machine, "left"),
        Column("case", lambda row: row.profile.title, "left"),
        Column("beside", lambda row: beside(row.profile) or MISSING, "left"),
        Column("step under the profiler (ms)", lambda row: number(median_ms(row.profile), 4)),
        Column("files", lambda row: bytes_in_words(sum(row.profile.file_bytes.values()))),
        Column("nsys", lambda row: row.profile.nsys, "left"),
        Column("to read it", lambda row: verbatim(command_to_read(row.profile)), "left"),
    ]
    return Table.of(pd.DataFrame({"profile": list(found)}), columns, caption=plural(len(found), "profile"))


def how_to_read(found: Iterable[Profile]) -> str:
    """What to do in the GUI; profiles of a CPU have ranges alone."""
    return IN_THE_GUI if any(profile.kernels for profile in found) else WITHOUT_KERNELS


def beside(profile: Profile) -> str:
    """What its title does not say: fields of the case that differ from the defaults, and what else was recorded."""
    said = {"context_length", "phase", "device", "warmup", "steps", "d_model", "d_ff", "num_layers", "num_heads"}
    if profile.title.startswith("custom"):
        said -= {"d_model", "d_ff", "num_layers", "num_heads"}
    defaults = {field.name: field.default for field in dataclasses.fields(Case)}
    fields = {name: value for name, value in profile.case.items() if name not in said}
    changed = [f"{name} {value}" for name, value in fields.items() if value != defaults.get(name)]
    return ", ".join([*changed, *(name for name, value in profile.extras.items() if value)])


def median_ms(profile: Profile) -> float | None:
    """What a step took with ranges and profiler, which is more than it takes."""
    samples = profile.samples.get("step_ms")
    return describe(samples).median if samples else None


def command_to_read(profile: Profile) -> str:
    """What prints the kernels of a profile; of one without any, what opens it."""
    if not profile.kernels:
        return shlex.join(["nsys-ui", shown_path(profile.report.absolute())])
    export = shown_path(profile.export.absolute())
    return shlex.join(["python", "scripts/kernel_summary.py", export, "--range", "forward"])

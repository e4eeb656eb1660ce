#!/usr/bin/env python3
"""Record a Transformer's step under Nsight Systems: which kernels ran for which named range (problem nsys_profile).

    python scripts/profile_step.py --size small --context 128 512 --phase forward step   a profile of each
    python scripts/profile_step.py --size small --autocast bfloat16 --cuda-memory-usage
    python scripts/profile_step.py --list                                                those there are

Each case is run by scripts/benchmark_step.py with --ranges, and recorded after its warm-ups. Profiles are kept in
data/local/<machine>/profiles, and what is there is not profiled again: a call that was stopped goes on where it was.
Every option of a step is as there. Needs nsys; where it is not found by itself, CS336_NSYS names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cs336_systems.bench.context import utc_now
from cs336_systems.bench.fingerprint import fingerprint
from cs336_systems.bench.machine import Machine, this_machine
from cs336_systems.bench.progress import EVENTS_VARIABLE, EventReader, Progress
from cs336_systems.bench.records import Record, Store
from cs336_systems.bench.report import plural
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.experiments import transformer_step
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.presentation.captured import how_to_read, kept, listing, table
from cs336_systems.profiling.catalogue import Profile, keep, profile_name, profiles
from cs336_systems.profiling.nsys_capture import Extras, Nsys, ProgramFailed, capture, find_nsys
from cs336_systems.repository import repository_root, shown_path
from cs336_systems.step_options import add_step_options, build_case, chosen_config, options_of, ranged_store

EXPERIMENT = "transformer_step"
PROGRAM = Path("scripts") / "benchmark_step.py"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A profile that is asked for."""

    case: Case
    extras: Extras

    @property
    def name(self) -> str:
        words = [self.case.size, str(self.case.context_length), self.case.phase, self.case.autocast]
        return profile_name(words, dataclasses.asdict(self.case), dataclasses.asdict(self.extras))


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    store = Store.default()
    if arguments.list:
        print_list(arguments.output_dir)
        return 0
    wanted = wanted_profiles(arguments)
    machine = this_machine(wanted[0].case.device)
    folder = arguments.output_dir or store.local / machine.name / "profiles"
    known = {profile.name: profile for profile in profiles(folder)}
    waiting = [each for each in wanted if arguments.again or each.name not in known]
    failures: list[str] = []
    if waiting:
        nsys = find_nsys()
        require_device(arguments.device, machine)
        if arguments.output_dir is None:
            store.check_machine(machine)  # two machines of one name would mix their profiles
        made, failures = profile_all(waiting, folder, machine, nsys)
        known |= made
    found = {each: known[each.name] for each in wanted if each.name in known}
    if found:
        print(table(list(found.values())))
        if len(waiting) < len(wanted):
            print("\nWhat was there already was not profiled again: --again does.")
        stale = [profile.name for each, profile in found.items() if is_stale(profile, each.case, machine)]
        if stale:
            print(f"\nOf another source or PyTorch than today's: {', '.join(stale)}; --again profiles them anew.")
        print(f"\n{how_to_read(found.values())}")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def is_stale(profile: Profile, case: Case, machine: Machine) -> bool:
    """Whether today's source would be profiled otherwise."""
    return profile.fingerprint != fingerprint(transformer_step, machine, case.object_references)


def wanted_profiles(arguments: argparse.Namespace) -> list[Wanted]:
    """A profile per context and phase; a mistake in the last is told before the first is run."""
    extras = Extras(arguments.cuda_memory_usage, arguments.python_backtrace)
    cases = [
        build_case(arguments, chosen_config(arguments, context), phase)
        for context in arguments.context
        for phase in arguments.phase
    ]
    return [Wanted(case, extras) for case in dict.fromkeys(cases)]


def require_device(asked: str, machine: Machine) -> None:
    """Raise a UserError unless there is a GPU, or a CPU was asked for by name."""
    if machine.device == "cpu" and asked != "cpu":
        raise UserError(
            "PyTorch finds no CUDA device here, and a CPU's profile would have the ranges but no kernels: give "
            "--device cpu to take it all the same, or record operators with PyTorch's profiler, as notebook 02 does"
        )


# Profiling -----------------------------------------------------------------------------------------------------


def profile_all(
    waiting: Sequence[Wanted], folder: Path, machine: Machine, nsys: Nsys
) -> tuple[dict[str, Profile], list[str]]:
    """Profile one after the other: those that are whole by their names, and what became of the others."""
    made: dict[str, Profile] = {}
    failures = []
    with Progress(len(waiting), "profiles") as progress:
        for index, wanted in enumerate(waiting):
            progress.label(str(wanted.case))
            try:
                made[wanted.name] = profile(wanted, folder, machine, nsys, progress.part_of(index))
            except StepFailed as error:
                failures.append(str(error))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{len(made)} of {plural(len(waiting), 'profile')} were made and are kept in {shown_path(folder)}; "
                    "run the same again for the rest"
                ) from None
            progress.advance_to(index + 1)
    return made, failures


class StepFailed(Exception):
    """A step that ran out of memory or failed of itself: others may be well."""


def profile(wanted: Wanted, folder: Path, machine: Machine, nsys: Nsys, on_part: Callable[[float], object]) -> Profile:
    """Profile one case.

    Raises:
        StepFailed: the step could not be measured, under a profiler or not.
        UserError: it was, and there is no whole profile of it.
    """
    options = [*options_of(wanted.case), "--ranges"]
    with tempfile.TemporaryDirectory(prefix="cs336-profile-") as temporary:
        events = Path(temporary) / "events.jsonl"
        reader = EventReader(events)

        def show() -> None:
            for event in reader.new_events():
                if event.get("event") == "progress":
                    on_part(min(1.0, float(event["done"])))

        try:
            captured = capture(
                nsys,
                [sys.executable, str(repository_root() / PROGRAM), *options, "--data-dir", temporary],
                folder / wanted.name,
                extras=wanted.extras,
                needs_kernels=machine.device == "cuda",
                environment={EVENTS_VARIABLE: str(events)},
                while_running=show,
            )
        except ProgramFailed as error:
            record = record_in(Path(temporary), machine)
            if record is None or record.status == "ok":
                raise
            raise StepFailed(f"{wanted.case}: {record.status}: {record.reason}") from error
        record = record_in(Path(temporary), machine)
    if record is None:
        raise UserError(f"{PROGRAM} ended well and recorded nothing of {wanted.case}: expected the times of its steps")
    program = ["python", PROGRAM.as_posix(), *options, "--data-dir", "FOLDER"]
    made = Profile(
        folder=folder,
        name=wanted.name,
        title=str(wanted.case),
        experiment=EXPERIMENT,
        machine=machine.name,
        case=dataclasses.asdict(wanted.case),
        extras=dataclasses.asdict(wanted.extras),
        command=["nsys", "profile", *captured.arguments, *program],
        nsys=nsys.version,
        torch=torch.__version__,
        finished_utc=utc_now(),
        samples=record.measurement.samples,
        fingerprint=record.fingerprint,
        ranges=sorted(captured.contents.ranges),
        kernels=captured.contents.kernels,
        file_bytes={path.suffix: path.stat().st_size for path in (captured.report, captured.export)},
    )
    keep(made)
    return made


def record_in(data_dir: Path, machine: Machine) -> Record | None:
    """The one record that a step left."""
    records = ranged_store(data_dir).local_records(machine.name, EXPERIMENT)
    return next(iter(records.values()), None)


# Showing -------------------------------------------------------------------------------------------------------


def print_list(output_dir: Path | None) -> None:
    found = kept(output_dir)
    print(listing(found, output_dir))
    if found:
        print(f"\n{how_to_read(found)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    # A profile grows with every step, and three show whether they are alike.
    add_step_options(parser, several_contexts=True, steps=3)
    profiling = parser.add_argument_group("profiling")
    profiling.add_argument(
        "--cuda-memory-usage", action="store_true", help="record how much of the GPU's memory is taken"
    )
    profiling.add_argument(
        "--python-backtrace", action="store_true", help="record which Python lines launched a kernel"
    )
    profiling.add_argument("--output-dir", type=Path, help="keep profiles there, not in data/local/<machine>/profiles")
    profiling.add_argument("--again", action="store_true", help="profile what has a profile again")
    profiling.add_argument("--list", action="store_true", help="list the profiles there are, and do nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

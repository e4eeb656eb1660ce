#!/usr/bin/env python3
"""Say what filled the memory, from a snapshot of a GPU's or a trace of PyTorch's profiler.

    python scripts/memory_summary.py snapshot.pickle                     the peak and what was live then
    python scripts/memory_summary.py trace.json                          the same of a CPU
    python scripts/memory_summary.py snapshot.pickle --plot timeline     and timeline.svg, timeline.png
    python scripts/memory_summary.py snapshot.pickle --under attention   what was allocated below a frame
    python scripts/memory_summary.py snapshot.pickle --format json

A snapshot is what torch.cuda.memory._dump_snapshot(path) writes, after
torch.cuda.memory._record_memory_history(max_entries=1_000_000) before the work. It is a pickle, and may come from
anybody: nothing in it is run, and all but plain data is refused. A trace is what export_chrome_trace(path) of
torch.profiler.profile(profile_memory=True, with_stack=True) writes (.json, .json.gz). The two are told apart by what is
in the file. No GPU and no network are needed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs336_systems.bench.report import bytes_in_words, plural
from cs336_systems.errors import HelpFormatter, UserError, run_command
from cs336_systems.files import write_atomically
from cs336_systems.presentation.memory_snapshot import device_in_words, figure, tables
from cs336_systems.profiling.live_memory import Group, Summary, summarise
from cs336_systems.profiling.memory_history import MemoryHistory, device_named
from cs336_systems.profiling.recordings import read_memory


def main(argv: list[str] | None) -> int:
    arguments = parse(argv)
    if arguments.top < 1:
        raise UserError(f"--top takes a number of rows from 1 on, found {arguments.top}")
    device = None if arguments.device is None else device_named(arguments.device)
    history = read_memory(arguments.file, device)
    summary = summarise(history, under=arguments.under)
    if arguments.format == "json":
        print(json.dumps(shortened(summary, arguments.top), indent=2))
    elif arguments.format == "csv":
        print(as_csv(summary, arguments.top), end="")
    else:
        print("\n\n".join(map(str, tables(summary, top=arguments.top))))
    if arguments.plot:
        plot(history, summary, arguments.plot)
    return 0


def shortened(summary: Summary, top: int) -> dict[str, object]:
    """The summary as plain data with the `top` first of each list; sizes are in bytes."""
    cut: dict[str, Any] = {name: getattr(summary, name)[:top] for name in ("by_size", "by_place", "largest")}
    for name in ("block", "under"):
        found = getattr(summary, name)
        cut[name] = found and dataclasses.replace(found, groups=found.groups[:top])
    plain = dataclasses.asdict(dataclasses.replace(summary, **cut))
    for groups in (*(plain[name] for name in cut if name not in ("block", "under")), *_groups_of(plain)):
        for group in groups:
            group["trace"] = [frame.with_folders for frame in group["trace"]]
    return plain


def _groups_of(plain: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [plain[name]["groups"] for name in ("block", "under") if plain[name]]


def as_csv(summary: Summary, top: int) -> str:
    """One row per quantity and per group, its section in the first column; sizes are in bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("section", "name", "count", "bytes", "total_bytes"))
    for name in ("peak_allocated", "peak_reserved", "before_trace", "before_trace_at_peak"):
        writer.writerow(("total", name, "", "", getattr(summary, f"{name}_bytes")))
    sections: dict[str, Sequence[Group]] = {
        "by_size": summary.by_size,
        "by_place": summary.by_place,
        "largest": summary.largest,
        "block": summary.block.groups if summary.block else (),
        "under": summary.under.groups if summary.under else (),
    }
    for section, groups in sections.items():
        for group in groups[:top]:
            each = "" if group.bytes is None else group.bytes
            writer.writerow((section, group.place, group.count, each, group.total_bytes))
    return text.getvalue()


def plot(history: MemoryHistory, summary: Summary, path: Path) -> None:
    """Write the timeline beside the path given, as SVG and as PNG."""
    caption = (
        f"Live memory of {device_in_words(history.device)} in {history.path.name}: peak "
        f"{bytes_in_words(summary.peak_allocated_bytes)}, {plural(len(history.timeline.birth), 'allocation')}"
    )
    picture = figure(history.timeline, caption, by=history.unit)
    base = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    for suffix, content in ((".svg", picture.svg()), (".png", picture.png())):
        write_atomically(base.with_name(base.name + suffix), content)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", type=Path, help="the snapshot or the trace")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of each table (default 10)")
    parser.add_argument("--format", choices=("markdown", "csv", "json"), default="markdown")
    parser.add_argument(
        "--under",
        metavar="TEXT",
        help="also what was allocated below a frame with this in its path:line name, or a trace's range or operator",
    )
    parser.add_argument(
        "--device", metavar="N", help="of several devices which, by number or cpu (default: the busiest)"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the timeline: PATH.svg and PATH.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

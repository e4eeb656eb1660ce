"""A command as people run it under torchrun or srun: the leader launches jobs and prints, the others follow."""

from __future__ import annotations

import json
import subprocess
import sys

import rank_workers

from cs336_systems.distributed.cluster import leading_or_following
from cs336_systems.distributed.launch import launch
from cs336_systems.errors import run_command


def main(argv: list[str] | None) -> int:
    way = (argv or sys.argv[1:])[0]
    if way == "as a child":
        print(json.dumps(launch(rank_workers.summed, 1.0, world_size=3)), flush=True)
        return 0
    with leading_or_following() as leads:
        if not leads:
            return 0
        if way == "working":
            reports: list[tuple[int, int]] = []
            found = [launch(rank_workers.summed, 1.0, world_size=world_size) for world_size in (3, 2, 1)]
            launch(rank_workers.reporting, 2, world_size=3, on_report=lambda _, value: reports.append(value))
            print(json.dumps({"found": found, "reports": reports}))
        elif way == "from a child":  # as a notebook's kernel is one
            for _ in range(2):
                subprocess.run([sys.executable, __file__, "as a child"], check=True)
        elif way == "reports of what failed":
            seen: list[int] = []
            try:
                launch(rank_workers.failing, 0, "raising", world_size=3, on_report=lambda rank, _: seen.append(rank))
            finally:
                print(json.dumps(sorted(seen)), flush=True)
        elif way == "too many":
            launch(rank_workers.summed, 1.0, world_size=4)
        elif way == "a users mistake":
            launch(rank_workers.of_a_users_mistake, world_size=3)
        else:
            launch(rank_workers.failing, 1, way, world_size=3)
    return 0


if __name__ == "__main__":
    run_command(main)

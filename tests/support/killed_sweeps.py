"""Start a sweep, kill it with SIGKILL at a random moment, and do so again: `killed_sweeps.py DATA KILLS SEED CASES`.

Children are forked from this process, which has imported everything and started no thread, so that a kill costs
milliseconds. Prints, per kill, how many cases the child had announced as saved; then what a last sweep found to do.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import toy_experiment

from cs336_systems.bench import sweep
from cs336_systems.bench.allocator import import_what_is_imported_late
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.progress import EVENTS_VARIABLE, EventReader
from cs336_systems.bench.records import Store


def main() -> None:
    folder, kills, seed, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    store = Store(local=folder / "local", published=folder)
    machine = this_machine("cpu")
    chance = random.Random(seed)
    # Or every child would spend its short life on these.
    import_what_is_imported_late()
    gc.freeze()
    for kill in range(kills):
        events = folder / f"events-{kill}.jsonl"
        known = set(store.local_records(machine.name, "toy_experiment"))
        child = os.fork()
        if child == 0:
            os.environ[EVENTS_VARIABLE] = str(events)
            cells = toy_experiment.grid(numbers=range(cases), seconds=0.002)
            sweep.run(toy_experiment, cells, store=store, machine=machine)
            os._exit(0)
        # A busy machine's child takes long to its first case: the moment is some cases after the start, and some time.
        enough, reader, announced = chance.randrange(8), EventReader(events), 0
        while announced < enough and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
            announced = max(announced, saved_in(reader))
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        announced = max(announced, saved_in(reader))
        recorded = set(store.local_records(machine.name, "toy_experiment"))
        print(json.dumps({"announced": announced, "new": len(recorded - known), "lost": len(known - recorded)}))
    outcome = sweep.run(toy_experiment, toy_experiment.grid(numbers=range(cases), seconds=0.002), store=store)
    print(json.dumps({"records": len(outcome.records), "counts": outcome.counts}))


def saved_in(reader: EventReader) -> int:
    """How many cases the new events announce as saved: the bar passes a case only when its record is on the disk."""
    return max((int(event["done"]) for event in reader.new_events() if event["event"] == "progress"), default=0)


if __name__ == "__main__":
    main()

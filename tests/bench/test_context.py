"""What a run's context says."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import toy_experiment

from cs336_systems.bench import context
from cs336_systems.bench.machine import this_machine


def test_the_context_is_json_and_names_no_host_and_no_person() -> None:
    found = context.run_context(toy_experiment, this_machine("cpu"), {"sizes": ["small"]})
    text = json.dumps(found)
    for secret in (Path.home().name, platform.node()):
        if len(secret) > 4:  # "root" is in many words
            assert secret not in text
    assert found["parameters"] == {"sizes": ["small"]}
    assert found["versions"]["torch"]
    assert found["threads"]["intra_op"] >= 1


def test_times_in_utc_sort_as_text() -> None:
    first, second = context.utc_now(), context.utc_now()
    assert first <= second
    assert first.endswith("Z")

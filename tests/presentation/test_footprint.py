"""Plans in words, and what is said of them once an allocator has been asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from cs336_systems.analysis.footprint import CPU, plan_step
from cs336_systems.model import TransformerConfig
from cs336_systems.presentation import footprint as presentation
from cs336_systems.step import StepConfig

TINY = TransformerConfig(d_model=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, context_length=8)
CHOSEN = StepConfig(**dataclasses.asdict(TINY), device="cuda", batch_size=2)


def rows(*ratios: float, **changes: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"name": f"case {index}", "status": "ok", "device": "cuda", "planned_bytes": 10**6, "peak_bytes": ratio * 10**6}
        | changes
        for index, ratio in enumerate(ratios)
    )


def said(frame: pd.DataFrame) -> str:
    return str(presentation.against_the_allocator(frame, lambda row: str(row["name"])))


def test_near_plans_are_said_to_be_near_and_far_ones_named() -> None:
    assert said(rows(1.0, 1.002)) == (
        "The allocator's peaks are +0 to +0.2 % from the planned ones in 2 cases, 1 of them met to the byte: none is "
        "further off than 1.0 %."
    )
    assert "further off than 1.0 % are case 1: +20 %; case 2: -50 %." in said(rows(1.0, 1.2, 0.5))


def test_nothing_is_said_where_no_allocator_counted() -> None:
    assert presentation.against_the_allocator(rows(1.0, device="cpu"), str) is None
    assert presentation.against_the_allocator(rows(1.0, status="oom"), str) is None
    assert presentation.against_the_allocator(rows(1.0, planned_bytes=float("nan")), str) is None


def test_shares_of_what_is_live_add_up_to_the_whole_of_the_table() -> None:
    plan = plan_step(CHOSEN, "h200")
    table = presentation.kinds(CHOSEN, plan)
    in_bytes = [int(row[2].replace(",", "")) for row in table.rows]
    assert sum(in_bytes) == plan.peak_allocated_bytes
    assert in_bytes == sorted(in_bytes, reverse=True)


def test_a_verdict_says_what_is_known_of_the_device() -> None:
    assert "fits on h200" in presentation.verdict(CHOSEN, plan_step(CHOSEN, "h200"))
    on_cpu = presentation.verdict(CHOSEN, plan_step(CHOSEN, CPU))
    assert "takes at most" in on_cpu
    assert "fits" not in on_cpu

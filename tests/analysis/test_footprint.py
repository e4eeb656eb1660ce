"""Planned memory against what was measured: on an A100, on an H100 by others, and on this CPU now."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from snapshots import A100_SNAPSHOT
from torch import Tensor, nn

from cs336_systems.analysis import footprint
from cs336_systems.analysis.activations import held_after_forward
from cs336_systems.analysis.allocations import record_step, recording
from cs336_systems.analysis.flops import parameters, resident_bytes
from cs336_systems.analysis.footprint import CPU, plan_step, replay
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.analysis.published_profiles import PublishedPeaks
from cs336_systems.attention import reference
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import memory_profile
from cs336_systems.experiments.transformer_step import Case
from cs336_systems.model import SIZES, TransformerConfig
from cs336_systems.profiling.live_memory import summarise
from cs336_systems.profiling.snapshot import read_snapshot
from cs336_systems.step import PHASES, StepConfig

pytestmark = pytest.mark.problem("memory_profiling")

TINY = TransformerConfig(d_model=48, d_ff=96, num_layers=3, num_heads=3, vocab_size=120, context_length=24)
SCALE_BYTES = 8
"""√d, which autograd keeps once per block in the CPU's memory, and no dispatched operator shows."""


def chosen(config: TransformerConfig = TINY, /, **changes: Any) -> StepConfig:
    return StepConfig(**dataclasses.asdict(config) | {"device": "cpu", "batch_size": 4} | changes)


def of_published(phase: str, context: int, autocast: str) -> StepConfig:
    config = dataclasses.replace(SIZES["gpt2-xl"], context_length=context)
    return chosen(config, phase=phase, autocast=autocast)


# On a GPU, by others -------------------------------------------------------------------------------------------


def test_the_run_of_the_sample_snapshot_is_planned_to_the_byte() -> None:
    """Its peak, what was there before, what was reserved; and every request of its trace, one after the other.

    But for 1,024 bytes of positions, which the model of that run made once per block and ours makes for queries and for
    keys; they are gone long before the peak.
    """
    found = summarise(read_snapshot(A100_SNAPSHOT))
    step = of_published("forward", 128, "none")
    plan = plan_step(step, "a100-40gb")
    assert plan.snapshot_peak_bytes == found.peak_allocated_bytes == 13_581_844_992
    assert plan.before_bytes == found.before_trace_bytes
    assert plan.peak_reserved_bytes == found.peak_reserved_bytes
    assert plan.fits is True

    trace = pickle.loads(A100_SNAPSHOT.read_bytes())["device_traces"][0]
    requested = [entry["size"] for entry in trace if entry["action"] == "alloc"]
    events = footprint._events_of(step, False)
    begins = next(index for index, event in enumerate(events) if event.mark == "step 1")
    planned = [event.allocation.requested_bytes for event in events[begins:] if event.allocation and event.is_birth]
    positions = 128 * 8
    assert [size for size in planned if size != positions] == [size for size in requested if size != positions]


@pytest.mark.slow
def test_every_published_peak_of_a_forward_pass_is_planned_within_its_rounding() -> None:
    """They are printed in whole gigabytes, cut off."""
    shown = 0
    for peak in PublishedPeaks(Store.default().reference).rows():
        if peak.phase == "forward":
            plan = plan_step(of_published("forward", peak.context_length, peak.autocast), "a100-40gb")
            assert peak.at_least_bytes <= plan.snapshot_peak_bytes < peak.below_bytes
            shown += 1
    assert shown == 6


def test_published_memory_of_attention_is_planned_within_a_hundredth_of_a_mib_in_all_rows() -> None:
    """In use before backward: with the output, a scalar loss, and the gradients and workspaces of passes before."""
    rows = Store.default().reference("attention_eager_h100")
    assert len(rows) == 20
    for row in rows.itertuples():
        with recording() as recorded:
            inputs = [torch.randn(8, 1, int(row.seq_len), int(row.d_model), requires_grad=True) for _ in range(3)]
            recorded.begin({"inputs": inputs})
            for _ in range(2):
                recorded.mark("forward")
                output = reference.attention(*inputs, is_causal=True)
                loss = output.sum()
                recorded.mark("between")
                loss.backward()
                del output, loss
        *_, between = (event for event in recorded.events if event.mark == "between")
        until = recorded.events[: recorded.events.index(between) + 1]
        in_use = replay(until, "h100-sxm").before_bytes
        assert in_use / 2**20 == pytest.approx(row.memory_after_forward_mib, abs=0.01), (row.d_model, row.seq_len)


# On this CPU, now ----------------------------------------------------------------------------------------------


def measured_on_cpu(step: StepConfig) -> int:
    """The peak of a second step by PyTorch's profiler, which sees every allocation."""
    case = Case(**dataclasses.asdict(step), warmup=1, steps=1)
    peak: int = memory_profile.measure(case, lambda _: None).values["peak_bytes"]
    return peak


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "choices", [{}, {"rope": "2026"}, {"formulation": "fused", "rope": "2026"}, {"attention": "flash"}]
)
def test_a_step_on_this_cpu_allocates_what_was_planned(phase: str, choices: dict[str, Any]) -> None:
    step = chosen(phase=phase, **choices)
    plan = plan_step(step, CPU)
    unseen = 0 if phase == "inference" or choices.get("attention") else SCALE_BYTES * TINY.num_layers
    assert measured_on_cpu(step) == plan.peak_allocated_bytes + unseen


@pytest.mark.parametrize("policy", ["every-1", "every-2", "nested", "from-start", "selective"])
def test_a_step_with_checkpoints_on_this_cpu_allocates_what_was_planned(policy: str) -> None:
    """Each rerun of a block keeps its √d again, for as long as its backward needs it: one per block of a checkpoint."""
    deep = dataclasses.replace(TINY, num_layers=4)
    step = chosen(deep, phase="step", checkpointing=policy)
    more = measured_on_cpu(step) - plan_step(step, CPU).peak_allocated_bytes
    assert 0 <= more <= SCALE_BYTES * deep.num_layers


# Relations -----------------------------------------------------------------------------------------------------


def test_what_is_live_at_the_peak_is_the_peak() -> None:
    for phase in PHASES:
        plan = plan_step(chosen(phase=phase), "h100-sxm")
        assert sum(plan.by_kind.values()) == plan.peak_allocated_bytes
        assert plan.before_bytes <= plan.peak_allocated_bytes <= plan.peak_reserved_bytes
        assert plan.snapshot_peak_bytes <= plan.peak_allocated_bytes


def test_a_training_step_holds_gradients_and_two_moments_of_the_size_of_the_parameters() -> None:
    kinds = plan_step(chosen(phase="step"), CPU).by_kind
    weights = sum(parameters(TINY).values()) * 4
    assert kinds["parameters"] == weights
    assert kinds["optimizer state"] == 2 * weights
    assert sum(kinds.values()) >= resident_bytes(TINY, "step")


def test_parameters_gradients_and_moments_are_told_apart_on_a_gpu_too() -> None:
    """At the end of a backward of a long model all four are there; the allocator only rounds."""
    plan = plan_step(chosen(dataclasses.replace(TINY, d_model=192, d_ff=768), batch_size=1, phase="step"), "h200")
    assert {"parameters", "gradients", "optimizer state"} <= set(plan.by_kind)
    assert plan.by_kind["parameters"] <= plan.by_kind["optimizer state"] / 2 * 1.01


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_activations_are_those_of_the_accounting_and_one_block_at_work(autocast: str) -> None:
    """`activations.held_after_forward` counts what is kept; at its peak a forward pass holds hardly more."""
    deep = dataclasses.replace(TINY, num_layers=12, d_model=96, d_ff=384, context_length=64)
    accounted = held_after_forward(deep, 4, 64, autocast=autocast)
    plan = plan_step(chosen(deep, phase="forward", autocast=autocast), "a100-40gb")
    least = sum(accounted.values())
    workspace = plan.by_kind["workspace of matrix products"]
    assert least <= plan.snapshot_peak_bytes - workspace <= 1.05 * least + plan.before_bytes * 0.01


def test_a_forward_pass_keeps_one_cast_of_each_matrix_under_autocast() -> None:
    kinds = plan_step(chosen(phase="forward", autocast="bfloat16"), CPU).by_kind
    counts = parameters(TINY)
    # The head's product is the last, and its cast is made for the peak.
    assert kinds["casts of parameters"] == 2 * (counts["attention"] + counts["ffn"] + counts["lm_head"])


def test_inference_holds_no_activations_and_less_than_forward() -> None:
    inference, forward = (plan_step(chosen(phase=phase), CPU) for phase in ("inference", "forward"))
    assert "activations" not in inference.by_kind
    assert inference.peak_allocated_bytes < forward.peak_allocated_bytes


def test_each_thread_that_multiplies_has_its_workspace() -> None:
    for gpu in ("a100-40gb", "h200"):
        workspace = GPUS[gpu].cublas_workspace_bytes
        forward = plan_step(chosen(phase="forward"), gpu).by_kind["workspace of matrix products"]
        step = plan_step(chosen(phase="step"), gpu).by_kind["workspace of matrix products"]
        assert (forward, step) == (workspace, 2 * workspace)


def test_the_first_step_is_not_what_the_peak_is_of() -> None:
    """It has no moments yet; from the second on all steps are alike."""
    config = chosen(phase="step")
    first, second, third = (replay(record_step(config, "cpu", steps).events, CPU) for steps in (1, 2, 3))
    assert first.peak_allocated_bytes < second.peak_allocated_bytes == third.peak_allocated_bytes


def test_planning_leaves_no_rule_and_no_tensor_behind() -> None:
    before = torch.get_default_dtype()
    plan_step(chosen(phase="step", autocast="bfloat16"), "h200")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(2).exp().dtype == torch.float32  # as made; a CPU casts it nowhere
        assert (torch.ones(2, 2, dtype=torch.bfloat16).exp()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == before
    assert type(torch.ones(2)) is Tensor


# What does not fit, and what cannot be planned -----------------------------------------------------------------


def test_a_step_that_does_not_fit_says_where_memory_ends() -> None:
    long = dataclasses.replace(TINY, context_length=65_536)
    plan = plan_step(chosen(long, phase="step"), "h200")
    assert plan.fits is False
    assert "forward" in plan.fails_at
    assert plan.usable_bytes is not None
    assert plan.peak_reserved_bytes > plan.usable_bytes


def test_an_unknown_gpu_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown GPU 'h20': did you mean 'h200'\? Known: a100-40gb"):
        plan_step(chosen(), "h20")


class Asks(nn.Module):
    """Looks at its values before it decides."""

    def __init__(self, **course: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(course["vocab_size"]))

    def forward(self, tokens: Tensor) -> Tensor:
        scaled = self.weight * 2 if self.weight.sum() > 0 else self.weight
        return scaled.expand(*tokens.shape, -1)


class Selects(Asks):
    """Makes a tensor as long as there are even tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        even = tokens[tokens % 2 == 0]
        return self.weight.expand(*tokens.shape, -1) + even.sum()


@pytest.mark.parametrize("name", ["Asks", "Selects"])
def test_a_model_that_looks_at_values_is_told_what_cannot_be_planned(name: str) -> None:
    with pytest.raises(UserError, match=r"depends on the values of tensors.*leave out"):
        plan_step(chosen(model=f"{__name__}:{name}"), "h200")


class Plain(nn.Module):
    """Somebody else's model: an embedding and a linear layer of PyTorch's."""

    def __init__(self, **course: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(course["vocab_size"], course["d_model"])
        self.head = nn.Linear(course["d_model"], course["vocab_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        head: Tensor = self.head(self.embedding(tokens))
        return head


def test_somebody_elses_model_is_planned_like_ours() -> None:
    step = chosen(model=f"{__name__}:Plain", phase="step")
    assert measured_on_cpu(step) == plan_step(step, CPU).peak_allocated_bytes


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"compile": "model"}, "when it is compiled"), ({"attention": "sdpa"}, "its kernels on the device")],
)
def test_what_fake_tensors_cannot_follow_is_refused(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_step(chosen(**choice), "h200")

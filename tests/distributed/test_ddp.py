"""Data parallel: training on parts of the batch is training on the whole, on equal ranks, whatever a rank lacks.

`pytest tests/distributed/test_ddp.py --ddp my_module:MyDDP` runs what the course asks of somebody else's wrapper:
`MyDDP(module)`, with `forward` and `finish_gradient_synchronization()`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ddp_workers as workers
import pytest
import torch
from torch import Tensor, nn

from cs336_systems.distributed.ddp import BYTES_PER_MB, BucketedDDP, buckets_of
from cs336_systems.distributed.launch import launch
from cs336_systems.distributed.replicas import shard_of
from cs336_systems.distributed.variants import NAMES, WITH_BUCKETS, load_ddp, wrap
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root

pytestmark = pytest.mark.distributed

MARKS = {
    "naive": pytest.mark.problem("naive_ddp"),
    "flat": pytest.mark.problem("naive_ddp"),
    "overlapped": pytest.mark.problem("ddp_overlap_individual_parameters"),
    "bucketed": pytest.mark.problem("ddp_overlap_bucketed"),
}
"""The problem whose points each wrapper earns."""
SUITES = tuple(f"{workers.OF_SUITES}{name}" for name in ("ddp_individual_parameters", "ddp_bucketed", "ddp"))
STEPS = 3
BITMAP = "torch.uint8"
"""The dtype of the reduction that tells which parameters were used."""


def bucket_size_of(name: str) -> float | None:
    return workers.BUCKET_MB if name in WITH_BUCKETS else None


def named(*names: str) -> pytest.MarkDecorator:
    """For each of these wrappers; of ours, for the points of its problem."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in names])


every_wrapper = named("naive", "flat", "overlapped", "bucketed")
every_overlapping_wrapper = named("overlapped", "bucketed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every wrapper: ours and PyTorch's, or the one that `--ddp` names."""
    if "wrapping" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--ddp")
        every = named(*(NAMES if chosen is None else (chosen,)))
        metafunc.parametrize("wrapping", every.args[1])


def trained(name: str, optimizer: str = "adamw", world_size: int = 2) -> list[workers.Trained]:
    """What a training through a wrapper left on every rank."""
    chosen = () if name in (*NAMES, *SUITES) else (name,)
    case = (name, bucket_size_of(name), optimizer)
    found = [rank[case] for rank in trainings(chosen or (*NAMES, *SUITES), world_size)]
    for each in found:
        if isinstance(each, str):
            pytest.fail(each, pytrace=False)
    return found


@functools.cache
def trainings(names: tuple[str, ...], world_size: int) -> list[dict[tuple, Any]]:
    """Of each rank, for each wrapper, bucket size and optimizer what it found; all in one launch."""
    for name in names:
        if name not in SUITES:
            load_ddp(name)
    cases = [(name, bucket_size_of(name), optimizer) for name in names for optimizer in workers.OPTIMIZERS]
    ranks = launch(workers.train, cases, STEPS, world_size=world_size)
    return [dict(zip(cases, rank, strict=True)) for rank in ranks]


@functools.cache
def trained_alone(optimizer: str) -> workers.Trained:
    return workers.train_alone(optimizer, STEPS)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, and None where there is None."""
    assert list(found) == list(expected)
    differing = [name for name in found if not is_same(found[name], expected[name])]
    assert differing == []


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_close(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-12) -> None:
    """To the rounding of float64, beside the largest number of each tensor; and None where there is None."""
    assert {name for name in found if found[name] is None} == {name for name in expected if expected[name] is None}
    for name in found:
        if found[name] is not None:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol * scale, msg=name)


# What the course asks of every wrapper -----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_those_of_one_process_on_the_whole_batch(wrapping: str, world_size: int) -> None:
    for found in trained(wrapping, world_size=world_size):
        for step, expected in zip(found.gradients, trained_alone("adamw").gradients, strict=True):
            assert_close(step, expected, rtol=1e-10)  # after the first step parameters carry what AdamW divides


@pytest.mark.parametrize("optimizer", workers.OPTIMIZERS)
def test_parameters_are_trained_as_in_one_process(wrapping: str, optimizer: str) -> None:
    for found in trained(wrapping, optimizer):
        assert_close(found.final, trained_alone(optimizer).final, rtol=1e-10)


def test_every_rank_begins_with_what_rank_0_has_frozen_parameters_and_buffers_too(wrapping: str) -> None:
    alone = trained_alone("adamw").initial
    assert "frozen" in alone
    assert {alone[name].dtype for name in ("mask", "seen")} == {torch.bool, torch.int64}
    for found in trained(wrapping):
        assert_equal(found.initial, alone)


def test_ranks_are_equal_bit_for_bit_after_every_step(wrapping: str) -> None:
    for world_size in (2, 3):
        first, *others = trained(wrapping, world_size=world_size)
        for other in others:
            assert_equal(other.final, first.final)
            for step in range(STEPS):
                assert_equal(other.gradients[step], first.gradients[step])


def test_what_is_frozen_has_no_gradient_and_stays_and_what_is_tied_stays_so(wrapping: str) -> None:
    for found in trained(wrapping):
        assert all(step["frozen"] is None for step in found.gradients)
        assert torch.equal(found.final["frozen"], found.initial["frozen"])
        assert found.is_tied
        assert not torch.equal(found.final["head.weight"], found.initial["head.weight"])


# When what is communicated ------------------------------------------------------------------------------------------

LAYERS = {"0": (20, 5), "1": (30, 6), "2": (42, 7), "3": (14, 2)}
"""Elements of weight and bias of each."""
BACKWARDS = [2, 14, 7, 42, 6, 30, 5, 20]


@functools.cache
def events_of(name: str, bucket_size_mb: float | None = None) -> list[tuple]:
    """Of one step of four layers, the same on every rank and in every step."""
    first, *others = [step for rank in launch(workers.layers, name, bucket_size_mb, world_size=2) for step in rank]
    assert all(other == first for other in others)
    return first


def sizes(events: list[tuple]) -> list[int]:
    """Elements of each reduction but the last, which is that of a byte per parameter."""
    reductions = [event[1:] for event in events if event[0] == "reduce"]
    assert reductions[-1] == (8, BITMAP)
    assert BITMAP not in [dtype for _, dtype in reductions[:-1]]
    return [size for size, _ in reductions[:-1]]


@named("naive")
def test_naive_reduces_each_gradient_after_the_backward_and_waits_for_it_before_the_next(name: str) -> None:
    events = events_of(name)
    assert sizes(events) == BACKWARDS
    after = events[events.index(("backward is over",)) :]
    begun = [event[0] for event in after if event[0] in ("reduce", "waited")]
    assert begun == ["reduce", "waited"] * len(BACKWARDS) + ["reduce"]


@named("flat")
def test_flat_reduces_all_gradients_as_one_after_the_backward(name: str) -> None:
    events = events_of(name)
    assert sizes(events) == [sum(BACKWARDS)]
    assert events.index(("backward is over",)) < events.index(("reduce", sum(BACKWARDS), "torch.float32"))


@named("overlapped")
def test_overlapped_reduces_every_gradient_before_the_next_layers_is_computed(name: str) -> None:
    events = events_of(name)
    assert sizes(events) == BACKWARDS
    for later, earlier in itertools.pairwise("3210"):
        before = events.index(("gradient", f"{earlier}.weight"))
        for size in LAYERS[later]:
            assert events.index(("reduce", size, "torch.float32")) < before
    assert events.index(("reduce", 14, "torch.float32")) < events.index(("gradient", "0.weight"))
    # Nothing is waited for until all have begun.
    assert max(n for n, event in enumerate(events) if event[0] == "reduce") < min(
        n for n, event in enumerate(events) if event[0] == "waited"
    )


@named("bucketed")
def test_bucketed_reduces_full_buckets_during_the_backward(name: str) -> None:
    # Of 250 bytes: 2 + 14 + 7 | 42 + 6 | 30 + 5 + 20 elements of 4 bytes.
    events = events_of(name, 250 / BYTES_PER_MB)
    assert sizes(events) == [23, 48, 55]
    first, second, third = (events.index(("reduce", size, "torch.float32")) for size in (23, 48, 55))
    assert first < events.index(("gradient", "1.weight"))
    assert second < events.index(("gradient", "0.weight")) < third < events.index(("backward is over",))


@named("bucketed")
def test_without_a_size_there_is_one_bucket_and_with_a_small_one_a_bucket_per_parameter(name: str) -> None:
    assert sizes(events_of(name, None)) == [sum(BACKWARDS)]
    assert sizes(events_of(name, 1e-6)) == BACKWARDS


@pytest.mark.problem("ddp_overlap_bucketed")
@pytest.mark.parametrize("seed", range(20))
def test_buckets_take_parameters_from_the_last_to_the_first_as_many_as_fit(seed: int) -> None:
    drawn = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float64][: 1 + seed % 3]
    parameters = [nn.Parameter(torch.zeros(drawn.randint(1, 50), dtype=drawn.choice(dtypes))) for _ in range(30)]
    limit_bytes = drawn.randint(1, 600)
    buckets = buckets_of(parameters, limit_bytes)
    backwards = {id(parameter): place for place, parameter in enumerate(reversed(parameters))}
    places = [[backwards[id(parameter)] for parameter in bucket] for bucket in buckets]
    assert sorted(itertools.chain(*places)) == list(range(30))
    assert [bucket[-1] for bucket in places] == sorted(bucket[-1] for bucket in places)
    for dtype in dtypes:
        of_one = [bucket for bucket in buckets if bucket[0].dtype is dtype]
        in_order = [parameter for parameter in reversed(parameters) if parameter.dtype is dtype]
        assert [id(each) for bucket in of_one for each in bucket] == [id(each) for each in in_order]
        size_bytes = [sum(each.nbytes for each in bucket) for bucket in of_one]
        for bucket, size in zip(of_one, size_bytes, strict=True):
            assert size <= limit_bytes or len(bucket) == 1
        for size, following in zip(size_bytes, of_one[1:], strict=False):
            assert size + following[0].nbytes > limit_bytes


@every_wrapper
def test_the_order_is_the_same_on_ranks_whose_gradients_come_in_different_orders(name: str) -> None:
    bucket_size_mb = 1e-6 if name == "bucketed" else None
    (order, events, averages, own), (other_order, other_events, other_averages, other_own) = launch(
        workers.crossed, name, bucket_size_mb, world_size=2
    )
    assert order != other_order
    assert events == other_events
    assert_equal(averages, other_averages)
    assert_equal(averages, {key: (own[key] + other_own[key]) / 2 for key in own})


SIZES_OF_SHARING = {"bucketed": (1e-6, None), "torch": (1e-6, None)}


@functools.cache
def shared() -> list[dict[tuple, Any]]:
    """Of each rank, by wrapper and bucket size, averages and own gradients by how memory was shared."""
    cases = [(name, size) for name in NAMES for size in SIZES_OF_SHARING.get(name, (None,))]
    return [dict(zip(cases, rank, strict=True)) for rank in launch(workers.share, cases, world_size=2)]


@named(*NAMES)
def test_gradients_that_lie_in_the_memory_of_others_are_averaged_and_spoil_none(name: str) -> None:
    for size in SIZES_OF_SHARING.get(name, (None,)):
        first, other = (rank[name, size] for rank in shared())
        for how in workers.SHARING:
            (averages, own), (other_averages, other_own) = first[how], other[how]
            assert_equal(averages, {key: (own[key] + other_own[key]) / 2 for key in own})
            assert_equal(other_averages, averages)


def test_after_construction_buffers_are_each_ranks_own() -> None:
    found = launch(workers.count, NAMES, world_size=2)
    assert found == [dict.fromkeys(NAMES, 3.0), dict.fromkeys(NAMES, 6.0)]


# What a rank lacks ---------------------------------------------------------------------------------------------------


SIZES_OF_BUCKETS = {"bucketed": (1e-6, workers.BUCKET_MB / 4, None)}


@functools.cache
def routed() -> list[dict[tuple, Any]]:
    """Of each rank, by wrapper and bucket size, the gradients of all steps and the final parameters."""
    cases = [(name, size) for name in MARKS for size in SIZES_OF_BUCKETS.get(name, (None,))]
    return [dict(zip(cases, rank, strict=True)) for rank in launch(workers.route, cases, world_size=2)]


@every_wrapper
def test_what_a_rank_did_not_use_counts_as_zero_and_what_none_used_has_no_gradient(name: str) -> None:
    expected, final = workers.route_alone()
    unused = [{key.split(".")[1] for key, value in step.items() if value is None} for step in expected]
    assert unused == [{"c"}, set(), {"b"}, {"a", "b"}]
    for bucket_size_mb in SIZES_OF_BUCKETS.get(name, (None,)):
        first, other = (rank[name, bucket_size_mb] for rank in routed())
        for step in range(len(expected)):
            assert_close(first[0][step], expected[step], rtol=1e-10)
            assert_equal(other[0][step], first[0][step])
        assert_close(first[1], final, rtol=1e-10)  # no weight decay of what nobody used
        assert_equal(other[1], first[1])


@every_wrapper
def test_gradients_of_backwards_under_no_sync_are_reduced_with_the_next_one(name: str) -> None:
    first, other = launch(workers.accumulate, name, bucket_size_of(name), world_size=2)
    for events, averages, own in (first, other):
        assert events == []
        assert {key for key, value in averages.items() if value is None} == {"experts.c.weight", "experts.c.bias"}
        assert_equal(averages, first[1])
        assert_equal(
            averages, {key: None if own[key] is None else (first[2][key] + other[2][key]) / 2 for key in averages}
        )


@every_wrapper
def test_gradients_of_any_dtype_and_layout_are_averaged_in_it(name: str) -> None:
    bucket_size_mb = 50 / BYTES_PER_MB if name == "bucketed" else None
    (averages, own, events), (other_averages, other_own, other_events) = launch(
        workers.mixed, name, bucket_size_mb, world_size=2
    )
    assert_equal(other_averages, averages)
    assert_equal(averages, {key: (own[key] + other_own[key]) / 2 for key in own})
    assert any(not torch.equal(own[key], other_own[key]) for key in own)
    assert events == other_events
    if name == "flat":
        assert sorted(dtype for _, _, dtype in events[:-1]) == sorted({dtype for _, _, dtype in events[:-1]})
        assert len(events) == 4 + 1


@every_wrapper
def test_a_sparse_gradient_is_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match="only dense gradients are averaged; use an embedding with sparse=False"):
        launch(workers.sparse, name, None, world_size=2)


# Backward and finish out of step -------------------------------------------------------------------------------------

AGAIN = "a gradient was computed again while its average is under way"


MISUSES = {
    "no backward": "",
    "two backwards": AGAIN,
    "a backward under no_sync after one outside": AGAIN,
    "no finish": "the gradients of the last backward are still being averaged",
    "unfrozen": "a parameter was unfrozen after the model was wrapped",
}
"""How finish and backward are called, and how the error begins."""


@every_overlapping_wrapper
def test_misuse_is_told_on_every_rank_and_the_next_step_is_right(name: str) -> None:
    first, other = launch(workers.misuse, name, bucket_size_of(name), list(MISUSES), world_size=2)
    for how, told in MISUSES.items():
        (raised, averages, own), (other_raised, other_averages, other_own) = first[how], other[how]
        assert raised == other_raised
        assert raised.startswith(told)
        assert bool(raised) == bool(told), how
        assert_close(averages, {key: None if own[key] is None else (own[key] + other_own[key]) / 2 for key in own})
        assert_equal(averages, other_averages)


@named("naive", "flat")
def test_what_reduces_after_the_backward_averages_the_sum_of_several(name: str) -> None:
    for rank in launch(workers.misuse, name, None, ["two backwards"], world_size=2):
        raised, averages, _ = rank["two backwards"]
        assert raised == ""
        alone = trained_alone("sgd").gradients[0]
        assert_close(averages, {key: None if value is None else 2 * value for key, value in alone.items()})


FAILURES = [
    (("early", "early"), False),
    (("early", "at once"), False),
    (("early", ""), True),
    (("at once", "early"), True),
]
"""Where the backward of each of two ranks raises, and whether they call finish all the same."""


@every_overlapping_wrapper
def test_after_a_backward_that_raised_the_next_step_is_right(name: str) -> None:
    bucket_size_mb = 1e-6 if name == "bucketed" else None
    results = launch(workers.fail_once, name, bucket_size_mb, FAILURES, world_size=2)
    begun = {"at once": 2, "early": 4, "": 6}  # reductions of one layer, of two, of all
    for number, (raises, _) in enumerate(FAILURES):
        assert [rank[number][0] for rank in results] == [begun[each] for each in raises]
        (_, averages, own), (_, other_averages, other_own) = (rank[number] for rank in results)
        assert_equal(averages, other_averages)
        assert_equal(averages, {key: (own[key] + other_own[key]) / 2 for key in own})


# What cannot be wrapped ----------------------------------------------------------------------------------------------


@every_wrapper
def test_ranks_that_differ_all_tell_of_the_first_difference_in_the_same_words(name: str) -> None:
    first, other = launch(workers.different, name, world_size=2)
    assert first == other
    assert list(first) == [*workers.DIFFERENT, "bucket size", "wrapper", "twice"]
    assert "rank 0 has the parameter '1.weight' of shape (4, 3) and torch.float32, rank 1" in first["shape"]
    assert "rank 1 has the parameter '1.weight' of shape (5, 3) and torch.float32; build the same" in first["shape"]
    assert "rank 0 has nothing more, rank 1 has the parameter '1.weight'" in first["number"]
    assert "of shape (3, 3) and torch.float32, rank 1 has" in first["dtype"]
    assert "rank 1 has the parameter 'weight' of shape (3, 3) and torch.float32, frozen" in first["frozen"]
    assert "rank 1 has the parameter '1.weight' of shape (3, 3) and torch.float32, tied to '0.weight'" in first["tied"]
    assert "rank 1 has the buffer 'table' of shape (3,)" in first["buffer"]
    assert "'weight' of shape (3, 3) and torch.float32 on meta" in first["meta"]
    assert "'weight' has no values yet" in first["lazy"]
    assert "BucketedDDP with bucket_size_mb 1, rank 1 has" in first["bucket size"]
    assert "NaiveDDP, rank 1 has the wrapper FlatDDP" in first["wrapper"]
    assert "data-parallel already" in first["twice"]


@pytest.mark.problem("ddp_overlap_bucketed")
@pytest.mark.parametrize("size", [0, -1, math.nan, -math.inf, "25", True, [25]])
def test_a_bucket_size_that_is_no_positive_number_is_an_error(size: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"found {size!r}")):
        BucketedDDP(nn.Linear(2, 2), size)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_process_group_it_says_how_to_start_one(name: str) -> None:
    with pytest.raises(UserError, match=r"no process group: .*launch.*torchrun"):
        wrap(name, nn.Linear(2, 2))


def test_a_batch_is_cut_into_equal_successive_parts() -> None:
    batch = torch.arange(24).view(12, 2)
    for world_size in (1, 2, 3, 4, 6, 12):
        parts = [shard_of(batch, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {12 // world_size}
        assert torch.equal(torch.cat(parts), batch)


@pytest.mark.parametrize(
    ("batch", "rank", "world_size", "told"),
    [
        (torch.zeros(7), 0, 2, "a batch of 7 does not divide into equal parts for 2 ranks: use a multiple of 2"),
        (torch.zeros(0), 0, 2, "a batch of 0 does not divide"),
        (torch.zeros(()), 0, 1, "a number does not divide"),
        (torch.zeros(4), 2, 2, "found rank 2 of 2"),
        (torch.zeros(4), -1, 2, "found rank -1 of 2"),
        (torch.zeros(4), 0, 0, "found rank 0 of 0"),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(batch: Tensor, rank: int, world_size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        shard_of(batch, rank, world_size)


# Others ---------------------------------------------------------------------------------------------------------------


def test_a_profiler_shows_what_is_communicated_during_the_backward_and_after() -> None:
    sizes_mb = {name: 1e-6 if name == "bucketed" else None for name in MARKS}
    during = [f"communicate bucket {number}" for number in range(4)]
    expected = [["communicate"], ["communicate"], [*during, "communicate"], [*during, "communicate"]]
    assert launch(workers.ranges, list(sizes_mb.items()), world_size=2) == [expected] * 2


@every_wrapper
def test_a_wrapper_that_is_gone_communicates_nothing_and_one_of_a_frozen_model_neither(name: str) -> None:
    for events, names, trainable in launch(workers.leave, name, bucket_size_of(name), world_size=2):
        assert events == []
        assert names == ["module.weight", "module.bias"]
        assert trainable == 0


@pytest.mark.problem("ddp_overlap_individual_parameters")
@pytest.mark.problem("ddp_overlap_bucketed")
@pytest.mark.parametrize("name", SUITES)
def test_the_functions_of_the_suites_train_as_one_process_does(name: str) -> None:
    for optimizer in workers.OPTIMIZERS:
        alone = trained_alone(optimizer)
        for found in trained(name, optimizer):
            assert_equal(found.initial, alone.initial)
            assert_close(found.final, alone.final, rtol=1e-10)


# Somebody else's ------------------------------------------------------------------------------------------------------

STUDENTS = """
import torch
import torch.distributed as dist

class Mine(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)

    def forward(self, x):
        return self.module(x)

    def finish_gradient_synchronization(self):
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
"""


ASKED: Mapping[str, Callable[[str], None]] = MappingProxyType(
    {
        "gradients": functools.partial(test_gradients_are_those_of_one_process_on_the_whole_batch, world_size=2),
        "parameters": functools.partial(test_parameters_are_trained_as_in_one_process, optimizer="sgd"),
        "begin": test_every_rank_begins_with_what_rank_0_has_frozen_parameters_and_buffers_too,
    }
)
"""What the course asks of a wrapper, by its name."""


@pytest.mark.parametrize(
    ("was", "becomes", "failing"),
    [
        ("torch", "torch", set()),
        ("parameter.grad /= dist.get_world_size()", "pass", {"gradients", "parameters"}),
        ("dist.broadcast(tensor.data, 0)", "pass", {"gradients", "parameters", "begin"}),
    ],
    ids=["right", "a sum", "no broadcast"],
)
def test_what_is_wrong_with_a_wrapper_is_found_by_what_the_course_asks(
    was: str, becomes: str, failing: set[str], write_module: Callable[[str], str]
) -> None:
    assert was in STUDENTS
    name = f"{write_module(STUDENTS.replace(was, becomes))}:Mine"
    for asked, check in ASKED.items():
        with pytest.raises(AssertionError) if asked in failing else contextlib.nullcontext():
            check(name)


@pytest.mark.slow
def test_a_wrapper_named_to_pytest_is_set_before_what_the_course_asks_and_nothing_else_is_run(
    write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    name = write_module(STUDENTS.replace("parameter.grad /= dist.get_world_size()", "pass"))
    settings = ["-c", str(repository_root() / "pyproject.toml"), "-p", "no:cacheprovider", "--verbose"]
    command = [sys.executable, "-m", "pytest", str(Path(__file__).resolve()), *settings, "--ddp", f"{name}:Mine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    told = re.findall(rf"::test_(\w+?)_[\w]*\[.*{name}:Mine.*\] (PASSED|FAILED|SKIPPED)", done.stdout)
    assert len(told) == 3 + 2 + 3, done.stdout + done.stderr
    assert "deselected" in done.stdout
    outcomes = {test: {outcome for each, outcome in told if each == test} for test, _ in told}
    assert outcomes["gradients"] == {"FAILED", "PASSED"}, done.stdout  # of one rank the sum is the average
    assert outcomes["every"] == {"PASSED"}, done.stdout
    assert done.returncode == 1


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown data-parallel wrapper 'bucket': did you mean 'bucketed'") as caught:
        load_ddp("bucket")
    assert all(name in str(caught.value) for name in (*NAMES, "module:Class"))


@pytest.mark.parametrize("name", ["naive", "flat", "overlapped"])
def test_a_bucket_size_for_what_has_no_buckets_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no buckets: bucket_size_mb is for bucketed and torch"):
        wrap(name, nn.Linear(2, 2), 25)


def test_something_that_is_no_wrapper_is_told(write_module: Callable[[str], str]) -> None:
    module = write_module("number = 3\ndef same(module):\n    return module\n")
    with pytest.raises(UserError, match="must be a class that wraps a module, found 3"):
        load_ddp(f"{module}:number")
    with pytest.raises(UserError, match=r"must give a torch\.nn\.Module with finish_gradient_synchronization"):
        wrap(f"{module}:same", nn.Linear(2, 2))


@pytest.mark.gpu
def test_over_nccl_gradients_are_those_without_a_wrapper() -> None:
    names = ("naive", "flat", "overlapped", "bucketed")
    ranks = launch(workers.averages_on_a_gpu, names, world_size=torch.cuda.device_count(), backend="nccl")
    for found in ranks:
        assert max(found.values()) < 10 * torch.finfo(torch.float64).eps

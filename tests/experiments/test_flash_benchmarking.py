"""All implementations are compared on the same inputs, in rounds, with their memory and their error against float64."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_records import PEAKS, TO_RUN, as_json, flash_case, nothing_of, record_of
from torch import Tensor

from cs336_systems.analysis.attention import PHASES
from cs336_systems.analysis.hardware import gpu_peaks
from cs336_systems.attention.reference import attention as materialised
from cs336_systems.attention.reference import scaled_dot_product_attention
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Measurement, Store, case_key
from cs336_systems.errors import UserError
from cs336_systems.experiments import flash_benchmarking, pytorch_attention
from cs336_systems.experiments.flash_benchmarking import (
    HEADS,
    LONGEST_TILED_IN_PYTHON,
    TOKENS,
    Case,
    exact_attention,
    grid,
    known_implementations,
    measure,
    relative_error,
    time_on_gpu,
)
from cs336_systems.experiments.pytorch_attention import AttentionContender, contenders_of, draw_inputs

pytestmark = pytest.mark.problem("flash_benchmarking")

STUDENTS = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from cs336_systems.errors import UserError

def works(query, key, value, *, is_causal):
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)

def raises(query, key, value, *, is_causal):
    raise IndexError("out of range")

def refuses(query, key, value, *, is_causal):
    raise UserError("takes no such length")

def exhausts(query, key, value, *, is_causal):
    return torch.empty(2**50, dtype=torch.uint8)

def divides(query, key, value, *, is_causal):
    return works(query, key, value, is_causal=is_causal) / 0

def sees_all(query, key, value, *, is_causal):
    return works(query, key, value, is_causal=False)

class Tuned:
    tuned = False

    def __call__(self, query, key, value, *, is_causal):
        return works(query, key, value, is_causal=is_causal)

    def tune(self, query, key, value, *, is_causal):
        self.tuned = True

    def configuration(self, query, key, *, is_causal):
        return {"forward": {"queries": query.shape[-2], "keys": key.shape[-2], "tuned": self.tuned}}

tuned = Tuned()
"""
MISBEHAVIOURS = {
    "raises": ("failed", "IndexError: out of range"),
    "refuses": ("skipped", "takes no such length"),
    "exhausts": ("oom", "memory"),
    "divides": ("failed", "not finite"),
}


def tiny(**changes: Any) -> Case:
    content: dict[str, Any] = {"batch_size": 2, "heads": 3, "seq_len": 32, "rounds": 2}
    return flash_case(**(content | changes))


def measured(case: Case) -> Measurement:
    return measure(case, lambda _: None)


# Cases and grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementations": ["flahs"]}, "unknown attention 'flahs': did you mean 'flash'"),
        ({"impl": "flahs"}, "unknown attention 'flahs'"),
        ({"impl": "nowhere_at_all:attention"}, "cannot import 'nowhere_at_all'"),
        ({"dtypes": ["float32", "int8"]}, "unknown dtype 'int8'"),
        ({"device": "tpu"}, "unknown device"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, found 0"),
        ({"rounds": 2.5}, r"rounds must be a whole number of at least 1, found 2\.5"),
        ({"seq_lens": [0]}, "seq_len must be a whole number of at least 1, found 0"),
        ({"training_seq_lens": [3000]}, "training_seq_lens must divide 16384, found 3000"),
        ({"training_seq_lens": [0]}, "training_seq_lens must divide 16384, found 0"),
        ({"training_seq_lens": [32_768]}, "training_seq_lens must divide 16384, found 32768"),
    ],
)
def test_a_grid_that_cannot_be_is_an_error_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(**{"device": "cpu", **arguments})


def test_implementations_named_twice_in_a_case_are_an_error() -> None:
    with pytest.raises(UserError, match="each once"):
        flash_case(implementations=("flash", "flash"))


def test_the_grid_is_the_handouts_shapes_then_trainings() -> None:
    cells = grid(
        seq_lens=[128, 256],
        head_dims=[16, 32],
        dtypes=["bfloat16", "float32"],
        training_seq_lens=[4096, 16_384],
        training_head_dims=[64],
        device="cpu",
    )
    cases = [cell.case for cell in cells]
    handouts, training = cases[:8], cases[8:]
    assert {(case.batch_size, case.heads, case.is_causal) for case in handouts} == {(1, 1, True)}
    assert len({(case.seq_len, case.head_dim, case.dtype) for case in handouts}) == 8
    assert len(set(training)) == len(training) == 2 * 2
    assert all(case.batch_size * case.seq_len == TOKENS and case.heads == HEADS for case in training)
    assert {(case.dtype, case.is_causal) for case in training} == {("bfloat16", True), ("bfloat16", False)}


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_by_default_a_grid_has_all_that_the_device_and_the_precision_have(device: str, dtype: str) -> None:
    known = known_implementations(device, dtype)
    for cell in grid(dtypes=[dtype], device=device):
        assert cell.case.implementations == known
    assert {"reference", "flash"} <= set(known)
    assert ("flash-triton" in known) == (device == "cuda")
    assert ("flash-triton-tf32" in known) == ((device, dtype) == ("cuda", "float32"))
    # PyTorch's flash backend takes no float32 on a GPU, and on a CPU it does.
    assert ("sdpa-flash" in known) == ((device, dtype) != ("cuda", "float32"))


def test_one_more_implementation_stands_behind_the_others_of_every_case(write_module: Callable[[str], str]) -> None:
    mine = f"{write_module(STUDENTS)}:works"
    cells = grid(seq_lens=[32], training_seq_lens=[16_384], impl=mine, device="cpu")
    assert len(cells) > 1
    assert all(cell.case.implementations[-1] == mine for cell in cells)
    assert mine in cells[0].case.object_references


def test_a_case_is_the_same_after_it_was_written_and_read() -> None:
    case = tiny(implementations=("reference", "theirs:attention"), is_causal=False)
    read = Case(**as_json(dataclasses.asdict(case)))
    assert read == case
    assert case_key(dataclasses.asdict(read)) == case_key(dataclasses.asdict(case))


def test_cases_that_differ_are_told_apart_by_their_names() -> None:
    cases = [tiny(), tiny(is_causal=False), tiny(heads=1), tiny(batch_size=1), tiny(dtype="bfloat16")]
    assert len({str(case) for case in cases}) == len(cases)


# The oracle ----------------------------------------------------------------------------------------------------


def float64_autograd(case: Case) -> list[Tensor]:
    """Output and gradients of the materialised form on the same inputs in float64, in one piece."""
    inputs = draw_inputs(case)
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    output = materialised(*leaves, is_causal=case.is_causal)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output.double())]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 32, 1000])
def test_exact_attention_is_that_of_float64_in_one_piece_however_large_its_blocks(
    rows: int, dtype: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny(dtype=dtype, is_causal=is_causal)
    monkeypatch.setattr(flash_benchmarking, "_BLOCK_ELEMENTS", rows * case.batch_size * case.heads * case.seq_len)
    found = exact_attention(draw_inputs(case), is_causal)
    expected = float64_autograd(case)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_exact_attention_holds_no_more_scores_at_a_time_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = tiny(), []
    monkeypatch.setattr(flash_benchmarking, "_BLOCK_ELEMENTS", 1000)

    def watched(query: Tensor, key: Tensor, *others: Any) -> Tensor:
        seen.append(query.shape[:-1].numel() * key.shape[-2])
        return scaled_dot_product_attention(query, key, *others)

    monkeypatch.setattr(flash_benchmarking, "scaled_dot_product_attention", watched)
    exact_attention(draw_inputs(case), case.is_causal)
    assert max(seen) <= 1000
    assert sum(seen) == case.batch_size * case.heads * case.seq_len**2


def test_an_error_is_relative_to_the_exact_and_so_has_no_unit() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = torch.tensor([3.0, 4.5])
    assert relative_error(found, exact) == pytest.approx(0.5 / 5)
    assert relative_error(2**20 * found, 2**20 * exact) == relative_error(found, exact)
    assert relative_error(exact.float(), exact) == 0


# Measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_has_its_samples_of_all_phases_its_memory_and_its_errors(
    dtype: str, is_causal: bool
) -> None:
    case = tiny(dtype=dtype, is_causal=is_causal, implementations=("flash", "reference", "sdpa-math"))
    measurement = measured(case)
    assert list(measurement.samples) == [f"{name} {phase}_ms" for name in case.implementations for phase in PHASES]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in measurement.samples.values())
    # Of the unit of the precision, what a few roundings make.
    unit = torch.finfo(getattr(torch, dtype)).eps
    for name in case.implementations:
        values = measurement.values[name]
        assert (values["status"], values["reason"]) == ("ok", None)
        assert values["peak_bytes"] >= values["forward_peak_bytes"] > 0
        assert 0 < values["output_error"] < 2 * unit
        assert 0 < values["gradient_error"] < 4 * unit
        assert "configuration" not in values
    case_key(dataclasses.asdict(measurement))  # refuses what JSON cannot hold


def test_progress_grows_to_the_whole_and_not_beyond() -> None:
    parts: list[float] = []
    measure(tiny(), parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_an_error_of_meaning_is_seen_in_the_errors(write_module: Callable[[str], str]) -> None:
    wrong = f"{write_module(STUDENTS)}:sees_all"
    values = measured(tiny(implementations=("reference", wrong))).values
    assert values[wrong]["output_error"] > 1e4 * values["reference"]["output_error"]
    values = measured(tiny(implementations=("reference", wrong), is_causal=False)).values
    assert values[wrong]["output_error"] < 10 * values["reference"]["output_error"]


@pytest.mark.parametrize("behaviour", MISBEHAVIOURS)
@pytest.mark.parametrize("place", [0, 1])
def test_one_that_cannot_leaves_the_others_measured(
    behaviour: str, place: int, write_module: Callable[[str], str]
) -> None:
    name = f"{write_module(STUDENTS)}:{behaviour}"
    names = ["reference"]
    names.insert(place, name)
    measurement = measured(tiny(implementations=tuple(names)))
    status, reason = MISBEHAVIOURS[behaviour]
    assert measurement.values[name]["status"] == status
    assert reason in measurement.values[name]["reason"]
    assert "output_error" not in measurement.values[name]
    assert measurement.values["reference"]["status"] == "ok"
    assert sorted(measurement.samples) == sorted(f"reference {phase}_ms" for phase in PHASES)
    assert (sweep.AVAILABLE in measurement.values) == (status == "oom")


def test_a_sequence_of_one_has_gradients_of_nothing_and_is_measured() -> None:
    """Of a single key the weight is 1, whatever the scores."""
    values = measured(tiny(seq_len=1)).values
    assert {name: each["status"] for name, each in values.items()} == {"reference": "ok", "flash": "ok"}


def test_the_loop_in_python_is_skipped_beyond_a_length_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("flash", "reference", "cs336_systems.attention.flash:attention")
    monkeypatch.setattr(flash_benchmarking, "LONGEST_TILED_IN_PYTHON", 31)
    values = measured(tiny(implementations=names)).values
    assert [values[name]["status"] for name in names] == ["skipped", "ok", "ok"]
    assert values["flash"]["reason"] == "its loop over tiles in Python is not measured beyond length 31"
    monkeypatch.setattr(flash_benchmarking, "LONGEST_TILED_IN_PYTHON", 32)
    assert measured(tiny(implementations=names)).values["flash"]["status"] == "ok"
    assert LONGEST_TILED_IN_PYTHON > 32


def test_stored_scores_that_do_not_fit_are_out_of_memory_and_ours_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pytorch_attention, "available_bytes", lambda _: 2**10)
    measurement = measured(tiny())
    assert [measurement.values[name]["status"] for name in ("reference", "flash")] == ["oom", "ok"]
    assert "in matrices of scores of 24.0 KiB each" in measurement.values["reference"]["reason"]
    assert sorted(measurement.samples) == sorted(f"flash {phase}_ms" for phase in PHASES)


def test_one_that_can_tune_itself_is_tuned_first_and_its_configuration_noted(
    write_module: Callable[[str], str],
) -> None:
    name = f"{write_module(STUDENTS)}:tuned"
    values = measured(tiny(implementations=(name, "reference"))).values
    assert values[name]["configuration"] == {"forward": {"queries": 32, "keys": 32, "tuned": True}}


# Timing as on a GPU --------------------------------------------------------------------------------------------


class Watched:
    """Attention that remembers its outputs, to tell whose graphs are still there."""

    graphs: list[tuple[str, weakref.ref[Tensor]]]

    def __init__(self, name: str, graphs: list[tuple[str, weakref.ref[Tensor]]]) -> None:
        self.name, self.graphs = name, graphs

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        output = materialised(query, key, value, is_causal=is_causal)
        self.graphs.append((self.name, weakref.ref(output)))
        return output


def watched_contenders(names: Sequence[str]) -> tuple[list[AttentionContender], list[tuple[str, weakref.ref[Tensor]]]]:
    graphs: list[tuple[str, weakref.ref[Tensor]]] = []
    contenders = contenders_of(tiny(implementations=("reference", "flash", "sdpa-math")[: len(names)]))
    for contender, name in zip(contenders, names, strict=True):
        contender.name, contender.function = name, Watched(name, graphs)
    return contenders, graphs


def test_on_a_gpu_a_round_is_every_phase_of_each_in_turn_and_only_one_has_graphs_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contenders, graphs = watched_contenders(["a", "b"])
    order: list[str] = []
    clock = iter(range(100))

    def benched(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        for _ in range(3):
            prepare()
            call()
        owners = {name for name, graph in graphs if graph() is not None}
        assert len(owners) <= 1
        order.append(graphs[-1][0])
        return float(next(clock))

    monkeypatch.setattr(flash_benchmarking, "benched_ms", benched)
    samples = time_on_gpu(contenders, 2, lambda: order.append("|"))
    assert "".join(order) == "aaabbb|bbbaaa|"
    assert list(samples) == [f"{name} {phase}_ms" for name in "ab" for phase in PHASES]
    # Each round begins with another.
    assert [samples[f"a {phase}_ms"] for phase in PHASES] == [[0.0, 9.0], [1.0, 10.0], [2.0, 11.0]]
    assert [samples[f"b {phase}_ms"] for phase in PHASES] == [[3.0, 6.0], [4.0, 7.0], [5.0, 8.0]]
    assert all(graph() is None for _, graph in graphs)
    assert all(leaf.grad is None for leaf in contenders[0].inputs.leaves)


def test_on_a_gpu_forward_is_timed_with_its_graph_backward_without_forward_and_both_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contenders, graphs = watched_contenders(["a"])
    seen: list[tuple[int, str]] = []

    def benched(call: Callable[[], Any], prepare: Callable[[], object] | None = None) -> float:
        results, made = [], 0
        for _ in range(3):
            if prepare is not None:
                prepare()
            before = len(graphs)
            results.append(call())
            made += len(graphs) - before
        kind = "output" if isinstance(results[-1], Tensor) else "gradients"
        if kind == "output":
            assert results[-1].requires_grad
        else:
            expected = float64_autograd(tiny())[1:]
            for found, exact in zip(results[-1], expected, strict=True):
                torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)
        seen.append((made, kind))
        return 1.0

    monkeypatch.setattr(flash_benchmarking, "benched_ms", benched)
    time_on_gpu(contenders, 1, lambda: None)
    assert seen == [(3, "output"), (0, "gradients"), (3, "gradients")]


def test_on_a_gpu_one_that_fails_while_it_is_timed_leaves_the_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders, graphs = watched_contenders(["a", "b"])

    def benched(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        prepare()
        call()
        if len(graphs) == 8:
            raise RuntimeError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(flash_benchmarking, "benched_ms", benched)
    samples = time_on_gpu(contenders, 3, lambda: None)
    # The eighth graph is that of the second contender, with which the second round begins.
    assert [contender.status for contender in contenders] == ["ok", "oom"]
    assert all(len(samples[f"a {phase}_ms"]) == 3 for phase in PHASES)


@pytest.mark.slow
def test_the_compiled_form_is_timed_call_after_call_as_on_a_gpu() -> None:
    """In a fresh process: the checks of shapes that tests put around the reference are not for the compiler."""
    program = """
import json
from cs336_systems.experiments import flash_benchmarking

def benched(call, prepare=lambda: None):
    for _ in range(3):
        prepare()
        call()
    return 1.0

flash_benchmarking.benched_ms = benched
flash_benchmarking.time_on_cpu = flash_benchmarking.time_on_gpu
case = flash_benchmarking.Case(
    head_dim=16, seq_len=32, device="cpu", rounds=2, implementations=("reference", "reference+compile")
)
found = flash_benchmarking.measure(case, lambda _: None)
print(json.dumps([found.samples, found.values]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    samples, values = json.loads(done.stdout)
    assert {name: (each["status"], each["reason"]) for name, each in values.items()} == {
        "reference": ("ok", None),
        "reference+compile": ("ok", None),
    }
    assert [len(samples[f"reference+compile {phase}_ms"]) for phase in PHASES] == [2] * 3
    assert values["reference+compile"]["output_error"] < 1e-6


@pytest.mark.gpu
def test_on_a_gpu_all_that_it_has_are_measured() -> None:
    for dtype in ("float32", "bfloat16"):
        names = known_implementations("cuda", dtype)
        values = measured(tiny(device="cuda", dtype=dtype, implementations=names)).values
        for name in ("reference", "reference+compile", "flash", "flash-triton"):
            assert values[name]["status"] == "ok", values[name]["reason"]


# Summarising ---------------------------------------------------------------------------------------------------


def rows_of(store: Store, *records: Any, **options: Any) -> list[Any]:
    return list(flash_benchmarking.summarise(records, PEAKS, store=store, **options).itertuples())


def test_a_record_becomes_a_row_per_implementation_with_times_rates_and_eagers_beside_them(store: Store) -> None:
    case = flash_case()
    eager, ours = rows_of(store, record_of(case, {"reference": 8.0, "flash": 2.0}))
    pairs = 256 * 257 / 2
    for row, forward in ((eager, 8.0), (ours, 2.0)):
        for column, times, products in (("forward", 1, 2), ("backward", 2, 5), ("both", 3, 7)):
            middle = forward * times
            samples = [0.9 * middle, middle, 1.1 * middle]
            assert getattr(row, f"{column}_ms") == pytest.approx(middle)
            assert getattr(row, f"{column}_mean_ms") == pytest.approx(statistics.fmean(samples))
            assert getattr(row, f"{column}_std_ms") == pytest.approx(statistics.stdev(samples))
            rate = products * 2 * 16 * pairs / (middle / 1e3)
            assert getattr(row, f"{column}_flops_per_s") == pytest.approx(rate)
            assert getattr(row, f"{column}_share") == pytest.approx(rate / 1e11)
            assert getattr(row, f"{column}_speedup") == pytest.approx(8.0 / forward)
            # Six products in all that none can do without.
            assert getattr(row, f"{column}_bound_ms") == pytest.approx(
                1e3 * {"forward": 2, "backward": 4, "both": 6}[column] * 2 * 16 * pairs / 1e11
            )
    assert (ours.output_error, ours.gradient_error, ours.configuration) == (1e-7, 2e-7, {})


PUBLISHED = {
    "h100_forward_eager_ms": 0.167,
    "h100_forward_triton_ms": 0.019,
    "h100_backward_eager_ms": 1.269,
    "h100_backward_triton_ms": 1.75,
    "h100_both_eager_ms": 1.436,
    "h100_both_triton_ms": 1.768,
    "h100_q_tile": 16,
    "h100_k_tile": 16,
}


@pytest.mark.parametrize(
    ("change", "is_published"),
    [
        ({}, True),
        ({"batch_size": 2}, False),
        ({"heads": 2}, False),
        ({"is_causal": False}, False),
        ({"dtype": "float16"}, False),
        ({"float32_matmul": "high"}, False),
        ({"head_dim": 48}, False),
        ({"seq_len": 300}, False),
    ],
)
def test_published_times_stand_beside_exactly_the_shape_they_were_published_for(
    store: Store, change: dict[str, Any], is_published: bool
) -> None:
    for row in rows_of(store, record_of(flash_case(**change))):
        for name, value in PUBLISHED.items():
            assert getattr(row, name) == pytest.approx(value if is_published else math.nan, nan_ok=True)


def test_each_precision_has_its_own_published_times(store: Store) -> None:
    one, other = (rows_of(store, record_of(flash_case(dtype=dtype)))[0] for dtype in ("float32", "bfloat16"))
    assert (one.h100_both_triton_ms, other.h100_both_triton_ms) == (1.768, 1.789)


def test_every_published_shape_has_the_columns_of_a_summary(store: Store) -> None:
    shapes = flash_benchmarking.published_shapes(store)
    assert len(shapes) == sum(len(store.reference(f"flash_{dtype}_h100")) for dtype in ("float32", "bfloat16"))
    assert set(PUBLISHED) <= set(shapes.columns)
    assert not shapes.isna().any(axis=None)
    (row,) = shapes.query("seq_len == 256 and head_dim == 16 and dtype == 'float32'").itertuples()
    assert {name: getattr(row, name) for name in PUBLISHED} == PUBLISHED


def test_without_an_eager_time_there_is_no_speedup_and_everything_else(store: Store) -> None:
    records = [
        record_of(flash_case(), fell_out={"reference": ("oom", "too large")}),
        record_of(flash_case(implementations=("flash",))),
    ]
    for row in (each for each in rows_of(store, *records) if each.implementation == "flash"):
        assert math.isnan(row.both_speedup)
        assert row.both_flops_per_s > 0
        assert row.both_bound_ms > 0


def test_a_missing_record_gives_each_implementation_a_row_with_its_floor_and_what_to_run(store: Store) -> None:
    for row in rows_of(store, nothing_of(flash_case()), fingerprint={"source": {"measure": "now"}}):
        assert (row.status, row.reason, row.stale) == ("missing", TO_RUN, "")
        assert row.both_bound_ms > 0
        assert math.isnan(row.both_ms)
        assert math.isnan(row.output_error)
        assert row.configuration == {}


def test_noise_and_staleness_are_those_of_the_record(store: Store) -> None:
    record = record_of(flash_case(), noise={"flags": ["load 3"]})
    for row in rows_of(store, record, fingerprint={"source": {"measure": "now"}}):
        assert (row.noise, row.stale) == ("load 3", "measure changed")


def test_no_published_time_is_below_the_floor_of_its_shape(store: Store) -> None:
    """Of the datasheet's H100: eager's and the Triton kernels' alike."""
    for shape in flash_benchmarking.published_shapes(store).itertuples():
        case = flash_case(seq_len=shape.seq_len, head_dim=shape.head_dim, dtype=shape.dtype, device="cuda")
        # Triton's float32 products run in TF32 unless they are told not to.
        peaks = gpu_peaks("h100-sxm")
        if shape.dtype == "float32":
            peaks = dataclasses.replace(peaks, matmul_flops_per_s={"float32": peaks.rate("tf32")})
        for row in flash_benchmarking.summarise([record_of(case)], peaks, store=store).itertuples():
            for column in ("forward", "backward", "both"):
                for form in ("eager", "triton"):
                    assert getattr(row, f"{column}_bound_ms") <= getattr(shape, f"h100_{column}_{form}_ms")


def test_the_predicted_time_is_positive_and_grows_with_what_there_is_to_do() -> None:
    def seconds(**changes: Any) -> float:
        return flash_benchmarking.predicted_seconds(flash_case(**changes), PEAKS, slowdown=2.0)

    assert 0 < seconds() < seconds(rounds=20)
    assert seconds() < seconds(seq_len=1024)
    assert seconds() < seconds(implementations=("reference", "flash", "reference+compile"))
    assert seconds() < seconds(device="cuda")  # do_bench repeats a short call for a while


def test_a_precision_whose_rate_is_not_known_does_not_keep_a_run_from_being_planned() -> None:
    seconds = flash_benchmarking.predicted_seconds(flash_case(dtype="float16"), PEAKS, slowdown=2.0)
    assert math.isnan(seconds) or seconds > 0

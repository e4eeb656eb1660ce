"""Attention is timed pass by pass beside its floor, its memory counted, and what cannot run harms nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_records import PEAKS, TO_RUN, as_json, attention_case, nothing_of, record_of

from cs336_systems.analysis.attention import kept_by_flash, kept_for_backward, least_work, materialised_traffic
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.bench import sweep
from cs336_systems.bench.records import Measurement, Store, case_key
from cs336_systems.errors import UserError
from cs336_systems.experiments import pytorch_attention
from cs336_systems.experiments.pytorch_attention import AttentionContender, Case, Inputs, draw_inputs, grid, measure

pytestmark = pytest.mark.problem("pytorch_attention")

# From outside: one that works, and one for every way not to.
STUDENTS = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from cs336_systems.errors import UserError

calls = []

def works(query, key, value, *, is_causal):
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)

def raises(query, key, value, *, is_causal):
    raise IndexError("out of range\\nin line two")

def refuses(query, key, value, *, is_causal):
    raise UserError("takes no such length")

def exhausts(query, key, value, *, is_causal):
    return torch.empty(2**50, dtype=torch.uint8)

def tires(query, key, value, *, is_causal):
    calls.append(1)
    if len(calls) > 4:
        raise RuntimeError("tired")
    return works(query, key, value, is_causal=is_causal)

class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        return query.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError

def has_no_backward(query, key, value, *, is_causal):
    return Nothing.apply(query, key, value)
"""
MISBEHAVIOURS = {
    "raises": ("failed", "IndexError: out of range"),
    "refuses": ("skipped", "takes no such length"),
    "exhausts": ("oom", "memory"),
    "tires": ("failed", "RuntimeError: tired"),
    "has_no_backward": ("failed", "ZeroDivisionError"),
}


def tiny(**changes: Any) -> Case:
    content: dict[str, Any] = {"batch_size": 2, "seq_len": 32, "warmup": 1, "passes": 2}
    return attention_case(**(content | {"implementations": ("reference", "flash")} | changes))


# Cases and grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float31"}, "unknown dtype 'float31': did you mean 'float32'"),
        ({"device": "gpu"}, "unknown device 'gpu'.*cpu, cuda"),
        ({"float32_matmul": "low"}, "unknown float32_matmul 'low'.*highest, high"),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1, found 0"),
        ({"seq_len": -5}, "seq_len must be a whole number of at least 1, found -5"),
        ({"seq_len": 2.5}, r"seq_len must be a whole number of at least 1, found 2\.5"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, found True"),
        ({"heads": "8"}, "heads must be a whole number of at least 1, found '8'"),
        ({"implementations": ()}, "implementations must be one or more names, each once"),
        ({"implementations": ("flash", "flash")}, "each once, found .*'flash', 'flash'"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0, found -1"),
        ({"passes": 0}, "passes must be a whole number of at least 1, found 0"),
        ({"passes": 2.5}, r"passes must be a whole number of at least 1, found 2\.5"),
        ({"warmup": "1"}, "warmup must be a whole number of at least 0, found '1'"),
    ],
)
def test_a_case_that_cannot_be_is_an_error_that_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementations": ["flahs"]}, "unknown attention 'flahs': did you mean 'flash'"),
        ({"implementations": ["flash+compil"]}, "unknown attention 'flash.compil'"),
        ({"impl": "flahs"}, "unknown attention 'flahs'"),
        ({"impl": "nowhere_at_all:attention"}, "cannot import 'nowhere_at_all'"),
        ({"impl": "nowhere_at_all:attention+compile"}, "cannot import 'nowhere_at_all'"),
        ({"impl": "math:sqroot"}, "unknown attribute 'sqroot'"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "tpu"}, "unknown device"),
        ({"head_dims": []}, "'head_dim' is empty"),
        ({"float32_matmul": ["highest", "higher"]}, "unknown float32_matmul 'higher'"),
    ],
)
def test_a_grid_that_cannot_be_is_an_error_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(**{"device": "cpu", **arguments})


def test_the_grid_is_dimensions_times_lengths_times_precisions_and_every_case_has_all_implementations() -> None:
    cells = grid(head_dims=[16, 32], seq_lens=[64, 128, 256], float32_matmul=["highest", "high"], device="cpu")
    cases = [cell.case for cell in cells]
    assert len(cases) == 2 * 3 * 2
    assert {(case.head_dim, case.seq_len) for case in cases} == {(d, n) for d in (16, 32) for n in (64, 128, 256)}
    assert {case.implementations for case in cases} == {("reference", "reference+compile")}
    assert {(case.batch_size, case.heads, case.is_causal) for case in cases} == {(8, 1, True)}


def test_one_more_implementation_stands_behind_the_others_and_is_there_once(
    write_module: Callable[[str], str],
) -> None:
    mine = f"{write_module(STUDENTS)}:works"
    for impl in (mine, f"{mine}+compile", "sdpa"):
        (cell,) = grid(head_dims=[16], seq_lens=[32], impl=impl, device="cpu")
        assert cell.case.implementations == ("reference", "reference+compile", impl)
    (cell,) = grid(head_dims=[16], seq_lens=[32], impl="reference", device="cpu")
    assert cell.case.implementations == ("reference", "reference+compile")


def test_a_case_is_the_same_after_it_was_written_and_read() -> None:
    case = tiny(implementations=("reference", "theirs:attention"), dtype="bfloat16")
    read = Case(**as_json(dataclasses.asdict(case)))
    assert read == case
    assert hash(read) == hash(case)
    assert case_key(dataclasses.asdict(read)) == case_key(dataclasses.asdict(case))


def test_a_record_depends_on_the_source_of_what_is_not_part_of_every_case() -> None:
    case = tiny(implementations=("reference", "flash", "sdpa-math", "theirs:attention+compile", "reference+compile"))
    assert case.object_references == ("cs336_systems.attention.flash:attention", "theirs:attention")
    assert tiny(implementations=("reference", "reference+compile")).object_references == ()


@pytest.mark.parametrize(
    ("dtype", "float32_matmul", "implementation", "precision"),
    [
        ("float32", "highest", "reference", "float32"),
        ("float32", "high", "reference+compile", "tf32"),
        ("float32", "high", "flash-triton", "float32"),  # its precision is its own
        ("float32", "highest", "flash-triton-tf32", "tf32"),
        ("bfloat16", "high", "flash-triton-tf32", "bfloat16"),
        ("float16", "highest", "sdpa-math", "float16"),
    ],
)
def test_products_run_in_the_precision_of_the_case_or_of_the_kernel(
    dtype: str, float32_matmul: str, implementation: str, precision: str
) -> None:
    assert tiny(dtype=dtype, float32_matmul=float32_matmul).precision(implementation) == precision


# Measuring -----------------------------------------------------------------------------------------------------


def measured(case: Case) -> Measurement:
    return measure(case, lambda _: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_has_its_samples_of_both_passes_and_its_memory(dtype: str) -> None:
    parts: list[float] = []
    case = tiny(dtype=dtype, implementations=("flash", "reference", "sdpa-math"))
    measurement = measure(case, parts.append)
    expected = [f"{name} {part}_ms" for name in case.implementations for part in ("forward", "backward")]
    assert list(measurement.samples) == expected
    assert all(len(samples) == 2 and min(samples) > 0 for samples in measurement.samples.values())
    for name in case.implementations:
        values = measurement.values[name]
        assert (values["status"], values["reason"]) == ("ok", None)
        assert 0 < values["forward_peak_bytes"] <= values["peak_bytes"]
    kept = {name: measurement.values[name]["kept_bytes"] for name in case.implementations}
    assert kept["flash"] == sum(kept_by_flash(case.shape).values())
    assert 0 <= kept["reference"] - sum(kept_for_backward(case.shape).values()) <= 16
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    case_key(dataclasses.asdict(measurement))  # refuses what JSON cannot hold


def test_a_measurement_leaves_the_float32_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    measured(tiny(float32_matmul="high"))
    assert torch.get_float32_matmul_precision() == before


def test_the_same_seed_gives_all_implementations_the_same_inputs() -> None:
    one, same, other = (draw_inputs(tiny(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.leaves, same.leaves, strict=True))
    assert torch.equal(one.grad_output, same.grad_output)
    assert not torch.equal(one.query, other.query)
    assert len({tensor.sum().item() for tensor in (*one.leaves, one.grad_output)}) == 4
    contenders = pytorch_attention.contenders_of(tiny())
    assert contenders[0].inputs is contenders[1].inputs


def test_the_gradients_of_one_backward_stay_for_the_next_to_add_to() -> None:
    (contender,) = pytorch_attention.contenders_of(tiny(implementations=("reference",)))
    contender.both()
    first = [leaf.grad.clone() for leaf in contender.inputs.leaves if leaf.grad is not None]
    assert len(first) == 3
    contender.both()
    for leaf, once in zip(contender.inputs.leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)
    assert contender.output is None


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
    assert measurement.values["reference"]["status"] == "ok"
    assert sorted(measurement.samples) == ["reference backward_ms", "reference forward_ms"]
    assert (sweep.AVAILABLE in measurement.values) == (status == "oom")


def test_where_nobody_is_left_the_record_says_why_and_has_no_samples(write_module: Callable[[str], str]) -> None:
    module = write_module(STUDENTS)
    parts: list[float] = []
    case = tiny(implementations=(f"{module}:raises", f"{module}:refuses"))
    measurement = measure(case, parts.append)
    assert measurement.samples == {}
    assert [values["status"] for values in measurement.values.values()] == ["failed", "skipped"]
    assert parts[-1] == 1.0


def test_one_from_outside_is_measured_beside_ours_and_a_record_knows_its_source(
    store: Store, write_module: Callable[[str], str]
) -> None:
    mine = f"{write_module(STUDENTS)}:works"
    cells = grid(
        head_dims=[16], seq_lens=[32], implementations=["reference"], impl=mine, device="cpu", passes=2, batch_size=2
    )
    (record,) = sweep.run(pytorch_attention, cells, store=store).records
    assert record.status == "ok"
    assert record.measurement.values[mine]["status"] == "ok"
    assert mine in json.dumps(record.fingerprint)
    assert sweep.run(pytorch_attention, cells, store=store).counts == {"reused": 1}


def test_stored_scores_that_cannot_fit_are_out_of_memory_at_once_with_their_accounting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = attention_case(seq_len=2**17, implementations=("reference", "reference+compile"), batch_size=1, passes=1)
    monkeypatch.setattr(pytorch_attention, "available_bytes", lambda _: 2**30)
    monkeypatch.setattr(AttentionContender, "forward", lambda _: pytest.fail("it was tried"))
    values = measured(case).values
    # 2³⁴ scores of four bytes, and eager a mask of one byte each.
    for name, at_once in (("reference", 6 * 64 + 16), ("reference+compile", 4 * 64)):
        assert values[name]["status"] == "oom"
        assert values[name]["reason"] == (
            f"forward and backward hold {at_once} GiB at once, in matrices of scores of 64.0 GiB each, "
            "and 1.00 GiB are available"
        )


def test_where_stored_scores_do_not_fit_one_that_stores_none_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_attention, "available_bytes", lambda _: 2**10)
    measurement = measured(tiny(implementations=("reference", "flash")))
    assert [measurement.values[name]["status"] for name in ("reference", "flash")] == ["oom", "ok"]
    assert sorted(measurement.samples) == ["flash backward_ms", "flash forward_ms"]
    assert measurement.values[sweep.AVAILABLE] > 0


def test_blocks_that_only_the_allocator_keeps_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what ran before leaves blocks that nobody uses; they are free for whoever comes next."""
    memory = {"total": 2**30, "cached": 2**30 - 2**10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory["total"] - memory["cached"], memory["total"]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: memory.update(cached=0))
    drawn = draw_inputs(tiny())
    on_gpu = AttentionContender("reference", tiny(device="cuda"), Inputs(*drawn.leaves, drawn.grad_output))
    on_gpu.require_memory()


@pytest.mark.slow
def test_the_compiled_form_is_measured_beside_eager_and_keeps_its_matrices_too() -> None:
    """In a fresh process: the checks of shapes that tests put around the reference are not for the compiler."""
    program = """
import json
from cs336_systems.experiments.pytorch_attention import Case, measure

case = Case(
    head_dim=16, seq_len=128, device="cpu", batch_size=2, warmup=1, passes=2,
    implementations=("reference", "reference+compile"),
)
found = measure(case, lambda _: None)
print(json.dumps([found.samples, found.values]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    samples, values = json.loads(done.stdout)
    assert {name: each["status"] for name, each in values.items()} == {"reference": "ok", "reference+compile": "ok"}
    assert [len(samples[f"reference+compile {part}_ms"]) for part in ("forward", "backward")] == [2, 2]
    shape = attention_case(seq_len=128, batch_size=2).shape
    kept = values["reference+compile"]["kept_bytes"]
    assert 2 * shape.matrix_bytes < kept < sum(kept_for_backward(shape).values())
    assert values["reference+compile"]["peak_bytes"] < values["reference"]["peak_bytes"]


@pytest.mark.gpu
def test_on_a_gpu_what_is_in_use_is_counted_and_what_is_kept_is_as_accounted() -> None:
    case = tiny(device="cuda", implementations=("reference", "flash"))
    values = measured(case).values
    for name, accounted in (("reference", kept_for_backward(case.shape)), ("flash", kept_by_flash(case.shape))):
        assert values[name]["in_use_bytes"] >= values[name]["kept_bytes"]
        # Each tensor fills blocks of 512 bytes.
        assert 0 <= values[name]["kept_bytes"] - sum(accounted.values()) <= 512 * (len(accounted) + 8)


# Summarising ---------------------------------------------------------------------------------------------------


def rows_of(store: Store, *records: Any, **options: Any) -> list[Any]:
    return list(pytorch_attention.summarise(records, PEAKS, store=store, **options).itertuples())


def test_a_record_becomes_a_row_per_implementation_with_its_statistics_and_floor(store: Store) -> None:
    case = attention_case()
    eager, compiled = rows_of(store, record_of(case, {"reference": 8.0, "reference+compile": 4.0}))
    assert (eager.implementation, compiled.implementation) == case.implementations
    for row, forward in ((eager, 8.0), (compiled, 4.0)):
        for part, middle in (("forward", forward), ("backward", 2 * forward)):
            samples = [0.9 * middle, middle, 1.1 * middle]
            assert getattr(row, f"{part}_ms") == middle
            assert getattr(row, f"{part}_mean_ms") == pytest.approx(statistics.fmean(samples))
            assert getattr(row, f"{part}_std_ms") == pytest.approx(statistics.stdev(samples))
    # Two products of 2·d FLOPs for each of 256·257/2 pairs in each of 8 batches, at 100 GFLOP/s.
    assert eager.forward_bound_ms == pytest.approx(1e3 * 2 * 2 * 16 * 8 * 256 * 257 / 2 / 1e11)
    # Fourteen matrices of 8·256² scores and Q, K, V and O at 10 GB/s.
    assert eager.forward_traffic_ms == pytest.approx(1e3 * 4 * (14 * 8 * 256**2 + 4 * 8 * 256 * 16) / 1e10)
    assert math.isnan(compiled.forward_traffic_ms)
    assert eager.accounted_bytes == sum(kept_for_backward(case.shape).values()) == eager.kept_bytes
    assert math.isnan(compiled.accounted_bytes)
    assert eager.flash_bytes == sum(kept_by_flash(case.shape).values())
    assert (eager.machine, eager.torch, eager.threads, eager.status, eager.noise, eager.stale) == (
        *("toy-1c", "2.13.0", 2, "ok"),
        *("", ""),
    )


def test_a_single_pass_has_no_deviation(store: Store) -> None:
    record = record_of(attention_case(implementations=("reference",)))
    single = Measurement({name: times[:1] for name, times in record.measurement.samples.items()})
    (row,) = rows_of(store, dataclasses.replace(record, measurement=single))
    assert row.forward_ms == row.forward_mean_ms
    assert math.isnan(row.forward_std_ms)


PUBLISHED = ("h100_forward_ms", "h100_backward_ms", "h100_kept_bytes")


@pytest.mark.parametrize(
    ("change", "implementation", "expected"),
    [
        ({}, "reference", (0.312, 0.898, 4.9614 * 2**20)),
        ({}, "reference+compile", (0.36, 0.539, math.nan)),
        ({"float32_matmul": "high"}, "reference", (math.nan,) * 3),
        ({"float32_matmul": "high"}, "reference+compile", (0.176, 0.544, math.nan)),
        ({}, "flash", (math.nan,) * 3),
        ({"seq_len": 512}, "reference", (math.nan,) * 3),
        ({"batch_size": 4}, "reference", (math.nan,) * 3),
        ({"dtype": "bfloat16"}, "reference", (math.nan,) * 3),
        ({"is_causal": False}, "reference+compile", (math.nan,) * 3),
        ({"heads": 2}, "reference", (math.nan,) * 3),
    ],
)
def test_a_published_time_stands_beside_exactly_the_work_it_was_published_for(
    store: Store, change: dict[str, Any], implementation: str, expected: tuple[float, ...]
) -> None:
    case = attention_case(implementations=("reference", "reference+compile", "flash"), **change)
    (row,) = (row for row in rows_of(store, record_of(case)) if row.implementation == implementation)
    assert [getattr(row, name) for name in PUBLISHED] == pytest.approx(list(expected), rel=1e-9, nan_ok=True)


def test_a_summary_without_any_published_work_still_has_the_columns_of_it(store: Store) -> None:
    summary = pytorch_attention.summarise([record_of(attention_case(implementations=("flash",)))], PEAKS, store=store)
    assert set(PUBLISHED) <= set(summary.columns)
    assert summary[list(PUBLISHED)].isna().all(axis=None)


def test_one_that_fell_out_is_a_row_without_times_that_keeps_its_floor_and_reason(store: Store) -> None:
    record = record_of(attention_case(), fell_out={"reference": ("oom", "too large")})
    eager, compiled = rows_of(store, record)
    assert (eager.status, eager.reason, compiled.status) == ("oom", "too large", "ok")
    assert math.isnan(eager.forward_ms)
    assert math.isnan(eager.kept_bytes)
    assert eager.forward_bound_ms == compiled.forward_bound_ms > 0
    assert eager.accounted_bytes > 0


@pytest.mark.parametrize("status", ["oom", "failed", "skipped"])
def test_a_record_that_ended_as_a_whole_gives_each_implementation_its_status(store: Store, status: str) -> None:
    nothing = Measurement(values={sweep.AVAILABLE: 1})
    for row in rows_of(store, record_of(attention_case(), status=status, reason="why", measurement=nothing)):
        assert (row.status, row.reason) == (status, "why")
        assert math.isnan(row.backward_ms)


def test_a_missing_record_gives_each_implementation_a_row_with_its_floor_and_what_to_run(store: Store) -> None:
    rows = rows_of(store, nothing_of(attention_case()), fingerprint={"source": {"measure": "now"}})
    assert [row.implementation for row in rows] == ["reference", "reference+compile"]
    for row in rows:
        assert (row.status, row.reason, row.stale) == ("missing", TO_RUN, "")
        assert row.forward_bound_ms > 0
        assert math.isnan(row.forward_ms)


def test_noise_and_staleness_are_those_of_the_record(store: Store) -> None:
    record = record_of(attention_case(), noise={"flags": ["spread of 40%", "load 3"]})
    for row in rows_of(store, record, fingerprint={"source": {"measure": "now"}, "torch": "2.13.0"}):
        assert row.noise == "spread of 40%; load 3"
        assert row.stale == "measure changed"
    for row in rows_of(store, record, fingerprint={"source": {"measure": "then"}}):
        assert row.stale == ""


def test_a_precision_without_a_known_ceiling_has_no_floor_instead_of_a_wrong_one(store: Store) -> None:
    peaks = dataclasses.replace(PEAKS, lacks="run `machine_peaks`")
    records = [record_of(attention_case(dtype=dtype)) for dtype in ("float16", "float32")]
    summary = pytorch_attention.summarise(records, peaks, store=store)
    unknown, known = (summary[summary["dtype"] == dtype] for dtype in ("float16", "float32"))
    assert unknown["forward_bound_ms"].isna().all()
    assert unknown["ridge"].isna().all()
    assert set(unknown["bound_lacks"]) == {"run `machine_peaks`"}
    assert set(known["bound_lacks"]) == {""}
    assert known["forward_bound_ms"].gt(0).all()


def test_no_measured_time_is_below_its_floor_here(store: Store) -> None:
    """With ceilings that no CPU reaches, so that it depends on the counts and not on the machine."""
    fast = dataclasses.replace(PEAKS, matmul_flops_per_s={"float32": 1e16}, bandwidth_bytes_per_s=1e14)
    record = record_of(tiny(), measurement=measured(tiny()))
    for row in pytorch_attention.summarise([record], fast, store=store).itertuples():
        for part in ("forward", "backward"):
            assert 0 < getattr(row, f"{part}_bound_ms") < getattr(row, f"{part}_ms")


def test_the_prediction_needs_no_device_and_has_the_floors_of_the_summary(store: Store) -> None:
    case = attention_case(device="cuda", seq_len=1024)
    (predicted,) = pytorch_attention.predict([case], GPUS["h200"]).itertuples()
    eager = next(iter(pytorch_attention.summarise([record_of(case)], GPUS["h200"], store=store).itertuples()))
    for name in ("forward_bound_ms", "backward_bound_ms", "forward_traffic_ms", "backward_traffic_ms", "flash_bytes"):
        assert getattr(predicted, name) == getattr(eager, name)
    assert predicted.kept_bytes == eager.accounted_bytes
    assert predicted.ceilings == "h200"


def test_the_published_roofline_is_of_every_published_shape_and_no_time_is_below_what_it_must_take(
    store: Store,
) -> None:
    found = pytorch_attention.published_roofline(store)
    assert len(found) == len(store.reference("attention_eager_h100")) == 20
    long = found[found["seq_len"] == found["seq_len"].max()]
    assert (found["products_ms"] < found["forward_ms"]).all()
    # Where the matrices do not fit into the cache, the traffic is a floor too, and a near one.
    assert ((long["traffic_ms"] < long["forward_ms"]) & (long["forward_ms"] < 2 * long["traffic_ms"])).all()
    first = found.iloc[0]
    shape = dataclasses.replace(attention_case(head_dim=16, seq_len=256).shape, is_causal=False)
    assert first["forward_ms"] == pytest.approx(0.312)
    assert first["products_ms"] == pytest.approx(1e3 * least_work(shape, "forward").flops / 66.9e12)
    assert first["traffic_ms"] == pytest.approx(1e3 * materialised_traffic(shape, "forward") / 3.35e12)


def test_the_predicted_time_is_positive_and_grows_with_what_there_is_to_do() -> None:
    def seconds(**changes: Any) -> float:
        return pytorch_attention.predicted_seconds(attention_case(**changes), PEAKS, slowdown=2.0)

    least = seconds(implementations=("reference",), passes=10)
    assert 0 < least < seconds(implementations=("reference",), passes=20)
    assert least < seconds(implementations=("reference",), passes=10, seq_len=512)
    assert least < seconds(implementations=("reference", "reference+compile"), passes=10)
    assert seconds(dtype="float16") > 0  # of which the ceilings know no rate

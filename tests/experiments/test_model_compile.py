"""A model is measured eager and compiled, on the same parameters; what falls out is told and harms no other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from compile_records import COMPILE_S, PEAKS, as_json, compile_case, compile_record, no_record_of
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from cs336_systems.bench import sweep
from cs336_systems.bench.grid import runnable
from cs336_systems.bench.machine import this_machine
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.errors import UserError
from cs336_systems.experiments import model_compile, model_compile_forms
from cs336_systems.experiments.model_compile import EXACT, TRAFFIC, Case
from cs336_systems.experiments.model_compile_forms import EAGER, name_of
from cs336_systems.experiments.transformer_step import bound_ms

pytestmark = [
    pytest.mark.problem("torch_compile"),
    # PyTorch's compiler warns of itself as it is imported and as it traces; a warning made an error would stop it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

SMALLEST = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50, "context_length": 8}
MODES = (EAGER, "model", "blocks")
TRAINING = ("forward", "forward-backward", "step")


class Layer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


class Course(nn.Module):
    """A model of somebody else's, with the course's constructor. (Ours has its types checked while testing, which is
    more than Dynamo can trace: it is measured in processes of their own.)"""

    layer: type[nn.Module] = Layer

    def __init__(self, vocab_size: int, d_model: int, num_layers: int, **_: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(self.layer(d_model) for _ in range(num_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class BreakingLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.sum() > 1e9:
            x = 2 * x
        return x


class Breaking(Course):
    layer = BreakingLayer


class Blockless(Course):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks = self.layers
        del self.layers

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CountingLayer(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class Counting(Course):
    layer = CountingLayer


class SingleOnly(Course):
    def double(self) -> SingleOnly:
        raise NotImplementedError("no float64 here")


CLASSES = {f"theirs:{each.__name__}": each for each in (Course, Breaking, Blockless, Counting, SingleOnly)}


def aot_eager(*graph_and_inputs: Any) -> Any:
    return lookup_backend("aot_eager")(*graph_and_inputs)


@pytest.fixture(autouse=True)
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs and their backward are made, and no code: that is what takes seconds."""
    monkeypatch.setattr("cs336_systems.model.load_object", CLASSES.__getitem__)
    monkeypatch.setattr(model_compile_forms, "inductor_apart", lambda: partial(aot_eager))
    monkeypatch.setattr(model_compile, "prepare_compiler", lambda _: None)
    yield
    torch.compiler.reset()


def smallest(model: str = "Course", **changes: Any) -> Case:
    return Case(**{**SMALLEST, "device": "cpu", "batch_size": 2, "model": f"theirs:{model}", **changes})


def measured(case: Case) -> Measurement:
    shares: list[float] = []
    measurement = model_compile.measure(case, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    json.dumps(dataclasses.asdict(measurement), allow_nan=False)
    return measurement


# The grid ------------------------------------------------------------------------------------------------------


def test_the_laptops_grid_has_a_real_case_of_the_handout_and_every_phase_of_training() -> None:
    cases = runnable(model_compile.grid(device="cpu"))
    assert "small" in {case.size for case in cases}
    assert {phase for case in cases for phase in case.phases} == set(TRAINING)


def test_on_a_cpu_a_deep_model_is_compiled_whole_only_when_that_is_asked_for() -> None:
    contexts = {"tiny": [128], "small": [128]}
    tiny, small = runnable(model_compile.grid(contexts=contexts, device="cpu"))
    assert (tiny.modes, small.modes) == (MODES, (EAGER, "blocks"))
    assert {case.modes for case in runnable(model_compile.grid(contexts=contexts, modes=MODES, device="cpu"))} == {
        MODES
    }


def test_on_a_cpu_tf32_is_skipped_with_its_reason() -> None:
    cells = model_compile.grid(contexts={"tiny": [128]}, float32_matmul=["highest", "high"], device="cpu")
    assert [cell.case.float32_matmul for cell in cells] == ["highest", "high"]
    assert cells[0].skip_reason is None
    assert "TF32" in str(cells[1].skip_reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contexts": {}}, "contexts must map size names"),
        ({"contexts": {"tinny": [8]}}, "did you mean 'tiny'"),
        ({"contexts": {"mini": [8]}}, "phases names none for mini, but tiny, small"),
        ({"phases": ["forwards"]}, "unknown phase 'forwards': did you mean 'forward'"),
        ({"phases": []}, "phases is empty"),
        ({"modes": ["models"]}, "unknown mode 'models': did you mean 'model'"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_compile.grid(**{"device": "cpu", **arguments})


def test_a_case_is_the_same_whatever_the_order_of_its_phases_and_forms_and_after_a_file() -> None:
    one = smallest(phases=("step", "forward"), modes=("blocks", EAGER))
    assert one == smallest(phases=("forward", "step"), modes=(EAGER, "blocks"))
    assert Case(**as_json(dataclasses.asdict(one))) == one
    assert one.object_references == ("theirs:Course",)


def test_phases_of_a_case_are_steps_with_all_its_choices() -> None:
    case = smallest(float32_matmul="high", formulation="reference", optimizer="fused")
    step = case.step("forward-backward", "blocks")
    assert (step.phase, step.compile) == ("forward-backward", "blocks")
    for name in ("d_model", "context_length", "float32_matmul", "optimizer", "model", "batch_size"):
        assert getattr(step, name) == getattr(case, name)


# Measuring -----------------------------------------------------------------------------------------------------


def test_every_form_of_every_phase_has_its_times_peak_and_status() -> None:
    case = smallest(phases=("inference", *TRAINING), rounds=2)
    measurement = measured(case)
    names = {name_of(phase, mode) for phase in case.phases for mode in MODES}
    assert set(measurement.samples) == {f"{name} ms" for name in names}
    assert {len(times) for times in measurement.samples.values()} == {2}
    assert set(measurement.values) == names | {EXACT, TRAFFIC, "compiled_while_timed"}
    for name in names:
        assert measurement.values[name]["status"] == "ok", name
        assert measurement.values[name]["peak_bytes"] > 0
    assert measurement.values["compiled_while_timed"] == 0


def test_forward_is_compiled_once_for_all_phases_of_training_and_inference_by_itself() -> None:
    values = measured(smallest(phases=("inference", *TRAINING), rounds=1)).values
    for mode in ("model", "blocks"):
        graphs = [values[name_of(phase, mode)]["graphs"] for phase in ("inference", *TRAINING)]
        assert graphs[0] > 0
        assert graphs[1] > 0
        assert graphs[2:] == [0, 0]
        backward = [sum(values[name_of(phase, mode)]["backward_stages_s"].values()) for phase in TRAINING]
        assert backward[0] == backward[2] == 0
        assert backward[1] > 0
    assert "compile_s" not in values[name_of("forward", EAGER)]


def test_compiled_logits_and_loss_are_compared_with_float64_beside_eagers_own_and_before_any_step() -> None:
    values = measured(smallest(phases=("forward", "step"), rounds=1)).values
    for mode in MODES:
        assert 0 < values[name_of("forward", mode)]["logits_error"] < 1e-5
        assert values[name_of("forward", mode)]["loss_error"] < 1e-5
        assert "logits_error" not in values[name_of("step", mode)]


def test_the_traffic_is_that_of_the_model_without_loss_and_optimizer() -> None:
    traffic = measured(smallest(rounds=1)).values[TRAFFIC]
    forward, both, step = (traffic[phase] for phase in TRAINING)
    assert both == step
    assert both["product_bytes"] > forward["product_bytes"] > 0
    assert both["other_operators"] > forward["other_operators"] > 0


def test_a_graph_break_in_somebody_elses_model_is_in_the_record_with_its_line() -> None:
    values = measured(smallest("Breaking", phases=("forward",), rounds=1)).values
    for mode in ("model", "blocks"):
        found = values[name_of("forward", mode)]
        assert found["status"] == "ok"
        assert sum(each["count"] for each in found["breaks"]) >= 1
        assert {each["place"].partition(":")[0] for each in found["breaks"]} == {"test_model_compile.py"}
        assert "branch on the value of a tensor" in found["breaks"][0]["reason"]
    assert [each["place"].partition(" in ")[2] for each in values[name_of("forward", "model")]["left"]] == ["forward"]


def test_a_model_without_blocks_in_layers_is_compiled_whole_and_skipped_by_blocks() -> None:
    measurement = measured(smallest("Blockless", phases=("forward", "step"), rounds=1))
    for phase in ("forward", "step"):
        part = measurement.values[name_of(phase, "blocks")]
        assert part["status"] == "skipped"
        assert "keeps no blocks in a ModuleList called `layers`" in part["reason"]
        assert measurement.values[name_of(phase, "model")]["status"] == "ok"
    assert not any(name.startswith("blocks") for name in measurement.samples)


def test_what_is_compiled_anew_too_often_fails_and_eager_is_measured_all_the_same() -> None:
    measurement = measured(smallest("Counting", phases=("forward",), warmup=4, rounds=12))
    part = measurement.values[name_of("forward", "model")]
    assert part["status"] == "failed"
    assert "compiled anew more often than" in part["reason"]
    assert set(measurement.samples) == {f"{name_of('forward', EAGER)} ms"}


def test_a_compiler_that_fails_is_a_failed_form_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no such instruction")

    monkeypatch.setattr(model_compile_forms, "inductor_apart", lambda: fails)
    values = measured(smallest(rounds=1)).values
    for phase in TRAINING:
        part = values[name_of(phase, "model")]
        assert (part["status"], "no such instruction" in part["reason"]) == ("failed", True)
        assert values[name_of(phase, EAGER)]["status"] == "ok"


def test_a_failed_form_makes_the_record_one_to_measure_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cs336_systems.bench.sweep.fingerprint", lambda *_: {"source": {}})

    def breaks(_: nn.Module, mode: str, __: Any) -> None:
        if mode != EAGER:
            raise RuntimeError("broken")

    monkeypatch.setattr(model_compile_forms, "compile_model", breaks)
    (cell,) = model_compile.grid(contexts={"tiny": [8]}, phases=["forward"], rounds=1, device="cpu")
    outcome = sweep.run(model_compile, [cell], store=store, machine=this_machine("cpu"))
    assert outcome.failed == outcome.records
    assert "RuntimeError: broken" in str(outcome.records[0].failures)


def test_a_compiler_that_is_turned_off_is_not_taken_for_a_compiled_model() -> None:
    with torch.compiler.set_stance("force_eager"):
        values = measured(smallest(phases=("forward",), rounds=1)).values
    assert values[name_of("forward", EAGER)]["status"] == "ok"
    for mode in ("model", "blocks"):
        assert values[name_of("forward", mode)]["status"] == "failed"
        assert "nothing was compiled" in values[name_of("forward", mode)]["reason"]


def test_a_model_that_has_no_float64_is_measured_without_errors_and_says_so() -> None:
    values = measured(smallest("SingleOnly", phases=("forward",), rounds=1)).values
    assert (values[EXACT]["status"], "no float64 here" in values[EXACT]["reason"]) == ("skipped", True)
    assert "logits_error" not in values[name_of("forward", "model")]
    assert values[name_of("forward", "model")]["status"] == "ok"


# Summarising ---------------------------------------------------------------------------------------------------


def rows(store: Store, *records: Record, **options: Any) -> Any:
    return model_compile.summarise(records, PEAKS, store=store, **options)


def test_a_row_has_its_time_its_floor_and_what_compiling_has_taken_up_to_its_phase(store: Store) -> None:
    case = compile_case()
    summary = rows(store, compile_record(case))
    assert list(summary["phase"]) == [phase for phase in TRAINING for _ in MODES]
    assert list(summary["compile"]) == [*MODES] * 3
    eager = summary[summary["compile"] == EAGER]
    assert list(eager["median_ms"]) == [100.0, 300.0, 360.0]
    assert eager["compile_s"].isna().all()
    for phase, floor in zip(TRAINING, eager["bound_ms"], strict=True):
        assert floor == bound_ms(case.step(phase), PEAKS)[0]
    blocks = summary[summary["compile"] == "blocks"]
    forward, backward = COMPILE_S["forward"], COMPILE_S["forward-backward"]
    assert list(blocks["compile_s"]) == [forward, forward + backward, forward + backward]
    assert list(blocks["inductor_s"]) == [0.5 * forward, 0.5 * (forward + backward), 0.5 * (forward + backward)]
    assert list(blocks["graphs"]) == [1, 1, 1]


def test_inference_does_not_pay_for_the_compilation_of_training(store: Store) -> None:
    summary = rows(store, compile_record(compile_case(phases=("inference", "forward"))))
    whole = summary[summary["compile"] == "model"].set_index("phase")
    assert whole.loc["inference", "compile_s"] == 12 * COMPILE_S["inference"]
    assert whole.loc["forward", "compile_s"] == 12 * COMPILE_S["forward"]


def test_published_times_of_an_h100_stand_beside_eager_and_whole_and_not_beside_blocks(store: Store) -> None:
    plain = rows(store, compile_record(compile_case())).set_index(["phase", "compile"])["h100_ms"]
    assert plain["step", EAGER] == pytest.approx(73.0)
    assert plain["step", "model"] == pytest.approx(49.8)
    assert math.isnan(plain["step", "blocks"])
    assert math.isnan(plain["forward", "model"])
    tf32 = rows(store, compile_record(compile_case(float32_matmul="high"))).set_index(["phase", "compile"])["h100_ms"]
    assert tf32["step", "model"] == pytest.approx(52.9)


def test_a_missing_record_has_a_row_per_form_and_phase_with_its_floor(store: Store) -> None:
    summary = rows(store, no_record_of(compile_case()))
    assert len(summary) == 9
    assert set(summary["status"]) == {"missing"}
    assert summary["median_ms"].isna().all()
    assert summary["bound_ms"].notna().all()


def test_a_form_that_fell_out_has_its_own_status_and_the_others_theirs(store: Store) -> None:
    fell_out = {name_of("step", "model"): ("oom", "needs 9 GiB")}
    summary = rows(store, compile_record(compile_case(), fell_out=fell_out)).set_index(["phase", "compile"])  # type: ignore[arg-type]
    assert summary.loc[("step", "model"), "status"] == "oom"
    assert math.isnan(summary.loc[("step", "model"), "compile_s"])
    assert summary.loc[("forward-backward", "model"), "status"] == "ok"


def test_the_prediction_has_a_row_per_phase_and_time_grows_with_what_is_compiled() -> None:
    predicted = model_compile.predict([compile_case()], PEAKS)
    assert list(predicted["phase"]) == [*TRAINING]
    by_modes = [
        model_compile.predicted_seconds(compile_case(modes=modes), PEAKS, 2.0)
        for modes in ((EAGER,), (EAGER, "blocks"), (EAGER, "blocks", "model"))
    ]
    assert by_modes == sorted(by_modes)


def test_published_steps_are_in_milliseconds(store: Store) -> None:
    first = model_compile.published_steps(store).iloc[0]
    assert (first["eager_ms"], first["compiled_ms"]) == (pytest.approx(73.0), pytest.approx(49.8))


@pytest.mark.gpu
def test_on_a_gpu_forms_are_measured_with_tf32_too() -> None:
    (cell,) = model_compile.grid(
        contexts={"tiny": [16]}, phases=["forward"], float32_matmul="high", rounds=1, device="cuda", modes=[EAGER]
    )
    assert cell.skip_reason is None
    assert measured(cell.case).values[name_of("forward", EAGER)]["peak_bytes"] > 0

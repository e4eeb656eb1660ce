"""What torch.compile is given is what is compiled, what it cannot compile is told, and cold is cold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs336_systems.compilation import (
    STAGES,
    CompileError,
    blocks_of,
    cold_caches,
    compile_model,
    compiled_or_error,
    failures_told,
    inductor_apart,
    no_fallback,
    require_compiled,
    twin_of,
    watch_compilation,
)
from cs336_systems.errors import UserError

pytestmark = [
    pytest.mark.problem("torch_compile"),
    # PyTorch's compiler warns of itself as it is imported and as it traces; a warning made an error would stop it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

INPUT = torch.linspace(-1, 1, 8).reshape(2, 4)
OUR_MODEL = """
import json, torch
from torch import nn
from cs336_systems.compilation import compile_model, no_fallback, watch_compilation
from cs336_systems.model import TransformerConfig, TransformerLM

real = nn.Module.compile
nn.Module.compile = lambda module, **_: real(module, backend="aot_eager")
config = TransformerConfig(16, 32, 3, 2, vocab_size=50, context_length=8)
for formulation in ("reference", "fused"):
    for mode in ("none", "model", "blocks"):
        torch.compiler.reset()
        model = TransformerLM(**config.course_arguments(), formulation=formulation)
        expected = model(torch.arange(16).reshape(2, 8))
        compile_model(model, mode)
        with watch_compilation() as watch, no_fallback():
            found = model(torch.arange(16).reshape(2, 8))
            found.sum().backward()
        torch.testing.assert_close(found, expected)
        seen = watch.compilation
        print(json.dumps([mode, seen.graphs, seen.graph_breaks, len(seen.left)]))
"""
"""In a process of its own: the types that tests check at every call are more than Dynamo can trace."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


@pytest.fixture
def uncoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and their backward are made, and no code: that is what takes seconds."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: real(module, backend="aot_eager"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Printing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        print("halfway", x.shape)  # what the next test looks for
        return torch.relu(x)


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.sum() > 0:
            x = 2 * x
        return torch.relu(x)


class Counting(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * self.linear(x)


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer()])


def stack() -> Stack:
    return Stack([Layer() for _ in range(3)])


def line_of(text: str) -> int:
    return 1 + next(i for i, line in enumerate(Path(__file__).read_text().splitlines()) if text in line)


# What is compiled ----------------------------------------------------------------------------------------------


def test_an_unknown_mode_is_told_with_the_known() -> None:
    with pytest.raises(UserError, match="unknown compile 'block': did you mean 'blocks'"):
        compile_model(stack(), "block")


def test_blocks_that_are_not_found_are_an_error_and_not_nothing() -> None:
    assert blocks_of(Unnamed()) == []
    with pytest.raises(UserError, match="Unnamed keeps no blocks in a ModuleList called `layers`"):
        compile_model(Unnamed(), "blocks")


@pytest.mark.usefixtures("uncoded")
@pytest.mark.parametrize(("mode", "graphs"), [("none", 0), ("model", 1), ("blocks", 1)])
def test_a_model_is_one_graph_as_a_whole_and_one_for_all_its_blocks(mode: str, graphs: int) -> None:
    model = stack()
    expected = model(INPUT)
    compile_model(model, mode)
    with watch_compilation() as watch, no_fallback():
        found = model(INPUT.requires_grad_())  # as all blocks but the first get it
    torch.testing.assert_close(found, expected)
    assert (watch.compilation.graphs, watch.compilation.graph_breaks) == (graphs, 0)
    assert watch.compilation.left == ()


@pytest.mark.slow
def test_our_model_has_no_graph_break_in_either_formulation() -> None:
    answer = subprocess.run([sys.executable, "-c", OUR_MODEL], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert found == 2 * [["none", 0, 0, 0], ["model", 1, 0, 0], ["blocks", 1, 0, 0]]


@pytest.mark.usefixtures("uncoded")
def test_backward_is_compiled_when_it_is_first_called_and_not_again() -> None:
    model = stack()
    compile_model(model, "model")
    with watch_compilation() as forward:
        loss = model(INPUT).sum()
    with watch_compilation() as backward:
        loss.backward()
    with watch_compilation() as again:
        model(INPUT).sum().backward()
    assert set(forward.compilation.forward_s) == set(STAGES)
    assert forward.compilation.forward_s["dynamo"] > 0
    assert sum(forward.compilation.backward_s.values()) == 0
    assert sum(backward.compilation.forward_s.values()) == 0
    assert backward.compilation.seconds > 0
    assert again.compilation.seconds == again.compilation.graphs == 0


@pytest.mark.usefixtures("uncoded")
def test_a_twin_has_the_same_parameters_and_only_it_is_compiled() -> None:
    model = stack()
    twin = twin_of(model)
    compile_model(twin, "model")
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(one is other for one, other in zip(model.buffers(), twin.buffers(), strict=True))
    with watch_compilation() as eager:
        expected = model(INPUT)
    with watch_compilation() as compiled:
        twin(INPUT).sum().backward()
    assert (eager.compilation.graphs, compiled.compilation.graphs) == (0, 1)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    assert not torch.equal(twin(INPUT), expected)


@pytest.mark.slow
def test_what_a_twin_compiles_apart_is_not_taken_from_another(tmp_path: Path) -> None:
    def graphs(backend: Any) -> int:
        model = Layer()
        compile_model(model, "model", backend)
        with watch_compilation() as watch:
            model(torch.ones(2, 4))
        return watch.compilation.graphs

    with cold_caches(tmp_path):
        assert [graphs("inductor"), graphs("inductor")] == [1, 0]
        assert [graphs(inductor_apart()), graphs(inductor_apart())] == [1, 1]


# Where a graph breaks ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncoded")
@pytest.mark.parametrize(
    ("layer", "line", "reason"),
    [(Printing, 'print("halfway"', "print"), (Branching, "if x.sum() >", "branch on the value of a tensor")],
)
def test_a_graph_break_is_told_with_its_line_and_reason_and_without_a_folder(
    layer: type[Layer], line: str, reason: str
) -> None:
    model = layer()
    compile_model(model, "model")
    with watch_compilation() as watch, no_fallback():
        model(torch.ones(2, 4))
    (found,) = watch.compilation.breaks
    assert found.place == f"{Path(__file__).name}:{line_of(line)} in forward"
    assert (found.count, watch.compilation.graphs) == (1, 2)
    assert reason in found.reason or "builtin" in found.reason
    assert "/" not in found.place + found.reason.replace("for/while", "")


@pytest.mark.usefixtures("uncoded")
def test_a_function_that_is_left_uncompiled_for_a_break_within_its_loop_is_told() -> None:
    model = Stack([Branching(), Branching()])
    compile_model(model, "model")
    with watch_compilation() as watch, no_fallback():
        model(torch.ones(2, 4))
    assert [each.place.partition(" in ")[2] for each in watch.compilation.left] == ["forward"]
    assert watch.compilation.graph_breaks >= 1
    require_compiled(watch.compilation)  # its layers are compiled, each by itself


@pytest.mark.usefixtures("uncoded")
def test_breaks_of_an_earlier_model_are_not_counted_again() -> None:
    for _ in range(2):
        model = Printing()
        compile_model(model, "model")
        with watch_compilation() as watch:
            model(torch.ones(2, 4))
        torch.compiler.reset()
        assert watch.compilation.graph_breaks == 1


# Never eager unseen --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncoded")
def test_what_is_compiled_anew_too_often_is_an_error_where_pytorch_would_go_on_eagerly() -> None:
    def run() -> None:
        torch.compiler.reset()
        model = Counting()
        compile_model(model, "model")
        for _ in range(torch._dynamo.config.recompile_limit + 2):
            model(torch.ones(2, 4))

    run()  # which says so in its log alone
    told = pytest.raises(CompileError, match=r"compiled anew more often than .*recompile_limit \(8\).*calls")
    with told, no_fallback(), failures_told(), watch_compilation():
        run()


def test_a_compiler_that_fails_is_an_error_with_its_reason_even_if_errors_are_suppressed() -> None:
    def fails(*_: Any) -> Callable[..., Any]:
        raise ValueError("no such instruction")

    def run() -> Tensor:
        torch.compiler.reset()
        compiled: Callable[[Tensor], Tensor] = torch.compile(Layer(), backend=fails)
        return compiled(torch.ones(2, 4))

    with torch._dynamo.config.patch(suppress_errors=True):
        assert run().shape == (2, 4)
        with pytest.raises(CompileError, match="no such instruction"), no_fallback(), failures_told():
            run()


def test_errors_of_the_model_itself_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), no_fallback(), failures_told():
        raise ZeroDivisionError


@pytest.mark.usefixtures("uncoded")
def test_a_compiler_that_is_turned_off_is_an_error_that_says_so() -> None:
    model = Layer()
    compile_model(model, "model")
    with torch.compiler.set_stance("force_eager"), watch_compilation() as watch:
        model(torch.ones(2, 4))
    with pytest.raises(CompileError, match=r"nothing was compiled: is torch.compile turned off"):
        require_compiled(watch.compilation)


@pytest.mark.usefixtures("uncoded")
def test_what_is_not_to_be_compiled_need_not_be_and_what_is_must() -> None:
    model = Layer()
    with compiled_or_error("none"):
        model(torch.ones(2, 4))
    with pytest.raises(CompileError, match="nothing was compiled"), compiled_or_error("model"):
        model(torch.ones(2, 4))
    compile_model(model, "model")
    with compiled_or_error("model"):
        model(torch.ones(2, 4))


# Cold ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cold_code_is_made_anew_in_a_folder_of_its_own_and_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "warm"))
    model = Layer()
    expected = model(torch.ones(2, 4))
    files = []
    for _ in range(2):
        torch.compiler.reset()
        twin = twin_of(model)
        compile_model(twin, "model")
        with cold_caches(tmp_path / "cold"):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "cold"))
            found = twin(torch.ones(2, 4))
            files.append(sum(path.suffix == ".so" for path in (tmp_path / "cold").rglob("*")))
        torch.testing.assert_close(found, expected)
        assert list((tmp_path / "cold").iterdir()) == []
        torch.testing.assert_close(twin(torch.ones(2, 4)), expected)
    assert all(files)  # nor is what the first run made used by the second
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "warm")


def test_a_cold_folder_is_removed_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), cold_caches(tmp_path / "cold"):
        raise ZeroDivisionError
    assert list((tmp_path / "cold").iterdir()) == []

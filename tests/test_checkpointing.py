"""Under every policy the gradients are those without one, and every block runs as often, and keeps as much, as said."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs336_systems.analysis.checkpointing import forward_runs
from cs336_systems.checkpointing import Plan, Policy, blocks_within, is_nested, parse_policy, plan_of, run_plan
from cs336_systems.compilation import compile_model
from cs336_systems.errors import UserError
from cs336_systems.model import TransformerConfig, build_model
from cs336_systems.profiling.ranges import record_ranges
from cs336_systems.step import StepConfig

pytestmark = pytest.mark.problem("gradient_checkpointing")

BLOCKS = 6
CONFIG = TransformerConfig(d_model=16, d_ff=40, num_layers=BLOCKS, num_heads=2, vocab_size=31, context_length=20)
SHALLOW = dataclasses.replace(CONFIG, num_layers=3)
"""For the compiler, which takes seconds per block."""
POLICIES = ("every-1", "every-2", "every-4", "every-6", "nested", "from-start", "selective")
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_depth = pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 8, 16])


def tokens(batch_size: int = 3, length: int = 17) -> Tensor:
    return torch.randint(31, (batch_size, length), generator=torch.Generator().manual_seed(1))


def built(policy: str = "none", config: TransformerConfig = CONFIG, **choices: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, checkpointing=policy, **choices)


def gradients(model: nn.Module, autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens())
    logits.float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Gradients -----------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["reference", "sdpa", "flash"])
def test_gradients_are_the_same_bit_for_bit(policy: str, autocast: bool, attention: str) -> None:
    expected = gradients(built(attention=attention), autocast)
    assert len(expected) == len(list(built().parameters()))
    assert are_equal(gradients(built(policy, attention=attention), autocast), expected)


@every_policy
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_the_same_in_other_precisions(policy: str, dtype: torch.dtype) -> None:
    assert are_equal(gradients(built(policy).to(dtype)), gradients(built().to(dtype)))


@every_policy
def test_logits_and_state_are_the_same_and_without_autograd_nothing_is_kept(policy: str) -> None:
    plain, checkpointed = built(), built(policy)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(tokens()), checkpointed(tokens()))


@every_policy
def test_with_ranges_recorded_gradients_stay_the_same(policy: str) -> None:
    with record_ranges():
        found = gradients(built(policy))
    assert are_equal(found, gradients(built()))


def test_blocks_that_are_rerun_show_as_ranges_within_backward() -> None:
    model = built("every-3")
    with record_ranges(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        gradients(model)
    events: Any = profiler.events()
    found = Counter(event.name for event in events if event.name.startswith("block "))
    assert found == {f"block {block}": 2 for block in range(BLOCKS)}


# Compiled ------------------------------------------------------------------------------------------------------


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Of what the compiler warns while it looks through a model, and imports what it needs."""
    for message in ("The .grad attribute", ".torch.jit.script_method. is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return pytest.mark.usefixtures("unchecked_types")(test)


def compiled(mode: str, policy: str) -> nn.Module:
    """Parted as by Inductor, and not made into machine code, which takes a minute."""
    torch.compiler.reset()
    model = built(policy, config=SHALLOW)
    for part in model.layers if mode == "blocks" else [model]:  # type: ignore[union-attr]
        part.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    return model


@compiling
@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        *(("blocks", policy) for policy in ("every-2", "nested", "from-start", "selective")),
        *(pytest.param("model", policy, marks=pytest.mark.slow) for policy in ("every-2", "selective")),
    ],
)
def test_compiled_gradients_are_the_same_as_compiled_without_checkpoints(mode: str, policy: str) -> None:
    found, expected = gradients(compiled(mode, policy)), gradients(compiled(mode, "none"))
    assert are_equal(found, expected)


@pytest.mark.slow
@compiling
def test_the_compilers_own_code_has_the_same_gradients_too() -> None:
    def fresh(policy: str) -> nn.Module:
        torch.compiler.reset()
        model = built(policy, config=SHALLOW)
        compile_model(model, "blocks")
        return model

    assert are_equal(gradients(fresh("every-2")), gradients(fresh("none")))


def saved_after_forward(model: nn.Module) -> int:
    """Bytes of all storages that the graph of a forward holds, those of parameters not counted."""
    waiting, seen, storages = [model(tokens()).grad_fn], set(), {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(storages.values())


@pytest.mark.slow
@compiling
def test_compiled_as_a_whole_a_checkpoint_keeps_its_input_alone() -> None:
    three, two, none = (saved_after_forward(compiled("model", policy)) for policy in ("every-1", "every-2", "none"))
    stream = tokens().numel() * CONFIG.d_model * 4
    assert three - two == stream
    assert none > 2 * three


def test_checkpoints_within_checkpoints_are_refused_where_the_whole_model_is_one_graph() -> None:
    sizes = {"d_model": 16, "d_ff": 40, "num_layers": 4, "num_heads": 2, "context_length": 8, "device": "cpu"}
    for policy in ("nested", "from-start"):
        StepConfig(**sizes, checkpointing=policy, compile="blocks")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"{policy} does not go with compile model.*blocks"):
            StepConfig(**sizes, checkpointing=policy, compile="model")  # type: ignore[arg-type]
    StepConfig(**sizes, checkpointing="every-2", compile="model")  # type: ignore[arg-type]


# Plans ---------------------------------------------------------------------------------------------------------


@every_depth
@pytest.mark.parametrize("name", ["none", "every-1", "every-half", "every-all", "nested", "from-start", "selective"])
def test_every_plan_has_each_block_once_and_in_its_order(depth: int, name: str) -> None:
    text = name.replace("half", str((depth + 1) // 2)).replace("all", str(depth))
    plan = plan_of(parse_policy(text, depth), depth)
    assert [block for node in plan for block in blocks_within(node)] == list(range(depth))


def test_only_nested_policies_have_checkpoints_within_checkpoints() -> None:
    nested = {text for text in ("none", *POLICIES) if is_nested(plan_of(parse_policy(text, BLOCKS), BLOCKS))}
    assert nested == {"nested", "from-start"}


def counted_runs(plan: Plan, depth: int) -> Counter[int]:
    """How often blocks that count their calls run in a forward and a backward."""
    runs: Counter[int] = Counter()
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(depth)]

    def counting(block: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            runs[block] += 1
            return layers[block](x)

        return run

    run_plan(plan, [counting(block) for block in range(depth)], torch.randn(2, 3, requires_grad=True)).sum().backward()
    return runs


@every_depth
@pytest.mark.parametrize("name", ["none", "every-1", "every-half", "every-all", "nested", "from-start"])
def test_every_block_runs_as_often_as_is_counted(depth: int, name: str) -> None:
    text = name.replace("half", str((depth + 1) // 2)).replace("all", str(depth))
    plan = plan_of(parse_policy(text, depth), depth)
    assert counted_runs(plan, depth) == forward_runs(plan)


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_blocks_run_as_often_as_the_formulas_say(depth: int) -> None:
    def runs(text: str) -> int:
        return sum(counted_runs(plan_of(parse_policy(text, depth), depth), depth).values())

    assert runs("none") == depth
    assert runs("every-1") == runs(f"every-{depth}") == 2 * depth
    assert runs("nested") == 2 * depth + depth * (math.log2(depth) - 1) / 2
    assert runs("from-start") == depth * (depth + 1) / 2


def test_halves_of_a_selective_block_run_twice_each() -> None:
    model, runs = built("selective"), Counter[str]()
    for layer in model.layers:  # type: ignore[union-attr]
        for name in ("attn", "ffn"):
            getattr(layer, name).register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    gradients(model)
    assert runs == {"attn": 2 * BLOCKS, "ffn": 2 * BLOCKS}


class CountsOperators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("every-1", 2), ("selective", 1)])
def test_attention_that_is_one_operator_is_not_run_again_by_the_selective_policy(policy: str, times: int) -> None:
    model = built(policy, attention="sdpa")
    with CountsOperators() as counted:
        gradients(model)
    assert counted.calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == times * BLOCKS


# Policies by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["none", "every-1", "every-6", "nested", "from-start", "selective"])
def test_a_policy_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_policy(text, 6)) == text


@pytest.mark.parametrize("text", ["", "nestd", "every", "every-K", "Every-2", None, 3])
def test_an_unknown_policy_is_an_error_that_lists_the_known(text: Any) -> None:
    with pytest.raises(UserError, match=r"unknown checkpointing .*every-K.*selective"):
        parse_policy(text, 6)


@pytest.mark.parametrize(
    "text", ["every-0", "every--1", "every-7", "every-1.5", "every-", "every-²", "every-9999999999"]
)
def test_a_group_that_cannot_be_is_an_error_that_says_what_can(text: str) -> None:
    with pytest.raises(UserError, match=r"whole number K from 1 to 6, the number of blocks: found 'every-"):
        parse_policy(text, 6)


def test_the_model_and_the_step_refuse_what_cannot_be() -> None:
    with pytest.raises(UserError, match="from 1 to 6"):
        built("every-7")
    with pytest.raises(UserError, match="from 1 to 2"):
        StepConfig(16, 40, 2, 2, 8, "cpu", checkpointing="every-3")


# Random numbers ------------------------------------------------------------------------------------------------


DROPPING = """
import torch

def attention(query, key, value, *, is_causal):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, dropout_p=0.3)
"""


@every_policy
def test_attention_from_outside_may_draw_random_numbers(policy: str, write_module: Callable[[str], str]) -> None:
    attention = f"{write_module(DROPPING)}:attention"
    found = []
    for text in ("none", policy):
        model = built(text, attention=attention)
        torch.manual_seed(7)
        found.append(gradients(model))
    assert are_equal(*found)


def test_where_nothing_is_drawn_no_state_of_a_generator_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Tensor:
        raise AssertionError("the state of the generator is asked for")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    gradients(built("every-2"))


# Somebody else's model -----------------------------------------------------------------------------------------

THEIRS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.dropout = nn.Linear(width, width), nn.Dropout(0.2)
    def forward(self, x, scale=1.0):
        return x + self.dropout(torch.tanh(self.inner(x))) * scale

class Model(nn.Module):
    blocks_are_called = "layers"
    def __init__(self, vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size)
        setattr(self, self.blocks_are_called, nn.ModuleList(Block(d_model) for _ in range(num_layers)))
    def forward(self, tokens):
        return self.head(self.through(self.embedding(tokens)))
    def through(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

class ByIndex(Model):
    def through(self, x):
        for index in range(len(self.layers)):
            x = self.layers[index](x)
        return x

class Scaled(Model):
    def through(self, x):
        for layer in self.layers:
            x = layer(2 * x)
        return x

class Arguments(Model):
    def through(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x

class ElsewhereKept(Model):
    blocks_are_called = "blocks"
    def through(self, x):
        for layer in self.blocks:
            x = layer(x)
        return x
"""


def gradients_of_theirs(name: str, policy: str) -> list[Tensor]:
    model = built(policy, model=name)
    torch.manual_seed(7)
    return gradients(model)


@pytest.mark.parametrize("policy", ["every-1", "every-2", "every-4", "nested", "from-start"])
@pytest.mark.parametrize("loop", ["Model", "ByIndex"])
def test_somebody_elses_blocks_have_the_same_gradients(
    policy: str, loop: str, write_module: Callable[[str], str]
) -> None:
    name = f"{write_module(THEIRS)}:{loop}"
    assert are_equal(gradients_of_theirs(name, policy), gradients_of_theirs(name, "none"))
    assert built(policy, model=name).state_dict().keys() == built(model=name).state_dict().keys()


def test_somebody_elses_blocks_keep_as_much_less(write_module: Callable[[str], str]) -> None:
    name = f"{write_module(THEIRS)}:Model"

    def kept(policy: str) -> int:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
            return tensor

        model = built(policy, model=name)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens())
        return saved

    stream = tokens().numel() * CONFIG.d_model * 4
    assert kept("every-2") - kept("every-3") == stream
    assert kept("every-1") < kept("none")


def test_the_grouping_of_blocks_between_which_something_is_done_is_an_error(write_module: Callable[[str], str]) -> None:
    name = f"{write_module(THEIRS)}:Scaled"
    assert are_equal(gradients_of_theirs(name, "every-1"), gradients_of_theirs(name, "none"))
    with pytest.raises(UserError, match=r"what the one before it returned.*every-1"):
        gradients_of_theirs(name, "every-2")


@pytest.mark.parametrize(
    ("model", "policy", "told"),
    [
        ("Arguments", "every-2", "must take one activation, found 1 more"),
        ("ElsewhereKept", "every-2", "in a torch.nn.ModuleList called layers, found none"),
        ("Model", "selective", "not known of Model: choose every-K"),
        ("Model", "every-7", "from 1 to 6"),
    ],
)
def test_what_cannot_be_done_with_somebody_elses_blocks_is_an_error(
    model: str, policy: str, told: str, write_module: Callable[[str], str]
) -> None:
    with pytest.raises(UserError, match=told):
        gradients_of_theirs(f"{write_module(THEIRS)}:{model}", policy)


def test_somebody_elses_blocks_are_not_compiled_one_by_one_in_checkpoints() -> None:
    with pytest.raises(UserError, match="compile the model"):
        StepConfig(16, 40, 2, 2, 8, "cpu", checkpointing="every-2", compile="blocks", model="somebody:Model")


def test_policies_that_are_equal_are_one() -> None:
    assert {Policy("every", 2), parse_policy("every-2", 3)} == {Policy("every", 2)}

"""Every storage that a call keeps for its backward is listed once, with its kind and the line that saved it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.errors import UserError
from cs336_systems.model import TransformerConfig, build_model
from cs336_systems.object_reference import load_object
from cs336_systems.profiling.saved_tensors import (
    KINDS,
    OF_THE_CALL,
    SavedTensor,
    record_saved,
    saved_by_middle_block,
)

pytestmark = pytest.mark.problem("memory_profiling")

FLOAT = 4


def needing_gradient(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def one(tensors: tuple[SavedTensor, ...]) -> SavedTensor:
    (found,) = tensors
    return found


# One storage ---------------------------------------------------------------------------------------------------


def test_a_result_that_is_saved_is_listed_with_its_line_and_the_operator_that_holds_it() -> None:
    x = needing_gradient(3, 5)
    saved = one(record_saved(lambda: x.exp()).tensors)
    assert (saved.bytes, saved.shape, saved.dtype, saved.kind) == (3 * 5 * FLOAT, (3, 5), "float32", "activation")
    assert (saved.operators, saved.times) == (("ExpBackward0",), 1)
    assert saved.place.startswith("test_saved_tensors.py:")
    assert saved.place.endswith("<lambda>")


def test_a_storage_counts_once_however_many_operators_and_views_of_it_are_saved() -> None:
    x = needing_gradient(4, 6)

    def call() -> Tensor:
        y = x.exp()
        return y.pow(2).sum() + y.T.pow(3).sum() + y[:2].pow(2).sum()

    saved = one(record_saved(call).tensors)
    assert (saved.bytes, saved.shape, saved.times) == (4 * 6 * FLOAT, (4, 6), 4)
    assert sorted(saved.operators) == ["ExpBackward0", "PowBackward0"]


def test_a_view_counts_with_all_of_the_storage_that_it_keeps() -> None:
    x = needing_gradient(8, 6)
    saved = one(record_saved(lambda: (x + 1)[:2].pow(2)).tensors)
    assert (saved.bytes, saved.shape) == (8 * 6 * FLOAT, (2, 6))


def test_storages_that_follow_one_another_at_one_address_are_told_apart() -> None:
    """Of what nobody holds on to the next may take the memory; what is recorded is held until the end."""
    x = needing_gradient(1000)

    def call() -> None:
        for _ in range(5):
            x.exp()

    saved = record_saved(call).tensors
    assert [tensor.bytes for tensor in saved] == [1000 * FLOAT] * 5
    assert all(tensor.operators == () for tensor in saved)  # whose graphs are gone


def test_nothing_is_held_after_recording() -> None:
    x = needing_gradient(1000)
    kept: list[Tensor] = []

    def call() -> Tensor:
        y = x.exp()  # which hangs on the node that saves it
        y.sin()
        return y

    record_saved(call)
    assert allocated_bytes(lambda: record_saved(call), "cpu")[1] == 0
    # Of a graph that somebody keeps only that much stays: not what was recorded beside it.
    assert allocated_bytes(lambda: kept.append(x.exp()), "cpu")[1] == x.nbytes

    def call_and_keep() -> None:
        x.sin().exp()
        kept.append(x.exp())

    assert allocated_bytes(lambda: record_saved(call_and_keep), "cpu")[1] == x.nbytes


def test_without_gradients_nothing_is_saved() -> None:
    x = needing_gradient(3, 5)
    with torch.no_grad():
        assert record_saved(lambda: x.exp()).tensors == ()
    assert record_saved(lambda: None).tensors == ()


def test_a_call_that_runs_its_own_backward_is_recorded_and_its_gradients_are_right() -> None:
    x = needing_gradient(3, 5)

    def call() -> Tensor:
        y = x.exp().sum()
        y.backward()
        return y

    saved = one(record_saved(call).tensors)
    assert (saved.bytes, saved.operators) == (3 * 5 * FLOAT, ())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().exp())


class Doubled(torch.autograd.Function):
    """A custom function that saves its input, and a second tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_ones(7))
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return 2 * grads[0]


def test_what_a_custom_function_saves_is_listed_under_its_name() -> None:
    x = needing_gradient(3, 5)
    saved = record_saved(lambda: Doubled.apply(x), inputs=[x])
    assert [(each.kind, each.bytes) for each in saved.tensors] == [("input", 15 * FLOAT), ("activation", 7 * FLOAT)]
    assert all(each.operators == ("DoubledBackward",) for each in saved.tensors)
    assert all(each.place.endswith("<lambda>") for each in saved.tensors)  # it saves when its forward is over


def test_under_checkpointing_only_the_input_of_what_is_recomputed_is_saved() -> None:
    x, layers = needing_gradient(3, 5), nn.Sequential(nn.Linear(5, 40), nn.GELU(), nn.Linear(40, 5))
    plain = record_saved(lambda: layers(x), module=layers, inputs=[x])
    kept = record_saved(lambda: checkpoint(layers, x, use_reentrant=False), module=layers, inputs=[x])
    assert kept.total_bytes(*OF_THE_CALL) == x.nbytes < plain.total_bytes(*OF_THE_CALL)


# Kinds ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A linear layer on an input that is scaled by a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale).exp()


@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_their_casts_buffers_and_inputs_are_of_kinds_of_their_own(autocast: bool) -> None:
    """The batch is as long as the weight is wide, so that no shape tells an activation from a weight."""
    module, x = Scaled(), needing_gradient(6, 6)
    module.scale.requires_grad_()

    def call() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result: Tensor = module(x)
            return result

    saved = record_saved(call, module=module, inputs=[x])
    assert one(saved.of("input")).bytes == x.nbytes
    assert one(saved.of("buffer")).bytes == module.scale.nbytes
    weight = one(saved.of("cast of a parameter" if autocast else "parameter"))
    assert weight.bytes == module.linear.weight.nbytes // (2 if autocast else 1)
    assert not saved.of("parameter" if autocast else "cast of a parameter")
    # The scaled input, in the precision of the product, and the exponentials.
    assert [each.bytes for each in saved.of("activation")] == [x.nbytes // (2 if autocast else 1)] * 2
    assert sum(len(saved.of(kind)) for kind in KINDS) == len(saved.of()) == len(saved.tensors)
    assert saved.total_bytes() == sum(saved.total_bytes(kind) for kind in KINDS)


def test_a_parameter_is_told_from_an_activation_without_its_module() -> None:
    weight, x = nn.Parameter(torch.randn(6, 6)), torch.randn(6, 6)
    saved = record_saved(lambda: (x @ weight.T).exp())
    assert [each.kind for each in saved.tensors] == ["activation", "activation"]  # x needs no gradient
    y = needing_gradient(6, 6)
    assert {each.kind for each in record_saved(lambda: y @ weight.T).tensors} == {"activation", "parameter"}


def test_a_product_with_an_input_that_needs_no_gradient_is_no_cast_of_its_weight() -> None:
    layer, x = nn.Linear(6, 6, bias=False), torch.randn(6, 6)

    def call() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden: Tensor = layer(x)  # in another precision than the one parameter it hangs on, and as large
            return hidden.sin()

    assert {each.kind for each in record_saved(call, module=layer).tensors} == {"activation"}


def test_an_unknown_kind_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown kind 'activations': did you mean 'activation'"):
        record_saved(lambda: None).total_bytes("activations")  # type: ignore[arg-type]


# Places and groups ---------------------------------------------------------------------------------------------

STUDENTS = """
import math
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, width, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))


class Twice(nn.Module):
    def forward(self, x):
        for _ in range(2):
            x = x.exp()
        return x
"""


@pytest.fixture
def students(write_module: Callable[[str], str]) -> ModuleType:
    name = write_module(STUDENTS)
    load_object(f"{name}:Model")
    return sys.modules[name]


def line_of(text: str) -> int:
    return 1 + next(index for index, line in enumerate(STUDENTS.splitlines()) if text in line)


def test_the_block_of_somebody_else_is_recorded_line_by_line(students: ModuleType) -> None:
    batch, length, width, heads = 3, 7, 8, 2
    model = students.Model(width)
    saved = saved_by_middle_block(model, batch, length, width)
    softmax = one(tuple(each for each in saved.tensors if "SoftmaxBackward0" in each.operators))
    assert softmax.bytes == batch * heads * length**2 * FLOAT
    assert softmax.place == f"{students.__name__}.py:{line_of('torch.softmax')} forward"
    assert [frame.name for frame in softmax.trace] == ["forward"]
    stream = batch * length * width * FLOAT
    assert one(saved.of("input")).bytes == stream
    assert saved.total_bytes("parameter") == sum(p.nbytes for p in model.layers[1].parameters())


def test_what_is_recorded_is_what_the_allocator_holds(students: ModuleType) -> None:
    batch, length, width = 3, 7, 8
    block, x = students.Block(width), needing_gradient(batch, length, width)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(block(x))

    _, left = allocated_bytes(forward, "cpu")
    saved = record_saved(lambda: block(x), module=block, inputs=[x])
    root = torch.tensor(math.sqrt(width), dtype=torch.float64)  # a number of Python's, which hooks are not shown
    assert left == saved.total_bytes("activation") + outputs[0].nbytes + root.nbytes


def test_groups_are_of_one_line_and_shape_and_precision_with_the_most_bytes_first(students: ModuleType) -> None:
    x = needing_gradient(4, 5)
    saved = record_saved(lambda: students.Twice()(x))
    (group,) = saved.largest()
    assert (group.count, group.total_bytes, group.bytes) == (2, 2 * x.nbytes, x.nbytes)
    assert (group.shape, group.operators) == ((4, 5), ("ExpBackward0",))
    assert group.place == f"{students.__name__}.py:{line_of('x = x.exp()')} forward"
    assert [frame.name for frame in group.trace] == ["forward", "<lambda>"]

    model = build_model(TransformerConfig(d_model=24, d_ff=56, num_layers=3, num_heads=2, context_length=40))
    block = saved_by_middle_block(model, 3, 17, 24)
    groups = block.largest()
    assert sum(group.total_bytes for group in groups) == block.total_bytes(*OF_THE_CALL)
    assert sum(group.count for group in groups) == len(block.of(*OF_THE_CALL))
    assert [group.total_bytes for group in groups] == sorted((g.total_bytes for g in groups), reverse=True)
    assert block.largest(5) == groups[:5]
    assert len({(group.place, group.shape, group.dtype) for group in groups}) == len(groups)
    parameters = block.largest(None, "parameter")
    assert sum(group.total_bytes for group in parameters) == block.total_bytes("parameter")


def test_storages_that_differ_in_size_have_no_size_in_common() -> None:
    x = needing_gradient(8, 6)

    def call() -> list[Tensor]:
        return [(x[:rows] + 1)[:2].pow(2) for rows in (4, 8)]

    (group,) = record_saved(call).largest()
    assert (group.count, group.total_bytes, group.bytes) == (2, 12 * 6 * FLOAT, None)


def test_a_call_of_pytorchs_own_is_put_down_to_who_recorded_it() -> None:
    saved = one(record_saved(functools.partial(torch.exp, needing_gradient(3))).tensors)
    assert saved.place.endswith("test_a_call_of_pytorchs_own_is_put_down_to_who_recorded_it")


# A model's blocks ----------------------------------------------------------------------------------------------


def test_the_block_that_is_recorded_is_the_middle_one() -> None:
    """On PyTorch's device without data, in the precision of its parameters."""
    called: list[int] = []

    class Block(nn.Linear):
        def __init__(self, index: int) -> None:
            super().__init__(6, 6, dtype=torch.bfloat16, device="meta")
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            called.append(self.index)
            assert (x.device.type, x.dtype, x.shape, x.requires_grad) == ("meta", torch.bfloat16, (2, 3, 6), True)
            return super().forward(x)

    model = nn.Module()
    model.layers = nn.ModuleList(map(Block, range(5)))
    assert saved_by_middle_block(model, 2, 3, 6).total_bytes("input") == 2 * 3 * 6 * 2
    assert called == [2]


def test_a_model_without_a_list_of_blocks_is_an_error_that_says_what_to_do() -> None:
    model = nn.Module()
    with pytest.raises(UserError, match=r"Module must have its blocks in .* called layers, found none: call record"):
        saved_by_middle_block(model, 2, 3, 6)
    model.layers = nn.ModuleList()
    with pytest.raises(UserError, match=r"found ModuleList\(\)"):
        saved_by_middle_block(model, 2, 3, 6)
    model.layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(UserError, match=r"Identity must have a parameter.*found none"):
        saved_by_middle_block(model, 2, 3, 6)


def test_a_block_that_takes_something_else_is_an_error_that_says_so() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + positions

    model = nn.Module()
    model.layers = nn.ModuleList([Block(6, 6)])
    with pytest.raises(UserError, match=r"Block must take one activation \(batch, seq, d_model\): .*positions"):
        saved_by_middle_block(model, 2, 3, 6)


def test_an_unknown_autocast_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown autocast 'bf16'.*none, bfloat16, float16"):
        saved_by_middle_block(nn.Module(), 2, 3, 6, autocast="bf16")

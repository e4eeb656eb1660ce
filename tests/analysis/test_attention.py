"""What attention must do and hold, as counted from its shape, is what PyTorch is seen to do and to hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis.attention import (
    PHASES,
    AttentionShape,
    checked_phase,
    counted_flops,
    flops_by_part,
    intensity,
    kept_by_flash,
    kept_for_backward,
    least_work,
    materialised_peak,
    materialised_traffic,
    softmax_flops,
    traffic_by_part,
)
from cs336_systems.attention import flash, reference
from cs336_systems.attention.backends import AttentionFunction
from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError

pytestmark = pytest.mark.problem("pytorch_attention")

MIB = 2**20
SHAPES = [(1, 1, 64, 16), (2, 3, 40, 8), (3, 2, 17, 32)]


def shape_of(sizes: tuple[int, int, int, int], *, is_causal: bool = False, dtype: str = "float32") -> AttentionShape:
    return AttentionShape(*sizes, is_causal, getattr(torch, dtype).itemsize)


def drawn(shape: AttentionShape, dtype: str = "float32") -> tuple[list[Tensor], Tensor]:
    """Q, K and V, and the gradient of the output."""
    sizes = (shape.batch_size, shape.heads, shape.seq_len, shape.head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(sizes, generator=generator).to(getattr(torch, dtype)) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], grad


class Pass:
    """Forward and backward of an implementation, one after the other."""

    def __init__(self, function: AttentionFunction, shape: AttentionShape, dtype: str = "float32") -> None:
        self.leaves, self.grad = drawn(shape, dtype)
        self.function, self.shape = function, shape
        self.output: Tensor | None = None

    def forward(self) -> None:
        self.output = self.function(*self.leaves, is_causal=self.shape.is_causal)

    def backward(self) -> None:
        assert self.output is not None
        self.output.backward(self.grad)
        self.output = None

    def both(self) -> None:
        self.forward()
        self.backward()


# Products ------------------------------------------------------------------------------------------------------


def seen_flops(function: AttentionFunction, shape: AttentionShape) -> dict[str, int]:
    """What PyTorch's own counter sees in each pass."""
    run = Pass(function, shape)
    found = {}
    for part in ("forward", "backward"):
        with FlopCounterMode(display=False) as counter:
            getattr(run, part)()
        found[part] = counter.get_total_flops()
    return found | {"forward-backward": sum(found.values())}


@pytest.mark.parametrize("sizes", SHAPES)
def test_the_products_are_those_that_pytorch_counts_of_the_materialised_form(sizes: tuple[int, int, int, int]) -> None:
    shape = shape_of(sizes)
    assert {phase: least_work(shape, phase).flops for phase in PHASES} == seen_flops(reference.attention, shape)


def test_the_flops_of_a_rate_are_those_that_pytorch_counts_of_flashattention_with_its_recomputed_product() -> None:
    shape = shape_of((2, 1, 2 * flash.TILE, 16))
    assert {phase: counted_flops(shape, phase) for phase in PHASES} == seen_flops(flash.attention, shape)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("phase", PHASES)
def test_with_a_causal_mask_only_pairs_that_see_one_another_count(sizes: tuple[int, int, int, int], phase: str) -> None:
    batch, heads, length, _ = sizes
    pairs = sum(key <= query for query in range(length) for key in range(length))
    causal, whole = shape_of(sizes, is_causal=True), shape_of(sizes)
    assert causal.pairs == batch * heads * pairs
    for count in (counted_flops, lambda shape, phase: least_work(shape, phase).flops):
        assert count(causal, phase) * length**2 == count(whole, phase) * pairs


def test_rates_count_two_and_a_half_times_forward_for_backward_and_three_and_a_half_for_both() -> None:
    shape = shape_of((2, 3, 40, 8), is_causal=True)
    forward, backward, both = (counted_flops(shape, phase) for phase in PHASES)
    assert (backward, both) == (2.5 * forward, 3.5 * forward)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_least_bytes_are_the_distinct_tensors_of_a_pass(dtype: str) -> None:
    shape = shape_of((2, 3, 40, 8), dtype=dtype)
    run = Pass(reference.attention, shape, dtype)
    run.forward()
    inputs, output = sum(leaf.nbytes for leaf in run.leaves), run.output
    assert output is not None
    run.backward()
    gradients = sum(leaf.grad.nbytes for leaf in run.leaves if leaf.grad is not None)
    moved = {phase: least_work(shape, phase).bytes for phase in PHASES}
    assert moved["forward"] == inputs + output.nbytes
    assert moved["backward"] == inputs + run.grad.nbytes + gradients
    assert moved["forward-backward"] == inputs + output.nbytes + run.grad.nbytes + gradients


# Traffic -------------------------------------------------------------------------------------------------------


class MatricesMoved(TorchDispatchMode):
    """Counts the matrices of scores that operators read and write; one that gives another view moves nothing."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = operator(*args, **(kwargs or {}))
        read, written = (self._matrices(tensors) for tensors in ((args, kwargs), result))
        storages = {matrix.untyped_storage().data_ptr() for matrix in read}
        # `expand` gives a matrix that is none in memory.
        new = [matrix for matrix in written if matrix.untyped_storage().data_ptr() not in storages]
        if not operator.is_view:
            self.count += len(read) + len(new)
        return result

    def _matrices(self, tensors: Any) -> list[Tensor]:
        leaves = tree_leaves(tensors)
        return [x for x in leaves if isinstance(x, Tensor) and x.numel() == self.elements and x.is_floating_point()]


@pytest.mark.parametrize("sizes", SHAPES)
def test_the_traffic_is_that_of_the_matrices_that_operators_are_seen_to_read_and_write(
    sizes: tuple[int, int, int, int],
) -> None:
    shape = shape_of(sizes, is_causal=True)
    run = Pass(reference.attention, shape)
    seen = {}
    for part in ("forward", "backward"):
        with MatricesMoved(shape.rows * shape.seq_len) as mode:
            getattr(run, part)()
        seen[part] = mode.count
    assert seen == {"forward": 14, "backward": 35}
    for phase, matrices in (seen | {"forward-backward": sum(seen.values())}).items():
        beyond_tensors = materialised_traffic(shape, phase) - least_work(shape, phase).bytes
        assert beyond_tensors == matrices * shape.matrix_bytes


def parts_of(shape: AttentionShape) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each part of the reference by itself, with its inputs: what `attention/reference.py` names so."""
    (query, key, value), _ = drawn(shape)
    root = math.sqrt(shape.head_dim)
    mask = reference.causal_mask(shape.seq_len, shape.seq_len, query.device)

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return torch.where(mask, torch.einsum("...qd,...kd->...qk", query, key) / root, float("-inf"))

    def softmax(scores: Tensor) -> Tensor:
        return reference.softmax(scores, dim=-1)

    def value_product(weights: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("...qk,...kv->...qv", weights, value)

    given = scores(query, key).detach().requires_grad_()
    weights = softmax(given).detach().requires_grad_()
    return {
        "scores": (scores, (query, key)),
        "softmax": (softmax, (given,)),
        "value product": (value_product, (weights, value)),
    }


@pytest.mark.parametrize("sizes", SHAPES)
def test_the_traffic_of_each_part_is_that_of_the_matrices_that_its_operators_are_seen_to_move(
    sizes: tuple[int, int, int, int],
) -> None:
    shape = shape_of(sizes, is_causal=True)
    for part, (function, inputs) in parts_of(shape).items():
        with MatricesMoved(shape.rows * shape.seq_len) as forward:
            output = function(*inputs)
        grad = torch.randn(output.shape)
        with MatricesMoved(shape.rows * shape.seq_len) as backward:
            gradients = torch.autograd.grad(output, inputs, grad)
        # What is no matrix of scores is one of Q, K, V, O or a gradient of one, each moved once.
        read = [tensor for tensor in inputs if tensor.shape[-1] == shape.head_dim]
        small = [[*read, output], [*read, grad, *gradients]]
        tensors = [sum(each.shape[-1] == shape.head_dim for each in moved) for moved in small]
        for phase, matrices, count in zip(("forward", "backward"), (forward, backward), tensors, strict=True):
            expected = matrices.count * shape.matrix_bytes + count * shape.tensor_bytes
            assert traffic_by_part(shape, phase)[part] == expected, (part, phase)


@pytest.mark.parametrize("phase", PHASES)
def test_the_parts_move_together_what_the_whole_moves(phase: str) -> None:
    shape = shape_of((2, 3, 40, 8), is_causal=True)
    assert sum(traffic_by_part(shape, phase).values()) == materialised_traffic(shape, phase)
    matrices = {part: moved // shape.matrix_bytes for part, moved in traffic_by_part(shape, phase).items()}
    assert max(matrices, key=lambda part: matrices[part]) == "softmax"


def test_the_parts_are_the_named_ranges_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []

    @contextmanager
    def named_range(name: str) -> Iterator[None]:
        named.append(name)
        yield

    monkeypatch.setattr(reference, "named_range", named_range)
    shape = shape_of((1, 1, 8, 4), is_causal=True)
    reference.attention(*drawn(shape)[0], is_causal=True)
    assert named == list(flops_by_part(shape)) == list(traffic_by_part(shape, "forward"))


class OperationsOnScores(TorchDispatchMode):
    """Counts one operation per element: that an elementwise operator writes, or that a reduction reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.count += max(x.numel() for x in tree_leaves((args, result)) if isinstance(x, Tensor))
        return result


@pytest.mark.parametrize("sizes", SHAPES)
def test_softmax_does_five_operations_per_score_and_the_products_what_pytorch_counts(
    sizes: tuple[int, int, int, int],
) -> None:
    shape = shape_of(sizes, is_causal=True)
    flops = flops_by_part(shape)
    scores = torch.randn(shape.batch_size, shape.heads, shape.seq_len, shape.seq_len)
    with OperationsOnScores() as mode:
        reference.softmax(scores, dim=-1)
    assert flops["softmax"] == softmax_flops(shape) == mode.count
    for part, (function, inputs) in parts_of(shape).items():
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        assert counter.get_total_flops() == (0 if part == "softmax" else flops[part])


def test_softmax_has_few_of_the_flops_and_most_of_the_traffic() -> None:
    """Why its time is out of proportion: of both products it has 5 / (4·d) of the FLOPs, and moves more than they."""
    for head_dim in (64, 80, 128):
        shape = AttentionShape(4, 25, 1024, head_dim, is_causal=True)
        flops, traffic = flops_by_part(shape), traffic_by_part(shape, "forward")
        products = ("scores", "value product")
        assert flops["softmax"] / sum(flops[part] for part in products) == 5 / (4 * head_dim)
        assert traffic["softmax"] > sum(traffic[part] for part in products)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiling_makes_intensity_grow_with_the_length_where_stored_scores_keep_it_still(
    head_dim: int, dtype: str
) -> None:
    itemsize = getattr(torch, dtype).itemsize
    shapes = [shape_of((4, 2, length, head_dim), is_causal=True, dtype=dtype) for length in (8192, 16_384)]
    for shape in shapes:
        stored, tiled = (intensity(shape, "forward", materialised=stored) for stored in (True, False))
        assert stored == pytest.approx(4 * head_dim / (14 * itemsize), rel=0.01)
        assert tiled == pytest.approx(shape.seq_len / itemsize, rel=0.01)
    short, long = (intensity(shape, "forward", materialised=False) for shape in shapes)
    assert long / short == pytest.approx(2, rel=1e-3)


def test_intensity_is_of_the_whole_matrix_in_either_form() -> None:
    for phase in PHASES:
        causal, whole = (shape_of((2, 3, 40, 8), is_causal=is_causal) for is_causal in (True, False))
        for stored in (True, False):
            assert intensity(causal, phase, materialised=stored) == intensity(whole, phase, materialised=stored)


# Memory --------------------------------------------------------------------------------------------------------

SCALARS = 16
"""Bytes of operands that are no tensor of the shape's, such as the −∞ of the mask."""


def kept_after_forward(run: Pass) -> int:
    """Bytes in use after a forward that follows an earlier backward: what was there before, and what it left."""
    run.both()
    _, left = allocated_bytes(run.forward, "cpu")
    before = run.leaves + [leaf.grad for leaf in run.leaves if leaf.grad is not None]
    assert len(before) == 6
    return left + sum(tensor.nbytes for tensor in before)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [*SHAPES, (2, 1, 256, 16)])
def test_what_the_materialised_form_keeps_is_what_the_allocator_counts(
    sizes: tuple[int, int, int, int], dtype: str, is_causal: bool
) -> None:
    shape = shape_of(sizes, is_causal=is_causal, dtype=dtype)
    found = kept_after_forward(Pass(reference.attention, shape, dtype))
    assert 0 <= found - sum(kept_for_backward(shape).values()) <= SCALARS


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [*SHAPES, (2, 1, 256, 16)])
def test_what_flashattention_keeps_is_what_the_allocator_counts(
    sizes: tuple[int, int, int, int], dtype: str, is_causal: bool
) -> None:
    shape = shape_of(sizes, is_causal=is_causal, dtype=dtype)
    found = kept_after_forward(Pass(flash.attention, shape, dtype))
    assert found == sum(kept_by_flash(shape).values())


def test_nothing_is_listed_that_takes_no_memory() -> None:
    assert "causal mask" in kept_for_backward(shape_of((1, 1, 8, 4), is_causal=True))
    assert "causal mask" not in kept_for_backward(shape_of((1, 1, 8, 4)))


def published_memory() -> list[tuple[int, int, str]]:
    """Head dimension, length, and the published MiB as they are printed."""
    path = Store.default().published / "reference" / "attention_eager_h100.csv"
    rows = pd.read_csv(path, dtype=str)
    return [(int(row.d_model), int(row.seq_len), row.memory_after_forward_mib) for row in rows.itertuples()]


def test_all_published_shapes_are_compared() -> None:
    assert len(published_memory()) == 20


@pytest.mark.parametrize(("head_dim", "seq_len", "printed"), published_memory())
def test_what_is_kept_is_what_was_published_to_the_last_digit(head_dim: int, seq_len: int, printed: str) -> None:
    shape = AttentionShape(8, 1, seq_len, head_dim, is_causal=True)
    # The matrix library's workspace; and the scalar takes one block of CUDA's allocator, which is of 512 bytes.
    found = sum(kept_for_backward(shape).values()) + 64 * MIB + 512
    assert f"{found / MIB:.6g}" == printed


PEAK_SHAPE = (2, 1, 512, 16)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_the_materialised_form_is_the_allocators(dtype: str, is_causal: bool) -> None:
    shape = shape_of(PEAK_SHAPE, is_causal=is_causal, dtype=dtype)
    run = Pass(reference.attention, shape, dtype)
    run.both()
    forward, _ = allocated_bytes(run.forward, "cpu")
    run.output = None
    both, _ = allocated_bytes(run.both, "cpu")
    assert forward == pytest.approx(materialised_peak(shape, "forward"), rel=0.02)
    assert both == pytest.approx(materialised_peak(shape, "forward-backward"), rel=0.02)


@pytest.mark.slow
def test_the_peak_of_the_compiled_materialised_form_is_the_allocators() -> None:
    """In a fresh process: the checks of shapes that tests put around the reference are not for the compiler."""
    program = """
import json
import torch
from cs336_systems.attention.backends import resolve_attention
from cs336_systems.bench.allocator import allocated_bytes

q, k, v, grad = (torch.randn(2, 1, 512, 16) for _ in range(4))
leaves = [x.requires_grad_() for x in (q, k, v)]
attention = resolve_attention("reference+compile")
kept = []
forward = lambda: kept.append(attention(*leaves, is_causal=True))
both = lambda: attention(*leaves, is_causal=True).backward(grad)
both()
print(json.dumps([allocated_bytes(forward, "cpu")[0], (kept.clear(), allocated_bytes(both, "cpu")[0])[1]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    shape = shape_of(PEAK_SHAPE, is_causal=True)
    expected = [materialised_peak(shape, phase, compiled=True) for phase in ("forward", "forward-backward")]
    assert json.loads(done.stdout) == pytest.approx(expected, rel=0.02)
    eager = [materialised_peak(shape, phase) for phase in ("forward", "forward-backward")]
    assert all(one < other for one, other in zip(expected, eager, strict=True))


# Names ---------------------------------------------------------------------------------------------------------


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(UserError, match=message):
        yield


def test_an_unknown_phase_is_an_error_that_lists_the_known() -> None:
    shape = shape_of((1, 1, 8, 4))
    calls = [
        partial(checked_phase, "forwards"),
        *(
            partial(each, shape, "forwards")
            for each in (least_work, counted_flops, materialised_traffic, traffic_by_part, materialised_peak)
        ),
        partial(intensity, shape, "forwards", materialised=True),
    ]
    for call in calls:
        with refused("unknown phase 'forwards': did you mean 'forward'.*forward, .*forward-backward"):
            call()
    assert [checked_phase(phase) for phase in PHASES] == list(PHASES)


def test_a_peak_of_backward_alone_is_an_error_since_forward_comes_before_it() -> None:
    with refused("unknown phase 'backward'.*forward, forward-backward"):
        materialised_peak(shape_of((1, 1, 8, 4)), "backward")

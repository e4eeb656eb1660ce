"""FlashAttention-2 in PyTorch: equal to float64 with every intermediate stored, and linear in memory."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from float64_attention import Results, float64_attention, largest_error, materialised_errors
from torch import Tensor

from cs336_systems.attention.flash import TILE, FlashAttention, attention
from cs336_systems.attention.inputs import ALIGNMENTS, Alignment, diagonal
from cs336_systems.attention.recompute import recomputed_backward

pytestmark = [pytest.mark.problem("flash_forward"), pytest.mark.problem("flash_backward")]

MASKS: list[tuple[bool, Alignment]] = [(False, "top-left"), *((True, alignment) for alignment in ALIGNMENTS)]
every_mask = pytest.mark.parametrize(("is_causal", "alignment"), MASKS, ids=["no mask", *ALIGNMENTS])
# Below, at, above and no multiple of a tile; fewer and more queries than keys.
LENGTHS = [(1, 1), (15, 15), (127, 127), (128, 128), (129, 129), (300, 300), (1, 300), (300, 1), (15, 129), (300, 130)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_inputs(
    num_queries: int,
    num_keys: int,
    *,
    heads: tuple[int, int] | None = (2, 2),
    dims: tuple[int, int] = (8, 8),
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and the gradient of the output; without heads in three dimensions."""
    leading = [(batch,) if heads is None else (batch, count) for count in heads or (1, 1)]
    return (
        drawn(*leading[0], num_queries, dims[0], dtype=dtype, seed=1),
        drawn(*leading[1], num_keys, dims[0], dtype=dtype, seed=2),
        drawn(*leading[1], num_keys, dims[1], dtype=dtype, seed=3),
        drawn(*leading[0], num_queries, dims[1], dtype=dtype, seed=4),
    )


def saved_logsumexp(output: Tensor) -> Tensor:
    """The one saved tensor of one number per query."""
    assert output.grad_fn is not None
    saved: Any = output.grad_fn
    (found,) = [x for x in saved.saved_tensors if x.shape == output.shape[:-1]]
    return found


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    is_causal: bool = False,
    alignment: Alignment = "top-left",
) -> Results:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = FlashAttention.apply(*leaves, is_causal, alignment)
    return Results(output.detach(), saved_logsumexp(output), *torch.autograd.grad(output, leaves, grad_output))


def assert_equals_float64(inputs: tuple[Tensor, ...], is_causal: bool, alignment: Alignment) -> None:
    query, key, value, grad_output = inputs
    found = flash(query, key, value, grad_output, is_causal, alignment)
    expected = float64_attention(query, key, value, grad_output, diagonal(query, key, is_causal, alignment))
    for name, result, of in zip(Results._fields, found, expected, strict=True):
        torch.testing.assert_close(
            result, of, rtol=1e-11, atol=1e-12, msg=f"{name} differs by {largest_error(result, of)}"
        )


@pytest.mark.parametrize(("num_queries", "num_keys"), LENGTHS)
@every_mask
def test_output_logsumexp_and_gradients_equal_float64(
    num_queries: int, num_keys: int, is_causal: bool, alignment: Alignment
) -> None:
    assert_equals_float64(draw_inputs(num_queries, num_keys), is_causal, alignment)


@pytest.mark.parametrize("heads", [None, (1, 1), (4, 2), (6, 1), (6, 2)], ids=str)
@every_mask
def test_inputs_may_have_no_heads_or_share_keys_among_them(
    heads: tuple[int, int] | None, is_causal: bool, alignment: Alignment
) -> None:
    assert_equals_float64(draw_inputs(140, 150, heads=heads), is_causal, alignment)


@pytest.mark.parametrize("dims", [(1, 1), (6, 3), (3, 20)], ids=str)
@every_mask
def test_values_may_be_of_another_width_than_keys(dims: tuple[int, int], is_causal: bool, alignment: Alignment) -> None:
    assert_equals_float64(draw_inputs(140, 150, heads=(4, 2), dims=dims), is_causal, alignment)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads after the length": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension first": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "a part of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
    "one for the whole batch": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_may_lie_in_memory_as_they_like(layout: str) -> None:
    query, key, value, grad_output = (LAYOUTS[layout](x) for x in draw_inputs(140, 150, heads=(4, 2)))
    assert not query.is_contiguous()
    assert_equals_float64((query, key, value, grad_output), True, "lower-right")


def test_the_form_that_the_model_calls_is_the_same() -> None:
    query, key, value, _ = draw_inputs(20, 20)
    for is_causal in (False, True):
        found = attention(query, key, value, is_causal=is_causal)
        assert torch.equal(found, FlashAttention.apply(query, key, value, is_causal))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 3), (2, 4), (4, 2)])
@every_mask
def test_gradients_equal_finite_differences(
    num_queries: int, num_keys: int, is_causal: bool, alignment: Alignment
) -> None:
    inputs = draw_inputs(num_queries, num_keys, heads=(2, 1), dims=(3, 2), batch=1)[:3]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: FlashAttention.apply(*x, is_causal, alignment), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 15), (129, 129), (300, 130), (130, 300)])
@every_mask
def test_lower_precisions_err_no_more_than_with_every_intermediate_stored(
    dtype: torch.dtype, num_queries: int, num_keys: int, is_causal: bool, alignment: Alignment
) -> None:
    inputs = draw_inputs(num_queries, num_keys, heads=(2, 1), dims=(32, 32), batch=1, dtype=dtype)
    offset = diagonal(*inputs[:2], is_causal, alignment)
    found = flash(*inputs, is_causal, alignment)
    expected = float64_attention(*inputs, offset)
    errors = materialised_errors(*inputs, offset)
    for name, error in errors.items():
        result = getattr(found, name)
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(getattr(expected, name).abs().max().clamp_min(1))
        assert largest_error(result, getattr(expected, name)) <= 2 * error + 8 * rounding, name
    # Kept in single precision whatever the inputs are.
    torch.testing.assert_close(found.logsumexp, expected.logsumexp.float(), rtol=1e-5, atol=1e-5)


def test_one_saved_tensor_has_a_number_per_query_and_it_is_the_logsumexp() -> None:
    query, key, value, grad_output = draw_inputs(150, 140, heads=None)
    output = FlashAttention.apply(query.requires_grad_(), key, value, True)
    assert output.grad_fn is not None
    saved = [x for x in output.grad_fn.saved_tensors if x.shape == (2, 150)]
    assert len(saved) == 1
    torch.testing.assert_close(saved[0], float64_attention(query, key, value, grad_output, 0).logsumexp)


@every_mask
def test_an_item_of_the_batch_and_a_head_do_not_touch_the_others(is_causal: bool, alignment: Alignment) -> None:
    inputs = draw_inputs(140, 150, heads=(4, 2), batch=3)
    before = flash(*inputs, is_causal, alignment)
    query, key, value, grad_output = (x.clone() for x in inputs)
    for x in (query, key, value, grad_output):
        x[1] *= -3
    after = flash(query, key, value, grad_output, is_causal, alignment)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[::2], new[::2])
        assert not torch.equal(old[1], new[1])
    query, key, value, grad_output = (x.clone() for x in inputs)
    # The second key head and the queries that share it.
    for x in (query, key, value, grad_output):
        x[:, x.shape[1] // 2 :] *= -3
    after = flash(query, key, value, grad_output, is_causal, alignment)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(*(x[:, : x.shape[1] // 2] for x in (old, new)))
        assert not torch.equal(*(x[:, x.shape[1] // 2 :] for x in (old, new)))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(300, 130), (300, 1), (129, 1), (20, 7)])
def test_rows_without_a_visible_key_give_nothing_and_take_no_gradient(num_queries: int, num_keys: int) -> None:
    found = flash(*draw_inputs(num_queries, num_keys, heads=(4, 2)), True, "lower-right")
    hidden = num_queries - num_keys
    assert (found.output[..., :hidden, :] == 0).all()
    assert (found.logsumexp[..., :hidden] == -math.inf).all()
    assert (found.grad_query[..., :hidden, :] == 0).all()
    assert found.logsumexp[..., hidden:].isfinite().all()
    assert not any(x.isnan().any() for x in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_keys_and_values_may_hold_anything_finite(dtype: torch.dtype) -> None:
    # In the tile of the diagonal and beyond it.
    query, key, value, grad_output = draw_inputs(150, 400, dtype=dtype)
    before = flash(query, key, value, grad_output, True)
    key[..., 150:, :] = 1e9
    value[..., 150:, :] = -1e9
    after = flash(query, key, value, grad_output, True)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    for grad in (after.grad_key, after.grad_value):
        assert (grad[..., 150:, :] == 0).all()


def test_huge_scores_do_not_overflow() -> None:
    # The largest grows from tile to tile, so that every tile rescales what came before.
    key = torch.linspace(-1e4, 1e4, 3 * TILE)[None, :, None]
    value = torch.arange(3.0 * TILE)[None, :, None]
    query = torch.tensor([[[100.0], [-100.0]]])
    assert FlashAttention.apply(query, key, value).flatten().tolist() == [3 * TILE - 1, 0]


# Memory ----------------------------------------------------------------------------------------------------------


def allocations(work: Callable[[], object], trace: Path) -> list[int]:
    """Bytes of each tensor allocated (positive) and freed (negative), in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    profile.export_chrome_trace(str(trace))
    del kept
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def test_memory_grows_linearly_with_length_forward_and_backward(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"forward": [], "backward": []}
    for length in (512, 1024, 2048):
        query, key, value, grad_output = draw_inputs(length, length, heads=None, batch=1, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        output = FlashAttention.apply(*leaves, True)
        for name, work in (
            ("forward", lambda leaves=leaves: FlashAttention.apply(*leaves, True)),
            (
                "backward",
                lambda leaves=leaves, output=output, grad=grad_output: torch.autograd.grad(output, leaves, grad),
            ),
        ):
            changes = allocations(work, tmp_path / "trace.json")
            # Nothing of queries × keys, at four bytes a score.
            assert max(changes) < length * length * 4 / 4, name
            peaks[name].append(max(itertools.accumulate(changes)))
    for name, (small, middle, large) in peaks.items():
        # What a tile needs is the same at every length; what is added doubles with the length: not ×4.
        assert 1.8 < (large - middle) / (middle - small) < 2.2, (name, peaks)


# The backward without tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (15, 40), (40, 15)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@every_mask
def test_the_recomputed_backward_gives_the_same_gradients(
    num_queries: int, num_keys: int, heads: tuple[int, int], is_causal: bool, alignment: Alignment
) -> None:
    inputs = draw_inputs(num_queries, num_keys, heads=heads, dims=(6, 5))
    offset = diagonal(*inputs[:2], is_causal, alignment)
    expected = float64_attention(*inputs, offset)
    found = recomputed_backward(*inputs[:3], expected.output, expected.logsumexp, inputs[3], offset)
    tiled = flash(*inputs, is_causal, alignment)
    for grad, exact, of_tiles in zip(found, expected[2:], tiled[2:], strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grad, of_tiles, rtol=1e-11, atol=1e-12)


def test_a_gradient_of_a_gradient_is_refused_instead_of_wrong() -> None:
    inputs = [torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    direction = torch.ones(1, 3, 2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(FlashAttention.apply(*inputs), inputs[0], direction, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()

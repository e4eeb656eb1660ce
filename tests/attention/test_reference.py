"""The oracle itself: equal to attention in explicit loops, with exact gradients and the promised mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.reference import attention, causal_mask, scaled_dot_product_attention, softmax

# (queries, keys): as many, fewer and more queries than keys, and a single one of either.
LENGTHS = [(5, 5), (3, 6), (6, 3), (1, 4), (4, 1)]
every_length = pytest.mark.parametrize(("num_queries", "num_keys"), LENGTHS)
causal_or_not = pytest.mark.parametrize("is_causal", [True, False])


def random_inputs(
    num_queries: int, num_keys: int, *, batch: int = 2, heads: int = 3, head_dim: int = 4, value_dim: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)

    def draw(length: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64)

    return draw(num_queries, head_dim), draw(num_keys, head_dim), draw(num_keys, value_dim)


def loop_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """One query at a time in Python's own floats: weights proportional to exp(q·k / √d), over the keys it sees."""
    output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            keys, values = key[b, h].tolist(), value[b, h].tolist()
            for i, q in enumerate(query[b, h].tolist()):
                seen = range(min(i + 1, len(keys)) if is_causal else len(keys))
                weights = [
                    math.exp(math.fsum(a * b for a, b in zip(q, keys[j], strict=True)) / math.sqrt(len(q)))
                    for j in seen
                ]
                for c in range(value.shape[-1]):
                    mixed = math.fsum(weight * values[j][c] for weight, j in zip(weights, seen, strict=True))
                    output[b, h, i, c] = mixed / math.fsum(weights)
    return output


@every_length
@causal_or_not
def test_attention_equals_explicit_loops(num_queries: int, num_keys: int, is_causal: bool) -> None:
    query, key, value = random_inputs(num_queries, num_keys)
    found = attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(found, loop_attention(query, key, value, is_causal), rtol=1e-12, atol=1e-14)


def test_values_may_be_of_another_width_than_keys() -> None:
    query, key, value = random_inputs(4, 5, head_dim=6, value_dim=3)
    found = attention(query, key, value, is_causal=True)
    assert found.shape == (2, 3, 4, 3)
    torch.testing.assert_close(found, loop_attention(query, key, value, True), rtol=1e-12, atol=1e-14)


def test_leading_dimensions_may_be_any_or_none() -> None:
    query, key, value = random_inputs(4, 5)
    expected = loop_attention(query, key, value, False)
    torch.testing.assert_close(
        scaled_dot_product_attention(query[0, 0], key[0, 0], value[0, 0]), expected[0, 0], rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        scaled_dot_product_attention(query[None], key[None], value[None]), expected[None], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 3), (2, 4), (4, 2)])
@causal_or_not
def test_gradients_equal_finite_differences(num_queries: int, num_keys: int, is_causal: bool) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(num_queries, num_keys, batch=1, heads=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, is_causal=is_causal), inputs)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_is_positive_and_sums_to_one_along_its_dimension(dim: int) -> None:
    x = 5 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = softmax(x, dim)
    assert (found > 0).all()
    sums = found.sum(dim)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-14, atol=0)
    # Ratios are those of the exponentials, which with the sum determines every entry.
    first, second = x.select(dim, 0), x.select(dim, 1)
    torch.testing.assert_close(found.select(dim, 0) / found.select(dim, 1), (first - second).exp(), rtol=1e-12, atol=0)


def test_softmax_does_not_change_under_a_shift_however_large() -> None:
    # Small integers and powers of two, so that the shifted inputs are exact.
    x = torch.tensor([[1.0, 2.0, -3.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    for shift in (-(2.0**40), -1.0, 3.0, 2.0**40):
        assert torch.equal(softmax(x + shift, -1), softmax(x, -1))


def test_softmax_of_huge_inputs_is_finite() -> None:
    assert softmax(torch.tensor([1e4, 0.0, -1e4, 1e4]), 0).tolist() == [0.5, 0.0, 0.0, 0.5]


@causal_or_not
def test_moving_every_key_by_the_same_vector_changes_nothing(is_causal: bool) -> None:
    query, key, value = random_inputs(5, 5)
    moved = key + torch.tensor([3.0, -2.0, 0.5, 7.0], dtype=torch.float64)
    torch.testing.assert_close(
        attention(query, moved, value, is_causal=is_causal),
        attention(query, key, value, is_causal=is_causal),
        rtol=1e-11,
        atol=1e-13,
    )


@every_length
def test_the_causal_mask_is_aligned_at_the_top_left(num_queries: int, num_keys: int) -> None:
    found = causal_mask(num_queries, num_keys, torch.device("cpu"))
    assert found.dtype == torch.bool
    assert found[0, 0].tolist() == [[key <= query for key in range(num_keys)] for query in range(num_queries)]


def test_masked_keys_and_values_are_never_seen_whatever_they_hold() -> None:
    query, key, value = random_inputs(3, 6)
    expected = attention(query, key, value, is_causal=True)
    key[:, :, 3:] = 1e6
    value[:, :, 3:] = -1e6
    assert torch.equal(attention(query, key, value, is_causal=True), expected)


def test_any_mask_can_be_given() -> None:
    query, key, value = random_inputs(4, 4)
    # With one visible key per query, the output is that key's value.
    only = torch.tensor([2, 0, 3, 1])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[torch.arange(4), only] = True
    found = scaled_dot_product_attention(query, key, value, mask.expand(2, 3, 4, 4))
    assert torch.equal(found, value[:, :, only])


def test_scores_of_ten_thousand_do_not_overflow_in_single_precision() -> None:
    query = torch.full((1, 1, 2, 1), 100.0)
    key = torch.tensor([[[[100.0], [-100.0]]]])
    value = torch.tensor([[[[1.0], [2.0]]]])
    assert attention(query, key, value, is_causal=False).flatten().tolist() == [1.0, 1.0]

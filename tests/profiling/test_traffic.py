"""Traffic of operators is what their shapes say, products apart, and views move nothing."""

from __future__ import annotations

import pytest
import torch

from cs336_systems.analysis.attention import AttentionShape, materialised_traffic
from cs336_systems.attention.reference import attention
from cs336_systems.profiling.traffic import Traffic, operator_traffic

pytestmark = pytest.mark.problem("torch_compile")

SIZE = 4 * 8 * 8
"""Bytes of a matrix below."""


def matrix() -> torch.Tensor:
    return torch.ones(8, 8)


def test_an_elementwise_operator_reads_its_inputs_and_writes_its_output() -> None:
    one, other = matrix(), matrix()
    assert operator_traffic(lambda: one + other) == Traffic(0, 3 * SIZE, 1)
    assert operator_traffic(lambda: one.exp()) == Traffic(0, 2 * SIZE, 1)
    assert operator_traffic(lambda: one.exp().exp()) == Traffic(0, 4 * SIZE, 2)


def test_products_are_counted_apart() -> None:
    one, other = matrix(), matrix()
    assert operator_traffic(lambda: one @ other) == Traffic(3 * SIZE, 0, 0)


def test_views_and_what_is_only_allocated_move_nothing() -> None:
    one = matrix()
    views = (
        lambda: one.T,
        lambda: one[2:],
        lambda: one.reshape(4, 16),
        lambda: torch.empty(8, 8),
        lambda: one.detach(),
    )
    assert {operator_traffic(view) for view in views} == {Traffic(0, 0, 0)}


def test_an_operator_in_place_reads_and_writes_what_it_changes() -> None:
    one, other = matrix(), matrix()
    assert operator_traffic(lambda: one.add_(other)) == Traffic(0, 3 * SIZE, 1)


def test_an_expanded_tensor_is_read_once() -> None:
    row, one = torch.ones(1, 8), matrix()
    assert operator_traffic(lambda: row.expand(8, 8) + one) == Traffic(0, 2 * SIZE + SIZE // 8, 1)


def test_backward_is_counted_as_it_runs() -> None:
    one = matrix().requires_grad_()
    forward = operator_traffic(lambda: one.exp().sum())
    both = operator_traffic(lambda: one.exp().sum().backward())
    assert both.other_bytes > forward.other_bytes
    assert both.product_bytes == 0


def test_of_attention_it_agrees_with_the_accounting_by_shape() -> None:
    shape = AttentionShape(batch_size=2, heads=2, seq_len=256, head_dim=8, is_causal=True)
    tensors = [torch.randn(2, 2, 256, 8) for _ in range(3)]
    found = operator_traffic(lambda: attention(*tensors, is_causal=True))
    total = found.product_bytes + found.other_bytes
    assert total == pytest.approx(materialised_traffic(shape, "forward"), rel=0.1)

"""What an operator is counted to launch, compute and move is what its tensors say, with or without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.analysis.operators import VIEW, Call, Operator, Trace, fake_tensors, fused, trace

pytestmark = pytest.mark.problem("benchmarking_script")

ROWS, COLUMNS = 6, 10
MATRIX = ROWS * COLUMNS * 4


def made() -> Tensor:
    return torch.ones(ROWS, COLUMNS)


def only(step: Callable[[], object]) -> Operator:
    """The one operator of a step that launches anything."""
    found = [call.operator for call in trace(step).calls if call.operator.name != VIEW]
    assert len(found) == 1, found
    return found[0]


def moved(step: Callable[[], object]) -> tuple[int, int, int]:
    operator = only(step)
    return operator.read_bytes, operator.written_bytes, operator.launches


def everything(_: Call) -> bool:
    return True


def nothing(_: Call) -> bool:
    return False


def launched(traced: Trace) -> int:
    return sum(call.operator.launches for call in traced.calls)


def test_a_product_has_two_flops_for_each_multiplication_and_reads_and_writes_every_matrix_once() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    product = only(lambda: a @ b)
    assert product.flops == 2 * 3 * 5 * 7
    assert (product.read_bytes, product.written_bytes) == (4 * (3 * 5 + 5 * 7), 4 * 3 * 7)
    assert product.precision == "float32"


def test_a_products_precision_is_that_of_its_factors() -> None:
    a = torch.ones(3, 3, dtype=torch.bfloat16)
    assert only(lambda: a @ a).precision == "bfloat16"
    assert only(lambda: a * a).precision == ""


def test_a_tensor_that_goes_in_twice_is_read_once_and_two_views_of_it_are_two() -> None:
    x = made()
    assert moved(lambda: x * x) == (MATRIX, MATRIX, 1)
    assert moved(lambda: x[:, 0::2] * x[:, 1::2]) == (MATRIX, MATRIX // 2, 1)


def test_a_broadcast_tensor_has_the_bytes_that_it_has_in_memory() -> None:
    x, row = made(), torch.ones(COLUMNS)
    assert moved(lambda: x + row) == (MATRIX + 4 * COLUMNS, MATRIX, 1)
    assert moved(lambda: x + row.expand(ROWS, COLUMNS)) == (MATRIX + 4 * COLUMNS, MATRIX, 1)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.view(-1),
        lambda x: x.transpose(0, 1)[1:],
        lambda x: x.expand(3, ROWS, COLUMNS),
        lambda x: torch.empty_like(x),
        lambda x: x.detach(),
    ],
)
def test_views_and_allocations_launch_nothing_but_take_the_host_its_step(step: Callable[[Tensor], object]) -> None:
    x = made()
    calls = [call.operator for call in trace(lambda: step(x)).calls]
    assert calls
    assert all((each.launches, each.bytes, each.flops, each.host_steps) == (0, 0, 0, 1) for each in calls)


def test_work_in_place_reads_what_it_changes_and_filling_does_not() -> None:
    x, y = made(), made()
    assert moved(lambda: x.add_(y)) == (2 * MATRIX, MATRIX, 1)
    assert moved(lambda: x.mul_(2.0)) == (MATRIX, MATRIX, 1)
    assert moved(lambda: x.zero_()) == (0, MATRIX, 1)
    assert moved(lambda: x.copy_(y)) == (MATRIX, MATRIX, 1)


def test_a_lookup_reads_what_it_finds_and_not_its_table() -> None:
    table, places = torch.ones(1000, COLUMNS), torch.zeros(ROWS, dtype=torch.int64)
    assert moved(lambda: table[places]) == (MATRIX + 8 * ROWS, MATRIX, 1)


def test_a_scatter_that_copies_first_is_two_launches_and_in_backward_it_works_in_place() -> None:
    table, places = torch.ones(100, COLUMNS, requires_grad=True), torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    source = made()
    alone = only(lambda: table.detach().scatter(0, places, source))
    assert (alone.launches, alone.written_bytes) == (2, 4 * 100 * COLUMNS + MATRIX)
    with fake_tensors():
        fake = torch.ones(100, COLUMNS, requires_grad=True)
        gathered = fake.gather(0, torch.zeros(ROWS, COLUMNS, dtype=torch.int64)).sum()
        back = trace(gathered.backward).calls
    scattered = next(call.operator for call in back if call.operator.name == "scatter_add")
    assert (scattered.launches, scattered.written_bytes) == (1, MATRIX)


def test_what_autograd_records_takes_the_host_two_steps_and_what_backward_calls_one() -> None:
    x = made().requires_grad_()
    assert only(lambda: x * 2.0).host_steps == 2
    with torch.no_grad():
        assert only(lambda: x * 2.0).host_steps == 1
    assert only(lambda: x.detach() * 2.0).host_steps == 1
    loss, gradient = (x * x).sum(), torch.ones(())
    assert {call.operator.host_steps for call in trace(lambda: loss.backward(gradient)).calls} == {1}


def layer(x: Tensor, weight: Tensor) -> Tensor:
    hidden = (x @ weight).sigmoid() * 2.0
    return (hidden / hidden.sum(dim=-1, keepdim=True)) @ weight


def test_without_data_the_same_is_counted_as_with_it() -> None:
    def counted() -> Counter[Operator]:
        x, weight = torch.ones(8, 4), torch.ones(4, 4, requires_grad=True)

        def step() -> None:
            weight.grad = None
            layer(x, weight).sum().backward()

        step()
        return trace(step).operators

    with fake_tensors():
        without_data = counted()
    assert without_data == counted()


def test_the_flops_are_those_of_pytorchs_own_counter() -> None:
    x, weight = torch.ones(8, 4), torch.ones(4, 4, requires_grad=True)

    def step() -> None:
        layer(x, weight).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    traced = trace(step)
    assert sum(call.operator.flops for call in traced.calls) == counter.get_total_flops()


def test_a_chain_between_two_products_is_one_kernel_that_moves_its_ends() -> None:
    x, weight = torch.ones(8, 4), torch.ones(4, 4)
    eager = trace(lambda: layer(x, weight))
    compiled = fused(eager, everything)
    assert [call.operator.name for call in compiled.calls] == ["mm", "fused", "mm"]
    assert (compiled.calls[1].operator.read_bytes, compiled.calls[1].operator.written_bytes) == (4 * 32, 4 * 32)
    assert sum(call.operator.flops for call in compiled.calls) == sum(call.operator.flops for call in eager.calls)


def test_what_a_kernel_makes_and_somebody_keeps_is_written() -> None:
    x = made()

    def step() -> tuple[Tensor, Tensor]:
        halved = x * 0.5
        return halved, halved + 1.0

    assert [call.operator.written_bytes for call in fused(trace(step), everything).calls] == [2 * MATRIX]
    dropped = fused(trace(lambda: step()[1]), everything)
    assert [call.operator.written_bytes for call in dropped.calls] == [MATRIX]


def test_where_nothing_is_compiled_nothing_changes() -> None:
    x, weight = torch.ones(8, 4), torch.ones(4, 4)
    eager = trace(lambda: layer(x, weight))
    assert fused(eager, nothing) == eager
    assert launched(fused(eager, everything)) < launched(eager)

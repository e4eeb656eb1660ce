"""The backward of each block shows as a range, in the order in which gradients arrive, and changes no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs336_systems.model import SIZES, build_model
from cs336_systems.profiling import backward_ranges
from cs336_systems.profiling.backward_ranges import record_backward_ranges


class Model(nn.Module):
    """Blocks one after the other, as in anybody's Transformer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def spans_of(profile: torch.profiler.profile) -> dict[str, tuple[float, float]]:
    """Start and end of each range of a block's backward."""
    found = [event for event in profile.events() if event.name.startswith("backward of block")]
    assert len({event.name for event in found}) == len(found)
    return {event.name: (event.time_range.start, event.time_range.end) for event in found}


def test_blocks_show_from_the_last_to_the_first_and_none_overlaps_another() -> None:
    model = Model(3)
    x = torch.randn(2, 8, requires_grad=True)
    with profiled() as profile, record_backward_ranges(model.layers):
        model(x).sum().backward()
    spans = spans_of(profile)
    assert sorted(spans, key=lambda name: spans[name][0]) == [f"backward of block {index}" for index in (2, 1, 0)]
    for later, earlier in ((1, 2), (0, 1)):
        assert spans[f"backward of block {later}"][0] >= spans[f"backward of block {earlier}"][1]


def test_all_of_a_blocks_gradients_are_made_within_its_range() -> None:
    model = Model(3)
    with profiled() as profile, record_backward_ranges(model.layers):
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    spans = spans_of(profile)
    products = [event for event in profile.events() if event.name == "aten::mm" and _in_backward(event)]
    # Of each linear layer the gradient of its weight and of its input.
    for start, end in spans.values():
        assert sum(start <= event.time_range.start <= event.time_range.end <= end for event in products) == 2
    assert len(products) == 6


def _in_backward(event: Any) -> bool:
    while event is not None:
        if "evaluate_function" in event.name:
            return True
        event = event.cpu_parent
    return False


def test_gradients_are_the_same_with_and_without_the_ranges() -> None:
    torch.manual_seed(1)
    model = build_model(SIZES["tiny"])
    tokens = torch.randint(SIZES["tiny"].vocab_size, (1, 16))
    model(tokens).square().mean().backward()
    without = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert isinstance(model.layers, nn.ModuleList)
    with record_backward_ranges(model.layers):
        model(tokens).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), without, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_nothing_is_left_on_the_blocks_afterwards_nor_any_range_open_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    closed: list[str] = []

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            opened.append(self.name)

        def __exit__(self, *_: object) -> None:
            closed.append(self.name)

    monkeypatch.setattr(backward_ranges, "recorded_range", Range)
    model = Model(2)

    def fail(_: Tensor) -> None:
        raise RuntimeError("in the middle of the backward")

    x = torch.randn(2, 8, requires_grad=True)
    with record_backward_ranges(model.layers):
        hidden = model.layers[0](x)
        hidden.register_hook(fail)
        loss = model.layers[1](hidden).sum()
        with pytest.raises(RuntimeError, match="in the middle"):
            loss.backward()
    assert opened == closed == ["backward of block 1", "backward of block 0"][: len(opened)]
    assert opened
    before = len(opened)
    model(x).sum().backward()
    assert len(opened) == before

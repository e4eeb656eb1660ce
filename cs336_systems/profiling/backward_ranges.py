"""Named ranges for the backward of each block, which has no code of its own to put them in.

    with record_backward_ranges(model.layers):
        loss.backward()   # shows as backward of block 11, backward of block 10, …

A block's backward begins when the gradient of its output is there, and ends when that of its input is. Blocks follow
one another on one tensor, so where the next one begins the one before has ended. Hooks stand on the activations, not on
the modules: a module's full backward hook would put a node of its own into the graph.

Source: torch.Tensor.register_hook.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from cs336_systems.profiling.ranges import recorded_range


@contextlib.contextmanager
def record_backward_ranges(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """For what is forwarded within, the backward of the n-th block is a range called `backward of block n`."""
    marks = _Marks()
    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(partial(marks.before, index)))
        handles.append(block.register_forward_hook(partial(marks.after, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        marks.close()


class _Marks:
    """Which block's backward is open."""

    def __init__(self) -> None:
        self._open: tuple[int, int, contextlib.ExitStack] | None = None

    def before(self, index: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        for found in inputs[:1]:
            if isinstance(found, Tensor) and found.requires_grad:
                found.register_hook(partial(self._end, index))

    def after(self, index: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._begin, index))

    def _begin(self, index: int, _: Tensor) -> None:
        self.close()
        opened = contextlib.ExitStack()
        opened.enter_context(recorded_range(f"backward of block {index}"))
        self._open = (index, threading.get_ident(), opened)

    def _end(self, index: int, _: Tensor) -> None:
        if self._open is not None and self._open[0] == index:
            self.close()

    def close(self) -> None:
        """End the range that is open. One of another thread is not ended here: ranges are a stack of their thread."""
        if self._open is not None and self._open[1] == threading.get_ident():
            self._open[2].close()
        self._open = None

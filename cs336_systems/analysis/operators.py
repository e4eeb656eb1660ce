"""What a step calls, operator by operator: FLOPs, bytes and the host's share, counted without doing the work.

    with fake_tensors():
        step = build()          # anything that can be called: parameters and inputs have shapes and no data
        step()                  # what only the first step does, as an optimizer's state
        operators = trace(step).operators

A dispatch mode sees every operator that reaches a kernel, those of backward and of the optimizer as well. Under
PyTorch's fake tensors an operator computes shapes and nothing else, so that a step of GPT-2 XL takes seconds and no
memory. What is counted of an operator:

- launches: one; none where it only makes a view, allocates or changes metadata. A functional scatter fills or copies
  its output before it writes into it: two.
- FLOPs: those of PyTorch's own counter, `torch.utils.flop_counter`: of products, none of all others.
- bytes read and written: of every distinct tensor that goes in and comes out, as if the caches held nothing between
  two operators. A broadcast tensor has the bytes that it has in memory, since its other elements are the same ones; of
  a table that is looked up, what is looked up counts.
- steps of the host: one, views included; two where autograd records the operator, which passes the dispatcher twice
  and makes a node of the graph. On small tensors of a CPU, recorded operators take 1.5 to 1.9 times as long. What
  backward and the optimizer call is not recorded.

The order and the tensors are kept, for `fused` to say what a compiler need not move. Exact for what PyTorch does in
eager mode: how a library splits a product, how an L2 cache serves the next operator, is not known here.

Source: Ivanov et al. 2021, "Data movement is all you need", section 3 (bytes per operator, and what fusion leaves);
PyTorch's `TorchDispatchMode`, `FakeTensorMode` and notes on autograd mechanics; what autograd does in place:
torch/csrc/autograd/FunctionsManual.cpp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cs336_systems.profiling.ranges import record_ranges

_ALLOCATE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"})
_LOOK_UP = frozenset({"index", "embedding", "gather", "index_select"})
"""Read of their table what they return."""
_FILL_FIRST = frozenset({"slice_backward", "select_backward"})
"""Fill their output with zeros, and copy their input into a part of it."""
_SCATTER = frozenset({"scatter", "scatter_add", "index_put", "index_add", "index_copy"})
"""Copy their first input, and write into a part of the copy; in backward autograd has them write into the first input
itself, unless it is a subclass of Tensor as fake ones are."""
_ONLY_WRITE = frozenset({"fill_", "zero_", "copy_", "uniform_", "normal_"})
"""Change their first input without reading it."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """One kind of call. Two calls are of one kind if all of this is the same."""

    name: str
    """Without namespace and overload: `bmm`. Of what a compiler fuses, `fused`; of what launches nothing, `view`."""
    flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    precision: str = ""
    """The dtype of the factors of a product; empty for what is none."""
    launches: int = 1
    host_steps: int = 1

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


VIEW = "view"
"""The name of what launches nothing."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor as an operator sees it: its storage, by a number of the trace, and how much of it."""

    storage: int
    view: tuple[Any, ...]
    """Offset, shape and strides: two views of one storage are read apart, the same view once."""
    itemsize: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator at its place in a trace."""

    operator: Operator
    ranges: tuple[str, ...]
    """The named ranges that were open, the outermost first."""
    reads: tuple[Piece, ...]
    writes: tuple[Piece, ...]

    @property
    def is_product(self) -> bool:
        return self.operator.flops > 0


@dataclasses.dataclass(frozen=True)
class Trace:
    """The operators of one step in their order."""

    calls: tuple[Call, ...]
    kept: frozenset[int]
    """The storages that outlive the step: its outputs, gradients, parameters and state."""

    @property
    def operators(self) -> Counter[Operator]:
        """How often each kind was called."""
        return Counter(call.operator for call in self.calls)


def fake_tensors() -> contextlib.AbstractContextManager[object]:
    """Meanwhile tensors that are made have shapes and no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def trace(step: Callable[[], object]) -> Trace:
    """Run `step` once, on real tensors or within `fake_tensors`, and write down what it launches.

    A step that has something to set up is to be run once before.
    """
    with record_ranges(), _Recorder() as recorder:
        result = step()
        kept = recorder.alive()  # while the result is
    del result
    return Trace(tuple(recorder.calls), kept)


class _Recorder(TorchDispatchMode):
    """Notes every operator that reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._ranges: list[str] = []
        # A weak reference keeps the address of a storage from being used again, not its bytes.
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}

    def alive(self) -> frozenset[int]:
        return frozenset(number for number, storage in self._storages.values() if not storage.expired())

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        name = function._overloadpacket.__name__
        if function.namespace == "profiler":
            self._follow(name, arguments)
        elif function.namespace != "prim":
            self._note(name, function, arguments, options, result)
        return result

    def _follow(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A named range is opened or closed by an operator of its own."""
        if name == "_record_function_enter_new":
            self._ranges.append(str(arguments[0]))
        elif name == "_record_function_exit":
            self._ranges.pop()

    def _note(self, name: str, function: Any, arguments: Any, options: Any, result: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        changed = _changed(function, arguments, options)
        reads, returned = self._pieces(inputs), self._pieces(outputs)
        known = {piece.storage for piece in reads}
        # What comes out in the storage of something that went in is a view, unless the operator writes into it.
        writes = self._pieces(changed) + [piece for piece in returned if piece.storage not in known]
        is_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        host_steps = 2 if is_recorded else 1
        if not writes or name in _ALLOCATE:
            view = Operator(VIEW, launches=0, host_steps=host_steps)
            self.calls.append(Call(view, tuple(self._ranges), (), ()))
            return
        reads, writes, launches = _traffic(name, reads, writes)
        flops, precision = 0, ""
        if function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*arguments, **options, out_val=result)
            precision = str(inputs[0].dtype).removeprefix("torch.")
        read_bytes, written_bytes = (sum(piece.bytes for piece in pieces) for pieces in (reads, writes))
        operator = Operator(name, flops, read_bytes, written_bytes, precision, launches, host_steps)
        self.calls.append(Call(operator, tuple(self._ranges), tuple(reads), tuple(writes)))

    def _pieces(self, tensors: Iterable[Tensor]) -> list[Piece]:
        """The distinct ones."""
        return list(dict.fromkeys(self._piece(tensor) for tensor in tensors))

    def _piece(self, tensor: Tensor) -> Piece:
        storage = tensor.untyped_storage()
        number, _ = self._storages.setdefault(storage._cdata, (len(self._storages), StorageWeakRef(storage)))
        shape, strides = tuple(tensor.shape), tensor.stride()
        # Along a stride of zero every element is the same one.
        elements = math.prod(size for size, stride in zip(shape, strides, strict=True) if stride)
        return Piece(number, (tensor.storage_offset(), shape, strides), tensor.itemsize, elements * tensor.itemsize)


def _traffic(name: str, reads: list[Piece], writes: list[Piece]) -> tuple[list[Piece], list[Piece], int]:
    """What an operator reads and writes of the tensors that go in and come out, and in how many launches."""
    if name in _ONLY_WRITE:
        return [piece for piece in reads if piece not in writes], writes, 1
    if name in _LOOK_UP:
        table, *indices = reads
        found = sum(piece.bytes for piece in writes)
        return [dataclasses.replace(table, bytes=min(table.bytes, found)), *indices], writes, 1
    if name in _FILL_FIRST:
        copied = sum(piece.bytes for piece in reads)
        return reads, [dataclasses.replace(piece, bytes=piece.bytes + copied) for piece in writes], 2
    if name in _SCATTER:
        # Into the part go as many elements as the last input has.
        part = math.prod(reads[-1].view[1]) * writes[0].itemsize
        if torch._C._current_graph_task_id() != -1:  # in backward
            return reads[1:], [dataclasses.replace(piece, bytes=part) for piece in writes], 1
        return reads, [dataclasses.replace(piece, bytes=piece.bytes + part) for piece in writes], 2
    return reads, writes, 1


def _changed(function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    """The inputs that an operator writes into, as its schema says."""
    changed = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arguments[index] if index < len(arguments) else options.get(argument.name)
            changed += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return changed


def fused(eager: Trace, is_compiled: Callable[[Call], bool]) -> Trace:
    """The trace of the same step when everything between two products is one kernel, where `is_compiled` says so.

    What such a kernel reads and writes is what comes from before it and what is needed after it; all in between stays
    on the chip. Views cost nothing: the compiler knows them. Products stay what they are, and the order too. Compiled
    code allocates the output of every kernel and launches it, two steps of the host.

    Source: Ansel et al. 2024, "PyTorch 2", section 4 (Inductor's fusion and the wrapper that it generates).
    """
    last_read: dict[int, int] = {}
    for place, call in enumerate(eager.calls):
        last_read |= dict.fromkeys((piece.storage for piece in call.reads), place)
    calls: list[Call] = []
    group: list[Call] = []

    def close(place: int) -> None:
        if group:
            calls.append(_one_kernel(group, lambda made: last_read.get(made, -1) >= place or made in eager.kept))
            group.clear()

    for place, call in enumerate(eager.calls):
        if not is_compiled(call):
            close(place)
            calls.append(call)
        elif call.is_product:
            close(place)
            calls.append(dataclasses.replace(call, operator=dataclasses.replace(call.operator, host_steps=2)))
        elif call.operator.launches:
            group.append(call)
    close(len(eager.calls))
    return Trace(tuple(calls), eager.kept)


def _one_kernel(group: Sequence[Call], is_needed: Callable[[int], bool]) -> Call:
    """The calls of `group` as one, of whose results those in the storages that are needed are written."""
    made: dict[int, Piece] = {}
    reads: dict[Piece, None] = {}
    for call in group:
        reads |= dict.fromkeys(piece for piece in call.reads if piece.storage not in made)
        made |= {piece.storage: piece for piece in call.writes}
    writes = tuple(piece for storage, piece in made.items() if is_needed(storage))
    operator = Operator(
        "fused", 0, sum(piece.bytes for piece in reads), sum(piece.bytes for piece in writes), host_steps=2
    )
    return Call(operator, group[0].ranges, tuple(reads), writes)

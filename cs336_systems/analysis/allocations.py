"""Every storage that a program makes, from its birth to its death, in order, and without the storages themselves.

    record_step(StepConfig(...)).events     # births and deaths, for an allocator to replay

    with recording() as recorded:           # the same of any program
        inputs = [torch.randn(8, 1024, 64) for _ in range(3)]
        recorded.begin({"inputs": inputs})
        output = my_attention(*inputs)

The program runs under `FakeTensorMode` on tensors that claim to be a CPU's, since fake tensors of a GPU need a build of
PyTorch for one. What a CPU and a GPU do differently is then undone:

- autocast follows CUDA's rules (`analysis/cuda_autocast.py`);
- the autograd engine adds a gradient onto one that nobody else holds, and scatters into zeros that it has just made, in
  place; subclasses such as fake tensors it gives a new tensor. An operator called by the engine itself whose first
  operand dies before the next operator begins is therefore one that works in place;
- the first matrix product of a thread makes the matrix library's handle and its workspace. Backward has a thread of its
  own for each GPU.

What a kernel allocates inside itself cannot be seen: the sort in the gradient of an embedding, a reduction's partial
results. Both are gone when the kernel ends, and small beside what is live at a peak.

Source: torch/csrc/autograd/input_buffer.cpp (can_accumulate_inplace), torch/csrc/autograd/FunctionsManual.cpp
(value_selecting_reduction_backward), aten/src/ATen/cuda/CublasHandlePool.cpp of PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd import graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cs336_systems.analysis.cuda_autocast import cuda_rules
from cs336_systems.errors import UserError, first_line
from cs336_systems.object_reference import is_object_reference
from cs336_systems.profiling.ranges import record_ranges
from cs336_systems.step import BuiltStep, StepConfig, build_step

aten = torch.ops.aten

WORKSPACE = "workspace of matrix products"
TEMPORARY = "temporaries"
SAVED = "activations"
OUTPUT = "output"
CAST = "casts of parameters"

Kinds = Mapping[str, Iterable[Tensor]]
"""Tensors by what they are."""
Device = Literal["cuda", "cpu"]


@dataclasses.dataclass(slots=True)
class Allocation:
    """One storage: how many bytes were asked for, by which operator, within which named ranges, and what it is."""

    requested_bytes: int
    operator: str
    ranges: tuple[str, ...]
    kind: str = TEMPORARY

    @property
    def is_workspace(self) -> bool:
        """Its size is the GPU's, and `requested_bytes` zero."""
        return self.kind == WORKSPACE


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Event:
    """A birth, a death, or (without an allocation) a moment that has a name."""

    allocation: Allocation | None
    is_birth: bool = False
    mark: str = ""


class Recording:
    """What a program has allocated and freed so far."""

    def __init__(self, device: Device = "cuda") -> None:
        self.events: list[Event] = []
        self._mode = _Storages(self.events, has_workspaces=device == "cuda")

    def begin(self, kinds: Kinds) -> None:
        """Forget what was until now, and start with what there is: the tensors of `kinds`, in order of their birth."""
        self._mode.keep_only(kinds)

    def mark(self, name: str) -> None:
        """Name this moment, at which a step begins."""
        self._mode.begin_step()
        self.events.append(Event(None, mark=name))

    def name(self, kinds: Kinds) -> None:
        """Say what tensors are that were born since: gradients, an optimizer's state."""
        self._mode.settle()
        self._mode.name(kinds)

    def name_rest(self, kind: str) -> None:
        """Say what everything is that is live and was not named."""
        self._mode.settle()
        self._mode.name_rest(kind)


@contextlib.contextmanager
def recording(device: Device = "cuda") -> Iterator[Recording]:
    """Meanwhile tensors are fake, and their storages recorded as they would be on `device`.

    Raises:
        UserError: the program asks what the values of a tensor are.
    """
    recorded = Recording(device)
    rules = cuda_rules() if device == "cuda" else contextlib.nullcontext()
    with rules, record_ranges(), FakeTensorMode(allow_non_fake_inputs=True), recorded._mode, _values_not_asked():
        yield recorded
        recorded._mode.settle()


@contextlib.contextmanager
def _values_not_asked() -> Iterator[None]:
    """What fake tensors say of a program that looks at values, said to its author."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"what runs depends on the values of tensors ({error}), which a plan does not have: leave out what asks "
            "for them (.item(), nonzero, boolean indexing, `if` of a tensor), or measure on a device"
        ) from error


def record_step(chosen: StepConfig, device: Device = "cuda", steps: int = 2) -> Recording:
    """A model being built and some steps of it, as `chosen` says but for its device.

    Gradients, moments and workspaces are born in the first step, so that the second is like all that follow. Of what
    building allocates only what stays is recorded, in its order.

    Raises:
        UserError: something that is chosen cannot be followed: compiled code, attention whose kernels are a GPU's, a
            model that asks for the values of tensors.
    """
    require_followed(chosen)
    with recording(device) as recorded, told_plainly(chosen):
        step = build_step(dataclasses.replace(chosen, device="cpu"))
        recorded.begin(held_by(step))
        for index in range(steps):
            recorded.mark(f"step {index}")
            output = step()
            if not chosen.has_backward:
                recorded.name_rest(SAVED if chosen.phase == "forward" else OUTPUT)
            del output
            recorded.name(held_by(step))
        recorded.mark("end")
    return recorded


@contextlib.contextmanager
def told_plainly(chosen: StepConfig) -> Iterator[None]:
    """What goes wrong on fake tensors is told as what it is: values asked for, sizes without end, others' code.

    Raises:
        UserError: any of these.
    """
    try:
        with _values_not_asked():
            yield
    except UserError:
        raise
    except Exception as error:
        if "overflow" in str(error).lower():
            raise UserError(f"{chosen}: a tensor has more bytes than can be counted; take a shorter context") from error
        names = " with ".join(chosen.object_references)
        if not names:
            raise
        raise UserError(f"{names} cannot be followed on tensors without data: {first_line(error)}") from error


def require_followed(chosen: StepConfig) -> None:
    """Raise a UserError for a choice whose allocations are decided where no fake tensor goes."""
    if chosen.compile != "none":
        raise UserError("what compiled code allocates is decided when it is compiled: plan it with compile none")
    if chosen.attention not in ("reference", "flash") and not is_object_reference(chosen.attention):
        raise UserError(
            f"what attention {chosen.attention!r} allocates is decided by its kernels on the device: plan reference, "
            "flash or your own module:function"
        )


def held_by(step: BuiltStep) -> dict[str, list[Tensor]]:
    """What a step holds between two runs, by kind."""
    parameters: list[Tensor] = list(step.model.parameters())
    state = [value for each in step.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    return {
        "parameters": parameters,
        "buffers": list(step.model.buffers()),
        "tokens": [step.batch],
        "gradients": [each.grad for each in parameters if each.grad is not None],
        "optimizer state": state,
    }


# Following storages ----------------------------------------------------------------------------------------------

_PRODUCTS = frozenset(
    {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default, aten.dot.default}
)
# Which the engine calls out of place on subclasses alone.
_IN_PLACE = frozenset(
    {
        aten.add.Tensor,
        aten.scatter.src,
        aten.scatter.value,
        aten.scatter_add.default,
        aten.index_put.default,
        aten.masked_fill.Scalar,
        aten.index_add.default,
    }
)
_ENTER, _EXIT = "profiler::_record_function_enter_new", "profiler::_record_function_exit"


class _Storages(TorchDispatchMode):
    """Sees every operator after autograd and autocast, and with it every storage that is made."""

    def __init__(self, events: list[Event], *, has_workspaces: bool) -> None:
        super().__init__()
        self.events = events
        self.live: dict[int, Allocation] = {}  # by the address of the storage
        self.successor: tuple[Allocation, Allocation] | None = None  # an operand, and what perhaps takes its place
        self.ranges: list[str] = []
        # Which threads have their handle of the matrix library: forward's (False), backward's (True).
        self.handles: set[bool] = set() if has_workspaces else {False, True}
        self.is_saved_named = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.settle()
        name = func._schema.name
        if name == _ENTER:
            self.ranges.append(str(args[0]))
        elif name == _EXIT and self.ranges:
            self.ranges.pop()
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self.is_saved_named:
            self.is_saved_named = True
            self.name_rest(SAVED)
        if func in _PRODUCTS and in_backward not in self.handles:
            self.handles.add(in_backward)
            self.events.append(Event(Allocation(0, name, tuple(self.ranges), WORKSPACE), is_birth=True))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or self.allocation_of(tensor) is not None:
                continue
            made = self.follow(tensor, name)
            if func is aten._to_copy.default and _kind(self.allocation_of(args[0])) == "parameters":
                made.kind = CAST
            if in_backward and func in _IN_PLACE and _is_called_by_engine():
                operand = self.allocation_of(args[0])
                self.successor = None if operand is None else (operand, made)
        return result

    def follow(self, tensor: Tensor, operator: str) -> Allocation:
        """Record the birth of a tensor's storage, and its death when it comes."""
        storage = tensor.untyped_storage()
        allocation = self.live[storage._cdata] = Allocation(storage.nbytes(), operator, tuple(self.ranges))
        self.events.append(Event(allocation, is_birth=True))
        weakref.finalize(storage, self.die, storage._cdata).atexit = False
        return allocation

    def die(self, address: int) -> None:
        allocation = self.live.pop(address, None)
        if allocation is not None:
            self.events.append(Event(allocation))

    def allocation_of(self, tensor: Tensor) -> Allocation | None:
        return self.live.get(tensor.untyped_storage()._cdata)

    def settle(self) -> None:
        """If an operand has died since the operator before, that operator worked in place: the operand lives on."""
        if self.successor is None:
            return
        (old, new), self.successor = self.successor, None
        since = len(self.events) - 1
        while self.events[since].allocation is not new:
            since -= 1
        died = next((i for i in range(since + 1, len(self.events)) if self.events[i].allocation is old), None)
        if died is None:
            return
        del self.events[died], self.events[since]
        for address in [address for address, allocation in self.live.items() if allocation is new]:
            self.live[address] = old

    def begin_step(self) -> None:
        self.settle()
        self.is_saved_named = False

    def keep_only(self, kinds: Kinds) -> None:
        self.successor = None
        self.name(kinds)
        kept = {id(self.allocation_of(each)) for tensors in kinds.values() for each in tensors}
        self.events[:] = [event for event in self.events if event.is_birth and id(event.allocation) in kept]
        self.live = {address: each for address, each in self.live.items() if id(each) in kept}

    def name(self, kinds: Kinds) -> None:
        for kind, tensors in kinds.items():
            for tensor in tensors:
                (self.allocation_of(tensor) or self.follow(tensor, "")).kind = kind

    def name_rest(self, kind: str) -> None:
        for allocation in self.live.values():
            if allocation.kind == TEMPORARY:
                allocation.kind = kind


def _kind(allocation: Allocation | None) -> str:
    return "" if allocation is None else allocation.kind


def _is_called_by_engine() -> bool:
    """Whether no function in Python is between autograd's engine and the operator that is being dispatched."""
    frame: FrameType | None = sys._getframe(2)  # of whoever called __torch_dispatch__
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(("torch._dynamo", "torch._compile")):
        frame = frame.f_back
    return frame is not None and frame.f_code is graph._engine_run_backward.__code__

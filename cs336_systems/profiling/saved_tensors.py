"""What a call keeps for its backward, asked of autograd itself: every tensor that it saves, with the line it is of.

    saved = record_saved(lambda: block(x), module=block, inputs=[x])
    saved.total_bytes("activation", "input"), saved.largest(5)

Autograd hands every tensor that an operator saves to a hook, on any device and for anybody's code. Several operators
may save one tensor, or views of it: each storage counts once, in full, where it was saved first. What code hides from
autograd is not seen: a tensor that a custom function keeps as a plain attribute, or Python's own references; nor are
numbers of Python's, which autograd keeps as tensors of 8 bytes in the CPU's memory and shows to no hook.

Source: PyTorch's tutorial "Hooks for autograd saved tensors"; CS336 assignment 2, memory_profiling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cs336_systems.errors import UserError, unknown_name
from cs336_systems.profiling.stacks import Frame, Stack, place_of, user_frames

Kind = Literal["activation", "input", "parameter", "cast of a parameter", "buffer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_THE_CALL: tuple[Kind, ...] = ("activation", "input")
"""What depends on the batch: not the parameters, nor what is made of them alone."""

AUTOCAST = ("none", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """One storage that is kept for backward."""

    bytes: int
    """Of the storage, of which the tensor may be a part."""
    shape: tuple[int, ...]
    """As it was saved first."""
    dtype: str
    kind: Kind
    place: str
    """The line of the user's code that saved it first."""
    trace: Stack
    """The frames of the user's code within the call, from the innermost out."""
    operators: tuple[str, ...]
    """The nodes of the graph that hold it, such as `ExpBackward0`; those of a call that ran its own backward do not."""
    times: int
    """How often it was saved."""


@dataclasses.dataclass(frozen=True)
class SavedGroup:
    """Storages that are alike: of one line, shape and precision."""

    count: int
    total_bytes: int
    bytes: int | None
    """Of each; None where they differ, as storages may of which only a part was saved."""
    shape: tuple[int, ...]
    dtype: str
    place: str
    trace: Stack
    """Where they share it: the frames of the user's code from the innermost out."""
    operators: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SavedTensors:
    """What a call keeps, in the order in which it was saved."""

    tensors: tuple[SavedTensor, ...]

    def of(self, *kinds: Kind) -> tuple[SavedTensor, ...]:
        """Those of some kinds; of all, without one.

        Raises:
            UserError: an unknown kind.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kind", kind, KINDS)
        return tuple(tensor for tensor in self.tensors if tensor.kind in (kinds or KINDS))

    def total_bytes(self, *kinds: Kind) -> int:
        """Bytes of some kinds; of all, without one."""
        return sum(tensor.bytes for tensor in self.of(*kinds))

    def largest(self, count: int | None = None, *kinds: Kind) -> tuple[SavedGroup, ...]:
        """What is alike together, the most bytes first; of the kinds that depend on the batch, unless others are named.

        The first `count` groups; all of them, without one.
        """
        alike: defaultdict[object, list[SavedTensor]] = defaultdict(list)
        for tensor in self.of(*(kinds or OF_THE_CALL)):
            alike[tensor.place, tensor.shape, tensor.dtype].append(tensor)
        groups = sorted(map(_group, alike.values()), key=lambda group: -group.total_bytes)
        return tuple(groups[:count])


def _group(members: list[SavedTensor]) -> SavedGroup:
    first, sizes, traces = members[0], {member.bytes for member in members}, {member.trace for member in members}
    return SavedGroup(
        count=len(members),
        total_bytes=sum(member.bytes for member in members),
        bytes=sizes.pop() if len(sizes) == 1 else None,
        shape=first.shape,
        dtype=first.dtype,
        place=first.place,
        trace=traces.pop() if len(traces) == 1 else (),
        operators=tuple(dict.fromkeys(name for member in members for name in member.operators)),
    )


def record_saved(
    call: Callable[[], object], *, module: nn.Module | None = None, inputs: Iterable[Tensor] = ()
) -> SavedTensors:
    """Run `call` once and list what autograd saves in it.

    A parameter is told by its type; `module` tells which tensors are buffers, `inputs` which were there before.
    """
    recorder = _Recorder(
        {
            **{_storage(tensor): "input" for tensor in inputs},
            **{_storage(tensor): "buffer" for tensor in (module.buffers() if module else ())},
            **{_storage(tensor): "parameter" for tensor in (module.parameters() if module else ())},
        }
    )
    try:
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack):
            output = call()
        recorder.find_operators(output)
        return SavedTensors(tuple(map(recorder.describe, recorder.saved.values())))
    finally:
        recorder.saved.clear()  # a graph that the call has put aside holds the hooks, and these the recorder


def saved_by_middle_block(
    model: nn.Module, batch_size: int, seq_len: int, d_model: int, *, autocast: str = "none"
) -> SavedTensors:
    """What the middle one of a model's blocks keeps when it runs on a random activation (batch, seq, d_model).

    The activation needs a gradient, and has the precision and the device of the block's parameters.

    Raises:
        UserError: the model has no list of `layers`, its blocks have no parameters or take other arguments, or autocast
            is unknown.
    """
    if autocast not in AUTOCAST:
        raise unknown_name("autocast", autocast, AUTOCAST)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, (nn.ModuleList, nn.Sequential)) or not len(layers):
        found = "none" if layers is None else repr(layers).partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} must have its blocks in a torch.nn.ModuleList called layers, found {found}: call "
            "record_saved on one of its blocks"
        )
    block = layers[len(layers) // 2]
    weight = next((p for p in block.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise UserError(f"{type(block).__name__} must have a parameter, of whose precision its input is: found none")
    try:
        inspect.signature(block.forward).bind(weight)
    except TypeError as error:
        raise UserError(
            f"{type(block).__name__} must take one activation (batch, seq, d_model): {error}; call record_saved on it"
        ) from error
    x = torch.randn(batch_size, seq_len, d_model, device=weight.device, dtype=weight.dtype, requires_grad=True)

    def call() -> object:
        if autocast == "none":
            return block(x)
        with torch.autocast(weight.device.type, dtype=getattr(torch, autocast)):
            return block(x)

    return record_saved(call, module=block, inputs=[x])


# Recording -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Saved:
    """One storage. The tensor is held, so that no later storage is taken for it."""

    tensor: Tensor
    kind: Kind
    stack: Stack
    times: int = 0
    operators: dict[str, None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """What autograd holds in place of the tensor."""

    tensor: Tensor
    storage: int


class _Recorder:
    """The two hooks, and what they saw, by storage."""

    def __init__(self, known: dict[int, Kind]) -> None:
        self.known = known
        self.saved: dict[int, _Saved] = {}
        self.unpacked: list[int] = []

    def pack(self, tensor: Tensor) -> _Packed:
        storage = _storage(tensor)
        detached = tensor.detach()  # a result hangs on the node that saves it, which would never be freed
        if storage not in self.saved:
            self.saved[storage] = _Saved(detached, self.known.get(storage) or _kind_of(tensor), _stack())
        self.saved[storage].times += 1
        return _Packed(detached, storage)

    def unpack(self, packed: _Packed) -> Tensor:
        self.unpacked.append(packed.storage)
        return packed.tensor

    def find_operators(self, output: object) -> None:
        """Ask every node that the output hangs on for what it saved."""
        for node in _nodes(output):
            self.unpacked.clear()
            for name in _saved_attributes(node):
                # One whose backward has run has nothing left.
                with contextlib.suppress(RuntimeError):
                    getattr(node, name)
            for storage in self.unpacked:
                self.saved[storage].operators[node.name()] = None

    def describe(self, saved: _Saved) -> SavedTensor:
        return SavedTensor(
            bytes=saved.tensor.untyped_storage().nbytes(),
            shape=tuple(saved.tensor.shape),
            dtype=str(saved.tensor.dtype).removeprefix("torch."),
            kind=saved.kind,
            place=place_of(saved.stack),
            trace=user_frames(saved.stack),
            operators=tuple(saved.operators),
            times=saved.times,
        )


def _storage(tensor: Tensor) -> int:
    """Tells a storage from any other that lives; its address in memory is no good for one without data."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _kind_of(tensor: Tensor) -> Kind:
    base: Any = tensor._base if tensor._is_view() else tensor
    if isinstance(base, nn.Parameter):
        return "parameter"
    return "cast of a parameter" if _is_cast_of_a_parameter(tensor) else "activation"


def _is_cast_of_a_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is one parameter in another precision: made of it alone, by operators that save nothing."""
    node: Any = tensor.grad_fn
    while node is not None:
        if hasattr(node, "variable"):
            leaf = node.variable
            is_parameter = isinstance(leaf, nn.Parameter)
            return is_parameter and leaf.numel() == tensor.numel() and leaf.dtype != tensor.dtype
        inputs = [function for function, _ in node.next_functions if function is not None]
        node = inputs[0] if len(inputs) == 1 and not _saved_attributes(node) else None
    return False


def _stack() -> Stack:
    """What is running within the call that is recorded, or around it if that runs no line of the user's."""
    frame: FrameType | None = sys._getframe(2)
    stack: list[Frame] = []
    while frame is not None:
        if frame.f_code is record_saved.__code__ and user_frames(tuple(stack)):
            break
        if frame.f_code.co_filename != __file__:
            stack.append(Frame(frame.f_code.co_name, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(stack)


def _nodes(output: object) -> Iterator[Any]:
    """The nodes of the graph that tensors among `output` hang on."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
            yield node


def _saved_attributes(node: Any) -> tuple[str, ...]:
    """The attributes of a node that are the tensors it saved: PyTorch's own, or a custom function's."""
    raw = [name.removeprefix("_raw") for name in dir(node) if name.startswith("_raw_saved_")]
    return tuple("saved_tensors" if name == "_saved_tensors" else name for name in raw)

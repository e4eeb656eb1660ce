"""Stack traces of allocations: which line of the user's code made one, and what one call of a block leaves behind.

A snapshot's stack has Python's frames and, where they were recorded, C++'s, from the innermost out; a trace's has
operators and named ranges among Python's. The line that an allocation is put down to is the innermost Python frame
outside of installed packages, of the standard library and of generated code; failing that, outside of PyTorch; failing
that, any Python frame. The backward pass has no Python frames of its own: there it is the innermost node of the graph
by name, with the line of the forward pass where that is known. Failing that too, it is the innermost named range and
the operator within it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

UNKNOWN = "(no stack trace)"

OPERATOR, RANGE = "(operator)", "(range)"
"""Stand for the file of a frame that has none: of an operator of PyTorch's, of a named range."""

_INSTALLED = re.compile(
    r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib[/\\]python3[^/\\]*[/\\]|torchinductor_|^<(?:frozen|string|eval_with_key)"
)
_TORCH = re.compile(r"[/\\](?:torch|triton)[/\\]")
_NODE = re.compile(r"\b(\w+Backward\w*|AccumulateGrad)\b")
_MAKES_MEMORY = re.compile(r"aten::(empty|new_empty|resize_)")


class Frame(NamedTuple):
    """One function call on a stack."""

    name: str
    filename: str
    line: int

    def __str__(self) -> str:
        """`file:line function`, the file without its folders; where there is no file, the name alone."""
        return self.name if self.has_no_file else f"{short_name(self.filename)}:{self.line} {self.name}"

    @property
    def with_folders(self) -> str:
        """The same with the whole path of the file."""
        return self.name if self.has_no_file else f"{self.filename}:{self.line} {self.name}"

    @property
    def has_no_file(self) -> bool:
        """Whether this is an operator or a named range."""
        return self.filename in (OPERATOR, RANGE)


Stack = tuple[Frame, ...]
"""From the innermost frame out."""


def short_name(filename: str) -> str:
    """A file without its folders.

    >>> short_name("/project/package/model.py")
    'model.py'
    """
    return re.split(r"[/\\]", filename)[-1]


def is_python(frame: Frame) -> bool:
    """Whether a frame is Python's; C++ has no file or one of its own."""
    return frame.filename.endswith(".py") or frame.filename.startswith("<")


@lru_cache(maxsize=2**16)
def is_users(frame: Frame) -> bool:
    """Whether a frame is Python's and outside of installed packages, the standard library and generated code."""
    return is_python(frame) and not _INSTALLED.search(frame.filename)


def user_frames(stack: Stack) -> Stack:
    """The frames of the user's own code, from the innermost out."""
    return tuple(filter(is_users, stack))


def operator_of(stack: Stack) -> str | None:
    """The operator that an allocation was made in, if its innermost frames are operators.

    One that only makes memory (`aten::empty`) is passed over for the one that it makes it for.
    """
    operators = [frame.name for frame in takewhile(lambda frame: frame.filename == OPERATOR, stack)]
    return next((name for name in operators if not _MAKES_MEMORY.match(name)), operators[0] if operators else None)


def place_of(stack: Stack, forward: Stack = ()) -> str:
    """The line that an allocation is put down to.

    `forward` is where the operator was called whose gradient the innermost node of the graph computes, if known.
    """
    if not stack:
        return UNKNOWN
    if mine := next(filter(is_users, stack), None):
        return str(mine)
    if python := [frame for frame in stack if is_python(frame)]:
        return str(next((frame for frame in python if not _TORCH.search(frame.filename)), python[0]))
    functions = [frame.name for frame in stack if frame.filename != RANGE]
    for name in functions:
        if node := _NODE.search(name):
            line = next(filter(is_users, forward), None) or _range_of(forward)
            return f"autograd: {node[1]} of {line}" if line else f"autograd: {node[1]}"
    if any("autograd" in name for name in functions):
        return "autograd engine"
    return ": ".join(filter(None, (_range_of(stack), operator_of(stack)))) or "(C++ alone)"


def _range_of(stack: Stack) -> str | None:
    """The innermost named range, of a stack without Python's frames."""
    if any(map(is_python, stack)):
        return None
    return next((frame.name for frame in stack if frame.filename == RANGE), None)


def matches(stack: Stack, text: str) -> bool:
    """Whether a frame's `path:line function` has `text` in it, or an operator's or range's name."""
    return any(text in frame.with_folders for frame in stack)


# One call of a block -------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What one call of a function that is called again and again leaves allocated."""

    function: str
    """`file function`, with the line that it begins at where calls are known."""
    called_from: str
    calls: int
    alike: int
    """How many of the calls left the same."""
    allocations: tuple[int, ...]
    """One such call's, in the order given."""


def saved_by_one_block(
    stacks: Sequence[Stack], sizes: Sequence[int], calls: Sequence[Sequence[int]] | None = None
) -> Saved | None:
    """The outermost function that one line calls again and again, each call leaving the same allocations.

    `stacks` are the user's frames of allocations, from the innermost out, in the order of the allocations' birth, and
    `calls`, where they are known, numbers for the frames that are another for each call. Without them a stack does not
    tell one call from the next, but time does: within one call the function's own line goes forward, and where it goes
    back a new call has begun. So a Transformer's block is found whose forward has several lines that leave something;
    one written in a single line, or with a loop inside, is not. With them a frame's line is where its function begins.
    """
    # From the outermost frame in: allocations that share the way so far, which ends at the frame given.
    ways: list[tuple[Frame | None, list[int]]] = [(None, list(range(len(stacks))))]
    depth = 0
    while ways:
        depth += 1
        found: list[Saved] = []
        deeper: list[tuple[Frame | None, list[int]]] = []
        for caller, members in ways:
            inside = [index for index in members if len(stacks[index]) >= depth]
            by_function: defaultdict[Frame, list[int]] = defaultdict(list)
            by_frame: defaultdict[Frame, list[int]] = defaultdict(list)
            for index in inside:
                frame = stacks[index][-depth]
                by_function[frame if calls is not None else frame._replace(line=0)].append(index)
                by_frame[frame].append(index)
            deeper += [(frame, sharing) for frame, sharing in by_frame.items() if len(sharing) > 1]
            if caller is not None:
                repeated = (_repeated(caller, stacks, sizes, calls, called, depth) for called in by_function.values())
                found += [saved for saved in repeated if saved is not None]
        if found:
            return max(found, key=lambda saved: saved.alike * sum(sizes[index] for index in saved.allocations))
        ways = deeper
    return None


def _repeated(
    caller: Frame,
    stacks: Sequence[Stack],
    sizes: Sequence[int],
    known_calls: Sequence[Sequence[int]] | None,
    members: list[int],
    depth: int,
) -> Saved | None:
    """The calls of a function that made `members`, if at least two of them left the same."""
    if known_calls is None:
        calls = _told_apart_by_line(stacks, members, depth)
    else:
        by_call: defaultdict[int, list[int]] = defaultdict(list)
        for index in members:
            by_call[known_calls[index][-depth]].append(index)
        calls = list(by_call.values())
    kinds = [tuple(sorted((sizes[index], stacks[index]) for index in call)) for call in calls]
    kind, alike = Counter(kinds).most_common(1)[0]
    if alike < 2:
        return None
    function = stacks[members[0]][-depth]
    return Saved(
        function=str(function) if known_calls is not None else f"{short_name(function.filename)} {function.name}",
        called_from=str(caller),
        calls=len(calls),
        alike=alike,
        allocations=tuple(calls[kinds.index(kind)]),
    )


def _told_apart_by_line(stacks: Sequence[Stack], members: list[int], depth: int) -> list[list[int]]:
    calls: list[list[int]] = []
    before = None
    for index in members:
        line = stacks[index][-depth].line
        if before is None or line < before:
            calls.append([])
        calls[-1].append(index)
        before = line
    return calls

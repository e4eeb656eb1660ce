"""A pickle of plain data, read without trust and in little memory.

A pickle is a program for a small stack machine, and can name any function to be called. This reader knows the
instructions that make lists, tuples, dictionaries, numbers and strings, and none besides: a class or a call is refused
where it is met, before anything is imported. A `pickle.Unpickler` whose `find_class` refuses would be as safe, but
holds all that it has read: a memory snapshot takes three to seven times its file. This one hands each dictionary to
`convert` when it is complete, and keeps only what that makes of it. What is held is bounded by a multiple of the file,
so that a small file cannot fill the memory either.

Source: the comments of the standard library's pickletools.py, which describe every instruction.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cs336_systems.errors import UserError

HELD_PER_BYTE, HELD_AT_LEAST = 3, 2**26
"""What may be held at a time, by a rough count of bytes: this many times the file, and this much of a small one."""
_PAUSE_EVERY = 2**23
_BOMB = "is a pickle that would grow to many times its size: no memory snapshot does"

# A list of nothing but references, such as a stack trace whose frames were all met before, in one match.
_REFERENCES = re.compile(rb"\](?:\x94|q.|r.{4})\(((?:h.|j.{4})++)e", re.DOTALL)
_REFERENCE = re.compile(rb"h(.)|j(.{4})", re.DOTALL)

_CALLS = {
    **dict.fromkeys(b"R\x81\x92bio", "a call"),
    **dict.fromkeys(b"PQ", "an object kept outside of the file"),
    **dict.fromkeys(b"\x82\x83\x84", "a registered class"),
}


class References(bytes):
    """A list that has only references, as it stands in the file: equal lists are one object, decoded when needed."""

    def indices(self) -> list[int]:
        """Which objects of the memo the list has."""
        return [ord(short) if short else struct.unpack("<I", long)[0] for short, long in _REFERENCE.findall(self)]


class _NotPlain(Exception):
    """Why this is no pickle of plain data."""


def load_plain(path: Path, convert: Callable[[dict[Any, Any]], Any]) -> tuple[Any, list[Any]]:
    """What the pickle in `path` holds, and its memo, which its `References` refer to.

    `convert` is given every finished dictionary of several entries: what it returns takes the dictionary's place,
    unless that is None.

    Raises:
        UserError: the file cannot be read, is no whole pickle, or has anything but plain data in it.
    """
    reached = 0
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            machine = _Machine(content, convert)
            try:
                value = machine.run()
            finally:
                reached = machine.position
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _NotPlain as error:
        raise UserError(f"{path} {error}") from error
    except (IndexError, struct.error, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is truncated or damaged: its pickle breaks off at byte {reached:,}") from error
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: a memory snapshot was expected") from error
        raise UserError(f"{path} is damaged: its pickle makes no sense at byte {reached:,}") from error
    return value, machine.memo


class _Machine:
    """The stack machine: `stack`, the places marked on it, and the `memo` of what later instructions refer to."""

    def __init__(self, content: mmap.mmap, convert: Callable[[dict[Any, Any]], Any]) -> None:
        self.content = content
        self.convert = convert
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        # Of each mark: how high the stack was, and how long the memo, whose last entry is then what is being filled.
        self.marks: list[tuple[int, int]] = []
        self.held = 0
        self.limit = max(HELD_AT_LEAST, HELD_PER_BYTE * len(content))
        self.references: dict[bytes, References] = {}

    def run(self) -> Any:
        """Run the program to its end, and return what it leaves."""
        content, stack, memo, marks = self.content, self.stack, self.memo, self.marks
        if content[0] != 0x80 or not 2 <= content[1] <= 5:
            raise _NotPlain("is not a pickle (protocol 2 to 5): torch.cuda.memory._dump_snapshot writes such a file")
        # What breaks off within a number is found at the next instruction, which lies beyond the end.
        position = 2
        while True:
            pause = position + _PAUSE_EVERY
            while position < pause:
                self.position = position
                op = content[position]
                position += 1
                if op == 0x68:  # BINGET
                    stack.append(memo[content[position]])
                    position += 1
                elif op == 0x94:  # MEMOIZE
                    memo.append(stack[-1])
                elif op == 0x4B:  # BININT1
                    stack.append(content[position])
                    position += 1
                elif op == 0x6A:  # LONG_BINGET
                    stack.append(memo[int.from_bytes(content[position : position + 4], "little")])
                    position += 4
                elif op == 0x8A:  # LONG1
                    size = content[position]
                    position += 1 + size
                    stack.append(int.from_bytes(content[position - size : position], "little", signed=True))
                elif op == 0x28:  # MARK
                    marks.append((len(stack), len(memo)))
                elif op == 0x7D:  # EMPTY_DICT
                    self.hold(64)
                    stack.append({})
                elif op == 0x75:  # SETITEMS
                    self.set_items()
                elif op == 0x4A:  # BININT
                    position += 4
                    stack.append(int.from_bytes(content[position - 4 : position], "little", signed=True))
                elif op == 0x4D:  # BININT2
                    position += 2
                    stack.append(int.from_bytes(content[position - 2 : position], "little"))
                elif op == 0x5D:  # EMPTY_LIST
                    found = _REFERENCES.match(content, position - 1)
                    # A list that goes on after its first thousand entries is read entry by entry.
                    if found and content[found.end()] not in b"(a":
                        position = self.refer(found)
                    else:
                        self.hold(64)
                        stack.append([])
                elif op == 0x65:  # APPENDS
                    self.append(self.since_mark()[0])
                elif op == 0x95:  # FRAME
                    position += 8
                elif op == 0x2E:  # STOP
                    (value,) = stack
                    return value
                else:
                    position = self.rare(op, position)
            self.pause()

    def taken(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, all of them."""
        taken = self.content[start : start + size]
        if len(taken) < size:
            raise IndexError
        return taken

    def pause(self) -> None:
        """Look at what has grown, and let go of the pages that were read: the file has them."""
        if 8 * (len(self.stack) + len(self.memo)) + 72 * len(self.marks) > self.limit:
            raise _NotPlain(_BOMB)
        if hasattr(mmap, "MADV_DONTNEED"):
            self.content.madvise(mmap.MADV_DONTNEED)

    def hold(self, size: int) -> None:
        """Count what is made; a list takes one byte of a file and sixty of memory."""
        self.held += size
        if self.held > self.limit:
            raise _NotPlain(_BOMB)

    def since_mark(self) -> tuple[list[Any], int]:
        """The values since the last mark, taken from the stack, and how long the memo was then."""
        height, memoized = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values, memoized

    def refer(self, found: re.Match[bytes]) -> int:
        """Push a list that has only references; returns where it ends."""
        raw = found[1]
        known = self.references.get(raw)
        if known is None:
            known = self.references[raw] = References(raw)
            self.hold(100 + 2 * len(raw))
        self.stack.append(known)
        put = self.content[found.start() + 1]
        if put == 0x94:
            self.memo.append(known)
        else:
            width = 1 if put == ord("q") else 4
            self.put(int.from_bytes(self.taken(found.start() + 2, width), "little"))
        return found.end()

    def put(self, index: int) -> None:
        """Remember the top of the stack; picklers count without gaps, and a gap could be as large as memory."""
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            raise _NotPlain(f"is damaged: the pickle's memo jumps to {index:,} at byte {self.position:,}")

    def set_items(self) -> None:
        """Fill the dictionary on the stack, and let `convert` have it."""
        values, memoized = self.since_mark()
        made = self.stack[-1]
        if type(made) is not dict or len(values) % 2:
            raise ValueError
        made.update(zip(values[::2], values[1::2], strict=True))
        kept = self.convert(made)
        if kept is None:
            self.hold(75 * len(values))
            return
        self.held -= 64
        self.stack[-1] = kept
        # So that the memo does not hold on to the dictionary.
        if memoized and self.memo[memoized - 1] is made:
            self.memo[memoized - 1] = kept

    def append(self, values: list[Any]) -> None:
        made = self.stack[-1]
        if type(made) is not list:
            raise ValueError
        self.hold(40 * len(values))
        made.extend(values)

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.hold(64 + 40 * size)
        values = tuple(self.stack[len(self.stack) - size :])
        self.stack[len(self.stack) - size :] = [values]

    def text(self, position: int, width: int) -> int:
        """Push the string whose length stands at `position` in `width` bytes; returns where it ends."""
        size = int.from_bytes(self.taken(position, width), "little")
        self.hold(56 + size)
        self.stack.append(str(self.taken(position + width, size), "utf-8", "surrogatepass"))
        return position + width + size

    def rare(self, op: int, position: int) -> int:
        """The instructions that a snapshot has few of; returns where the next one stands."""
        stack = self.stack
        if op in _TEXT:
            return self.text(position, _TEXT[op])
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
            self.push_tuple(op - 0x84)
        elif op == 0x74:  # TUPLE
            values, _ = self.since_mark()
            stack += values
            self.push_tuple(len(values))
        elif op == 0x61:  # APPEND
            self.append([stack.pop()])
        elif op == 0x73:  # SETITEM
            self.hold(150)
            value, key = stack.pop(), stack.pop()
            if type(stack[-1]) is not dict:
                raise ValueError
            stack[-1][key] = value
        elif op == 0x47:  # BINFLOAT
            stack.append(struct.unpack(">d", self.taken(position, 8))[0])
            return position + 8
        elif op == 0x71:  # BINPUT
            self.put(self.content[position])
            return position + 1
        elif op == 0x72:  # LONG_BINPUT
            self.put(int.from_bytes(self.taken(position, 4), "little"))
            return position + 4
        else:
            self.refuse(op, position)
        return position

    def refuse(self, op: int, position: int) -> None:
        """Say what a pickle of plain data does not have."""
        named: object = None
        if op == 0x63:  # GLOBAL
            line = self.content[position : position + 400].split(b"\n")[:2]
            named = ".".join(part.decode("utf-8", "replace") for part in line)
        elif op == 0x93:  # STACK_GLOBAL
            named = ".".join(map(str, self.stack[-2:]))
        elif op in _CALLS:
            named = _CALLS[op]
        if named is None:
            raise _NotPlain(
                f"is damaged or no pickle of plain data: unknown instruction {op:#04x} at byte {position - 1:,}"
            )
        raise _NotPlain(
            f"is refused: its pickle names {str(named)[:200]!r}, and loading a class or calling a function can run any "
            "code; a memory snapshot holds only lists, dictionaries, numbers and strings"
        )


_TEXT = {0x8C: 1, 0x58: 4, 0x8D: 8}  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}

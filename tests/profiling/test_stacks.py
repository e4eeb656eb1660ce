"""The line an allocation is put down to, and what one call of a block leaves."""

from __future__ import annotations

import pytest

from cs336_systems.profiling.stacks import UNKNOWN, Frame, Stack, matches, place_of, saved_by_one_block

NATIVE = Frame("at::native::empty_cuda", "??", 0)
TORCH = Frame("linear", "/venv/lib/python3.11/site-packages/torch/nn/functional.py", 9)
EINOPS = Frame("rearrange", "/venv/lib/python3.11/site-packages/einops/einops.py", 5)
GENERATED = Frame("op1", "<string>", 3)
STANDARD = Frame("__exit__", "/usr/lib/python3.11/contextlib.py", 141)
MINE = Frame("forward", "/project/model.py", 43)
CALLER = Frame("main", "/project/train.py", 7)


@pytest.mark.parametrize(
    ("stack", "place"),
    [
        ((NATIVE, TORCH, NATIVE, MINE, CALLER), "model.py:43 forward"),
        ((NATIVE, GENERATED, EINOPS, STANDARD, CALLER), "train.py:7 main"),
        ((NATIVE, TORCH, EINOPS), "einops.py:5 rearrange"),
        ((NATIVE, TORCH), "functional.py:9 linear"),
        ((NATIVE, Frame("torch::autograd::generated::MmBackward0::apply(...)", "??", 0)), "autograd: MmBackward0"),
        ((NATIVE, Frame("torch::autograd::Engine::thread_main()", "??", 0)), "autograd engine"),
        ((NATIVE,), "(C++ alone)"),
        ((), UNKNOWN),
        ((Frame("step", r"C:\work\train.py", 3),), "train.py:3 step"),
    ],
)
def test_an_allocation_is_put_down_to_the_innermost_line_that_its_user_wrote(stack: Stack, place: str) -> None:
    assert place_of(stack) == place


def test_a_stack_matches_by_path_or_line_or_function() -> None:
    stack = (NATIVE, TORCH, MINE)
    assert [matches(stack, text) for text in ("model.py:43", "/project/", "forward", "linear", "train")] == [
        *(True, True, True, True),
        False,
    ]


# One call of a block -------------------------------------------------------------------------------------------


def within(*lines: tuple[str, int]) -> Stack:
    """A stack from the outermost call in, all in one file."""
    return tuple(Frame(name, "/project/model.py", line) for name, line in reversed(lines))


def of_block(line: int, *inner: tuple[str, int]) -> Stack:
    return within(("main", 1), ("model", 20), ("block", line), *inner)


def calls_of_a_block(count: int) -> list[tuple[Stack, int]]:
    each = [(of_block(30, ("norm", 5)), 10), (of_block(31, ("attention", 50)), 40), (of_block(32), 10)]
    before, after = (within(("main", 1), ("model", 19), ("embed", 3)), 99), (within(("main", 1), ("model", 22)), 77)
    return [before, *(each * count), after]


def test_the_block_is_the_outermost_function_that_is_called_again_and_leaves_the_same() -> None:
    stacks, sizes = zip(*calls_of_a_block(4), strict=True)
    found = saved_by_one_block(stacks, sizes)
    assert found is not None
    assert (found.function, found.called_from) == ("model.py block", "model.py:20 model")
    assert (found.calls, found.alike, found.allocations) == (4, 4, (1, 2, 3))


def test_a_call_that_leaves_something_else_is_counted_and_not_taken() -> None:
    made = [*calls_of_a_block(1)[:-1], *calls_of_a_block(3)[1:]]
    made[2] = (made[2][0], 41)
    stacks, sizes = zip(*made, strict=True)
    found = saved_by_one_block(stacks, sizes)
    assert found is not None
    assert (found.calls, found.alike) == (4, 3)
    assert [sizes[index] for index in found.allocations] == [10, 40, 10]


def test_a_training_loop_whose_first_step_leaves_more_is_not_taken_for_the_block() -> None:
    optimizer = [(within(("main", 1), ("step", 9), ("adam", 80)), 500)]
    forward = [
        (within(("main", 1), ("step", 5), *((frame.name, frame.line) for frame in reversed(stack[:-1]))), size)
        for stack, size in calls_of_a_block(3)
    ]
    stacks, sizes = zip(*optimizer, *forward, strict=True)
    found = saved_by_one_block(stacks, sizes)
    assert found is not None
    assert (found.function, found.calls) == ("model.py block", 3)


def test_without_a_function_that_is_called_again_there_is_no_block() -> None:
    stacks, sizes = zip(*calls_of_a_block(1), strict=True)
    assert saved_by_one_block(stacks, sizes) is None
    assert saved_by_one_block([(), (), ()], [1, 1, 1]) is None
    assert saved_by_one_block([], []) is None

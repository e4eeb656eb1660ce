"""The replayed allocator against figures worked out by hand, and against a plain search of all free blocks."""

from __future__ import annotations

import random

import pytest

from cs336_systems.analysis.caching_allocator import (
    KIB,
    MIB,
    Block,
    CachingAllocator,
    OutOfSegments,
    rounded,
    segment_bytes,
)


@pytest.mark.parametrize(("requested", "given"), [(1, 512), (512, 512), (513, 1024), (1_000_000, 1_000_448)])
def test_a_request_is_rounded_up_to_512_bytes(requested: int, given: int) -> None:
    assert rounded(requested) == given
    allocator = CachingAllocator()
    allocator.allocate(requested)
    assert allocator.allocated_bytes == given


@pytest.mark.parametrize(
    ("requested", "segment"),
    [
        (1, 2 * MIB),
        (1 * MIB, 2 * MIB),
        (1 * MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_are_of_2_mib_of_20_mib_or_the_request_rounded_to_2_mib(requested: int, segment: int) -> None:
    assert segment_bytes(rounded(requested)) == segment
    allocator = CachingAllocator()
    allocator.allocate(requested)
    assert allocator.reserved_bytes == segment


def test_a_request_of_nothing_takes_nothing() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(0))
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


def test_a_large_block_is_handed_out_whole_when_at_most_1_mib_would_be_left() -> None:
    allocator = CachingAllocator()
    allocator.allocate(33 * MIB)  # of a segment of 34
    assert allocator.allocated_bytes == 34 * MIB
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(34 * MIB))
    allocator.allocate(33 * MIB - 512)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (33 * MIB - 512, 34 * MIB)


def test_a_small_block_is_cut_when_at_least_512_bytes_are_left() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(1 * MIB)
    second = allocator.allocate(1 * MIB - 512)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB - 512, 2 * MIB)
    allocator.allocate(512)  # the rest
    assert allocator.reserved_bytes == 2 * MIB
    assert [block.address for block in (first, second) if block is not None] == [0, 1 * MIB]


def test_small_and_large_requests_never_share_a_segment() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    allocator.allocate(4 * KIB)
    assert allocator.reserved_bytes == 14 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (30, 12, 20)]
    for block in blocks:
        allocator.free(block)
    taken = allocator.allocate(12 * MIB)
    assert taken is not None
    assert taken.address == 30 * MIB
    again = allocator.allocate(19 * MIB)
    assert again is not None
    assert again.address == 42 * MIB
    assert allocator.reserved_bytes == 62 * MIB


def test_neighbours_merge_once_they_are_free_and_serve_a_larger_request() -> None:
    allocator = CachingAllocator()
    pieces = [allocator.allocate(5 * MIB) for _ in range(4)]  # one segment of 20 MiB
    assert allocator.reserved_bytes == 20 * MIB
    for index in (0, 2, 1):  # the middle one last: it has a free neighbour on either side
        allocator.free(pieces[index])
    whole = allocator.allocate(15 * MIB)
    assert whole is not None
    assert (whole.address, whole.size) == (0, 15 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_segments_that_are_free_as_a_whole_are_given_back_before_memory_is_out() -> None:
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    allocator.allocate(36 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (36 * MIB, 36 * MIB)
    assert allocator.peak_reserved_bytes == 36 * MIB


def test_a_cut_segment_is_not_given_back_and_memory_is_out() -> None:
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    first, second = allocator.allocate(15 * MIB + 512), allocator.allocate(2 * MIB)
    allocator.free(first)
    assert second is not None
    with pytest.raises(OutOfSegments, match="allocated") as error:
        allocator.allocate(30 * MIB)
    assert error.value.allocated_bytes == 2 * MIB
    assert error.value.limit_bytes == 40 * MIB


def test_a_block_is_freed_once() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(block)


class _Searching:
    """The same rules with the blocks of every segment in a list, all of which are looked at for every request."""

    def __init__(self) -> None:
        self.segments: list[list[Block]] = []
        self.top = 0

    def allocate(self, requested: int) -> Block:
        size = rounded(requested)
        is_small = size <= MIB
        free = [block for segment in self.segments for block in segment if block.is_free and block.is_small == is_small]
        fitting = [block for block in free if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda each: (each.size, each.address))
        else:
            block = Block(self.top, segment_bytes(size), is_small)
            self.top += block.size
            self.segments.append([block])
        rest = block.size - size
        if (is_small and rest >= 512) or (not is_small and rest > MIB):
            segment = next(segment for segment in self.segments if block in segment)
            segment.insert(segment.index(block) + 1, Block(block.address + size, rest, is_small))
            block.size = size
        block.is_free = False
        return block

    def free(self, block: Block) -> None:
        block.is_free = True
        for segment in self.segments:
            for first, second in zip(segment[-2::-1], segment[:0:-1], strict=True):
                if first.is_free and second.is_free:
                    first.size += second.size
                    segment.remove(second)

    def total(self, *, free: bool) -> int:
        return sum(block.size for segment in self.segments for block in segment if free or not block.is_free)


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_get_the_blocks_that_a_plain_search_finds(seed: int) -> None:
    chance = random.Random(seed)
    allocator, searching = CachingAllocator(), _Searching()
    live: list[tuple[Block, Block]] = []
    for _ in range(400):
        if live and chance.random() < 0.48:
            mine, theirs = live.pop(chance.randrange(len(live)))
            allocator.free(mine)
            searching.free(theirs)
        else:
            size = int(2 ** chance.uniform(0, 26))
            block, expected = allocator.allocate(size), searching.allocate(size)
            assert block is not None
            assert (block.address, block.size) == (expected.address, expected.size)
            live.append((block, expected))
        assert allocator.allocated_bytes == searching.total(free=False)
        assert allocator.reserved_bytes == searching.total(free=True)
    for mine, _ in live:
        allocator.free(mine)
    assert allocator.allocated_bytes == 0
    # All that was cut has merged again.
    assert all(block.is_whole_segment for free in allocator._free.values() for _, _, block in free)

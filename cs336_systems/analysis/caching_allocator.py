"""PyTorch's caching allocator for CUDA, replayed: what it hands out and what it holds for a series of requests.

A GPU's memory is taken from the driver in segments, and handed out in blocks of them:

- a request is rounded up to a multiple of 512 bytes;
- up to 1 MiB it is served from the pool of small blocks, whose segments are of 2 MiB, else from the pool of large ones,
  whose segments are of 20 MiB for a request below 10 MiB, and else of the request rounded up to a multiple of 2 MiB;
- the smallest free block that is large enough is taken, of several the one at the lowest address, whose rest stays a
  free block if it is at least 512 bytes in the small pool, more than 1 MiB in the large one. Else the whole block is
  handed out, and counts as allocated;
- a block that is freed merges with free neighbours of its segment;
- segments are kept. Only when the driver has no more are those given back that are free as a whole.

So of what is allocated every byte follows from the requests alone. Which of several free blocks of one size is taken
depends on addresses, which the driver chooses: here each segment lies above those before it. That can change what is
reserved, and, by a rest of less than 1 MiB that is or is not cut off, what is allocated.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch, with its default settings (no expandable segments, no rounding to
powers of two, no garbage collection, one stream).
"""

from __future__ import annotations

import bisect
import dataclasses

KIB, MIB = 2**10, 2**20
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 * MIB
"""The largest request that the small pool serves, and the largest rest of a large block that stays uncut."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_OWN_SEGMENT_BYTES = 10 * MIB
"""From here on a request gets a segment of its own size."""
SEGMENT_ROUNDING_BYTES = 2 * MIB


class OutOfSegments(Exception):
    """The driver has no memory left for another segment."""

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"no segment for {requested_bytes} bytes: of {limit_bytes} {reserved_bytes} are reserved, and of them "
            f"{allocated_bytes} allocated"
        )
        self.requested_bytes, self.limit_bytes = requested_bytes, limit_bytes
        self.allocated_bytes, self.reserved_bytes = allocated_bytes, reserved_bytes


@dataclasses.dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, and its neighbours there."""

    address: int
    size: int
    is_small: bool
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


def rounded(requested_bytes: int) -> int:
    """A request as the allocator rounds it: to a multiple of 512 bytes, and at least that."""
    return max(1, -(-requested_bytes // MIN_BLOCK_BYTES)) * MIN_BLOCK_BYTES


def segment_bytes(size: int) -> int:
    """The size of the segment that is taken from the driver for a rounded request."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES


class CachingAllocator:
    """The allocator's state, and the peaks so far, in bytes.

    `limit_bytes`: what the driver can give in all; None for a device without end.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._top = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by is_small, sorted by size

    def allocate(self, requested_bytes: int) -> Block | None:
        """A block for a request; none for one of no bytes.

        Raises:
            OutOfSegments: the limit is reached, also after every segment that is free as a whole was given back.
        """
        if requested_bytes == 0:
            return None
        size = rounded(requested_bytes)
        is_small = size <= SMALL_BYTES
        block = self._best_fit(size, is_small) or self._new_segment(size, is_small)
        rest = block.size - size
        if rest >= MIN_BLOCK_BYTES if is_small else rest > SMALL_BYTES:
            self._cut(block, size)
        block.is_free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Take a block back, and merge it with its free neighbours."""
        if block is None:
            return
        if block.is_free:
            raise ValueError(f"the block at {block.address} is free already")
        self.allocated_bytes -= block.size
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self._withdraw(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free:
            self._withdraw(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        block.is_free = True
        self._offer(block)

    def reset_peaks(self) -> None:
        """As torch.cuda.reset_peak_memory_stats: from now on the peaks are of what comes."""
        self.peak_allocated_bytes, self.peak_reserved_bytes = self.allocated_bytes, self.reserved_bytes

    def _best_fit(self, size: int, is_small: bool) -> Block | None:
        free = self._free[is_small]
        index = bisect.bisect_left(free, (size, -1))
        return free.pop(index)[2] if index < len(free) else None

    def _new_segment(self, size: int, is_small: bool) -> Block:
        wanted = segment_bytes(size)
        if self._is_beyond_limit(wanted):
            self._give_back_free_segments()
            if self._is_beyond_limit(wanted):
                assert self.limit_bytes is not None
                raise OutOfSegments(size, self.allocated_bytes, self.reserved_bytes, self.limit_bytes)
        self.reserved_bytes += wanted
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(self._top, wanted, is_small)
        self._top += wanted
        return block

    def _is_beyond_limit(self, more_bytes: int) -> bool:
        return self.limit_bytes is not None and self.reserved_bytes + more_bytes > self.limit_bytes

    def _give_back_free_segments(self) -> None:
        for is_small, free in self._free.items():
            self.reserved_bytes -= sum(block.size for _, _, block in free if block.is_whole_segment)
            self._free[is_small] = [entry for entry in free if not entry[2].is_whole_segment]

    def _cut(self, block: Block, size: int) -> None:
        """Leave `size` at the front of a block, and offer the rest."""
        rest = Block(block.address + size, block.size - size, block.is_small, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        self._offer(rest)

    def _offer(self, block: Block) -> None:
        # Addresses are unique, so that blocks themselves are never compared.
        bisect.insort(self._free[block.is_small], (block.size, block.address, block))

    def _withdraw(self, block: Block) -> None:
        free = self._free[block.is_small]
        del free[bisect.bisect_left(free, (block.size, block.address))]

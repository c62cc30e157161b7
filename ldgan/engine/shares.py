"""Who does what: numbered work shared out among processes, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterator


def share(num_items: int, rank: int, world_size: int) -> range:
    """The numbers out of 0..num_items - 1 that fall to process ``rank``: contiguous, rank 0 the first.

    Shares differ by one at most, and together they are every number once.
    """
    return range(num_items * rank // world_size, num_items * (rank + 1) // world_size)


def batches(numbers: range, batch_size: int) -> Iterator[range]:
    """Cut a range into pieces of ``batch_size``; the last one may be smaller."""
    for first in range(numbers.start, numbers.stop, batch_size):
        yield range(first, min(first + batch_size, numbers.stop))

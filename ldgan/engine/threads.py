"""Work that threads do in advance while the caller is busy with what came before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items under way for each thread


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, ahead: int = AHEAD
) -> Generator[Result, None, None]:
    """``map(function, items)``, in that order, computed by threads up to ``ahead`` items each in advance.

    With no threads the caller computes. ``items`` is gone through by the caller alone, so that it may be a
    generator that is not safe to share. An error of ``function`` is raised in its place, and ends the work.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    waiting = iter(items)
    pool = ThreadPoolExecutor(num_threads)
    try:
        pending = deque(pool.submit(function, item) for item in islice(waiting, num_threads * ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(waiting, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)

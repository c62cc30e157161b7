"""Work that is shared out among processes of this machine."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ldgan.engine.cli import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_PER_WORKER = 4  # under way at a time: bounds memory when one item takes long


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """``map(function, items)``, in that order; with one worker this process does it itself.

    Raises `UserError` when a worker is killed, and what ``function`` raises.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the progress bar has a thread, and a fork may copy a lock that this thread holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_ignore_interrupts)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= num_workers * ITEMS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, for lack of memory perhaps; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

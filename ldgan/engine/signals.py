"""What a scheduler says before it ends a run: SIGTERM, and SIGUSR1 where a batch job asks to be warned earlier.

Both are only noted, so that the step under way is finished and a checkpoint is written, and the processes of a run
agree on the step after which they stop, whichever of them was told. Processes that read data for them ignore both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed

# Windows has no SIGUSR1.
NOTED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Notices:
    """Whether this process, or another one of the run, was asked to stop; made by `noting_signals`."""

    def __init__(self, timeout: timedelta | None) -> None:
        """``timeout`` is the longest wait for another process; None: torch's own."""
        self._number = 0
        # Numbers on the CPU go through gloo: the graphics card goes on working meanwhile.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group: Any = torch.distributed.new_group(timeout=timeout, backend="gloo") if distributed else None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal: the handler."""
        self._number = number

    def agreed(self) -> signal.Signals | None:
        """The signal that any process was sent, None if none was; to be called by all, it gives all the same.

        With several processes it is one reduction of four bytes, 0.24 ms for two of one machine (median of 2,000 on two
        busy cores); processes wait for each other here, but not for work that is queued on their graphics cards.
        """
        number = self._number
        if self._group is not None:
            highest = torch.tensor(number, dtype=torch.int32)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(highest)
        return signal.Signals(number) if number else None


@contextmanager
def noting_signals(timeout: timedelta | None = None) -> Iterator[Notices]:
    """Note SIGTERM and SIGUSR1 in this block instead of dying of them; afterwards they mean what they meant before.

    Python lets only the main thread handle signals; in another one nothing is noted. All processes of a run enter
    the block together; ``timeout`` is that of `Notices`.
    """
    notices = Notices(timeout)
    if threading.current_thread() is not threading.main_thread():
        yield notices
        return
    before = {number: signal.signal(number, notices.note) for number in NOTED}
    try:
        yield notices
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_notices(_: int = 0) -> None:
    """Let a worker process outlive what a scheduler sends to all processes of a job; a DataLoader's ``worker_init_fn``.

    It leaves its parent's process group and ignores SIGUSR1. A SIGTERM ends it only if the parent sent it, as Python
    does to end workers: who sent a signal, only waiting for it tells. A system that cannot tell (macOS), or a thread
    that was there before and takes the signal, leaves SIGTERM to its default.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads begun from here on inherit it
    threading.Thread(target=_end_on_sigterm_of, args=(parent.pid,), daemon=True).start()


def _end_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def exit_status(number: signal.Signals) -> int:
    """What a shell reports of a process that a signal ended: 143 for SIGTERM, 138 for SIGUSR1 on Linux."""
    return 128 + number

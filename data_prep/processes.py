"""The processes that `accelerate launch`, torchrun or a scheduler have started for one command, on any machines."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ldgan.engine.cli import UserError

LONGEST_WAIT = datetime.timedelta(days=7)  # for a process that is slower; one that has ended is noticed at once


def _nobody_to_wait_for() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process is number ``index`` of ``count``; ``wait`` returns when all of them have called it."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = _nobody_to_wait_for

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports."""
        return self.index == 0


ALONE = Processes()


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that RANK and WORLD_SIZE tell of, connected (by MASTER_ADDR and MASTER_PORT) while in the block.

    Without these variables this process is alone. ``wait`` raises a `UserError` where another process has ended.

    Raises:
        UserError: the variables are wrong, or the processes do not find each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    # Imported here, since it takes seconds that a process alone need not spend.
    from torch import distributed

    try:
        # gloo: no graphics card is needed, and none is kept waiting.
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this command do not find each other ({_first_line(error)}); start them by torchrun or"
            " accelerate launch"
        ) from error

    def wait() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise UserError(
                f"another process of this command has ended ({_first_line(error)}); see what it says"
            ) from error

    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), wait)
    finally:
        distributed.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

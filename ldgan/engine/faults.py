"""What the world does to a run, told from errors of its code: no memory left, a process lost.

Libraries report most of it as a RuntimeError that only its text tells from any other.
"""

from __future__ import annotations

import re

import torch

# Of torch's allocator on the CPU (Linux, Windows), of CUDA itself, and of other accelerators.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
# c10::DistError is NCCL's and the store's; gloo throws plain ones, which begin with the place in its source.
_GLOO = re.compile(r"\[.*gloo/.*?\]\s*")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of an accelerator, could not be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(_first_line(error)) is not None


def lost_process(error: BaseException) -> str | None:
    """What an error says of another process of the group that is gone or silent, None if it speaks of nothing such."""
    line = _first_line(error)
    if isinstance(error, torch.distributed.DistError):
        return line
    if isinstance(error, RuntimeError) and (place := _GLOO.match(line)) is not None:
        return line[place.end() :].partition(". This is")[0]
    return None


def lost_reader(error: BaseException) -> str | None:
    """What an error says of a DataLoader's worker that was killed, None if it speaks of nothing such."""
    line = _first_line(error)
    return line if isinstance(error, RuntimeError) and line.startswith("DataLoader worker (pid") else None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(". ")

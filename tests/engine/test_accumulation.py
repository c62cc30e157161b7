"""Micro-batches: every process has its own, together they are the batch, and only the last one is reduced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from torch import nn

from ldgan.engine.accumulation import Accumulation


@dataclass
class Process:
    """What `Accumulation` needs of an accelerator, on one of several processes."""

    process_index: int
    num_processes: int
    unreduced: list[nn.Module] = field(default_factory=list)  # models now within `no_sync`

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self.unreduced.append(model)
        yield
        self.unreduced.remove(model)


def accumulation(process: Process, num_micro_batches: int) -> Accumulation:
    return Accumulation(process, num_micro_batches, batch_size=12, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_processes", "num_micro_batches", "numbers"),
    [
        (1, 1, [[0]]),
        (1, 4, [[0, 1, 2, 3]]),
        (2, 4, [[0, 2], [1, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (3, 6, [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_processes_share_the_micro_batches(
    num_processes: int, num_micro_batches: int, numbers: list[list[int]]
) -> None:
    processes = [Process(rank, num_processes) for rank in range(num_processes)]
    assert [list(accumulation(process, num_micro_batches).micro_batches()) for process in processes] == numbers


def test_gradients_are_reduced_with_the_last_micro_batch_only() -> None:
    process, models = Process(1, 2), [nn.Identity(), nn.Identity()]
    seen = [(number, len(process.unreduced)) for number in accumulation(process, 6).micro_batches(*models)]
    assert seen == [(1, 2), (3, 2), (5, 0)]


@pytest.mark.parametrize(("num_processes", "num_micro_batches"), [(1, 1), (1, 4), (2, 4), (3, 6)])
def test_weighted_sums_averaged_over_processes_are_the_mean_over_micro_batches(
    num_processes: int, num_micro_batches: int
) -> None:
    values = [float(number**2) for number in range(num_micro_batches)]
    sums = []
    for rank in range(num_processes):
        own = accumulation(Process(rank, num_processes), num_micro_batches)
        sums.append(sum(own.weight * values[number] for number in own.micro_batches()))
    assert sum(sums) / num_processes == pytest.approx(sum(values) / num_micro_batches)

"""Gradient accumulation that gives the same sums whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Split(NamedTuple):
    """How the processes of a run share a step's batch, and compute it."""

    num_processes: int
    num_micro_batches: int
    precision: str

    def changes_since(self, former: Split) -> str | None:
        """What a run that goes on in this way should know, None if all is as it was."""
        if self == former:
            return None
        names = ("the number of processes", "the number of micro-batches", "run.precision")
        changes = ", ".join(
            f"{name} was {old} and is {new}" for name, old, new in zip(names, former, self, strict=True) if old != new
        )
        if self.num_micro_batches == former.num_micro_batches:
            return f"{changes}: steps see the same samples and, but for dropout, the same noise, rounded differently"
        could_share = former.num_micro_batches % self.num_processes == 0
        advice = f" (run.num_micro_batches={former.num_micro_batches} draws the same)" if could_share else ""
        return f"{changes}: steps see the same samples, but draw other noise{advice}"


def micro_batches(accelerator: Accelerator, num_micro_batches: int, *models: nn.Module) -> Iterator[int]:
    """Yield the numbers of this process's micro-batches: those m with m % num_processes == rank.

    Noise is drawn and data are read by this number, so two processes with one micro-batch each compute what
    one process computes with two. ``models``, as `Accelerator.prepare` returned them, reduce their gradients
    over processes with the last one only. The loss of each is to be multiplied by `micro_batch_weight`.
    """
    numbers = range(accelerator.process_index, num_micro_batches, accelerator.num_processes)
    for number in numbers:
        with ExitStack() as stack:
            if number != numbers[-1]:
                for model in models:
                    stack.enter_context(accelerator.no_sync(model))
            yield number


def micro_batch_weight(accelerator: Accelerator, num_micro_batches: int) -> float:
    """What makes gradients, summed over micro-batches and averaged over processes, the mean over micro-batches."""
    return accelerator.num_processes / num_micro_batches


def mean_terms(micro_batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The loss terms of this process's micro-batches, scalars, averaged by name and detached."""
    return {name: torch.stack([terms[name].detach() for terms in micro_batches]).mean() for name in micro_batches[0]}

"""Gradient accumulation that gives the same sums whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random, key_of


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


@dataclass(frozen=True)
class Accumulation:
    """How trainers take a step: by the gradients of micro-batches, whose noise is drawn by step and number.

    So two processes with one micro-batch each compute what one process computes with two. ``batch_size`` counts the
    images of a step over all processes; ``seed`` decides all noise.
    """

    accelerator: Accelerator
    num_micro_batches: int
    batch_size: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def weight(self) -> float:
        """What makes gradients, summed over micro-batches and averaged over processes, the mean over micro-batches."""
        return self.accelerator.num_processes / self.num_micro_batches

    def prepare(self, model: nn.Module | None) -> Any:
        """The same weights behind a wrapper that averages gradients over processes; None for None."""
        return None if model is None else self.accelerator.prepare(model)

    def micro_batches(self, *models: nn.Module | None) -> Iterator[int]:
        """Yield the numbers of this process's micro-batches: those m with m % num_processes == rank.

        ``models``, as `prepare` returned them, reduce their gradients over processes with the last one
        only.
        """
        numbers = range(self.accelerator.process_index, self.num_micro_batches, self.accelerator.num_processes)
        for number in numbers:
            with ExitStack() as stack:
                if number != numbers[-1]:
                    for model in filter(None, models):
                        stack.enter_context(self.accelerator.no_sync(model))
                yield number

    def backward(self, *terms: Tensor) -> None:
        """Add the gradient of the sum of a micro-batch's loss terms, scalars, at the `weight` of a micro-batch."""
        self.accelerator.backward(self.weight * sum(terms))

    def random(self, purpose: str, step: int, micro_batch: int) -> Random:
        """The random numbers of one micro-batch for one purpose; nothing else draws from them."""
        return Random(key_of(self.seed, purpose), self.device, step=step, part=micro_batch)

    def average(self, ema: EMA, model: nn.Module, step: int) -> None:
        """Move the average of ``model``'s weights by what step 1, 2, ... has made of them."""
        ema.update(model, self.batch_size, step * self.batch_size)


def mean_terms(micro_batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The loss terms of this process's micro-batches, scalars, averaged by name and detached."""
    return {name: torch.stack([terms[name].detach() for terms in micro_batches]).mean() for name in micro_batches[0]}

"""Gradient accumulation that gives the same sums whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor, nn


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

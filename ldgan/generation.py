"""Samples by the number: the loop that sampling and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator
from torch import Tensor

from ldgan.engine.progress import progress_bar
from ldgan.engine.shares import batches, share
from ldgan.loading import TrainedModel


def generate(
    accelerator: Accelerator, model: TrainedModel, *, num_images: int, first_seed: int, batch_size: int
) -> Iterator[tuple[range, Tensor]]:
    """Yield this process's image numbers and their samples of x_0 (B, C, s, s), with a progress bar.

    Image number i is made from seed ``first_seed`` + i, whatever the batch size and the number of processes.
    """
    mine = share(num_images, accelerator.process_index, accelerator.num_processes)
    with progress_bar("sampling", len(mine), "images", enabled=accelerator.is_main_process) as bar:
        for numbers in batches(mine, batch_size):
            with accelerator.autocast():
                x_0 = model.sample([first_seed + number for number in numbers])
            yield numbers, x_0
            bar.advance(len(numbers))

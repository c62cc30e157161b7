"""Decoding many latents to disk: what is left to do, who does it, and the two kinds of output.

Blocks of images are shared out among processes. A batch is decoded as a whole even if some of its images are there
already, so that an image has the same bits whether or not the work was interrupted, on any number of processes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

from autoencoder.inference.latents import pack_caption, read_captions
from data_prep.loader import LatentDataset, SampleRef
from data_prep.resuming import ResumableShards
from ldgan.engine.files import BackgroundWrites, write_atomically, writing_to
from ldgan.engine.images import encode_lossless, to_uint8
from ldgan.engine.progress import ProgressBar
from ldgan.engine.shares import batches
from ldgan.engine.threads import map_ahead

TASK = "decoding"
DESCRIPTION = f"{TASK}.json"
READ_AHEAD_BATCHES = 2


class Output(abc.ABC):
    """A folder that images are written to by number; safe to use from several threads.

    Images number k * ``block_size`` to (k + 1) * ``block_size`` - 1 are a block, the work of one process.
    """

    def __init__(self, folder: Path, block_size: int) -> None:
        self.folder, self.block_size = folder, block_size

    @abc.abstractmethod
    def is_written(self, number: int) -> bool:
        """Whether image ``number`` is on the disk for good."""

    @abc.abstractmethod
    def write(self, number: int, image: Tensor, label: int, caption: str) -> None:
        """Write a uint8 image (C, H, W); ``label`` is -1 and ``caption`` "" for none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what is not complete; the next run writes it again."""


class ImageFiles(Output):
    """One file for each image, lossless: ``000000000.png``, ``000000001.png``, ... or the same with ``.webp``."""

    def __init__(self, folder: Path, image_format: Literal["png", "webp"], block_size: int) -> None:
        super().__init__(folder, block_size)
        self._format = image_format

    def is_written(self, number: int) -> bool:
        """Whether there is a file of that number: it gets its name when it is complete."""
        return self._path(number).exists()

    def write(self, number: int, image: Tensor, label: int, caption: str) -> None:
        """Write one file; files have neither labels nor captions."""
        write_atomically(self._path(number), encode_lossless(image, self._format))

    def close(self) -> None:
        """Nothing stays open."""

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:09d}.{self._format}"


class ImageShards(Output):
    """A shard set of PNG images, see `data_prep.shards`; a block is a shard, complete or absent."""

    def __init__(self, folder: Path, num_images: int, samples_per_shard: int) -> None:
        super().__init__(folder, samples_per_shard)
        self._shards = ResumableShards(folder, list(batches(range(num_images), samples_per_shard)))

    def is_written(self, number: int) -> bool:
        """Whether the shard that image ``number`` belongs to is complete."""
        return self._shards.is_written(number // self.block_size)

    def write(self, number: int, image: Tensor, label: int, caption: str) -> None:
        """Append an image to its shard, after those before it."""
        sample = {"png": encode_lossless(image, "png")} | ({"cls": str(label).encode()} if label >= 0 else {})
        self._shards.write(number, sample | pack_caption(caption))

    def close(self) -> None:
        """Abandon shards that are not complete."""
        self._shards.close()

    def write_manifest(
        self, class_names: Sequence[str] | None, details: Mapping[str, Any], seconds: float, *, has_captions: bool
    ) -> None:
        """Make the shards of all processes and runs a shard set; ``seconds`` as in `Manifest`."""
        self._shards.write_manifest("images", class_names, details, seconds, has_captions=has_captions)


def unfinished_blocks(output: Output, num_images: int) -> list[range]:
    """The image numbers of each block of which something is not written yet."""
    blocks = batches(range(num_images), output.block_size)
    return [block for block in blocks if not all(map(output.is_written, block))]


@torch.inference_mode()
def decode_batches(
    decode: Callable[[Tensor], Tensor],
    latents: LatentDataset,
    output: Output,
    work: Sequence[range],
    device: torch.device | str,
    bar: ProgressBar,
) -> None:
    """Decode the latents (posterior means) of ``work``, batches of image numbers, and write what is not there yet.

    Reading, decoding and writing overlap. On a GPU even the copy to the CPU is the writers' business, so that
    the next batch is queued before this one is done.
    """
    if not work:
        return
    max_pending = 2 * max(map(len, work))  # while one batch is being written, the next one is handed over
    with closing(output), BackgroundWrites(max_pending) as writes:
        for numbers, (batch, captions) in zip(work, read_ahead(latents, work)):
            images = to_uint8(decode(batch["mean"].to(device)))
            for number, image, label, caption in zip(numbers, images, batch["label"].tolist(), captions):
                writes.submit(_write_missing, output, number, image, label, caption)
            bar.advance(len(numbers))


def read_ahead(latents: LatentDataset, work: Sequence[range]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Yield batches as `data_prep.loader` does, and captions, read by a thread while those before are worked on."""

    def read(numbers: range) -> tuple[dict[str, Tensor], list[str]]:
        batch = default_collate([latents[SampleRef(number, flip=False)] for number in numbers])
        return batch, read_captions(latents.shards, numbers)

    return map_ahead(read, work, num_threads=1, ahead=READ_AHEAD_BATCHES)


def _write_missing(output: Output, number: int, image: Tensor, label: int, caption: str) -> None:
    with writing_to(output.folder):
        if not output.is_written(number):
            output.write(number, image, label, caption)

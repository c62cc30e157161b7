"""Batches for training: what step s sees is a function of (seed, s), whatever the number of processes.

Positions 0, 1, 2, ... number the endless stream of samples: epoch 0, then epoch 1, and so on. Each epoch is a
fresh permutation of all samples, computed from the seed. A training step takes the next positions of the
stream, so a run that is resumed, or run by two processes instead of one, sees the same samples in the same
steps.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.images import IMAGE_FORMATS, image_member
from data_prep.shards import ShardSet
from ldgan.engine.cli import UserError
from ldgan.engine.session import RunConfig
from ldgan.engine.shares import batches, share

# What a random generator is for: the last word of its seed, so that no two uses share a stream.
_SHARD_ORDER, _SAMPLE_ORDER, _FLIPS = range(3)


class SampleRef(NamedTuple):
    """Which sample, and whether mirrored left to right."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    flip: bool


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window_shards: int) -> Iterator[np.ndarray]:
    """Yield all sample indices of an epoch, once each, as one shuffled int64 array per window of shards.

    Shards are permuted and taken ``window_shards`` at a time; samples are permuted within such a window. So
    only a window's shards need be open at a time, and samples of one shard meet different neighbours each
    epoch.
    """
    for number, shards in enumerate(_windows(shard_sizes, seed, epoch, window_shards)):
        yield _window_order(shard_sizes, shards, seed, epoch, number)


def _windows(shard_sizes: Sequence[int], seed: int, epoch: int, window_shards: int) -> list[np.ndarray]:
    """Return the shard numbers of each of an epoch's windows."""
    shards = np.random.default_rng([seed, epoch, 0, _SHARD_ORDER]).permutation(len(shard_sizes))
    return [shards[first : first + window_shards] for first in range(0, len(shards), window_shards)]


def _window_order(shard_sizes: Sequence[int], shards: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    first_indices = np.cumsum([0, *shard_sizes])
    indices = np.concatenate([np.arange(first_indices[shard], first_indices[shard + 1]) for shard in shards])
    return np.random.default_rng([seed, epoch, window, _SAMPLE_ORDER]).permutation(indices)


class TrainingOrder(Sampler[list[SampleRef]]):
    """The endless micro-batches of one process, as a DataLoader's ``batch_sampler``.

    A step takes a global batch, the next ``micro_batch_size * num_micro_batches`` positions of the stream; it
    may straddle epochs, and nothing is dropped. Micro-batch m of it goes to rank ``m % world_size``. Starting
    at ``first_step`` skips epochs and windows by arithmetic. With ``flips`` each position tosses a fair coin.

    Raises ValueError if ``world_size`` does not divide ``num_micro_batches``, or if there are no samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        flips: bool,
        window_shards: int = 16,
    ) -> None:
        if num_micro_batches % world_size:
            raise ValueError(f"{num_micro_batches} micro-batches cannot be shared by {world_size} processes")
        if sum(shard_sizes) == 0:
            raise ValueError("there are no samples")
        self.shard_sizes = list(shard_sizes)
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_step = first_step
        self.flips = flips
        self.window_shards = window_shards

    def __iter__(self) -> Iterator[list[SampleRef]]:
        global_batch_size = self.micro_batch_size * self.num_micro_batches
        stream = self._stream(self.first_step * global_batch_size)
        while True:
            global_batch = list(itertools.islice(stream, global_batch_size))
            for number in range(self.rank, self.num_micro_batches, self.world_size):
                first = number * self.micro_batch_size
                yield global_batch[first : first + self.micro_batch_size]

    def _stream(self, position: int) -> Iterator[SampleRef]:
        """Yield what is at ``position`` of the stream and all that follows."""
        first_epoch, skip = divmod(position, sum(self.shard_sizes))
        for epoch in itertools.count(first_epoch):
            windows = _windows(self.shard_sizes, self.seed, epoch, self.window_shards)
            for number, shards in enumerate(windows):
                num_samples = sum(self.shard_sizes[shard] for shard in shards)
                if skip < num_samples:
                    order = _window_order(self.shard_sizes, shards, self.seed, epoch, number)
                    flips = self._coins(num_samples, epoch, number)
                    yield from map(SampleRef, order[skip:].tolist(), flips[skip:].tolist())
                skip = max(skip - num_samples, 0)

    def _coins(self, num_samples: int, epoch: int, window: int) -> np.ndarray:
        if not self.flips:
            return np.zeros(num_samples, dtype=bool)
        return np.random.default_rng([self.seed, epoch, window, _FLIPS]).random(num_samples) < 0.5


class ImageDataset(Dataset[dict[str, Tensor | int]]):
    """Images of a shard set: {"image": float32 (3, H, W) in [-1, 1], "label": int, -1 if none}.

    Raises `UserError` for shards of another kind, and when an image cannot be decoded.
    """

    def __init__(self, shards: ShardSet) -> None:
        _check_kind(shards, "images")
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, ref: SampleRef) -> dict[str, Tensor | int]:
        sample = self.shards.read(ref.index)
        try:
            pixels = _decode_image(sample)
            label = _label(sample)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _undecodable(self.shards, ref.index, error) from error
        if ref.flip:
            pixels = pixels[:, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # HWC, uint8 -> CHW, uint8
        return {"image": image.float() / 127.5 - 1, "label": label}


class LatentDataset(Dataset[dict[str, Tensor | int]]):
    """Posterior moments of a shard set: {"mean", "std": float32 (C, h, w), "label": int, -1 if none}.

    A sample's ``npy`` member holds mean and std stacked along channels, (2C, h, w); or, if the mirrored image
    was encoded too, such an array for the plain and one for the mirrored image, (2, 2C, h, w). A flip must
    have been encoded: mirrored latents of an image are not the latents of the mirrored image.

    Raises `UserError` for shards of another kind and damaged arrays, ValueError for a flip that is not
    stored.
    """

    def __init__(self, shards: ShardSet) -> None:
        _check_kind(shards, "latents")
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, ref: SampleRef) -> dict[str, Tensor | int]:
        sample = self.shards.read(ref.index)
        try:
            moments = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
            label = _label(sample)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _undecodable(self.shards, ref.index, error) from error
        if moments.ndim == 4:
            moments = moments[int(ref.flip)]
        elif ref.flip:
            raise ValueError(f"{self.shards.folder} holds no latents of mirrored images")
        mean, std = torch.from_numpy(moments.astype(np.float32)).chunk(2)  # (2C, h, w) -> 2 x (C, h, w)
        return {"mean": mean, "std": std, "label": label}


def _decode_image(sample: dict[str, bytes]) -> np.ndarray:
    """Return the sample's image as uint8 (H, W, 3)."""
    extension, content = image_member(sample)
    image = Image.open(io.BytesIO(content), formats=[IMAGE_FORMATS[extension]])
    return np.asarray(image.convert("RGB"))


def _label(sample: dict[str, bytes]) -> int:
    return int(sample.get("cls", b"-1"))


def _check_kind(shards: ShardSet, kind: str) -> None:
    if shards.manifest.kind != kind:
        raise UserError(f"{shards.folder} holds {shards.manifest.kind}, but {kind} are needed; give another folder")


def _undecodable(shards: ShardSet, index: int, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{shards.locate(index)} cannot be decoded ({reason}); restore the shard or write it again")


def batches_of_run(
    dataset: ImageDataset | LatentDataset, run: RunConfig, accelerator: Accelerator, *, first_step: int, flips: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's micro-batches of a run from after ``first_step`` on; see `TrainingOrder`."""
    num_micro_batches, micro_batch_size = run.micro_batches(accelerator.num_processes)
    order = TrainingOrder(
        dataset.shards.shard_sizes,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=run.seed,
        first_step=first_step,
        flips=flips,
    )
    return training_batches(dataset, order, run.num_workers)


def training_batches(
    dataset: ImageDataset | LatentDataset, order: TrainingOrder, num_workers: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of ``order``, endlessly; labels become int64 (B,)."""
    return _batches(dataset, order, num_workers)


def sequential_batches(
    dataset: ImageDataset | LatentDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Yield the first ``limit`` samples (None: all) in order and unflipped, each on exactly one rank.

    A rank gets a contiguous range, rank 0 the first; a rank's last batch may be smaller.
    """
    num_samples = len(dataset) if limit is None else min(limit, len(dataset))
    order = (
        [SampleRef(index, flip=False) for index in numbers]
        for numbers in batches(share(num_samples, rank, world_size), batch_size)
    )
    return _batches(dataset, order, num_workers)


def _batches(
    dataset: ImageDataset | LatentDataset, order: Iterator[list[SampleRef]] | TrainingOrder, num_workers: int
) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # The global generator would lose a number each time loading starts, and a resumed run differ.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # One from a worker arrives with that process's traceback as text; its last line is the message.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

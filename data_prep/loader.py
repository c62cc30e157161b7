"""Batches for training: what step s sees is a function of (seed, s), whatever the number of processes.

Positions 0, 1, 2, ... number the endless stream of samples: epoch 0, then epoch 1, and so on. Each epoch is a
fresh permutation of all samples, computed from the seed. A training step takes the next positions of the
stream, so a run that is resumed, or run by two processes instead of one, sees the same samples in the same
steps.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.samples import load_moments, load_text, open_image, text_shape
from data_prep.shards import ShardSet
from ldgan.engine.cli import UserError
from ldgan.engine.session import RunConfig
from ldgan.engine.shares import batches, share
from ldgan.engine.signals import ignore_notices

# What a random generator is for: the last word of its seed, so that no two uses share a stream.
_SHARD_ORDER, _SAMPLE_ORDER, _FLIPS = range(3)


class SampleRef(NamedTuple):
    """Which sample, and whether mirrored left to right."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    flip: bool


class EpochOrder:
    """One epoch's permutation of all samples, a function of (seed, epoch) that is computed window by window.

    Shards are permuted and taken ``window_shards`` at a time; samples are permuted within such a window. So
    only a window's shards need be open at a time, and samples of one shard meet different neighbours each
    epoch. ``first_indices`` holds the first sample's index of each shard and, at the end, the number of samples.
    """

    def __init__(self, first_indices: np.ndarray, seed: int, epoch: int, window_shards: int) -> None:
        shards = np.random.default_rng([seed, epoch, 0, _SHARD_ORDER]).permutation(len(first_indices) - 1)
        self._window_shards = window_shards
        self._seed = seed
        self._epoch = epoch
        self._firsts, self._ends = first_indices[shards], first_indices[shards + 1]
        self._window_starts = np.append(0, np.cumsum(self._ends - self._firsts))[:-1:window_shards]

    def window_at(self, position: int) -> tuple[int, int]:
        """The window that holds ``position`` of the epoch, and the position that it starts at."""
        number = int(np.searchsorted(self._window_starts, position, side="right")) - 1
        return number, int(self._window_starts[number])

    def indices(self, window: int) -> np.ndarray:
        """The sample indices of a window in their order, int64."""
        shards = slice(window * self._window_shards, (window + 1) * self._window_shards)
        ranges = [np.arange(first, end) for first, end in zip(self._firsts[shards], self._ends[shards])]
        return self._random(window, _SAMPLE_ORDER).permutation(np.concatenate(ranges))

    def coins(self, window: int, num_samples: int) -> np.ndarray:
        """Fair coins for the positions of a window, bool."""
        return self._random(window, _FLIPS).random(num_samples) < 0.5

    def _random(self, window: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._epoch, window, purpose])


class _Window(NamedTuple):
    """A window of the stream: the position it starts at, and what lies at its positions."""

    start: int
    indices: np.ndarray
    flips: np.ndarray

    @property
    def end(self) -> int:
        return self.start + len(self.indices)


class SampleStream:
    """The endless stream of samples, readable at any position; keeps the window that it last read from.

    Memory is a window's and a few numbers for each shard. With ``flips`` each position tosses a fair coin.

    Raises ValueError if there are no samples.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, flips: bool, window_shards: int = 16) -> None:
        self._first_indices = np.append(0, np.cumsum(shard_sizes, dtype=np.int64))
        self.num_samples = int(self._first_indices[-1])  # of an epoch
        if self.num_samples == 0:
            raise ValueError("there are no samples")
        self._seed = seed
        self._flips = flips
        self._window_shards = window_shards
        self._epoch = -1  # that of ``_order``
        self._order: EpochOrder
        self._window = _Window(0, np.empty(0, np.int64), np.empty(0, bool))

    def read(self, position: int, num: int) -> tuple[np.ndarray, np.ndarray]:
        """What lies at the ``num`` >= 1 positions from ``position`` on: sample indices, int64, and flips, bool."""
        parts = []
        end = position + num
        while position < end:
            window = self._window_at(position)
            part = slice(position - window.start, end - window.start)
            parts.append((window.indices[part], window.flips[part]))
            position = min(end, window.end)
        if len(parts) == 1:
            return parts[0]
        indices, flips = zip(*parts)
        return np.concatenate(indices), np.concatenate(flips)

    def _window_at(self, position: int) -> _Window:
        if not self._window.start <= position < self._window.end:
            epoch, offset = divmod(position, self.num_samples)
            if epoch != self._epoch:
                self._order = EpochOrder(self._first_indices, self._seed, epoch, self._window_shards)
                self._epoch = epoch
            number, start = self._order.window_at(offset)
            indices = self._order.indices(number)
            flips = self._order.coins(number, len(indices)) if self._flips else np.zeros(len(indices), dtype=bool)
            self._window = _Window(epoch * self.num_samples + start, indices, flips)
        return self._window


class TrainingOrder(Sampler[list[SampleRef]]):
    """The endless micro-batches of one process, as a DataLoader's ``batch_sampler``.

    A step takes a global batch, the next ``micro_batch_size * num_micro_batches`` positions of the stream; it
    may straddle epochs, and nothing is dropped. Micro-batch m of it goes to rank ``m % world_size``. All of this
    is arithmetic: a process computes the windows that its own positions lie in, wherever it starts, and no others.
    ``flips`` are those of the `SampleStream`.

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
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self._stream = SampleStream(shard_sizes, seed=seed, flips=flips, window_shards=window_shards)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for position in self.positions():
            indices, flips = self._stream.read(position, self.micro_batch_size)
            yield list(map(SampleRef, indices.tolist(), flips.tolist()))

    def positions(self) -> Iterator[int]:
        """Where in the stream this process's micro-batches start, endlessly."""
        # As world_size divides num_micro_batches, m % world_size is the rank also when m counts on from step to step.
        first = self.first_step * self.num_micro_batches + self.rank
        return itertools.count(first * self.micro_batch_size, self.world_size * self.micro_batch_size)


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
            image = open_image(sample, self.shards.manifest.details.get("resolution"))
            pixels = np.asarray(image.convert("RGB"))
            label = _label(sample)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _undecodable(self.shards, ref.index, error) from error
        if ref.flip:
            pixels = pixels[:, ::-1]
        chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (H, W, 3) -> (3, H, W), uint8
        return {"image": chw.float().div_(127.5).sub_(1), "label": label}


class LatentDataset(Dataset[dict[str, Tensor | int]]):
    """Posterior moments of a shard set: {"mean", "std": float32 (C, h, w), "label": int, -1 if none}.

    A sample's ``npy`` member holds mean and std stacked along channels, (2C, h, w); or, if the mirrored image
    was encoded too, such an array for the plain and one for the mirrored image, (2, 2C, h, w). A flip must
    have been encoded: mirrored latents of an image are not the latents of the mirrored image.

    With ``with_text`` there is the embedding of the sample's caption too, {"text": float16 (1 + max_tokens, d),
    "text_mask": bool (1 + max_tokens,)}: the pooled row and, as far as the mask is True, those of its tokens; no rows
    where there is no caption. ``text.npy`` holds the rows that there are, float16 (1 + n, d), n <= max_tokens.

    Raises `UserError` for shards of another kind, or without embeddings where these are wanted, and for damaged
    arrays; ValueError for a flip that is not stored.
    """

    def __init__(self, shards: ShardSet, with_text: bool = False) -> None:
        _check_kind(shards, "latents")
        self.shards = shards
        self._text_shape = _text_shape(shards) if with_text else None

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, ref: SampleRef) -> dict[str, Tensor | int]:
        sample = self.shards.read(ref.index)
        try:
            moments = load_moments(sample, self.shards.manifest.details)
            label = _label(sample)
            text = _text(sample, *self._text_shape) if self._text_shape is not None else {}
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _undecodable(self.shards, ref.index, error) from error
        if moments.ndim == 4:
            moments = moments[int(ref.flip)]
        elif ref.flip:
            raise ValueError(f"{self.shards.folder} holds no latents of mirrored images")
        mean, std = torch.from_numpy(moments.astype(np.float32)).chunk(2)  # (2C, h, w) -> 2 x (C, h, w)
        return {"mean": mean, "std": std, "label": label, **text}


def _label(sample: dict[str, bytes]) -> int:
    return int(sample.get("cls", b"-1"))


def _text_shape(shards: ShardSet) -> tuple[int, int]:
    """The rows of an embedding at most, 1 + max_tokens, and their dimension."""
    try:
        shape = text_shape(shards.manifest.details)
    except ValueError as error:
        raise UserError(f"{shards.folder}: {error} in its manifest; restore it or encode again") from error
    if shape is None:
        raise UserError(
            f"{shards.folder}: holds no embeddings of captions; encode captioned images with --text-encoder PATH"
        )
    return shape


def _text(sample: dict[str, bytes], num_rows: int, dim: int) -> dict[str, Tensor]:
    """The embedding of a sample's caption, padded to ``num_rows``; raises nearly anything where it is damaged."""
    embedding = np.zeros((num_rows, dim), np.float16)
    num_there = 0
    if "text.npy" in sample:
        found = load_text(sample["text.npy"], num_rows, dim)
        num_there = len(found)
        embedding[:num_there] = found
    return {"text": torch.from_numpy(embedding), "text_mask": torch.arange(num_rows) < num_there}


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
    return read_batches(dataset, order, run.num_workers)


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
    return read_batches(dataset, order, num_workers)


def read_batches(
    dataset: ImageDataset | LatentDataset, order: Iterator[list[SampleRef]] | TrainingOrder, num_workers: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of samples that ``order`` lists; labels become int64 (B,)."""
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_notices if os.name == "posix" else None,
        # The global generator would lose a number each time loading starts, and a resumed run differ.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # One from a worker arrives with that process's traceback as text; its last line is the message.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

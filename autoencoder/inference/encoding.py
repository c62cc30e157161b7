"""Encoding many images to disk: shard k of the latents is made of shard k of the images alone, by one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder.inference.latents import pack_caption, pack_moments, read_captions
from autoencoder.inference.text_encoder import TextEncoder
from autoencoder.models.autoencoder import AutoencoderKL
from data_prep.loader import ImageDataset, SampleRef, read_batches
from data_prep.resuming import ResumableShards, batches_of_blocks
from data_prep.shards import ShardSet
from ldgan.engine.cli import UserError
from ldgan.engine.files import BackgroundWrites, writing_to
from ldgan.engine.images import to_uint8
from ldgan.engine.progress import ProgressBar
from ldgan.engine.shares import batches
from ldgan.engine.threads import map_ahead
from ldgan.metrics.pixels import psnr

# bfloat16 is as large as float16 with 3 bits less, and its range is no use to latents of unit variance; npy, which
# stores them, does not know it either.
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CHECKED_IMAGES = 8
VISIBLE_DB = 20 * math.log10(255)  # the PSNR of images that are one step of 255 apart in every value: 48.1 dB
MAX_PENDING_BATCHES = 2


@dataclass(frozen=True)
class MomentsEncoder:
    """Images -> the moments that are stored; ``dtype`` is a key of `DTYPES`, ``flips`` as in `encode_moments`."""

    autoencoder: AutoencoderKL
    flips: bool
    dtype: str

    @property
    def device(self) -> torch.device:
        """Where images are encoded."""
        return self.autoencoder.latent_mean.device

    def __call__(self, images: Tensor) -> Tensor:
        """Moments of images (B, 3, H, W) in [-1, 1], see `encode_moments`; fp32."""
        return encode_moments(self.autoencoder, images, flips=self.flips)

    def round(self, moments: Tensor) -> Tensor:
        """Moments as they are stored, on their device."""
        return moments.to(DTYPES[self.dtype])


class CaptionEncoder:
    """What latent shards keep of captions: themselves and, if there is a ``text_encoder``, their embeddings.

    ``counts`` are of the captions gone through so far: ``images``, ``captions`` that are not empty, and those of them
    that are ``truncated``, longer than the text encoder reads.
    """

    def __init__(self, shards: ShardSet, text_encoder: TextEncoder | None) -> None:
        self.text_encoder = text_encoder
        self.counts = {"images": 0, "captions": 0, "truncated": 0}
        self._shards = shards

    def members(self, blocks: Sequence[range], batch_size: int) -> Iterator[list[dict[str, bytes]]]:
        """Yield, for the batches of `batches_of_blocks`, each image's members (see `pack_caption`).

        Of the captions of a block, each that differs from those before it is encoded, once.
        """
        for block in blocks:
            known: dict[str, dict[str, bytes]] = {}
            for numbers in batches(block, batch_size):
                captions = read_captions(self._shards, numbers)
                new = {caption: number for number, caption in zip(numbers, captions) if caption not in known}
                known |= zip(new, self._encode(list(new), list(new.values())))
                self._count(captions)
                yield [known[caption] for caption in captions]

    def _encode(self, captions: list[str], numbers: list[int]) -> Iterator[dict[str, bytes]]:
        if self.text_encoder is None:
            yield from map(pack_caption, captions)
            return
        for number, caption, rows, mask in zip(numbers, captions, *self.text_encoder(captions)):
            stored = rows[mask].half().cpu()
            if not stored.isfinite().all():
                largest, limit = rows.abs().max().item(), torch.finfo(torch.float16).max
                raise UserError(
                    f"{self._shards.locate(number)}: the embedding of its caption reaches {largest:,.0f}, and fp16 ends"
                    f" at {limit:,.0f}; give another text encoder"
                )
            yield pack_caption(caption, stored if mask.any() else None)

    def _count(self, captions: list[str]) -> None:
        self.counts["images"] += len(captions)
        self.counts["captions"] += sum(bool(caption.strip()) for caption in captions)
        if self.text_encoder is not None:
            lengths = self.text_encoder.num_tokens(captions)
            self.counts["truncated"] += sum(length > self.text_encoder.max_tokens for length in lengths)


@torch.inference_mode()
def encode_moments(autoencoder: AutoencoderKL, images: Tensor, *, flips: bool) -> Tensor:
    """Moments (B, 2C, h, w), mean and std along channels, of images in [-1, 1].

    With ``flips`` (B, 2, 2C, h, w): a flipped latent is not the latent of a flipped image, so both are encoded.
    """

    def moments(batch: Tensor) -> Tensor:
        posterior = autoencoder.encode(batch)
        return torch.cat([posterior.mean, posterior.std], dim=1)

    if not flips:
        return moments(images)
    return torch.stack([moments(images), moments(images.flip(-1))], dim=1)


def shard_ranges(shards: ShardSet) -> list[range]:
    """The sample numbers of each shard."""
    ends = itertools.accumulate(shards.shard_sizes)
    return [range(end - size, end) for end, size in zip(ends, shards.shard_sizes)]


def parallel_passes(device: torch.device) -> int:
    """How many batches this process encodes at a time, each in a thread of its own; 0: one, in the main thread.

    On CPUs that is one for each of PyTorch's threads, which are then reduced to one: a convolution's last bits depend
    on the number of threads that compute it, and so would the latents on the number of processes and cores.
    """
    if device.type != "cpu":
        return 0
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return num_threads


def encode_blocks(
    encode: MomentsEncoder,
    images: ImageDataset,
    captions: CaptionEncoder,
    output: ResumableShards,
    blocks: Sequence[range],
    bar: ProgressBar,
    *,
    batch_size: int,
    num_workers: int,
    num_passes: int,
) -> None:
    """Encode the images of ``blocks`` and write their latents and captions; batches do not go beyond a block.

    ``num_passes`` is as of `parallel_passes`. Writing, with the copy from the device, is done by threads while the next
    batches are encoded.

    Raises:
        UserError: an image cannot be read; moments do not fit into the type that they are stored in; or the output
            cannot be written.
    """
    work = batches_of_blocks(blocks, batch_size)
    if not work:
        return

    def encode_batch(batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        return encode(batch["image"].to(encode.device)), batch["label"].tolist()

    order = ([SampleRef(number, flip=False) for number in numbers] for numbers in work)
    with closing(output), BackgroundWrites(MAX_PENDING_BATCHES) as writes:
        encoded = map_ahead(encode_batch, read_batches(images, order, num_workers), num_passes, ahead=1)
        for numbers, (moments, labels), members in zip(work, encoded, captions.members(blocks, batch_size)):
            writes.submit(_store, encode, images.shards, output, numbers, moments, labels, members)
            bar.advance(len(numbers))


def _store(
    encode: MomentsEncoder,
    shards: ShardSet,
    output: ResumableShards,
    numbers: range,
    moments: Tensor,
    labels: Sequence[int],
    captions: Sequence[dict[str, bytes]],
) -> None:
    stored = encode.round(moments).cpu().contiguous()
    is_finite = stored.isfinite().flatten(1).all(dim=1).tolist()
    if not all(is_finite):
        first = is_finite.index(False)
        raise _unstorable(shards.locate(numbers[first]), moments[first], encode.dtype)
    with writing_to(output.folder):
        for number, sample, label, caption in zip(numbers, stored, labels, captions):
            output.write(number, pack_moments(sample, label) | caption)


def _unstorable(where: str, moments: Tensor, dtype: str) -> UserError:
    if not moments.isfinite().all():
        return UserError(f"{where}: its latents are not finite numbers; look at the image and at the autoencoder")
    largest = moments.abs().max().item()
    limit = torch.finfo(DTYPES[dtype]).max
    return UserError(f"{where}: its latents reach {largest:,.0f}, and {dtype} ends at {limit:,.0f}; give --dtype fp32")


@torch.inference_mode()
def check_precision(encode: MomentsEncoder, images: ImageDataset) -> dict[str, Any]:
    """What rounding latents costs the first images: ``psnr`` in dB, and of how many images, ``num_images``.

    Stored means are decoded and compared with the images that fp32 means decode to, both rounded to 8 bits. The image
    that loses most counts; None where all pixels of all images are the same.
    """
    num_images = min(CHECKED_IMAGES, len(images))
    lowest = math.inf
    for number in range(num_images):  # one by one: decoding takes more memory than encoding
        image = images[SampleRef(number, flip=False)]["image"]
        assert isinstance(image, Tensor)
        mean = encode.autoencoder.encode(image[None].to(encode.device)).mean
        exact, rounded = (to_uint8(encode.autoencoder.decode(latent)) for latent in (mean, encode.round(mean).float()))
        lowest = min(lowest, psnr(rounded, exact).item())
    return {"num_images": num_images, "psnr": round(lowest, 2) if math.isfinite(lowest) else None}


def caption_line(counts: Mapping[str, int], max_tokens: int) -> str:
    """What `CaptionEncoder.counts` say, for people; ``max_tokens`` are those of its text encoder."""
    num_empty = counts["images"] - counts["captions"]
    return (
        f"captions: {counts['captions']:,} encoded now, {num_empty:,} images have none;"
        f" {counts['truncated']:,} are longer than {max_tokens} tokens and lost their ends"
    )


def precision_line(dtype: str, check: dict[str, Any]) -> str:
    """What `check_precision` has found, for people."""
    where = f"first {check['num_images']} images"
    if check["psnr"] is None:
        return f"{dtype} latents decode to the same pixels as fp32 latents ({where})"
    line = (
        f"{dtype} latents decode to the pixels of fp32 latents with a PSNR of {check['psnr']:.1f} dB or more ({where})"
    )
    return line if check["psnr"] > VISIBLE_DB else f"warning: {line}, which may be visible; --dtype fp32 loses nothing"

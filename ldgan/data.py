"""Where x_0 comes from: latent shards, image shards encoded on the fly, or pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autoencoder.latents import check_latents, draw
from autoencoder.networks import AutoencoderKL
from data_prep.loader import ImageDataset, LatentDataset
from data_prep.shards import ShardSet
from ldgan.engine.cli import UserError


@dataclass
class StoredLatents:
    """Standardised posteriors from latent shards; each read draws a new sample, or takes the mean."""

    dataset: LatentDataset
    shape: tuple[int, int, int]
    sample_posterior: bool
    description: str = "latents read from latent shards"

    def x_0(self, batch: dict[str, Tensor], noise: torch.Generator) -> Tensor:
        """Sample the posteriors of the batch, or take their means."""
        mean, std = batch["mean"].to(noise.device), batch["std"].to(noise.device)
        return draw(mean, std, noise) if self.sample_posterior else mean


@dataclass
class EncodedImages:
    """Latents of image shards, encoded as they are read; slower than `StoredLatents` in every epoch."""

    dataset: ImageDataset
    shape: tuple[int, int, int]
    sample_posterior: bool
    autoencoder: AutoencoderKL
    description: str = "image shards, encoded on the fly (autoencoder/encode.py would do it once)"

    @torch.no_grad()
    def x_0(self, batch: dict[str, Tensor], noise: torch.Generator) -> Tensor:
        """Encode the batch and sample the posteriors, or take their means."""
        posterior = self.autoencoder.encode(batch["image"].to(noise.device))
        return draw(posterior.mean, posterior.std, noise) if self.sample_posterior else posterior.mean


@dataclass
class Pixels:
    """Images themselves, in [-1, 1], as in the paper."""

    dataset: ImageDataset
    shape: tuple[int, int, int]
    description: str = "pixels of image shards"

    def x_0(self, batch: dict[str, Tensor], noise: torch.Generator) -> Tensor:
        """The images of the batch."""
        return batch["image"].to(noise.device)


DataSource: TypeAlias = StoredLatents | EncodedImages | Pixels
"""Has ``dataset``, the ``shape`` of x_0, a ``description``, and turns a batch of the dataset into x_0."""


def open_source(
    folder: str, autoencoder: AutoencoderKL | None, *, flips: bool = False, sample_posterior: bool = True
) -> DataSource:
    """Open a shard set for training on latents of ``autoencoder`` or, without one, on pixels.

    Raises:
        UserError: latent shards without an autoencoder, or of another one, or for ``flips`` without mirror images.
    """
    shards = ShardSet.open(folder)
    details = shards.manifest.details
    if autoencoder is None:
        if shards.manifest.kind == "latents":
            raise UserError(f"{folder}: holds latents; give --latent and autoencoder=RUN, or a folder of image shards")
        return Pixels(ImageDataset(shards), (3, details["resolution"], details["resolution"]))
    if shards.manifest.kind == "latents":
        check_latents(shards, autoencoder, flips=flips)
        channels, side, _ = details["latent_shape"]
        return StoredLatents(LatentDataset(shards), (channels, side, side), sample_posterior)
    shape = autoencoder.latent_shape(details["resolution"])
    return EncodedImages(ImageDataset(shards), shape, sample_posterior, autoencoder)

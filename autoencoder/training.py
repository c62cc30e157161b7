"""One training step of the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.losses import kl_loss, reconstruction_loss
from autoencoder.networks import AutoencoderKL
from ldgan.engine.accumulation import mean_terms, micro_batch_weight, micro_batches
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.seeding import generator


@dataclass
class LossConfig:
    """Loss = reconstruction + kl_weight * KL; every term is a mean, so a weight means the same at every size."""

    distance: Literal["l1", "l2"] = option("l1", "distance between pixels in [-1, 1]")
    kl_weight: float = option(1e-3, "weight of the KL divergence, in nats per latent dimension")


class AutoencoderTrainer:
    """Takes optimisation steps on an autoencoder; knows neither files nor schedules."""

    def __init__(
        self,
        accelerator: Accelerator,
        autoencoder: AutoencoderKL,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        *,
        loss: LossConfig,
        num_micro_batches: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._accelerator, self._autoencoder, self._optimizer, self._ema = (
            accelerator,
            autoencoder,
            optimizer,
            ema,
        )
        self._forward: nn.Module = accelerator.prepare(autoencoder)  # the same weights, with gradients reduced
        self._loss, self._num_micro_batches, self._batch_size = loss, num_micro_batches, batch_size
        self._seed = seed

    def step(self, step: int, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take step number ``step`` on this process's share of the batch; return the detached loss terms."""
        self._optimizer.zero_grad(set_to_none=True)
        weight = micro_batch_weight(self._accelerator, self._num_micro_batches)
        terms = []
        for number in micro_batches(self._accelerator, self._num_micro_batches, self._forward):
            images = next(batches)["image"].to(self._accelerator.device)
            noise = generator(images.device, self._seed, "posterior", step, number)
            terms.append(self.losses(images, noise))
            self._accelerator.backward(weight * terms[-1]["loss"])
        self._optimizer.step()
        self._ema.update(self._autoencoder, self._batch_size, step * self._batch_size)
        return mean_terms(terms)

    def losses(self, images: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        """The loss of images (B, C, H, W) in [-1, 1] and its terms, scalars."""
        shape = (len(images), *self._autoencoder.latent_shape(images.shape[-1]))
        reconstruction = self._forward(images, torch.randn(shape, generator=noise, device=images.device))
        pixels = reconstruction_loss(reconstruction.images, images, self._loss.distance)
        kl = kl_loss(reconstruction.posterior.kl())
        return {"loss": pixels + self._loss.kl_weight * kl, "reconstruction": pixels, "kl": kl}

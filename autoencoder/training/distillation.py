"""How a light decoder learns: one training step, and how close it comes to the decoder it imitates.

Its target is the output of the full decoder, not the image behind the latents: what the autoencoder lost is lost,
and a small network that guessed at it would blur. Latents are samples of the posteriors, not their means: so are
those that stage 2 learns to generate, and every epoch brings new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from autoencoder.evaluation.reconstruction import PSNR, ImageMetric, MeanOverImages, perceptual_metric
from autoencoder.inference.latents import draw
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.models.perceptual import PerceptualDistance
from autoencoder.training.losses import reconstruction_loss
from ldgan.engine.accumulation import Accumulation, mean_terms
from ldgan.engine.ema import EMA
from ldgan.engine.images import to_uint8
from ldgan.engine.philox import Random


class DistillationTrainer:
    """Takes optimisation steps on a light decoder; knows neither files nor schedules."""

    def __init__(
        self,
        accumulation: Accumulation,
        autoencoder: AutoencoderKL,
        light: LightDecoder,
        optimizer: torch.optim.Optimizer,
        ema: EMA[LightDecoder],
        perceptual: PerceptualDistance | None,
        *,
        distance: Literal["l1", "l2"],
        perceptual_weight: float,
    ) -> None:
        self._accumulation, self._autoencoder, self._light = accumulation, autoencoder, light
        self._optimizer, self._ema, self._perceptual = optimizer, ema, perceptual
        self._forward: nn.Module = accumulation.prepare(light)  # the same weights, with gradients reduced
        self._distance, self._perceptual_weight = distance, perceptual_weight

    def step(self, step: int, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take step number ``step`` on this process's share of the batch; return the detached loss terms."""
        self._optimizer.zero_grad(set_to_none=True)
        terms = []
        for number in self._accumulation.micro_batches(self._forward):
            noise = self._accumulation.random("posterior", step, number)
            latents, targets = self.pairs(next(batches), noise)
            terms.append(self.losses(latents, targets))
            self._accumulation.backward(terms[-1]["loss"])
        self._optimizer.step()
        self._accumulation.average(self._ema, self._light, step)
        return mean_terms(terms)

    @torch.no_grad()
    def pairs(self, batch: dict[str, Tensor], noise: Random) -> tuple[Tensor, Tensor]:
        """Latents (B, c, h, w), samples of the batch's posteriors, and their full decoding (B, C, H, W)."""
        with self._accumulation.accelerator.autocast():
            mean, std = posterior_moments(self._autoencoder, batch)
            latents = draw(mean, std, noise)
            return latents, self._autoencoder.decode(latents)

    def losses(self, latents: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of latents (B, c, h, w) and its terms before weighting, scalars; targets (B, C, H, W)."""
        images = self._forward(latents)
        pixels = reconstruction_loss(images, targets, self._distance)
        if self._perceptual is None:
            return {"loss": pixels, "reconstruction": pixels}
        features = self._perceptual(images, targets).mean()
        loss = pixels + self._perceptual_weight * features
        return {"loss": loss, "reconstruction": pixels, "perceptual": features}


def posterior_moments(autoencoder: AutoencoderKL, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (B, c, h, w), of a batch's standardised posteriors: those that are stored, or
    those of its images.
    """
    device = autoencoder.latent_mean.device
    if "image" not in batch:
        return batch["mean"].to(device), batch["std"].to(device)
    posterior = autoencoder.encode(batch["image"].to(device))
    return posterior.mean, posterior.std


def agreement_metrics(perceptual: PerceptualDistance | None) -> list[ImageMetric]:
    """PSNR and, if given, a perceptual distance."""
    return [PSNR] if perceptual is None else [PSNR, perceptual_metric(perceptual)]


@torch.no_grad()
def measure_agreement(
    light: LightDecoder,
    autoencoder: AutoencoderKL,
    batches: Iterable[Mapping[str, Tensor]],
    metrics: Sequence[ImageMetric],
) -> list[MeanOverImages]:
    """Each of ``metrics`` of the light decoder's images with the full decoder's as reference, both uint8.

    Posteriors are decoded at their means.
    """
    means = [MeanOverImages(autoencoder.latent_mean.device) for _ in metrics]
    for batch in batches:
        latents, _ = posterior_moments(autoencoder, batch)
        images, reference = to_uint8(light.decode(latents)), to_uint8(autoencoder.decode(latents))
        for metric, mean in zip(metrics, means):
            mean.add(metric.compute(images, reference))
    return means

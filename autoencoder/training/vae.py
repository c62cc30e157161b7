"""The two steps of stage 1: one for the autoencoder, one for the discriminator of its reconstructions.

One pass through the autoencoder serves both: the discriminator trains on what the autoencoder's step made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoencoder.models.autoencoder import AutoencoderKL, Reconstruction
from autoencoder.models.discriminator import PatchDiscriminator
from autoencoder.models.perceptual import PerceptualDistance
from autoencoder.training.losses import (
    AdversarialKind,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    kl_loss,
    negative_log_likelihood,
    reconstruction_loss,
)
from ldgan.engine.accumulation import Accumulation, mean_terms
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig
from ldgan.engine.philox import Random


@dataclass
class LossConfig:
    """Loss = distance + kl_weight * KL + ...; every term is a mean, so a weight means the same at every size."""

    distance: Literal["l1", "l2"] = option("l1", "distance between pixels in [-1, 1]")
    learned_variance: bool = option(
        False, "minimise distance / exp(s) + s instead, s learned: reconstruction counts the more, the better it is"
    )
    kl_weight: float = option(1e-3, "weight of the KL divergence, in nats per latent dimension")


@dataclass
class AdversarialConfig:
    """A PatchGAN discriminator of reconstructions, and what the autoencoder gives on its judgement."""

    weight: float = option(0.0, "weight of the autoencoder's adversarial loss; 0: no discriminator")
    kind: AdversarialKind = option("hinge", "loss of both players")
    start_step: int = option(1, "first step of the game; before it there is no adversarial term")
    adaptive: bool = option(
        True, "multiply the weight by the ratio of both losses' gradients at the decoder's last layer (VQGAN)"
    )
    base_channels: int = option(64, "channels of the discriminator's first layer")
    num_layers: int = option(3, "strided convolutions of the discriminator; 3: a logit sees 70 x 70 pixels")
    optimizer: OptimizerConfig = option(OptimizerConfig(beta1=0.5, beta2=0.9), "")


class LogVariance(nn.Module):
    """The learned scale of the reconstruction: one parameter, in a module so that processes average its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, distance: Tensor) -> Tensor:
        """Negative log-likelihood of a ``distance``, scalars both."""
        return negative_log_likelihood(distance, self.value)


@dataclass
class Adversary:
    """The discriminator and its optimizer."""

    discriminator: PatchDiscriminator
    optimizer: torch.optim.Optimizer


@dataclass
class Players:
    """The autoencoder, the average of its weights, and its adversary if there is one.

    ``optimizer`` holds the weights of the autoencoder and, if there is one, the ``log_variance``.
    """

    autoencoder: AutoencoderKL
    optimizer: torch.optim.Optimizer
    ema: EMA[AutoencoderKL]
    log_variance: LogVariance | None = None
    adversary: Adversary | None = None


class AutoencoderTrainer:
    """Takes optimisation steps on autoencoder and discriminator; knows neither files nor schedules."""

    def __init__(
        self,
        accumulation: Accumulation,
        players: Players,
        perceptual: PerceptualDistance | None,
        *,
        loss: LossConfig,
        perceptual_weight: float,
        adversarial: AdversarialConfig,
    ) -> None:
        self._accumulation, self._players, self._perceptual = accumulation, players, perceptual
        self._loss, self._perceptual_weight, self._adversarial = loss, perceptual_weight, adversarial
        # The same weights behind wrappers that average gradients over processes. Each player's own step goes
        # through its wrapper; the discriminator serves in the autoencoder's step as the bare network.
        discriminator = players.adversary.discriminator if players.adversary is not None else None
        self._reduced_autoencoder = accumulation.prepare(players.autoencoder)
        self._reduced_log_variance = accumulation.prepare(players.log_variance)
        self._reduced_discriminator = accumulation.prepare(discriminator)

    def step(self, step: int, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take step number ``step`` on this process's share of the batch; return the detached loss terms."""
        images = [next(batches)["image"].to(self._accumulation.device) for _ in self._accumulation.micro_batches()]
        adversary = self._players.adversary if step >= self._adversarial.start_step else None
        terms, reconstructions = self.autoencoder_step(step, images, adversary)
        if adversary is not None:
            terms |= self.discriminator_step(adversary, images, reconstructions)
        return terms

    def autoencoder_step(
        self, step: int, batches: Sequence[Tensor], adversary: Adversary | None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Train the autoencoder on this process's micro-batches, against ``adversary`` if given, which takes no
        gradient; return the loss terms and the detached reconstructions.
        """
        if adversary is not None:
            adversary.discriminator.requires_grad_(False)
        self._players.optimizer.zero_grad(set_to_none=True)
        terms, reconstructions = [], []
        reduced = (self._reduced_autoencoder, self._reduced_log_variance)
        for number, images in zip(self._accumulation.micro_batches(*reduced), batches):
            noise = self._accumulation.random("posterior", step, number)
            reconstruction = self.reconstruct(images, noise)
            terms.append(self.autoencoder_losses(images, reconstruction, adversary))
            self._accumulation.backward(terms[-1]["loss"])
            reconstructions.append(reconstruction.images.detach())
        self._players.optimizer.step()
        self._accumulation.average(self._players.ema, self._players.autoencoder, step)
        return mean_terms(terms), reconstructions

    def discriminator_step(
        self, adversary: Adversary, batches: Sequence[Tensor], reconstructions: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Train the discriminator on this process's micro-batches of images and their detached reconstructions."""
        adversary.discriminator.requires_grad_(True)
        adversary.optimizer.zero_grad(set_to_none=True)
        terms = []
        numbers = self._accumulation.micro_batches(self._reduced_discriminator)
        for _, images, fakes in zip(numbers, batches, reconstructions):
            real_logits, fake_logits = self._reduced_discriminator(torch.cat([images, fakes])).chunk(2)
            terms.append({"discriminator": discriminator_loss(real_logits, fake_logits, self._adversarial.kind)})
            self._accumulation.backward(terms[-1]["discriminator"])
        adversary.optimizer.step()
        return mean_terms(terms)

    def reconstruct(self, images: Tensor, noise: Random) -> Reconstruction:
        """One pass of images (B, C, H, W) in [-1, 1] through posterior samples and back."""
        shape = (len(images), *self._players.autoencoder.latent_shape(images.shape[-1]))
        return self._reduced_autoencoder(images, noise.normal(shape))

    def autoencoder_losses(
        self, images: Tensor, reconstruction: Reconstruction, adversary: Adversary | None
    ) -> dict[str, Tensor]:
        """The loss of the autoencoder and its terms before weighting, scalars."""
        terms, distance = self._distance(images, reconstruction.images)
        if self._players.log_variance is not None:
            terms["log_variance"] = self._players.log_variance.value.detach().clone()  # it is about to move
            distance = self._reduced_log_variance(distance)
        terms["kl"] = kl_loss(reconstruction.posterior.kl())
        loss = distance + self._loss.kl_weight * terms["kl"]
        if adversary is not None:
            game = self._game(distance, reconstruction.images, adversary)
            loss = loss + self._adversarial.weight * game.get("adaptive_weight", 1.0) * game["adversarial"]
            terms |= game
        return {"loss": loss, **terms}

    def _distance(self, images: Tensor, reconstructions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms that compare reconstructions with images, and their weighted sum."""
        pixels = reconstruction_loss(reconstructions, images, self._loss.distance)
        if self._perceptual is None:
            return {"reconstruction": pixels}, pixels
        features = self._perceptual(reconstructions, images).mean()
        return {"reconstruction": pixels, "perceptual": features}, pixels + self._perceptual_weight * features

    def _game(self, distance: Tensor, reconstructions: Tensor, adversary: Adversary) -> dict[str, Tensor]:
        """The adversarial loss of reconstructions and, if asked for, its adaptive weight."""
        loss = adversarial_loss(adversary.discriminator(reconstructions), self._adversarial.kind)
        if not self._adversarial.adaptive:
            return {"adversarial": loss}
        # Each micro-batch has its own weight, measured on it alone: so it is the same on however many processes,
        # needs no further exchange between them, and no second pass once all gradients are known.
        last_layer = self._players.autoencoder.decoder.conv_out.weight
        return {"adversarial": loss, "adaptive_weight": adaptive_weight(distance, loss, last_layer)}

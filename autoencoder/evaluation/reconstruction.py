"""What an evaluation of an autoencoder measures, accumulated image by image; processes add their sums up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from autoencoder.inference.latent_statistics import LatentMoments
from autoencoder.models.autoencoder import AutoencoderKL, Posterior
from autoencoder.models.perceptual import PerceptualDistance
from ldgan.engine.images import from_uint8, to_uint8
from ldgan.metrics.features import FeatureNetwork
from ldgan.metrics.frechet import FeatureStatistics
from ldgan.metrics.pixels import psnr

ACTIVITY_THRESHOLD = 0.01
MAX_PSNR = 100.0  # dB; that of an image reproduced exactly is infinite, and would be all that is left of the mean


class ImageMetric(NamedTuple):
    """A number per image: ``compute`` maps images and their reference, uint8 (B, 3, H, W), to (B,)."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    compute: Callable[[Tensor, Tensor], Tensor]


PSNR = ImageMetric("PSNR", "dB", "higher", lambda images, reference: psnr(images, reference).clamp(max=MAX_PSNR))


def perceptual_metric(distance: PerceptualDistance) -> ImageMetric:
    """A perceptual distance as a metric."""
    return ImageMetric(distance.name, "", "lower", lambda *pair: distance(*map(from_uint8, pair)))


class MeanOverImages:
    """Mean of a number per image, and the standard error of that mean."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # number, sum, sum of squares

    def add(self, values: Tensor) -> None:
        """Add the numbers of a batch of images, (B,)."""
        values = values.double()
        self.sums += torch.stack([torch.full_like(values, 1.0), values, values.square()]).sum(dim=1)

    @property
    def mean(self) -> float:
        """Mean over all images added."""
        number, total, _ = self.sums.tolist()
        return total / number

    @property
    def standard_error(self) -> float:
        """Standard deviation (unbiased variance) over the square root of the number of images, two at least."""
        number, total, squares = self.sums.tolist()
        variance = (squares - total * total / number) / (number - 1)
        return (max(variance, 0.0) / number) ** 0.5


class LatentActivity:
    """How much each dimension of the raw latents, (C, h, w), tells about an image.

    A dimension is inactive if the variance of its posterior mean over the data is below 0.01 (Burda et al.,
    arXiv 1509.00519, section 2.5). The threshold is relative to the prior N(0, I), hence raw latents: those of
    the KL divergence, before they are standardised.
    """

    def __init__(self, latent_shape: tuple[int, int, int], device: torch.device | str) -> None:
        # Number of images; sums of posterior means, of their squares and of KL divergences.
        self.sums = torch.zeros(4, *latent_shape, dtype=torch.float64, device=device)

    def add(self, posterior: Posterior) -> None:
        """Add raw posteriors (B, C, h, w)."""
        mean, kl = posterior.mean.double(), posterior.kl().double()
        self.sums += torch.stack([torch.ones_like(mean), mean, mean.square(), kl]).sum(dim=1)

    @property
    def inactive(self) -> Tensor:
        """Which dimensions are inactive, bool (C, h, w)."""
        number, total, squares, _ = self.sums
        return squares / number - (total / number).square() < ACTIVITY_THRESHOLD

    @property
    def kl(self) -> Tensor:
        """Mean KL divergence from N(0, I) of each dimension in nats, float64 (C, h, w)."""
        return self.sums[3] / self.sums[0]


class Evaluation:
    """Runs images, and noise in the place of latents, through an autoencoder and accumulates what to report.

    Reconstructions are those of posterior means; they are rounded to uint8 before they are measured, as they
    would be stored.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        latent_shape: tuple[int, int, int],
        metrics: Mapping[str, ImageMetric],
        features: FeatureNetwork | None,
    ) -> None:
        """Without ``features`` no Frechet distance is measured."""
        device = autoencoder.latent_mean.device
        self.autoencoder, self.metrics, self.features = autoencoder, metrics, features
        self.means = {name: MeanOverImages(device) for name in metrics}
        self.moments = LatentMoments(latent_shape[0], device)
        self.activity = LatentActivity(latent_shape, device)
        self.statistics: dict[str, FeatureStatistics] = {}
        if features is not None:
            kinds = ("images", "reconstructions", "prior_samples")
            self.statistics = {kind: FeatureStatistics(features.num_features, device) for kind in kinds}

    def add_images(self, images: Tensor) -> None:
        """Encode, decode and measure images (B, 3, H, W) in [-1, 1]."""
        reconstructions, posterior = reconstruct(self.autoencoder, images)
        raw = raw_posterior(self.autoencoder, posterior)
        self.moments.add(raw.mean, raw.std)
        self.activity.add(raw)
        originals = to_uint8(images)
        with torch.inference_mode():
            for name, metric in self.metrics.items():
                self.means[name].add(metric.compute(reconstructions, originals))
        self._add_features("images", originals)
        self._add_features("reconstructions", reconstructions)

    def add_prior_samples(self, noise: Tensor) -> None:
        """Decode noise ~ N(0, I), (B, C, h, w), as if it were standardised latents, and measure the images."""
        self._add_features("prior_samples", decode_uint8(self.autoencoder, noise))

    @property
    def accumulators(self) -> list[MeanOverImages | LatentMoments | LatentActivity | FeatureStatistics]:
        """Everything whose ``sums`` processes add up."""
        return [*self.means.values(), self.moments, self.activity, *self.statistics.values()]

    def _add_features(self, kind: str, images: Tensor) -> None:
        if self.features is not None:
            self.statistics[kind].add(self.features(images))


@torch.inference_mode()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Posterior]:
    """Reconstructions, uint8, of images (B, 3, H, W) in [-1, 1] at their posterior means; and the posteriors."""
    posterior = autoencoder.encode(images)
    return decode_uint8(autoencoder, posterior.mean), posterior


@torch.inference_mode()
def decode_uint8(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images, uint8 (B, 3, H, W), of standardised latents (B, C, h, w)."""
    return to_uint8(autoencoder.decode(latents))


@torch.inference_mode()
def raw_posterior(autoencoder: AutoencoderKL, posterior: Posterior) -> Posterior:
    """The posterior before its standardisation: what `AutoencoderKL.encode` did, undone."""
    mean, std = autoencoder.latent_mean, autoencoder.latent_std
    return Posterior(posterior.mean * std + mean, posterior.log_variance + 2 * std.log())

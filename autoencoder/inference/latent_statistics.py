"""Mean and standard deviation of latents over a data set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from autoencoder.models.autoencoder import AutoencoderKL


class LatentMoments:
    """Running sums over samples of raw posteriors; processes add theirs up by `sums`."""

    def __init__(self, latent_channels: int, device: torch.device) -> None:
        # Rows: number of values, sum of values, sum of squares; float64 keeps millions of images exact enough.
        self.sums = torch.zeros(3, latent_channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Add posteriors N(mean, std), both (B, latent_channels, h, w)."""
        mean, std = mean.double(), std.double()
        self.sums[0] += mean[:, 0].numel()
        self.sums[1] += mean.sum(dim=(0, 2, 3))
        self.sums[2] += (mean.square() + std.square()).sum(dim=(0, 2, 3))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (latent_channels,) in fp32, of samples from all posteriors added."""
        number, total, squares = self.sums
        mean = total / number
        return mean.float(), (squares / number - mean.square()).sqrt().float()


@torch.inference_mode()
def accumulate_moments(autoencoder: AutoencoderKL, images: Iterable[Tensor], device: torch.device) -> LatentMoments:
    """Moments of the raw latents of batches of images (B, C, H, W) in [-1, 1]."""
    moments = LatentMoments(autoencoder.latent_mean.shape[0], device)
    for batch in images:
        posterior = autoencoder.raw_posterior(batch.to(device))
        moments.add(posterior.mean, posterior.std)
    return moments

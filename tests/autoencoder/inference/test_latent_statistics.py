"""Statistics of latents: those of all samples together, and standardised by them the data have mean 0, std 1."""

from __future__ import annotations

import numpy as np
import torch

from autoencoder.inference.latent_statistics import LatentMoments, accumulate_moments

CPU = torch.device("cpu")


def test_statistics_of_points_are_those_of_numpy() -> None:
    latents = torch.randn(37, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 8
    moments = LatentMoments(3, CPU)
    for batch in latents.split(8):  # the last one is smaller
        moments.add(batch, torch.zeros_like(batch))
    mean, std = moments.statistics()
    values = latents.double().numpy()
    np.testing.assert_allclose(mean.numpy(), values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std(axis=(0, 2, 3)), rtol=1e-6)


def test_a_posteriors_own_variance_counts() -> None:
    # Law of total variance: means -1 and 1, each with std 2, have variance 1 + 4.
    moments = LatentMoments(1, CPU)
    moments.add(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0))
    mean, std = moments.statistics()
    assert mean.item() == 0
    assert std.item() == np.float32(5**0.5)


def test_sums_of_processes_add_up() -> None:
    mean, std = torch.randn(6, 2, 3, 3), torch.rand(6, 2, 3, 3)
    whole, first, second = (LatentMoments(2, CPU) for _ in range(3))
    whole.add(mean, std)
    first.add(mean[:4], std[:4])
    second.add(mean[4:], std[4:])
    first.sums += second.sums
    torch.testing.assert_close(first.statistics(), whole.statistics())


def test_large_means_do_not_swallow_the_std() -> None:
    moments = LatentMoments(1, CPU)
    latents = 1000 + 0.01 * torch.randn(50, 1, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments.add(latents, torch.zeros_like(latents))
    np.testing.assert_allclose(moments.statistics()[1].item(), latents.numpy().std(), rtol=1e-4)


def test_standardised_latents_of_the_data_have_mean_0_and_std_1(tiny_autoencoder) -> None:
    autoencoder = tiny_autoencoder()
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    autoencoder.set_latent_statistics(*accumulate_moments(autoencoder, images.split(10), CPU).statistics())
    with torch.no_grad():
        posterior = autoencoder.encode(images)
    mean = posterior.mean.mean(dim=(0, 2, 3))
    variance = posterior.mean.var(dim=(0, 2, 3), unbiased=False) + posterior.std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(variance, torch.ones(2), rtol=1e-5, atol=0)

"""The autoencoder: its posterior, its latent statistics, its convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from autoencoder.networks import (
    MAX_LOG_VARIANCE,
    MIN_LOG_VARIANCE,
    AutoencoderKL,
    Posterior,
    group_norm,
)


def new_autoencoder(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    numbers = {
        "image_channels": 3,
        "latent_channels": 2,
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "mid_attention": True,
        "dropout": 0.0,
    }
    return AutoencoderKL(**numbers | changes).eval()


def images(batch_size: int = 3, side: int = 8) -> torch.Tensor:
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_posterior() -> Posterior:
    mean, log_variance = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Posterior(mean, log_variance)


def test_kl_is_that_of_torch_distributions() -> None:
    posterior = random_posterior()
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected)


def test_kl_of_the_prior_is_zero() -> None:
    assert torch.equal(Posterior(torch.zeros(2), torch.zeros(2)).kl(), torch.zeros(2))


def test_samples_are_mean_plus_std_times_noise() -> None:
    posterior, noise = random_posterior(), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.log_variance.exp().sqrt() * noise)


@pytest.mark.parametrize(("bias", "bound"), [(1e4, MAX_LOG_VARIANCE), (-1e4, MIN_LOG_VARIANCE)])
def test_log_variance_stays_within_its_bounds(bias: float, bound: float) -> None:
    autoencoder = new_autoencoder()
    nn.init.constant_(autoencoder.encoder.conv_out.bias, bias)
    posterior = autoencoder.raw_posterior(images())
    assert torch.equal(posterior.log_variance, torch.full_like(posterior.mean, bound))
    assert posterior.kl().isfinite().all()


def test_encode_standardises_what_raw_posterior_gives() -> None:
    autoencoder, x = new_autoencoder(), images()
    raw = autoencoder.raw_posterior(x)
    torch.testing.assert_close(autoencoder.encode(x), raw, rtol=0, atol=0)  # statistics are 0 and 1 at first
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0])
    autoencoder.set_latent_statistics(mean, std)
    posterior = autoencoder.encode(x)
    mean, std = mean[:, None, None], std[:, None, None]
    torch.testing.assert_close(posterior.mean, (raw.mean - mean) / std)
    torch.testing.assert_close(posterior.std, raw.std / std)


def test_decode_undoes_the_standardisation() -> None:
    autoencoder, x, noise = new_autoencoder(), images(), torch.randn(3, 2, 4, 4)
    autoencoder.set_latent_statistics(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0]))
    by_hand = autoencoder.decode(autoencoder.encode(x).sample(noise))
    torch.testing.assert_close(by_hand, autoencoder(x, noise).images, rtol=1e-4, atol=1e-5)


def test_statistics_travel_with_the_weights() -> None:
    source, target = new_autoencoder(), new_autoencoder()
    source.set_latent_statistics(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0]))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.latent_mean.flatten(), torch.tensor([3.0, -1.0]))
    assert torch.equal(target.latent_std.flatten(), torch.tensor([0.5, 7.0]))


@pytest.mark.parametrize(("multipliers", "factor"), [([1], 1), ([1, 2], 2), ([1, 2, 2], 4), ([1, 1, 1, 2], 8)])
def test_each_level_after_the_first_halves_the_size(multipliers: list[int], factor: int) -> None:
    autoencoder, x = new_autoencoder(channel_multipliers=multipliers), images(2, side=16)
    assert autoencoder.latent_shape(16) == (2, 16 // factor, 16 // factor)
    assert autoencoder.encode(x).mean.shape == (2, 2, 16 // factor, 16 // factor)
    assert autoencoder(x, torch.zeros(2, *autoencoder.latent_shape(16))).images.shape == x.shape


def test_images_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 6x8 are no multiple of 4"):
        new_autoencoder(channel_multipliers=[1, 1, 1]).encode(images()[:, :, :6])


@pytest.mark.parametrize("mid_attention", [False, True])
def test_every_weight_takes_part(mid_attention: bool) -> None:
    autoencoder = new_autoencoder(mid_attention=mid_attention)
    reconstruction = autoencoder(images(), torch.randn(3, 2, 4, 4))
    (reconstruction.images.square().sum() + reconstruction.posterior.kl().sum()).backward()
    assert [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    autoencoder, x = new_autoencoder(), images(3)
    batch = autoencoder.encode(x).mean
    torch.testing.assert_close(
        torch.cat([autoencoder.encode(row[None]).mean for row in x]), batch, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 1), (6, 1), (8, 2), (12, 2), (24, 4), (48, 8), (64, 16), (128, 32), (512, 32)],
)
def test_groups_have_at_least_four_channels(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups

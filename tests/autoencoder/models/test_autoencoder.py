"""The autoencoder: its posterior, its latent statistics, its convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from autoencoder.models.autoencoder import (
    MAX_LOG_VARIANCE,
    MIN_LOG_VARIANCE,
    AutoencoderKL,
    Posterior,
)
from autoencoder.models.blocks import SelfAttention, group_norm
from autoencoder.models.config import AutoencoderConfig
from ldgan.engine.cli import UserError

EVERY_OPTION: dict[str, Any] = {
    "mid_attention": True,
    "attention_factors": [1, 2],
    "num_groups": 2,
    "latent_convolutions": True,
}


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
def test_log_variance_stays_within_its_bounds(tiny_autoencoder, bias: float, bound: float) -> None:
    autoencoder = tiny_autoencoder()
    nn.init.constant_(autoencoder.encoder.conv_out.bias, bias)
    posterior = autoencoder.raw_posterior(images())
    assert torch.equal(posterior.log_variance, torch.full_like(posterior.mean, bound))
    assert posterior.kl().isfinite().all()


def test_encode_standardises_what_raw_posterior_gives(tiny_autoencoder) -> None:
    autoencoder, x = tiny_autoencoder(), images()
    raw = autoencoder.raw_posterior(x)
    torch.testing.assert_close(autoencoder.encode(x), raw, rtol=0, atol=0)  # statistics are 0 and 1 at first
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0])
    autoencoder.set_latent_statistics(mean, std)
    posterior = autoencoder.encode(x)
    mean, std = mean[:, None, None], std[:, None, None]
    torch.testing.assert_close(posterior.mean, (raw.mean - mean) / std)
    torch.testing.assert_close(posterior.std, raw.std / std)


def test_decode_undoes_the_standardisation(tiny_autoencoder) -> None:
    autoencoder, x, noise = tiny_autoencoder(), images(), torch.randn(3, 2, 4, 4)
    autoencoder.set_latent_statistics(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0]))
    by_hand = autoencoder.decode(autoencoder.encode(x).sample(noise))
    torch.testing.assert_close(by_hand, autoencoder(x, noise).images, rtol=1e-4, atol=1e-5)


def test_statistics_travel_with_the_weights(tiny_autoencoder) -> None:
    source, target = tiny_autoencoder(), tiny_autoencoder()
    source.set_latent_statistics(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 7.0]))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.latent_mean.flatten(), torch.tensor([3.0, -1.0]))
    assert torch.equal(target.latent_std.flatten(), torch.tensor([0.5, 7.0]))


@pytest.mark.parametrize("latent_channels", [1, 16])
@pytest.mark.parametrize(
    ("multipliers", "factor"),
    [([1], 1), ([1, 2], 2), ([1, 2, 2], 4), ([1, 1, 1, 2], 8), ([1, 1, 2, 2, 2], 16), ([1, 1, 1, 1, 2, 2], 32)],
)
def test_each_level_after_the_first_halves_the_size(
    tiny_autoencoder, multipliers: list[int], factor: int, latent_channels: int
) -> None:
    autoencoder, x = tiny_autoencoder(channel_multipliers=multipliers, latent_channels=latent_channels), images(2, 32)
    assert autoencoder.latent_shape(32) == (latent_channels, 32 // factor, 32 // factor)
    assert autoencoder.encode(x).mean.shape == (2, latent_channels, 32 // factor, 32 // factor)
    assert autoencoder(x, torch.zeros(2, *autoencoder.latent_shape(32))).images.shape == x.shape


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 2), (2, 2)])
def test_images_that_do_not_divide_are_refused(tiny_autoencoder, height: int, width: int) -> None:
    autoencoder = tiny_autoencoder(channel_multipliers=[1, 1, 1])
    message = f"images of {height}x{width} px are no multiple of the autoencoder's factor 4"
    with pytest.raises(UserError, match=message):
        autoencoder.encode(images()[:, :, :height, :width])
    if height == width:
        with pytest.raises(UserError, match=message):
            autoencoder.latent_shape(height)


@pytest.mark.parametrize("numbers", [{}, {"mid_attention": True}, EVERY_OPTION])
def test_every_weight_takes_part(tiny_autoencoder, numbers: dict[str, Any]) -> None:
    autoencoder = tiny_autoencoder(**numbers)
    reconstruction = autoencoder(images(), torch.randn(3, 2, 4, 4))
    (reconstruction.images.square().sum() + reconstruction.posterior.kl().sum()).backward()
    assert [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_follows_every_residual_block_of_its_levels(tiny_autoencoder) -> None:
    autoencoder = tiny_autoencoder(channel_multipliers=[1, 1, 1], attention_factors=[2], num_res_blocks=2)
    assert list(autoencoder.encoder.levels) == [
        *("f1_block0", "f1_block1", "f2_down", "f2_block0", "f2_attention0", "f2_block1", "f2_attention1"),
        *("f4_down", "f4_block0", "f4_block1"),
    ]
    assert list(autoencoder.decoder.levels) == [
        *("f4_block0", "f4_block1", "f4_block2", "f4_up"),
        *("f2_block0", "f2_attention0", "f2_block1", "f2_attention1", "f2_block2", "f2_attention2", "f2_up"),
        *("f1_block0", "f1_block1", "f1_block2"),
    ]


def test_self_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2, "sdpa"), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).double().reshape(2, 3, 8, 15).unbind(1)  # (B, C, positions) each
    weights = (q.transpose(1, 2) @ k / 8**0.5).softmax(dim=2)
    attended = (v @ weights.transpose(1, 2)).reshape(2, 8, 3, 5).float()
    expected = x + F.conv2d(attended, layer.out.weight, layer.out.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_without_gradients_numbers_and_inputs_stay_the_same(tiny_autoencoder) -> None:
    # Activations are then computed in place.
    autoencoder, x, latents = tiny_autoencoder(**EVERY_OPTION), images(), torch.randn(3, 2, 4, 4)
    untouched = x.clone(), latents.clone()
    expected = autoencoder.encode(x), autoencoder.decode(latents)
    with torch.no_grad():
        torch.testing.assert_close((autoencoder.encode(x), autoencoder.decode(latents)), expected, rtol=0, atol=0)
    assert torch.equal(x, untouched[0])
    assert torch.equal(latents, untouched[1])


def train(autoencoder: AutoencoderKL) -> tuple[dict[str, Tensor], int]:
    """Gradients of a loss, and the bytes of activations that were kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(3)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reconstruction = autoencoder(images(4, 16), torch.ones(4, *autoencoder.latent_shape(16)))
        loss = reconstruction.images.square().mean() + reconstruction.posterior.kl().mean()
    loss.backward()
    weights = {parameter.data_ptr() for parameter in autoencoder.parameters()}
    gradients = {name: parameter.grad for name, parameter in autoencoder.named_parameters()}
    return gradients, sum(size for pointer, size in kept.items() if pointer not in weights)


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(tiny_autoencoder) -> None:
    numbers = {**EVERY_OPTION, "dropout": 0.3, "num_res_blocks": 2}
    gradients, kept = train(tiny_autoencoder(**numbers).train())
    recomputed, kept_inputs = train(tiny_autoencoder(**numbers, gradient_checkpointing=True).train())
    torch.testing.assert_close(recomputed, gradients, rtol=0, atol=0)
    assert kept_inputs < kept / 3


def test_gradient_checkpointing_has_no_part_in_evaluation(tiny_autoencoder) -> None:
    _, kept = train(tiny_autoencoder(**EVERY_OPTION).eval())
    _, kept_too = train(tiny_autoencoder(**EVERY_OPTION, gradient_checkpointing=True).eval())
    assert kept == kept_too


def test_an_autoencoder_tells_the_numbers_it_was_built_with() -> None:
    config = AutoencoderConfig(**EVERY_OPTION, base_channels=4, channel_multipliers=[1, 3], gradient_checkpointing=True)
    autoencoder = AutoencoderKL(config)
    assert autoencoder.config == config
    assert {module.num_groups for module in autoencoder.modules() if isinstance(module, nn.GroupNorm)} == {2}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"attention_factors": [1, 16]}, r"attention_factors: no level has factor 16; choose among \[1, 2, 4\]"),
        ({"num_groups": 3}, "num_groups 3 does not divide 32 channels; choose a divisor"),
        ({"channel_multipliers": []}, "channel_multipliers is empty; give one number per level"),
    ],
)
def test_numbers_that_make_no_network_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"network.{message}"):
        AutoencoderKL(AutoencoderConfig(**numbers))


def test_layers_keep_the_names_and_the_order_of_saved_checkpoints(tiny_autoencoder) -> None:
    # Order matters as well: with it, a seed gives the same initial weights.
    autoencoder = tiny_autoencoder(mid_attention=True)
    block = ("norm1", "conv1", "norm2", "conv2")
    middle = [*(f"mid.0.{name}" for name in block), "mid.1.norm", "mid.1.qkv", "mid.1.out"]
    middle += [f"mid.2.{name}" for name in block]

    def level(*names: str) -> list[str]:
        return [f"levels.{name}.{layer}" for name in names for layer in block]

    encoder = ["conv_in", *level("f1_block0"), "levels.f2_down.conv", *level("f2_block0"), "levels.f2_block0.skip"]
    encoder += [*middle, "norm_out", "conv_out"]
    decoder = ["conv_in", *middle, *level("f2_block0", "f2_block1"), "levels.f2_up.conv"]
    decoder += [*level("f1_block0"), "levels.f1_block0.skip", *level("f1_block1"), "norm_out", "conv_out"]
    expected = [f"encoder.{name}" for name in encoder] + [f"decoder.{name}" for name in decoder]
    saved = dict.fromkeys(name.rpartition(".")[0] for name in autoencoder.state_dict())
    assert [name for name in saved if name] == expected


def test_a_sample_does_not_depend_on_the_rest_of_its_batch(tiny_autoencoder) -> None:
    autoencoder, x = tiny_autoencoder(), images(3)
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

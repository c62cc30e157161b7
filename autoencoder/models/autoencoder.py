"""The KL-regularised autoencoder: encoder, diagonal Gaussian posterior, decoder, latent statistics.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752),
appendix G, is the source of the architecture; Kingma and Welling (arXiv 1312.6114) of the objective.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoder.models.blocks import BlockBuilder, Downsample, Upsample, apply_blocks, silu
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.diffusers_format import load_diffusers, save_diffusers
from ldgan.engine.cli import UserError

# exp(-30) and exp(20): far outside what training visits, but finite, also in bf16.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


class Posterior(NamedTuple):
    """A diagonal Gaussian q(z | x); both fields (B, latent_channels, h, w)."""

    mean: Tensor
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, latent_channels, h, w)."""
        return torch.exp(0.5 * self.log_variance)

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterised sample: mean + std * noise, with noise ~ N(0, I)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q(z | x) || N(0, I)) in nats for each latent dimension, (B, latent_channels, h, w)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance)


class Reconstruction(NamedTuple):
    """What one pass through the autoencoder gives: the images again, and the posterior they came through."""

    images: Tensor
    posterior: Posterior


class AutoencoderKL(nn.Module):
    """Images (B, image_channels, H, W) in [-1, 1] <-> standardised latents (B, latent_channels, H / f, W / f).

    f = 2 ** (len(channel_multipliers) - 1), and H, W must be multiples of it. `encode` and `decode` speak
    standardised latents: zero mean and unit variance per channel over the training set, by the buffers
    ``latent_mean`` and ``latent_std`` (0 and 1 until `set_latent_statistics`). No caller scales latents.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        """Raises a UserError for numbers that make no network."""
        super().__init__()
        config.validate()
        self.config = config
        self.downsampling_factor = 2 ** (len(config.channel_multipliers) - 1)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(config.latent_channels, 1, 1))

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode, sample with ``noise`` (latent shape), decode: the training pass.

        Encode and decode stay inside `forward` so that DistributedDataParallel sees every gradient.
        """
        posterior = self.raw_posterior(images)
        return Reconstruction(self.decoder(posterior.sample(noise)), posterior)

    def raw_posterior(self, images: Tensor) -> Posterior:
        """Posterior over latents as the encoder makes them, before standardisation: the one with the KL term."""
        self._check_size(*images.shape[-2:])
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))

    def encode(self, images: Tensor) -> Posterior:
        """Posterior over standardised latents of images in [-1, 1]."""
        mean, log_variance = self.raw_posterior(images)
        return Posterior((mean - self.latent_mean) / self.latent_std, log_variance - 2 * self.latent_std.log())

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1] and not clamped, of standardised latents."""
        return self.decoder(latents * self.latent_std + self.latent_mean).float()

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store mean and standard deviation, (latent_channels,), of raw latents over the training set."""
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    @classmethod
    def from_diffusers(cls, folder: str | os.PathLike[str]) -> AutoencoderKL:
        """Load a model of diffusers, in eval mode: see `autoencoder.models.diffusers_format.load_diffusers`."""
        return load_diffusers(folder, cls).eval()

    def save_diffusers(self, folder: str | os.PathLike[str]) -> None:
        """Save for diffusers as a new ``folder``: see `autoencoder.models.diffusers_format.save_diffusers`."""
        save_diffusers(self.config, self.state_dict(), folder)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(latent_channels, h, w) of square images of ``resolution`` pixels; a UserError if they do not divide."""
        self._check_size(resolution, resolution)
        side = resolution // self.downsampling_factor
        return (self.latent_mean.shape[0], side, side)

    def _check_size(self, height: int, width: int) -> None:
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise UserError(
                f"images of {height}x{width} px are no multiple of the autoencoder's factor"
                f" {self.downsampling_factor}; give images of another size, or another autoencoder"
            )


class Encoder(nn.Module):
    """Residual levels, each after the first at half the resolution of the one before."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        blocks, widths, out_channels = BlockBuilder(config), config.widths, 2 * config.latent_channels
        self.gradient_checkpointing = config.gradient_checkpointing
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleDict()
        channels = widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.levels[f"f{2**level}_down"] = Downsample(channels)
            self.levels.update(blocks.level(2**level, channels, width, config.num_res_blocks))
            channels = width
        self.mid = blocks.middle(channels)
        self.norm_out = blocks.norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.latent_conv = nn.Conv2d(out_channels, out_channels, 1) if config.latent_convolutions else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.training and self.gradient_checkpointing
        x = apply_blocks([*self.levels.values(), *self.mid], self.conv_in(x), recompute=recompute)
        return self.latent_conv(self.conv_out(silu(self.norm_out(x))))


class Decoder(nn.Module):
    """The encoder's mirror image: from the lowest resolution up."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        blocks, widths, in_channels = BlockBuilder(config), config.widths, config.latent_channels
        self.gradient_checkpointing = config.gradient_checkpointing
        channels = widths[-1]
        self.latent_conv = nn.Conv2d(in_channels, in_channels, 1) if config.latent_convolutions else nn.Identity()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.mid = blocks.middle(channels)
        self.levels = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            self.levels.update(blocks.level(2**level, channels, width, config.num_res_blocks + 1))
            channels = width
            if level > 0:
                self.levels[f"f{2**level}_up"] = Upsample(channels)
        self.norm_out = blocks.norm(channels)
        self.conv_out = nn.Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        recompute = self.training and self.gradient_checkpointing
        x = self.conv_in(self.latent_conv(latents))
        x = apply_blocks([*self.mid, *self.levels.values()], x, recompute=recompute)
        return self.conv_out(silu(self.norm_out(x)))

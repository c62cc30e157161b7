"""The KL-regularised autoencoder: encoder, diagonal Gaussian posterior, decoder, latent statistics.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752),
appendix G, is the source of the architecture; Kingma and Welling (arXiv 1312.6114) of the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldgan.engine.config import option

# exp(-30) and exp(20): far outside what training visits, but finite, also in bf16.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@dataclass
class AutoencoderConfig:
    """The numbers that define an `AutoencoderKL`; they travel inside every checkpoint."""

    image_channels: int = option(3, "channels of the images")
    latent_channels: int = option(4, "channels of the latents")
    base_channels: int = option(32, "channels at full resolution")
    channel_multipliers: list[int] = option(
        [1, 2, 4], "channels per level over base_channels; each level after the first halves height and width"
    )
    num_res_blocks: int = option(1, "residual blocks per level of the encoder; the decoder has one more")
    mid_attention: bool = option(False, "self-attention between the two residual blocks in the middle")
    dropout: float = option(0.0, "dropout probability inside residual blocks")


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

    def __init__(
        self,
        *,
        image_channels: int,
        latent_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        mid_attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.downsampling_factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(image_channels, 2 * latent_channels, widths, num_res_blocks, mid_attention, dropout)
        self.decoder = Decoder(latent_channels, image_channels, widths, num_res_blocks + 1, mid_attention, dropout)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode, sample with ``noise`` (latent shape), decode: the training pass.

        Encode and decode stay inside `forward` so that DistributedDataParallel sees every gradient.
        """
        posterior = self.raw_posterior(images)
        return Reconstruction(self.decoder(posterior.sample(noise)), posterior)

    def raw_posterior(self, images: Tensor) -> Posterior:
        """Posterior over latents as the encoder makes them, before standardisation: the one with the KL term."""
        height, width = images.shape[-2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(f"images of {height}x{width} are no multiple of {self.downsampling_factor}")
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

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(latent_channels, h, w) of square images of ``resolution`` pixels."""
        side = resolution // self.downsampling_factor
        return (self.latent_mean.shape[0], side, side)


class Encoder(nn.Module):
    """Residual levels, each after the first at half the resolution of the one before."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_blocks: int,
        mid_attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleDict()
        channels = widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.levels[f"f{2**level}_down"] = Downsample(channels)
            for block in range(num_blocks):
                self.levels[f"f{2**level}_block{block}"] = ResidualBlock(channels, width, dropout)
                channels = width
        self.mid = middle(channels, mid_attention, dropout)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.levels.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The encoder's mirror image: from the lowest resolution up."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_blocks: int,
        mid_attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.mid = middle(channels, mid_attention, dropout)
        self.levels = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(num_blocks):
                self.levels[f"f{2**level}_block{block}"] = ResidualBlock(channels, width, dropout)
                channels = width
            if level > 0:
                self.levels[f"f{2**level}_up"] = Upsample(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for block in self.levels.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def middle(channels: int, attention: bool, dropout: float) -> nn.Sequential:
    """Residual block, self-attention where asked for, residual block; at the lowest resolution."""
    blocks: list[nn.Module] = [
        ResidualBlock(channels, channels, dropout),
        ResidualBlock(channels, channels, dropout),
    ]
    if attention:
        blocks.insert(1, SelfAttention(channels))
    return nn.Sequential(*blocks)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip connection (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (B, h * w, C) each
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded right and below as in latent diffusion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with `num_groups`."""
    return nn.GroupNorm(num_groups(channels), channels, eps=1e-6)


def num_groups(channels: int) -> int:
    """Up to 32 groups of at least four channels.

    Groups of a single channel would be instance norms, which forget how strong each channel is: with them a
    small autoencoder needs several times as long to learn colours.
    """
    return next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))

"""The light decoder: a small network that imitates the decoder of an autoencoder at a fraction of its cost.

The idea is TAESD's (O. Bohan Boer Boesen, github.com/madebyollin/taesd): plain convolutions, distilled, come
close to a decoder of many times their size. `autoencoder/distill.py` trains one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.models.autoencoder import AutoencoderKL
from ldgan.engine.cli import UserError
from ldgan.engine.config import option


@dataclass
class LightDecoderConfig:
    """The numbers that define a `LightDecoder`, beside those of its autoencoder.

    They go by resolution, so that one config serves autoencoders of every factor. An autoencoder of factor 4
    has the first two levels; one of factor 32 has five, and the last number serves those that have none.
    """

    widths: list[int] = option([64, 64, 96], "channels at 1/2, 1/4, 1/8 ... of the images' height and width")
    num_blocks: list[int] = option([3, 3, 3], "residual blocks at 1/2, 1/4, 1/8 ... of the images' height and width")

    def validate(self) -> None:
        """Raise a UserError for numbers that make no network."""
        for name, numbers in vars(self).items():
            if not numbers or min(numbers) < 1:
                raise UserError(f"network.{name} is {numbers}; give one number per level, each 1 or more: [64, 64, 96]")


class LightDecoder(nn.Module):
    """Standardised latents (B, latent_channels, h, w) -> images (B, image_channels, f h, f w), about [-1, 1].

    f = 2 ** len(widths). Without normalisation and attention a pixel depends only on the latents around it, so
    that h and w may be any. Nothing is computed at the images' own resolution: at half of it a convolution makes
    each 2x2 pixels at once (Shi et al., arXiv 1609.05158).

    Latents come in as they are. TAESD bounds them by 3 tanh(x / 3); here that cost 0.2 to 0.6 dB in each of
    three short runs, and the decoder that is imitated has no bound either.
    """

    def __init__(
        self, *, latent_channels: int, image_channels: int, widths: Sequence[int], num_blocks: Sequence[int]
    ) -> None:
        """``widths`` and ``num_blocks`` per level, from half of the images' resolution down to the latents'."""
        super().__init__()
        self.downsampling_factor = 2 ** len(widths)
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.levels = nn.ModuleDict()
        for level, (width, number) in reversed(list(enumerate(zip(widths, num_blocks, strict=True), start=1))):
            if level < len(widths):
                self.levels[f"f{2**level}_up"] = Upsample(channels, width)
            for block in range(number):
                self.levels[f"f{2**level}_block{block}"] = PlainBlock(width)
            channels = width
        self.conv_out = nn.Conv2d(channels, 4 * image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """The training pass; `decode` is for use."""
        x = self.conv_in(latents)
        for block in self.levels.values():
            x = block(x)
        return F.pixel_shuffle(self.conv_out(x), 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1] and not clamped, in fp32, of standardised latents: as `AutoencoderKL.decode`."""
        return self(latents).float()


class PlainBlock(nn.Module):
    """Two 3x3 convolutions beside a skip connection, without normalisation (Lim et al., arXiv 1707.02921)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images of the same shape out."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Upsample(nn.Module):
    """Convolve, then double height and width by nearest neighbour: a quarter of the work of the other order."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, 2 h, 2 w)."""
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")


def build_light_decoder(config: LightDecoderConfig, autoencoder: AutoencoderKL) -> LightDecoder:
    """A fresh light decoder for the latents of ``autoencoder``.

    Raises:
        UserError: if the numbers make no network, or the autoencoder does not downsample.
    """
    config.validate()
    num_levels = autoencoder.downsampling_factor.bit_length() - 1
    if num_levels == 0:
        raise UserError("an autoencoder of factor 1 has nothing to gain from a light decoder; give one of 2 or more")
    return LightDecoder(
        latent_channels=autoencoder.config.latent_channels,
        image_channels=autoencoder.config.image_channels,
        widths=_per_level(config.widths, num_levels),
        num_blocks=_per_level(config.num_blocks, num_levels),
    )


def _per_level(numbers: Sequence[int], num_levels: int) -> list[int]:
    return [numbers[min(level, len(numbers) - 1)] for level in range(num_levels)]

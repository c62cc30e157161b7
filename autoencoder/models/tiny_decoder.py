"""The decoder of diffusers' AutoencoderTiny, TAESD say, as a light decoder.

Ollin Boer Bohan, github.com/madebyollin/taesd, trains such networks for the latents of well-known autoencoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.models.diffusers_format import CONFIG_FILE, read_settings, read_weights, weights_file
from autoencoder.models.light_decoder import LightDecoder
from ldgan.engine.cli import UserError
from ldgan.engine.rebuilding import meta_device
from ldgan.engine.weights import check_fit

CLASS_NAME = "AutoencoderTiny"
PREFIX = "decoder."
# What diffusers takes for settings that a config.json lacks; those of the encoder are not read.
DEFAULTS: Mapping[str, Any] = {
    "out_channels": 3,
    "latent_channels": 4,
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_decoder_blocks": [3, 3, 3, 1],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


class TinyDecoder(LightDecoder):
    """A `LightDecoder` to those who use it, of AutoencoderTiny's layers under its names.

    f = 2 ** (len(widths) - 1). Its latents are ``scale`` times the standardised ones.
    """

    scale: Tensor

    def __init__(
        self, *, latent_channels: int, image_channels: int, widths: Sequence[int], num_blocks: Sequence[int]
    ) -> None:
        """``widths`` and ``num_blocks`` per level, from the latents' resolution up to the images'."""
        nn.Module.__init__(self)  # of LightDecoder's layers it has none
        self.downsampling_factor = 2 ** (len(widths) - 1)
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, (width, number) in enumerate(zip(widths, num_blocks, strict=True), start=1):
            layers += [TinyBlock(width) for _ in range(number)]
            if level < len(widths):
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], image_channels, 3, padding=1))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1], of standardised latents."""
        return 2 * self.layers(3 * torch.tanh(self.scale * latents / 3)) - 1


class TinyBlock(nn.Module):
    """Three 3x3 convolutions beside a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images of the same shape out."""
        return F.relu(self.conv(x) + x)


def load_tiny_decoder(folder: Path) -> TinyDecoder:
    """Load the decoder of an AutoencoderTiny that diffusers saved, in fp32; its scale is 1.

    Raises:
        UserError: a file is missing or damaged, the two do not belong together, or the model has something that
            `TinyDecoder` cannot have.
    """
    path, file = folder / CONFIG_FILE, weights_file(folder)
    settings = read_settings(path, CLASS_NAME, DEFAULTS)
    for key in ("act_fn", "upsample_fn", "upsampling_scaling_factor"):
        if settings[key] != DEFAULTS[key]:
            raise UserError(f"{path}: {key} is {settings[key]!r:.80}, and only {DEFAULTS[key]!r} can be loaded")
    numbers = {
        "latent_channels": settings["latent_channels"],
        "image_channels": settings["out_channels"],
        "widths": settings["decoder_block_out_channels"],
        "num_blocks": settings["num_decoder_blocks"],
    }
    weights = {name.removeprefix(PREFIX): t for name, t in read_weights(file).items() if name.startswith(PREFIX)}
    weights["scale"] = torch.ones(())
    with meta_device(path, len(weights)):
        expected = TinyDecoder(**numbers).state_dict()
    check_fit(file, weights, expected, by=f"by its {CONFIG_FILE}", why=f"it does not belong to its {CONFIG_FILE}")
    decoder = TinyDecoder(**numbers)
    decoder.load_state_dict(weights)
    return decoder

"""The numbers of an autoencoder: of the networks, of the config files, and of every format it is saved in."""

from __future__ import annotations

from dataclasses import dataclass

from ldgan.engine.attention import Kernel
from ldgan.engine.cli import UserError
from ldgan.engine.config import option


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
    attention_factors: list[int] = option(
        [], "downsampling factors, [16] say, at which every residual block is followed by self-attention"
    )
    num_groups: int = option(0, "groups of each group normalisation; 0: up to 32 of at least four channels")
    latent_convolutions: bool = option(
        False, "1x1 convolutions on both sides of the latents, as in Stable Diffusion's autoencoders"
    )
    dropout: float = option(0.0, "dropout probability inside residual blocks")
    gradient_checkpointing: bool = option(
        False, "compute blocks again in the backward pass: less memory, about a third more time"
    )
    attention_kernel: Kernel = option("sdpa", "what computes attention: PyTorch itself, or xformers where it runs")

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    def validate(self) -> None:
        """Raise a UserError for numbers that make no network."""
        if not self.channel_multipliers:
            raise UserError("network.channel_multipliers is empty; give one number per level, [1, 2, 4] say")
        factors = [2**level for level in range(len(self.channel_multipliers))]
        if unknown := sorted(set(self.attention_factors) - set(factors)):
            raise UserError(f"network.attention_factors: no level has factor {unknown[0]}; choose among {factors}")
        if self.num_groups and (odd := [width for width in self.widths if width % self.num_groups]):
            raise UserError(f"network.num_groups {self.num_groups} does not divide {odd[0]} channels; choose a divisor")

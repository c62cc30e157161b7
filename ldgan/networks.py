"""Generator and discriminator of the denoising diffusion GAN.

The generator is a U-Net after NCSN++ (Song et al., arXiv 2011.13456) whose normalisation is steered by a
random z through a mapping network; the discriminator is a time-dependent residual network on the pair
(x_{t-1}, x_t). Xiao et al. (arXiv 2112.07804), appendix C, describes both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.blocks import num_groups
from ldgan.engine.config import option


@dataclass
class GeneratorConfig:
    """The numbers that define a `Generator`, besides the shape of the data."""

    base_channels: int = option(64, "channels at full resolution")
    channel_multipliers: list[int] = option([1, 2], "channels per level over base_channels; a level halves the size")
    num_res_blocks: int = option(2, "residual blocks per level of the way down; the way up has one more")
    attention_resolutions: list[int] = option(
        [4], "sides of the feature maps, in latent pixels, that get self-attention"
    )
    z_dim: int = option(64, "dimension of the random z")
    num_mapping_layers: int = option(3, "layers of the mapping network from z to the style")
    embedding_dim: int = option(128, "dimension of time embedding and style")
    dropout: float = option(0.0, "dropout probability inside residual blocks")


@dataclass
class DiscriminatorConfig:
    """The numbers that define a `Discriminator`, besides the shape of the data."""

    widths: list[int] = option(
        [64, 128, 128], "channels of the residual blocks; each block after the first halves the size"
    )
    embedding_dim: int = option(128, "dimension of the time embedding")


class Generator(nn.Module):
    """G(x_t, z, t) -> estimate of x_0, in the shape of x_t: (B, C, s, s).

    The random z makes p(x_0 | x_t) multimodal; without it a large denoising step could only answer with a
    mean. The output is not squashed: standardised latents have no bounds.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        z_dim: int,
        num_mapping_layers: int,
        embedding_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.mapping = MappingNetwork(z_dim, embedding_dim, num_mapping_layers)
        self.time_embedding = TimeEmbedding(base_channels, embedding_dim)
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)

        def block(in_channels: int, out_channels: int, side: int, resample: str = "none") -> UNetBlock:
            attention = side in attention_resolutions and resample == "none"
            return UNetBlock(in_channels, out_channels, embedding_dim, dropout, resample, attention)

        self.down = nn.ModuleDict()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        width, side = base_channels, resolution
        skips = [width]
        for level, level_width in enumerate(widths):
            if level > 0:
                side //= 2
                self.down[f"{side}x{side}_down"] = block(width, width, side, "down")
                skips.append(width)
            for index in range(num_res_blocks):
                self.down[f"{side}x{side}_block{index}"] = block(width, level_width, side)
                width = level_width
                skips.append(width)

        self.middle = nn.ModuleList([block(width, width, side), block(width, width, side)])

        self.up = nn.ModuleDict()
        for level, level_width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                self.up[f"{side}x{side}_block{index}"] = block(width + skips.pop(), level_width, side)
                width = level_width
            if level > 0:
                side *= 2
                self.up[f"{side}x{side}_up"] = block(width, width, side, "up")
        self.norm_out = AdaptiveGroupNorm(width, embedding_dim)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        initialise(self)
        for layer in residual_outputs(self):
            nn.init.zeros_(layer.weight)  # every residual branch starts as nothing

    def forward(self, x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``x_t`` (B, C, s, s), ``z`` (B, z_dim) ~ N(0, I), ``t`` int64 (B,) in 1..T -> x_0 (B, C, s, s)."""
        style, time = self.mapping(z), self.time_embedding(t)
        x = self.conv_in(x_t)
        skips = [x]
        for block in self.down.values():
            x = block(x, time, style)
            skips.append(x)
        for block in self.middle:
            x = block(x, time, style)
        for name, block in self.up.items():
            x = block(x if name.endswith("_up") else torch.cat([x, skips.pop()], dim=1), time, style)
        return self.conv_out(F.silu(self.norm_out(x, style))).float()


def residual_outputs(generator: Generator) -> list[nn.Conv2d]:
    """The last convolution of each residual branch and attention."""
    modules = list(generator.modules())
    blocks = [module.conv2 for module in modules if isinstance(module, UNetBlock)]
    return blocks + [module.out for module in modules if isinstance(module, SelfAttention)]


class UNetBlock(nn.Module):
    """BigGAN residual block: z steers both normalisations, time is added between the convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float,
        resample: str,
        attention: bool,
    ) -> None:
        super().__init__()
        self.resample = Resample(resample)
        self.norm1 = AdaptiveGroupNorm(in_channels, embedding_dim)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.norm2 = AdaptiveGroupNorm(out_channels, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = SelfAttention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, style: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x, style))))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h, style))))
        return self.attention((self.skip(self.resample(x)) + h) * math.sqrt(0.5))


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are a linear function of the style."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6, affine=False)
        self.affine = nn.Linear(embedding_dim, 2 * channels)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (B, positions, C) each
        attended = F.scaled_dot_product_attention(q, k, v)
        return (x + self.out(attended.transpose(1, 2).reshape(x.shape))) * math.sqrt(0.5)


class MappingNetwork(nn.Module):
    """z (B, z_dim), normalised to unit mean square, through fully connected layers -> style (B, embedding_dim)."""

    def __init__(self, z_dim: int, embedding_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [z_dim] + [embedding_dim] * num_layers
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in itertools.pairwise(dims)])

    def forward(self, z: Tensor) -> Tensor:
        style = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)  # PixelNorm, as in StyleGAN
        for layer in self.layers:
            style = F.silu(layer(style))
        return style


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t (Vaswani et al., 2017) through two layers: int64 (B,) -> (B, embedding_dim)."""

    def __init__(self, num_frequencies: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.layer1 = nn.Linear(num_frequencies, embedding_dim)
        self.layer2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, t: Tensor) -> Tensor:
        half = (self.num_frequencies + 1) // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / max(half - 1, 1))
        angles = t[:, None].float() * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, : self.num_frequencies]
        return self.layer2(F.silu(self.layer1(waves)))


class Discriminator(nn.Module):
    """D(x_{t-1}, x_t, t) -> logit (B,): is x_{t-1} a plausible denoised x_t?"""

    def __init__(self, *, channels: int, widths: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(embedding_dim, embedding_dim)
        self.conv_in = nn.Conv2d(2 * channels, widths[0], 3, padding=1)
        pairs = list(zip([widths[0], *widths[:-1]], widths))
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(i, o, embedding_dim, downsample=level > 0) for level, (i, o) in enumerate(pairs)
        )
        self.conv_out = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)  # + 1: minibatch stddev
        self.logit = nn.Linear(widths[-1], 1)
        initialise(self)

    def forward(self, x_previous: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``x_previous``, ``x_t`` (B, C, s, s), ``t`` int64 (B,) in 1..T -> logits (B,)."""
        time = F.leaky_relu(self.time_embedding(t), 0.2)
        x = self.conv_in(torch.cat([x_previous, x_t], dim=1))
        for block in self.blocks:
            x = block(x, time)
        x = F.leaky_relu(self.conv_out(append_minibatch_stddev(x)), 0.2)
        return self.logit(x.sum(dim=(2, 3))).squeeze(1).float()


class DiscriminatorBlock(nn.Module):
    """Residual block with time added between its convolutions, halving the size where asked."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, downsample: bool) -> None:
        super().__init__()
        self.resample = Resample("down" if downsample else "none")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, 0.2)) + self.time(time)[:, :, None, None]
        h = self.conv2(self.resample(F.leaky_relu(h, 0.2)))
        return (self.skip(self.resample(x)) + h) * math.sqrt(0.5)


class Resample(nn.Module):
    """Halve by 2x2 means ("down"), double by nearest neighbour ("up"), or pass ("none")."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        if mode not in ("none", "down", "up"):
            raise ValueError(f"no resampling {mode!r}")
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.mode == "up" else x


def append_minibatch_stddev(x: Tensor, group_size: int = 4) -> Tensor:
    """Append one channel with the mean standard deviation over groups of samples (Karras et al., 2018).

    Groups hold ``group_size`` samples or the largest divisor of the batch below it, so any batch size works.
    """
    batch, channels, height, width = x.shape
    size = next(size for size in range(min(group_size, batch), 0, -1) if batch % size == 0)
    groups = x.float().reshape(size, batch // size, channels, height, width)
    stddev = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (batch / size,)
    return torch.cat([x, stddev.to(x.dtype).repeat(size).reshape(batch, 1, 1, 1).expand(-1, 1, height, width)], dim=1)


def initialise(network: nn.Module) -> None:
    """Xavier initialisation of all weights, biases zero, as in DDPM and NCSN++ (variance scaling by fan average).

    PyTorch's own default shrinks a signal about threefold in each layer. A discriminator has no normalisation
    to make up for it: it would start as a constant and stay one for hundreds of steps.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

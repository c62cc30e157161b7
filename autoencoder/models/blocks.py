"""The blocks of the autoencoder: residual blocks, self-attention, resampling, group normalisation.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752),
appendix G, is their source.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoencoder.models.config import AutoencoderConfig
from ldgan.engine.attention import Kernel, attend


class BlockBuilder:
    """Builds the blocks of an autoencoder's networks by its numbers."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self._config = config

    def level(self, factor: int, in_channels: int, out_channels: int, num_res_blocks: int) -> dict[str, nn.Module]:
        """The blocks at one resolution by name: residual blocks, each followed by self-attention where asked for."""
        blocks: dict[str, nn.Module] = {}
        for index in range(num_res_blocks):
            blocks[f"f{factor}_block{index}"] = self._residual(
                in_channels if index == 0 else out_channels, out_channels
            )
            if factor in self._config.attention_factors:
                blocks[f"f{factor}_attention{index}"] = self._attention(out_channels)
        return blocks

    def middle(self, channels: int) -> nn.Sequential:
        """Residual block, self-attention where asked for, residual block; at the lowest resolution."""
        # This order of construction decides which initial weights a seed gives.
        first, last = self._residual(channels, channels), self._residual(channels, channels)
        return nn.Sequential(first, *([self._attention(channels)] if self._config.mid_attention else []), last)

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalisation."""
        return group_norm(channels, self._config.num_groups)

    def _residual(self, in_channels: int, out_channels: int) -> ResidualBlock:
        return ResidualBlock(in_channels, out_channels, self._config.num_groups, self._config.dropout)

    def _attention(self, channels: int) -> SelfAttention:
        return SelfAttention(channels, self._config.num_groups, self._config.attention_kernel)


def apply_blocks(blocks: Iterable[nn.Module], x: Tensor, *, recompute: bool) -> Tensor:
    """Apply ``blocks`` one after the other.

    With ``recompute`` only their inputs are kept for the backward pass, which computes the rest again:
    gradient checkpointing, Chen et al. (arXiv 1604.06174). Gradients are the same.
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip connection (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        h += self.skip(x)
        return h


class SelfAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, num_groups: int, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.norm = group_norm(channels, num_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)  # (B, 1, h * w, C)
        attended = attend(q, k, v, self.kernel).squeeze(1)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded right and below as in latent diffusion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def silu(x: Tensor) -> Tensor:
    """SiLU; where no gradient is computed it takes the place of ``x``, and large images need less memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def group_norm(channels: int, groups: int = 0) -> nn.GroupNorm:
    """GroupNorm of so many ``groups``; 0: `num_groups`."""
    return nn.GroupNorm(groups or num_groups(channels), channels, eps=1e-6)


def num_groups(channels: int) -> int:
    """Up to 32 groups of at least four channels.

    Groups of a single channel would be instance norms, which forget how strong each channel is: with them a
    small autoencoder needs several times as long to learn colours.
    """
    return next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))

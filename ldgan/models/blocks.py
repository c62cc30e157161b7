"""The blocks of stage 2's networks: conditioned residual blocks, attention, resampling, embeddings.

Sources: NCSN++ (Song et al., arXiv 2011.13456, appendix H), ADM (Dhariwal and Nichol, arXiv 2105.05233) and
DD-GAN (Xiao et al., arXiv 2112.07804, appendix C).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.models.blocks import num_groups
from autoencoder.models.text import Text
from ldgan.models.conditions import clear

AttentionLayout = Literal["every_block", "adm", "ncsnpp"]
ResBlock = Literal["biggan", "ncsnpp", "plain"]
ResampleMode = Literal["none", "down", "up"]
TimeEmbeddingKind = Literal["positional", "fourier"]

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)  # the binomial filter of StyleGAN2 and NCSN++
FOURIER_SCALE = 16.0  # standard deviation of the frequencies; Song et al., appendix C


class Condition(NamedTuple):
    """What acts on the blocks in one forward pass, vectors being (B, dim); None where nothing goes that way."""

    norm1: Tensor | None  # steers the first normalisation
    added: Tensor | None  # added between the convolutions, after SiLU and a linear layer
    norm2: Tensor | None  # steers the second normalisation
    text: Text | None = None  # attended to


@dataclass(frozen=True)
class BlockBuilder:
    """Builds the blocks of one U-Net from the numbers they share; `ldgan.models.unet.UNetConfig` tells what these mean.

    ``norm1_dim``, ``added_dim`` and ``norm2_dim`` are the dimensions of the `Condition`; 0 where it is None. At
    ``text_resolutions`` every residual block is followed by cross-attention to a text of dimension ``text_dim``.
    """

    norm1_dim: int
    added_dim: int
    norm2_dim: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    attention_layout: AttentionLayout
    num_heads: int
    head_channels: int
    resblock: ResBlock
    fir: bool
    rescale: bool
    dropout: float
    text_dim: int = 0
    text_resolutions: tuple[int, ...] = ()

    def way_down(self, side: int, in_channels: int, out_channels: int) -> dict[str, UNetBlock]:
        """The residual blocks of one level of the way down, by name."""
        attention = side in self.attention_resolutions
        widths = [in_channels] + [out_channels] * (self.num_res_blocks - 1)
        blocks = [self._residual(width, out_channels, side, attention=attention) for width in widths]
        return {f"{side}x{side}_block{index}": block for index, block in enumerate(blocks)}

    def middle(self, side: int, channels: int) -> list[UNetBlock]:
        """The residual blocks at the lowest resolution; NCSN++ and ADM have attention between them, and only there."""
        behind_each = self.attention_layout == "every_block"
        attention = side in self.attention_resolutions
        first = self._residual(channels, channels, side, attention=attention or not behind_each)
        return [first, self._residual(channels, channels, side, attention=attention and behind_each)]

    def way_up(self, side: int, in_channels: int, out_channels: int, skips: Sequence[int]) -> dict[str, UNetBlock]:
        """The residual blocks of one level of the way up, by name; block i gets ``skips[i]`` channels more."""
        widths = [in_channels] + [out_channels] * (len(skips) - 1)
        blocks = {}
        for index, (width, skip) in enumerate(zip(widths, skips, strict=True)):
            behind_this = self.attention_layout != "ncsnpp" or index == len(skips) - 1
            attention = side in self.attention_resolutions and behind_this
            block = self._residual(width + skip, out_channels, side, attention=attention)
            blocks[f"{side}x{side}_block{index}"] = block
        return blocks

    def resampling(self, channels: int, mode: Literal["down", "up"]) -> UNetBlock | ConvResample:
        """What leads from one resolution to the next."""
        if self.resblock == "plain":
            return ConvResample(channels, channels, mode, self.fir)
        return self._residual(channels, channels, None, attention=False, mode=mode)

    def pyramid_step(self, in_channels: int, out_channels: int) -> ConvResample:
        """What halves the input pyramid."""
        return ConvResample(in_channels, out_channels, "down", self.fir)

    def _residual(
        self, in_channels: int, out_channels: int, side: int | None, *, attention: bool, mode: ResampleMode = "none"
    ) -> UNetBlock:
        """A block whose output is ``side`` pixels wide; None leads from one resolution to the next."""
        reads = side in self.text_resolutions
        num_heads = heads(out_channels, self.num_heads, self.head_channels) if attention or reads else 0
        return UNetBlock(
            in_channels,
            out_channels,
            norm1_dim=self.norm1_dim,
            added_dim=self.added_dim,
            norm2_dim=self.norm2_dim,
            dropout=self.dropout,
            resample=Resample(mode, self.fir),
            convolved_skip=self.resblock == "ncsnpp" and mode != "none",
            rescale=self.rescale,
            num_heads=num_heads if attention else 0,
            text_dim=self.text_dim if reads else 0,
            num_text_heads=num_heads,
        )


class UNetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip connection, on which a `Condition` acts; then attention, to
    itself and to a text.

    As in BigGAN (Brock et al., arXiv 1809.11096), resampling happens inside: before the first convolution and
    on the skip connection, which is 1x1 convolved where the width changes or ``convolved_skip`` wants it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm1_dim: int,
        added_dim: int,
        norm2_dim: int,
        dropout: float,
        resample: Resample,
        convolved_skip: bool,
        rescale: bool,
        num_heads: int,
        text_dim: int = 0,
        num_text_heads: int = 1,
    ) -> None:
        """``num_heads`` of the self-attention that follows, ``text_dim`` of the text attended to then; 0: none."""
        super().__init__()
        self.resample = resample
        self.norm1 = AdaptiveGroupNorm(in_channels, norm1_dim)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(added_dim, out_channels) if added_dim > 0 else None
        self.norm2 = AdaptiveGroupNorm(out_channels, norm2_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and not convolved_skip
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.scale = residual_scale(rescale)
        self.attention = SelfAttention(out_channels, num_heads, rescale) if num_heads > 0 else nn.Identity()
        self.cross_attention = CrossAttention(out_channels, text_dim, num_text_heads, rescale) if text_dim > 0 else None

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w'), where h' is h, h / 2 or 2 h."""
        h = self.conv1(self.resample(F.silu(self.norm1(x, condition.norm1))))
        if self.time is not None and condition.added is not None:
            h = h + self.time(F.silu(condition.added))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h, condition.norm2))))
        x = self.attention((self.skip(self.resample(x)) + h) * self.scale)
        if self.cross_attention is None or condition.text is None:
            return x
        return self.cross_attention(x, condition.text)


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are a linear function of a condition; of none, plain weights."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        """``condition_dim`` 0: no condition."""
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6, affine=condition_dim == 0)
        self.affine = nn.Linear(condition_dim, 2 * channels) if condition_dim > 0 else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """``x`` (B, channels, h, w), ``condition`` (B, condition_dim), not looked at where that is 0."""
        if self.affine is None:
            return self.norm(x)
        scale, shift = self.affine(condition)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Self-attention over all positions, with a residual connection. Head i has the i-th share of the channels."""

    def __init__(self, channels: int, num_heads: int = 1, rescale: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.scale = residual_scale(rescale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, positions, channels of a head) each
        attended = F.scaled_dot_product_attention(q, k, v)
        return (x + self.out(attended.transpose(2, 3).reshape(x.shape))) * self.scale


class CrossAttention(nn.Module):
    """Attention of all positions to the rows of a text, with a residual connection (Rombach et al., arXiv 2112.10752).

    Before the text comes a learned row that is always there: a text without rows has a meaning then, "anything", and
    no softmax is empty.
    """

    def __init__(self, channels: int, text_dim: int, num_heads: int = 1, rescale: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.norm_text = nn.LayerNorm(text_dim)
        self.null = nn.Parameter(torch.randn(text_dim))  # as large as a normalised row
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Linear(text_dim, 2 * channels)
        self.out = nn.Conv2d(channels, channels, 1)
        self.scale = residual_scale(rescale)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """(B, channels, h, w) and B texts -> (B, channels, h, w)."""
        embeddings, mask = clear(text)
        rows = torch.cat([self.null.expand(x.shape[0], 1, -1), self.norm_text(embeddings)], dim=1)
        k, v = self.kv(rows).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, rows, dim) each
        q = self.q(self.norm(x)).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        there = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
        return (x + self.out(attended.transpose(2, 3).reshape(x.shape))) * self.scale


class PooledText(nn.Module):
    """The pooled row of a text as a vector, (B, dim), of about unit length like a label's; a learned one where absent.

    Only its direction counts: text encoders are trained to be compared by angles.
    """

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_dim, dim)
        self.null = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def forward(self, text: Text) -> Tensor:
        """B texts -> (B, dim)."""
        embeddings, mask = clear(text)
        return torch.where(mask[:, :1], self.linear(F.normalize(embeddings[:, 0], dim=1)), self.null)


def heads(channels: int, num_heads: int, head_channels: int) -> int:
    """How many heads attention over ``channels`` has: ``num_heads``, or one for each ``head_channels`` (0: not used).

    Raises:
        ValueError: both are given, or the channels cannot be shared out.
    """
    if num_heads > 1 and head_channels > 0:
        raise ValueError(f"num_heads is {num_heads} and head_channels is {head_channels}; give one of them")
    if channels % (head_channels or num_heads):
        name, number = ("head_channels", head_channels) if head_channels else ("num_heads", num_heads)
        raise ValueError(f"{channels} channels cannot be shared out with {name} {number}")
    return channels // head_channels if head_channels > 0 else num_heads


def residual_scale(rescale: bool) -> float:
    """1 / sqrt(2) with ``rescale``: the sum of two branches then has the variance of one."""
    return math.sqrt(0.5) if rescale else 1.0


def level_sides(resolution: int, channel_multipliers: Sequence[int]) -> list[int]:
    """Sides of the feature maps of each level, of which every one but the first halves the size.

    Raises:
        ValueError: a side would not be a whole number of pixels.
    """
    if resolution % 2 ** (len(channel_multipliers) - 1):
        raise ValueError(
            f"resolution {resolution} cannot be halved for each of channel_multipliers {[*channel_multipliers]}"
        )
    return [resolution // 2**level for level in range(len(channel_multipliers))]


class MappingNetwork(nn.Module):
    """z (B, z_dim), normalised to unit mean square, through fully connected layers -> style (B, style_dim)."""

    def __init__(self, z_dim: int, style_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [z_dim] + [style_dim] * num_layers
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in itertools.pairwise(dims)])

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_dim) -> (B, style_dim)."""
        style = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)  # PixelNorm, as in StyleGAN
        for layer in self.layers:
            style = F.silu(layer(style))
        return style


class TimeEmbedding(nn.Module):
    """Waves of t through two layers: int64 (B,), t >= 1 -> (B, embedding_dim).

    "positional" waves are fixed (Vaswani et al., 2017); "fourier" ones have random frequencies in log t, drawn
    once and saved with the weights (Song et al., appendix C, where log t is the logarithm of the noise).
    """

    frequencies: Tensor | None

    def __init__(self, num_waves: int, embedding_dim: int, kind: TimeEmbeddingKind = "positional") -> None:
        super().__init__()
        self.num_waves = num_waves
        fourier = kind == "fourier"
        self.register_buffer("frequencies", FOURIER_SCALE * torch.randn(num_waves) if fourier else None)
        self.layer1 = nn.Linear(2 * num_waves if fourier else num_waves, embedding_dim)
        self.layer2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, embedding_dim)."""
        if self.frequencies is None:
            waves = positional_waves(t, self.num_waves)
        else:
            waves = fourier_waves(t.float().log(), self.frequencies)
        return self.layer2(F.silu(self.layer1(waves)))


def positional_waves(t: Tensor, num_waves: int) -> Tensor:
    """sin and cos of (B,) numbers at frequencies from 1 down to 1 / 10,000: (B, num_waves)."""
    half = (num_waves + 1) // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / max(half - 1, 1))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :num_waves]


def fourier_waves(x: Tensor, frequencies: Tensor) -> Tensor:
    """sin and cos of 2 pi f x: numbers (B,) at frequencies (F,) -> (B, 2 F) (Tancik et al., arXiv 2006.10739)."""
    angles = 2 * math.pi * x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def label_embedding(num_classes: int, dim: int) -> nn.Embedding:
    """Embeddings of the labels 0..num_classes, of about unit length, so that a class weighs like the rest at first."""
    embedding = nn.Embedding(num_classes + 1, dim)
    nn.init.normal_(embedding.weight, std=dim**-0.5)
    return embedding


class Resample(nn.Module):
    """Halve ("down"), double ("up") or pass ("none"), without weights.

    By 2x2 means and nearest neighbours or, with ``fir``, by one depthwise (transposed) convolution with the filter
    [1, 3, 3, 1] that zero-stuffs and filters at once (Karras et al., arXiv 1912.04958); outside, images are zero.
    """

    kernel: Tensor | None

    def __init__(self, mode: ResampleMode, fir: bool = False) -> None:
        super().__init__()
        if mode not in ("none", "down", "up"):
            raise ValueError(f"no resampling {mode!r}")
        self.mode = mode
        # Zeros stuffed between the pixels take three quarters of the sum; the factor 4 gives it back.
        kernel = fir_kernel() * (4 if mode == "up" else 1) if fir and mode != "none" else None
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, h', w'), where h' is h / 2, 2 h or h."""
        if self.mode == "none":
            return x
        if self.kernel is None:
            return F.avg_pool2d(x, 2) if self.mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.mode == "down":
            return F.conv2d(x, depthwise(self.kernel, x), stride=2, padding=1, groups=x.shape[1])
        # On CPUs not in bfloat16: they have no fast kernel for it, and it took 50 times as long (torch 2.14).
        wide = x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
        with torch.autocast("cpu", enabled=False):
            doubled = F.conv_transpose2d(wide, depthwise(self.kernel, wide), stride=2, padding=1, groups=x.shape[1])
        return doubled.to(x.dtype)


class ConvResample(nn.Module):
    """Halve or double with a 3x3 convolution, between residual blocks: DDPM's way, filtered with ``fir`` (DDPM++).

    "down" convolves with stride 2, padded right and below, or after the filter; "up" convolves what `Resample`
    makes.
    """

    kernel: Tensor | None

    def __init__(self, in_channels: int, out_channels: int, mode: Literal["down", "up"], fir: bool) -> None:
        super().__init__()
        up = mode == "up"
        self.resample = Resample("up" if up else "none", fir)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=1 if up else 2, padding=1 if up else 0)
        self.register_buffer("kernel", fir_kernel() if fir and not up else None, persistent=False)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h / 2 or 2 h, ...); no ``condition`` acts here."""
        if self.conv.padding == (1, 1):
            return self.conv(self.resample(x))
        if self.kernel is None:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.conv2d(x, depthwise(self.kernel, x), padding=2, groups=x.shape[1]))


def fir_kernel() -> Tensor:
    """The 4x4 filter that `FIR_TAPS` make, of sum 1."""
    taps = torch.tensor(FIR_TAPS)
    return torch.outer(taps, taps) / taps.sum().square()


def depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    """A (k, k) kernel as the weight that filters each channel of ``x`` alone: (channels, 1, k, k)."""
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


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

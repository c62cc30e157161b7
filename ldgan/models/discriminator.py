"""The time-dependent discriminator of the denoising diffusion GAN: a residual network on the pair (x_{t-1}, x_t).

Xiao et al. (arXiv 2112.07804), appendix C, describes it. Its small and its large form, and those of the latent
variant (Trinh and Hamagami, IEEE Access 2024), are numbers of one class: see the configs named after them. Their
code starts with the second convolution of each block at zero, and has leaky ReLUs in the time embedding too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.models.text import Text
from ldgan.engine.config import option
from ldgan.models.blocks import (
    PooledText,
    Resample,
    ResampleMode,
    SelfAttention,
    TimeEmbedding,
    initialise,
    label_embedding,
)

ClassConditioning = Literal["projection", "added"]

Logits = Literal["sample", "positions"]
"""What is judged: a sample by the sum of its features, or each position of the last feature map on its own."""


@dataclass
class DiscriminatorConfig:
    """The numbers that define a `Discriminator`, besides the shape of the data and the number of classes."""

    widths: list[int] = option([64, 128, 128], "channels of the residual blocks; each after the first halves the size")
    downsample_first: bool = option(False, "whether the first block halves the size too")
    stem_width: int = option(0, "channels of the convolution before the blocks; 0: as many as the first block has")
    stem_kernel_size: int = option(3, "side of that convolution's kernel, 1 or 3")
    embedding_dim: int = option(128, "dimension of the time embedding")
    fir: bool = option(False, "halve the size by the filter [1, 3, 3, 1] instead of 2x2 means")
    attention_resolutions: list[int] = option([], "sides of the blocks' outputs, in latent pixels, with self-attention")
    class_conditioning: ClassConditioning = option(
        "projection", "how a class acts: its embedding, projected on the features, or added to the time embedding"
    )
    logits: Logits = option("sample", "one logit for the sum of the last features, or one for each of their positions")
    minibatch_stddev: bool = option(True, "whether the last features tell how far samples of a batch lie apart")


class Discriminator(nn.Module):
    """D(x_{t-1}, x_t, t) -> logits (B,) or (B, N): is x_{t-1} a plausible denoised x_t?

    One logit answers for the whole sample, or N of them for the positions of the last feature map, as in a PatchGAN
    (Isola et al., arXiv 1611.07004): what the noise of x_{t-1} hides in a sum shows in its place.
    Without ``pairs`` it judges x_{t-1} alone. With classes it judges whether x_{t-1} is a plausible one of its
    class, by projection (Miyato and Koyama, arXiv 1802.05637) or by addition to the time embedding; with texts
    whether it is one of its text, by projection of the pooled embedding.
    """

    def __init__(
        self,
        numbers: DiscriminatorConfig,
        *,
        channels: int,
        resolution: int,
        num_classes: int,
        pairs: bool = True,
        text_dim: int = 0,
    ) -> None:
        """The data are (channels, resolution, resolution); ``text_dim`` 0 is no text, as ``num_classes`` 0 no labels.

        Raises:
            ValueError: the blocks cannot halve the resolution, or there is no output of a side with attention.
        """
        super().__init__()
        widths, attended = numbers.widths, numbers.attention_resolutions
        modes: list[ResampleMode] = ["down"] * len(widths)
        if not numbers.downsample_first:
            modes[0] = "none"
        sides = [resolution >> modes[: level + 1].count("down") for level in range(len(widths))]
        if resolution != sides[-1] << modes.count("down"):
            raise ValueError(f"widths {list(widths)} halve the side {modes.count('down')} times; it is {resolution}")
        if unknown := set(attended) - set(sides):
            raise ValueError(f"attention_resolutions has {min(unknown)}; the blocks' outputs have sides {sides}")

        self.num_classes, self.pairs = num_classes, pairs
        self.by_position, self.minibatch_stddev = numbers.logits == "positions", numbers.minibatch_stddev
        stem_width = numbers.stem_width or widths[0]
        self.time_embedding = TimeEmbedding(numbers.embedding_dim, numbers.embedding_dim)
        self.conv_in = nn.Conv2d(
            (2 if pairs else 1) * channels, stem_width, numbers.stem_kernel_size, padding=numbers.stem_kernel_size // 2
        )
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(i, o, numbers.embedding_dim, Resample(mode, numbers.fir), attention=side in attended)
            for i, o, mode, side in zip([stem_width, *widths[:-1]], widths, modes, sides)
        )
        self.conv_out = nn.Conv2d(widths[-1] + int(numbers.minibatch_stddev), widths[-1], 3, padding=1)
        self.logit = nn.Linear(widths[-1], 1)
        self.projected_text = PooledText(text_dim, widths[-1]) if text_dim > 0 else None
        initialise(self)
        self.added = self.projected = None
        if num_classes > 0 and numbers.class_conditioning == "added":
            self.added = label_embedding(num_classes, numbers.embedding_dim)
        elif num_classes > 0:
            self.projected = label_embedding(num_classes, widths[-1])

    def forward(
        self,
        x_previous: Tensor,
        x_t: Tensor | None,
        t: Tensor,
        labels: Tensor | None = None,
        text: Text | None = None,
    ) -> Tensor:
        """``x_previous``, ``x_t`` (B, C, s, s), ``t`` int64 (B,) in 1..T -> logits (B,), or (B, N) by position.

        ``x_t`` is None without ``pairs``. ``labels``, int64 (B,) in 0..num_classes, where num_classes stands for
        no label, are None without classes; ``text``, B texts of which some may have no rows, is None without texts.
        """
        time = self.time_embedding(t)
        if self.added is not None:
            time = time + self.added(labels)
        time = F.leaky_relu(time, 0.2)
        x = self.conv_in(x_previous if x_t is None else torch.cat([x_previous, x_t], dim=1))
        for block in self.blocks:
            x = block(x, time)
        x = F.leaky_relu(self.conv_out(append_minibatch_stddev(x) if self.minibatch_stddev else x), 0.2)
        features = x.flatten(2).transpose(1, 2) if self.by_position else x.sum(dim=(2, 3))  # (B, N, F) or (B, F)
        logits = self.logit(features).squeeze(-1)
        if self.projected is not None:
            logits = logits + projection(self.projected(labels), features)
        if self.projected_text is not None and text is not None:
            logits = logits + projection(self.projected_text(text), features)
        return logits.float()


class DiscriminatorBlock(nn.Module):
    """Residual block with time added between its convolutions, which may halve the size; then attention if asked."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, resample: Resample, attention: bool
    ) -> None:
        super().__init__()
        self.resample = resample
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.attention = SelfAttention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w'), where h' is h or h / 2."""
        h = self.conv1(F.leaky_relu(x, 0.2)) + self.time(time)[:, :, None, None]
        h = self.conv2(self.resample(F.leaky_relu(h, 0.2)))
        return self.attention((self.skip(self.resample(x)) + h) * math.sqrt(0.5))


def projection(embedding: Tensor, features: Tensor) -> Tensor:
    """Inner products of embeddings (B, F) with features (B, F) or, at each position, (B, N, F): (B,) or (B, N)."""
    return (embedding.reshape(len(features), *[1] * (features.ndim - 2), -1) * features).sum(dim=-1)


def append_minibatch_stddev(x: Tensor, group_size: int = 4) -> Tensor:
    """Append one channel with the mean standard deviation over groups of samples (Karras et al., 2018).

    Groups hold ``group_size`` samples or the largest divisor of the batch below it, so any batch size works.
    """
    batch, channels, height, width = x.shape
    size = next(size for size in range(min(group_size, batch), 0, -1) if batch % size == 0)
    groups = x.float().reshape(size, batch // size, channels, height, width)
    stddev = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (batch / size,)
    return torch.cat([x, stddev.to(x.dtype).repeat(size).reshape(batch, 1, 1, 1).expand(-1, 1, height, width)], dim=1)

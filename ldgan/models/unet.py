"""The U-Net of stage 2: generator of the denoising diffusion GAN, and the network of its baselines.

The default is a small NCSN++ (Song et al., arXiv 2011.13456) whose normalisation a random z steers, as in Xiao et
al. (arXiv 2112.07804, appendix C). The other options of NCSN++ and those of ADM (Dhariwal and Nichol, arXiv
2105.05233) are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.models.text import Text
from ldgan.engine.config import option
from ldgan.models.blocks import (
    AdaptiveGroupNorm,
    AttentionLayout,
    BlockBuilder,
    Condition,
    CrossAttention,
    MappingNetwork,
    PooledText,
    ResBlock,
    SelfAttention,
    TimeEmbedding,
    TimeEmbeddingKind,
    UNetBlock,
    initialise,
    label_embedding,
    level_sides,
    residual_scale,
)

Conditioning = Literal["add", "adaptive_norm"]
ProgressiveInput = Literal["none", "residual"]
TextConditioning = Literal["cross_attention", "pooled"]


@dataclass
class UNetConfig:
    """The numbers that define a `UNet`, besides the shape of the data."""

    base_channels: int = option(64, "channels at full resolution")
    channel_multipliers: list[int] = option([1, 2], "channels per level over base_channels; a level halves the size")
    num_res_blocks: int = option(2, "residual blocks per level of the way down; the way up has one more")
    attention_resolutions: list[int] = option(
        [4], "sides of the feature maps, in latent pixels, that get self-attention"
    )
    attention_layout: AttentionLayout = option(
        "every_block",
        "every_block: behind each residual block at these sides; adm: the same, but once in the middle whatever its"
        " side; ncsnpp: as adm, but on the way up behind the last block of a level alone",
    )
    num_heads: int = option(1, "heads of each self-attention")
    head_channels: int = option(0, "channels of a head, in place of num_heads; 0: not used")
    resblock: ResBlock = option(
        "biggan",
        "biggan: residual blocks resample, as in ADM; ncsnpp: the same with a convolution on their skip connection;"
        " plain: convolutions between the residual blocks do, as in DDPM",
    )
    fir: bool = option(False, "resample with the filter [1, 3, 3, 1]; false: 2x2 means and nearest neighbours")
    progressive_input: ProgressiveInput = option(
        "none", "residual: the input, halved and convolved from level to level, joins each of them, as in NCSN++"
    )
    rescale: bool = option(True, "divide sums of two branches by sqrt(2)")
    z_dim: int = option(64, "dimension of the random z; 0: none")
    num_mapping_layers: int = option(3, "layers of the mapping network from z to the style")
    style_dim: int = option(0, "dimension of the style; 0: embedding_dim")
    z_conditioning: Conditioning = option(
        "adaptive_norm",
        "adaptive_norm: the style steers both normalisations of a block; add: it is added between its convolutions",
    )
    adaptive_output_norm: bool = option(True, "let a style that steers normalisations steer the last one too")
    embedding_dim: int = option(128, "dimension of the time embedding")
    time_embedding: TimeEmbeddingKind = option("positional", "waves of t, or random frequencies of log t (fourier)")
    time_conditioning: Conditioning = option(
        "add",
        "add: time and class are added between a block's convolutions; adaptive_norm: they steer its second"
        " normalisation, as in ADM",
    )
    dropout: float = option(0.0, "dropout probability inside residual blocks")
    text_conditioning: TextConditioning = option(
        "cross_attention",
        "of a model that reads captions. pooled: their pooled embedding joins the time embedding; cross_attention: and"
        " feature maps attend to their tokens",
    )
    text_attention_resolutions: list[int] = option(
        [], "sides of the feature maps, in latent pixels, that attend to captions; []: attention_resolutions"
    )


class UNet(nn.Module):
    """G(x_t, z, t, labels, text) -> what is asked of it about x_t, an estimate of x_0 say: (B, out_channels, s, s).

    The random z makes p(x_0 | x_t) multimodal; without it a large denoising step could only answer with a
    mean. The output is not squashed: standardised latents have no bounds.
    """

    def __init__(
        self,
        numbers: UNetConfig,
        *,
        channels: int,
        resolution: int,
        out_channels: int,
        num_classes: int,
        text_dim: int = 0,
    ) -> None:
        """``num_classes`` 0: no labels. ``text_dim`` 0: no text. The data are (channels, resolution, resolution).

        Raises:
            ValueError: two numbers contradict each other, or a level would have no block.
        """
        super().__init__()
        if numbers.num_res_blocks < 1:
            raise ValueError(f"num_res_blocks is {numbers.num_res_blocks}; give 1 or more")
        sides = level_sides(resolution, numbers.channel_multipliers)
        text_resolutions = tuple(numbers.text_attention_resolutions or numbers.attention_resolutions)
        if text_dim == 0 or numbers.text_conditioning == "pooled":
            text_resolutions = ()
        elif not set(text_resolutions) & set(sides):
            raise ValueError(
                f"no feature map would attend to captions: text_attention_resolutions has {[*text_resolutions]}, and"
                f" the sides are {sides}; give one of these, or text_conditioning=pooled"
            )
        self.z_dim, self.num_classes, self.text_dim = numbers.z_dim, num_classes, text_dim
        self.z_conditioning, self.time_conditioning = numbers.z_conditioning, numbers.time_conditioning
        style_dim = (numbers.style_dim or numbers.embedding_dim) if numbers.z_dim > 0 else 0
        self.mapping = (
            MappingNetwork(numbers.z_dim, style_dim, numbers.num_mapping_layers) if numbers.z_dim > 0 else None
        )
        self.time_embedding = TimeEmbedding(numbers.base_channels, numbers.embedding_dim, numbers.time_embedding)
        self.label_embedding = label_embedding(num_classes, numbers.embedding_dim) if num_classes > 0 else None
        # Beside cross-attention too: one vector costs nothing, and it reaches every block, at every resolution.
        self.text_embedding = PooledText(text_dim, numbers.embedding_dim) if text_dim > 0 else None

        steering = style_dim if numbers.z_conditioning == "adaptive_norm" else 0
        added = numbers.embedding_dim if numbers.time_conditioning == "add" else 0
        build = BlockBuilder(
            norm1_dim=steering,
            added_dim=added + style_dim - steering,
            norm2_dim=steering + numbers.embedding_dim - added,
            num_res_blocks=numbers.num_res_blocks,
            attention_resolutions=tuple(numbers.attention_resolutions),
            attention_layout=numbers.attention_layout,
            num_heads=numbers.num_heads,
            head_channels=numbers.head_channels,
            resblock=numbers.resblock,
            fir=numbers.fir,
            rescale=numbers.rescale,
            dropout=numbers.dropout,
            text_dim=text_dim,
            text_resolutions=text_resolutions,
        )
        widths = [numbers.base_channels * multiplier for multiplier in numbers.channel_multipliers]

        self.conv_in = nn.Conv2d(channels, numbers.base_channels, 3, padding=1)
        self.down, self.pyramid = nn.ModuleDict(), nn.ModuleDict()
        self.scale = residual_scale(numbers.rescale)
        width, pyramid_width, skips = numbers.base_channels, channels, [numbers.base_channels]
        for side, level_width in zip(sides, widths):
            if side < resolution:
                self.down[f"{side}x{side}_down"] = build.resampling(width, "down")
                if numbers.progressive_input == "residual":
                    self.pyramid[f"{side}x{side}_down"] = build.pyramid_step(pyramid_width, width)
                    pyramid_width = width
                skips.append(width)
            self.down.update(build.way_down(side, width, level_width))
            width = level_width
            skips += [width] * numbers.num_res_blocks

        self.middle = nn.ModuleList(build.middle(sides[-1], width))

        self.up = nn.ModuleDict()
        for side, level_width in zip(reversed(sides), reversed(widths)):
            level_skips = [skips.pop() for _ in range(numbers.num_res_blocks + 1)]
            self.up.update(build.way_up(side, width, level_width, level_skips))
            width = level_width
            if side < resolution:
                self.up[f"{2 * side}x{2 * side}_up"] = build.resampling(width, "up")
        self.norm_out = AdaptiveGroupNorm(width, steering if numbers.adaptive_output_norm else 0)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        initialise(self)
        for layer in residual_outputs(self):
            nn.init.zeros_(layer.weight)  # every residual branch starts as nothing

    def forward(
        self, x_t: Tensor, z: Tensor | None, t: Tensor, labels: Tensor | None = None, text: Text | None = None
    ) -> Tensor:
        """(B, C, s, s) -> (B, out_channels, s, s), in fp32.

        Args:
            x_t: (B, C, s, s).
            z: (B, z_dim) ~ N(0, I); None where ``z_dim`` is 0.
            t: int64 (B,), 1 or more.
            labels: int64 (B,) in 0..num_classes, where ``num_classes`` itself means "no label"; None where that is 0.
            text: B texts of dimension ``text_dim``, where one without rows means "no text"; None where that is 0.
        """
        condition = self._condition(z, t, labels, text)
        x = self.conv_in(x_t)
        skips, pyramid = [x], x_t
        for name, block in self.down.items():
            x = block(x, condition)
            if name in self.pyramid:
                x = pyramid = (self.pyramid[name](pyramid) + x) * self.scale
            skips.append(x)
        for block in self.middle:
            x = block(x, condition)
        for name, block in self.up.items():
            x = block(x if name.endswith("_up") else torch.cat([x, skips.pop()], dim=1), condition)
        return self.conv_out(F.silu(self.norm_out(x, condition.norm1))).float()

    def _condition(self, z: Tensor | None, t: Tensor, labels: Tensor | None, text: Text | None) -> Condition:
        """Time, class, text and style, sent the ways that the arguments chose."""
        self._check_inputs(z, labels, text)
        time = self.time_embedding(t)
        if self.label_embedding is not None:
            time = time + self.label_embedding(labels)
        if self.text_embedding is not None:
            time = time + self.text_embedding(text)
        style = self.mapping(z) if self.mapping is not None else None
        steering_style, added_style = (style, None) if self.z_conditioning == "adaptive_norm" else (None, style)
        if self.time_conditioning == "add":
            return Condition(norm1=steering_style, added=join(time, added_style), norm2=steering_style, text=text)
        steering = join(F.silu(time), steering_style)
        return Condition(norm1=steering_style, added=added_style, norm2=steering, text=text)

    def _check_inputs(self, z: Tensor | None, labels: Tensor | None, text: Text | None) -> None:
        """Raise a ValueError unless there is what the network knows, and nothing else."""
        for name, value, number, size in (
            ("z", z, "z_dim", self.z_dim),
            ("labels", labels, "num_classes", self.num_classes),
            ("text", text, "text_dim", self.text_dim),
        ):
            if (value is None) != (size == 0):
                raise ValueError(
                    f"{number} is {size}, but {name} is {type(value).__name__}; give it where its number is not 0, and"
                    " None elsewhere"
                )


def join(vector: Tensor, other: Tensor | None) -> Tensor:
    """(B, m) and (B, n) -> (B, m + n), where there is another."""
    return vector if other is None else torch.cat([vector, other], dim=1)


def residual_outputs(unet: UNet) -> list[nn.Conv2d]:
    """The last convolution of each residual branch and attention."""
    modules = list(unet.modules())
    blocks = [module.conv2 for module in modules if isinstance(module, UNetBlock)]
    return blocks + [module.out for module in modules if isinstance(module, SelfAttention | CrossAttention)]

"""The PatchGAN discriminator: tells patches of images from patches of reconstructions.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017 (arXiv 1611.07004),
appendix 6.1.2; Esser et al. (arXiv 2012.09841) set it on an autoencoder.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from autoencoder.models.blocks import group_norm

MAX_MULTIPLIER = 8  # the width doubles per layer up to this multiple of base_channels


class PatchDiscriminator(nn.Module):
    """Images (B, image_channels, H, W) in [-1, 1] -> logits (B, 1, h, w), one for each of h x w overlapping patches.

    ``num_layers`` strided convolutions halve the size, two more widen the view: with 3 layers a logit sees 70 x 70
    pixels, and images of 64 px have 6 x 6 logits. Group instead of batch normalisation, so that an image's
    logits depend neither on the rest of its batch nor on the number of processes.
    """

    def __init__(self, *, image_channels: int, base_channels: int, num_layers: int) -> None:
        super().__init__()
        self.min_size = 3 * 2**num_layers  # the two unstrided convolutions take one position each
        widths = [base_channels * min(2**layer, MAX_MULTIPLIER) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (in_channels, out_channels) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=False),
                group_norm(out_channels),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w), high where a patch looks like one of an image."""
        return self.layers(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)  # Isola et al., appendix 6.2

"""The PatchGAN: the paper's layers, what a logit sees, and that images do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoencoder.models.discriminator import PatchDiscriminator


def new_discriminator(num_layers: int = 3, base_channels: int = 8) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(image_channels=3, base_channels=base_channels, num_layers=num_layers)


def images(batch_size: int, side: int) -> Tensor:
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_layers_are_c64_c128_c256_c512_of_the_paper() -> None:
    convolutions = [layer for layer in new_discriminator(3, 64).layers if isinstance(layer, nn.Conv2d)]
    numbers = [(layer.in_channels, layer.out_channels, layer.stride[0]) for layer in convolutions]
    assert numbers == [(3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    assert {layer.kernel_size for layer in convolutions} == {(4, 4)}
    for layer in convolutions[1:-1]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_the_width_stops_growing() -> None:
    widths = [layer.out_channels for layer in new_discriminator(5, 2).layers if isinstance(layer, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


@pytest.mark.parametrize(("num_layers", "view"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_so_many_pixels(num_layers: int, view: int) -> None:
    discriminator = new_discriminator(num_layers)
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):  # statistics over the whole image are another matter
            discriminator.layers[index] = nn.Identity()
    x = images(1, 128).requires_grad_()
    logits = discriminator(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    touched = gradient.abs().sum(dim=(0, 1))
    assert (touched.sum(dim=1) > 0).sum() == view
    assert (touched.sum(dim=0) > 0).sum() == view


def test_an_images_logits_do_not_depend_on_the_rest_of_its_batch() -> None:
    discriminator, x = new_discriminator(), images(3, 32)
    torch.testing.assert_close(torch.cat([discriminator(row[None]) for row in x]), discriminator(x))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_image_has_one_logit_and_a_smaller_one_none(num_layers: int) -> None:
    discriminator = new_discriminator(num_layers)
    assert discriminator(images(2, discriminator.min_size)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(images(2, discriminator.min_size - 1))

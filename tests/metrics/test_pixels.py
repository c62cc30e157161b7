"""PSNR and SSIM against closed forms and independent computations in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.pixels import psnr, ssim


def noise(seed: int, shape: tuple[int, ...] = (3, 3, 20, 24)) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def distorted(images: Tensor, strength: float) -> Tensor:
    shift = strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + shift).round().clamp(0, 255).to(torch.uint8)


def smooth(brightness: int) -> Tensor:
    """A bright, nearly flat image: where variances are small differences of large numbers."""
    x = torch.linspace(0, 6, 24).sin() * 3 + brightness
    return x.expand(1, 3, 20, 24).round().to(torch.uint8)


@pytest.mark.parametrize("difference", [1, 10, 255])
def test_psnr_of_a_constant_difference(difference: int) -> None:
    reference = torch.zeros(2, 3, 5, 7, dtype=torch.uint8)
    expected = 20 * math.log10(255 / difference)
    torch.testing.assert_close(psnr(reference + difference, reference), torch.full((2,), expected))


def test_psnr_is_that_of_each_image_in_float64() -> None:
    images, reference = noise(0), noise(1)
    squares = (images.numpy().astype(float) - reference.numpy()) ** 2
    expected = 10 * np.log10(255**2 / squares.mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(images, reference).numpy(), expected, rtol=1e-6)


def test_psnr_of_equal_images_is_infinite() -> None:
    assert psnr(noise(0), noise(0)).tolist() == [math.inf] * 3


def ssim_in_float64(images: Tensor, reference: Tensor) -> np.ndarray:
    """Wang et al., equation 13, at every place where the 11x11 window lies within the image."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def local_mean(values: np.ndarray) -> np.ndarray:
        return np.einsum("bchwij,ij->bchw", sliding_window_view(values, (11, 11), axis=(2, 3)), window)

    x, y = images.numpy().astype(float), reference.numpy().astype(float)
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("images", "reference"),
    [
        (noise(0), noise(1)),
        (distorted(noise(0), 20), noise(0)),
        (smooth(240), smooth(245)),
        (noise(0, (2, 3, 11, 11)), noise(1, (2, 3, 11, 11))),  # a single place
    ],
)
def test_ssim_is_that_of_an_independent_computation(images: Tensor, reference: Tensor) -> None:
    np.testing.assert_allclose(ssim(images, reference).numpy(), ssim_in_float64(images, reference), rtol=1e-6)


def test_ssim_is_that_of_torchmetrics_away_from_the_border() -> None:
    peer = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    images, reference = distorted(noise(0), 20), noise(0)
    _, similarity = peer(images.double(), reference.double(), data_range=255.0, return_full_image=True)
    expected = similarity[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))  # beyond it reflects the image, unlike the paper
    torch.testing.assert_close(ssim(images, reference).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("a", "b"), [(100, 150), (255, 254), (0, 255)])
def test_ssim_of_flat_images_is_its_luminance_term(a: int, b: int) -> None:
    c1 = (0.01 * 255) ** 2
    images, reference = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (a, b))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(images, reference).item() == pytest.approx(expected, rel=1e-6)


def test_an_image_is_most_similar_to_itself() -> None:
    images = noise(0)
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    scores = torch.stack([ssim(distorted(images, strength), images) for strength in (0, 10, 30, 90)])
    assert bool((scores.diff(dim=0) < 0).all())


def test_images_smaller_than_the_window_are_refused() -> None:
    images = noise(0, (1, 3, 10, 16))
    with pytest.raises(UserError, match="SSIM needs images of 11 px or more, and these are 10x16 px"):
        ssim(images, images)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("other", [noise(0).float(), noise(0)[:2]])
def test_pairs_that_do_not_match_are_refused(metric, other: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 of one shape \(B, C, H, W\)"):
        metric(other, noise(0))

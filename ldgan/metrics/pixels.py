"""How close an image is to its reference, pixel by pixel (PSNR) and in local structure (SSIM)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldgan.engine.cli import UserError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, fp32 (B,), of uint8 images (B, C, H, W); infinite for equal images.

    10 log10(255^2 / MSE), where the mean squared error is taken over all values of an image.
    """
    _check_pair(images, reference)
    mse = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / mse)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, fp32 (B,), at most 1, of uint8 images (B, C, H, W).

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, equation 13:
    11x11 Gaussian window, constants 0.01 and 0.03 of the range 255, mean over the places where the window lies
    within the image; here for each colour channel, and then the mean over channels.

    Raises:
        UserError: the images are smaller than the window.
    """
    _check_pair(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        height, width = images.shape[-2:]
        raise UserError(f"SSIM needs images of {SSIM_WINDOW} px or more, and these are {height}x{width} px")
    # Variances are small differences of squares up to 65,025: in fp32 (torchmetrics, 1.9) the SSIM of flat bright
    # images, a white background say, is off by up to 0.002.
    x, y = images.double(), reference.double()
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    var_x, var_y = _local_mean(x * x) - mean_x * mean_x, _local_mean(y * y) - mean_y * mean_y
    covariance = _local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _local_mean(values: Tensor) -> Tensor:
    """Gaussian mean of values (..., H, W) around each place where the window fits, (..., H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2)).double()
    window /= window.sum()
    for dim in (-2, -1):
        length = values.shape[dim] - SSIM_WINDOW + 1
        # Shifted sums: faster in float64 than the convolutions of torch.
        values = sum(weight * values.narrow(dim, k, length) for k, weight in enumerate(window.tolist()))
    return values


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8 or images.shape != reference.shape:
        given = f"{images.dtype} {tuple(images.shape)} and {reference.dtype} {tuple(reference.shape)}"
        raise ValueError(f"images and reference must be uint8 of one shape (B, C, H, W), not {given}")

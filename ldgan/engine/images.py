"""Between float tensors, uint8 images, grids, and PNG and WebP files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldgan.engine.files import write_atomically

MIN_TILE = 96  # pixels; in pictures for people, smaller images are enlarged by a whole factor
MAX_WEBP_SIDE = 16383  # pixels; 14 bits in the format


def to_uint8(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to the nearest of 0..255 (uint8, same shape); clamp what lies outside."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], same shape; `to_uint8` gives the very same bytes back."""
    return images.float() / 127.5 - 1


def image_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Lay images (N, C, H, W) out row by row in one image (C, H', W').

    ``padding`` black pixels separate neighbours; places behind the last image stay black.
    """
    num_images, channels, height, width = images.shape
    columns = min(columns, num_images)
    rows = -(-num_images // columns)
    blanks = images.new_zeros(rows * columns - num_images, channels, height, width)
    cells = F.pad(torch.cat([images, blanks]), (0, padding, 0, padding))
    rows_of_cells = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # (C, rows, H + p, columns, W + p)
    grid = rows_of_cells.reshape(channels, rows * (height + padding), columns * (width + padding))
    return grid[:, : grid.shape[1] - padding, : grid.shape[2] - padding]


def enlarge(images: Tensor, factor: int | None = None) -> Tensor:
    """Show each pixel of images (N, C, H, W) as ``factor`` x ``factor`` pixels, for people to look at.

    None leaves large images as they are and brings small ones near `MIN_TILE`.
    """
    if factor is None:
        factor = max(1, MIN_TILE // images.shape[-1])
    return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def error_maps(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Absolute difference of uint8 images (B, C, H, W), mean over channels, as grey images of that shape.

    Black is no difference; white is 64 of 255 grey levels or more.
    """
    difference = (reconstructions.float() - images.float()).abs().mean(dim=1, keepdim=True)
    return (difference * (255 / 64)).round().clamp(max=255).to(torch.uint8).expand_as(images)


def encode_lossless(image: Tensor, image_format: Literal["png", "webp"]) -> bytes:
    """Return a file's bytes for a uint8 image (C, H, W), C = 1 (grey) or 3 (RGB).

    WebP has no grey, so that it is read back as RGB, and at most `MAX_WEBP_SIDE` pixels a side.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    # PNG knows no other way and ignores the option.
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def save_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image (C, H, W), C = 1 (grey) or 3 (RGB), as a PNG file that is complete or absent."""
    write_atomically(path, encode_lossless(image, "png"))


def load_png(path: Path) -> Tensor:
    """Read what `save_png` wrote: a uint8 image (C, H, W), C = 1 or 3."""
    with Image.open(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())

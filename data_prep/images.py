"""From any image file to a square of RGB pixels, and from pixels to bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # file extension -> Pillow's name
# What is read, by Pillow's names. It knows more, and some it hands to other programs: EPS to Ghostscript, say.
_READ_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP")
RESIZE_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
CONVERSIONS = ("grey", "alpha", "16-bit")


class Picture(NamedTuple):
    """A decoded file: upright 8-bit RGB, and which of `CONVERSIONS` made it that."""

    image: Image.Image
    conversions: tuple[str, ...]


def read_picture(file: str | os.PathLike[str] | BinaryIO, max_pixels: int | None = None) -> Picture:
    """Decode an image file.

    Transparent pixels are composited on white, 16-bit samples are scaled from 0..65535 to 0..255, EXIF
    orientation is applied, and of an animation the first frame is taken. Raises what Pillow raises for a
    damaged file, and ValueError for floating-point pixels, whose range nobody knows, and for more than
    ``max_pixels`` (None: twice what Pillow warns of), which are not decoded.
    """
    with Image.open(file, formats=_READ_FORMATS) as opened:
        if max_pixels is not None and opened.width * opened.height > max_pixels:
            raise ValueError(f"{opened.width} x {opened.height} pixels; at most {max_pixels:,} are decoded")
        conversions = _conversions(opened)
        upright = ImageOps.exif_transpose(opened)
        upright.load()
    return Picture(_to_rgb(upright), conversions)


def _conversions(image: ImageFile.ImageFile) -> tuple[str, ...]:
    """Which of `CONVERSIONS` an image needs that is not decoded yet."""
    # Pillow gives the high bytes of 16-bit colours as an RGB image, and only the decoder's arguments tell.
    wide = image.mode.startswith("I") or ";16" in str(image.tile)
    needed = (Image.getmodebase(image.mode) == "L", image.has_transparency_data, wide)
    return tuple(name for name, is_needed in zip(CONVERSIONS, needed) if is_needed)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips these at 255
        wide = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: int, resize_filter: str = "lanczos", position: float = 0.5
) -> Image.Image:
    """Scale the short side to ``resolution`` pixels and keep a square, the central one unless told otherwise.

    ``resize_filter`` is one of `RESIZE_FILTERS`; all are antialiased when they scale down. ``position`` says where
    along the long side the square lies, from 0 (left or top) to 1 (right or bottom).
    """
    side = min(image.size)
    left, top = (image.width - side) * position, (image.height - side) * position
    # A box crops and scales at once: no panorama is scaled as a whole, and the crop is exact to sub-pixels.
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), RESIZE_FILTERS[resize_filter], box=box)


def image_member(sample: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The extension and content of the image among a shard's sample; ValueError where there is none."""
    for extension, content in sample.items():
        if extension in IMAGE_FORMATS:
            return extension, content
    raise ValueError(f"no image among its members: {', '.join(sample)}")


def encode_image(image: Image.Image, image_format: str, quality: int) -> bytes:
    """Return a "png", "jpg" or "webp" file's bytes; ``quality`` (1..100) is for the lossy two."""
    options = {
        "png": {},
        "jpg": {"quality": quality, "subsampling": 0},  # 0 keeps colour at full resolution
        "webp": {"quality": quality},
    }
    buffer = io.BytesIO()
    image.save(buffer, IMAGE_FORMATS[image_format], **options[image_format])
    return buffer.getvalue()

"""From any image file to a square of RGB pixels, and from pixels to bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # file extension -> Pillow's name


def read_rgb(image: Path | np.ndarray) -> Image.Image:
    """Return ``image``, a file or uint8 pixels (H, W, 3), upright and as 8-bit RGB.

    Transparent pixels are composited on white, 16-bit samples are scaled from 0..65535 to 0..255, EXIF
    orientation is applied, and of an animation the first frame is taken. Raises what Pillow raises for a
    damaged file, and ValueError for floating-point pixels, whose range nobody knows.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with Image.open(image) as opened:
        upright = ImageOps.exif_transpose(opened)
        upright.load()
    return _to_rgb(upright)


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


def resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the short side to ``resolution`` pixels (antialiased, Lanczos) and keep the central square."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # A box crops and scales at once: no panorama is scaled as a whole, and the crop is exact to sub-pixels.
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


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

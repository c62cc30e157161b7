"""What the members of a shard's sample hold, read with care: a file may promise anything, and a stranger wrote it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_prep.images import IMAGE_FORMATS, image_member

MAX_TEXT_NUMBERS = 1 << 24  # of a caption's embedding; T5-XXL's 512 tokens have 1 << 21


def open_image(sample: Mapping[str, bytes], side: int | None) -> Image.Image:
    """A sample's image, not decoded yet; ValueError unless both sides have ``side`` pixels, where given.

    A file of a few kilobytes can hold more pixels than there is memory for. Raises what Pillow does for a damaged one.
    """
    extension, content = image_member(sample)
    image = Image.open(io.BytesIO(content), formats=[IMAGE_FORMATS[extension]])
    if side is not None and image.size != (side, side):
        raise ValueError(f"{image.width} x {image.height} pixels, not {side} x {side} as in the manifest")
    return image


def load_moments(sample: Mapping[str, bytes], details: Mapping[str, Any]) -> np.ndarray:
    """A sample's moments, (2C, h, w) or (2, 2C, h, w), see `data_prep.loader.LatentDataset`.

    ValueError unless they are what the manifest's ``details`` say.
    """
    if "npy" not in sample:
        raise ValueError(f"no npy among its members: {', '.join(sample)}")
    moments = load_array(sample["npy"])
    if moments.ndim not in (3, 4) or moments.dtype.kind != "f" or moments.shape[-3] % 2:
        raise ValueError(f"no moments: an array of {moments.dtype} of shape {moments.shape}")
    if moments.ndim == 4 and len(moments) != 2:
        raise ValueError(f"moments of {len(moments)} images instead of one and its mirror image")
    if moments.ndim == 3 and details.get("flips"):
        raise ValueError("no moments of the mirror image, which the manifest promises")
    if (shape := details.get("latent_shape")) is not None and moments.shape[-3:] != (2 * shape[0], *shape[1:]):
        raise ValueError(f"moments of shape {moments.shape}, not of latents {tuple(shape)} as in the manifest")
    if not np.isfinite(moments).all():
        raise ValueError("moments that are not all finite")
    return moments


def load_array(content: bytes) -> np.ndarray:
    """The array of a ``.npy`` member, never a pickle; ValueError where it is damaged.

    Its header may promise any shape, for which `numpy.load` would take the memory before it reads on.
    """
    file = io.BytesIO(content)
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"an npy file of version {version}; numpy.save writes (1, 0) for plain arrays")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only a pickle could hold")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{len(content) - file.tell():,} bytes for an array of {dtype} of shape {shape}")
    return np.load(io.BytesIO(content), allow_pickle=False)


def load_text(content: bytes, num_rows: int, dim: int) -> np.ndarray:
    """The embedding of a caption, float16 (2 to ``num_rows``, ``dim``), of a ``text.npy`` member; else ValueError."""
    rows = load_array(content)
    if rows.dtype != np.float16 or rows.ndim != 2 or rows.shape[1] != dim or not 2 <= len(rows) <= num_rows:
        raise ValueError(f"text of {rows.dtype} {rows.shape}, not float16 (2 to {num_rows}, {dim})")
    if not np.isfinite(rows).all():
        raise ValueError("text that is not finite")
    return rows


def text_shape(details: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows of a caption's embedding at most, 1 + max_tokens, and their dimension, by a manifest's details.

    None where captions are not embedded; ValueError where the details cannot be true.
    """
    if (text := details.get("text")) is None:
        return None
    max_tokens, dim = (text.get(key) if isinstance(text, dict) else None for key in ("max_tokens", "dim"))
    if type(max_tokens) is not int or type(dim) is not int or min(max_tokens, dim) < 1:
        raise ValueError('"text" is damaged')
    if (1 + max_tokens) * dim > MAX_TEXT_NUMBERS:
        raise ValueError(f'"text" promises captions of {max_tokens} x {dim} numbers')
    return 1 + max_tokens, dim

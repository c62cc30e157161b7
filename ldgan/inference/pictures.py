"""Between the images that people have, PIL images, files, arrays or tensors, and the tensors that models take."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.images import read_picture, resize_and_crop
from ldgan.engine.cli import UserError

Pictures = Any
"""Images: PIL images, paths of files, arrays (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), or a
sequence of these. Arrays and tensors hold uint8 in 0..255 or floats in 0..1."""

Masks = Any
"""Masks, which say where something new is made: PIL images and files (where they have 128 or more of 255), arrays and
tensors of bool, uint8 (not 0) or floats (more than half of 0..1), (H, W) or (B, H, W), tensors also (B, 1, H, W), or a
sequence of these."""

Output = Literal["pil", "numpy", "tensor"]
"""What images come as: a list of PIL images, a uint8 array (B, H, W, 3), or a uint8 tensor (B, 3, H, W) on the CPU."""

MASKED = 128  # of 255: from here on a grey level says "new", as does an opacity below it


def open_pictures(pictures: Pictures) -> list[Image.Image]:
    """Images as RGB; a UserError if something is none."""
    found = [picture for item in _items(pictures) for picture in _pictures_of(item)]
    if not found:
        raise UserError(f"there are no images; give {_POSSIBLE}")
    return found


def open_masks(masks: Masks, pictures: list[Image.Image]) -> list[Image.Image]:
    """One mask for each picture, of mode "L" with 0 and 255; a single one serves all.

    Raises:
        UserError: something is no mask, there are too many or too few, or one has another size than its picture.
    """
    found = [mask for item in _items(masks) for mask in _masks_of(item)]
    if len(found) == 1:
        found *= len(pictures)
    if len(found) != len(pictures):
        raise UserError(f"{len(found)} masks for {len(pictures)} images; give one for each, or one for all of them")
    for number, (mask, picture) in enumerate(zip(found, pictures)):
        if mask.size != picture.size:
            raise UserError(
                f"mask {number} is {mask.width}x{mask.height} pixels, its image {picture.width}x{picture.height};"
                " give a mask of the image's size"
            )
    return found


def to_images(pictures: list[Image.Image], resolution: int | None = None) -> Tensor:
    """uint8 (B, 3, s, s); what has another size is scaled and cropped to its central square, as for training.

    Without a ``resolution`` images stay as they are, (B, 3, H, W); a UserError if they are not all of one size.
    """
    if resolution is not None:
        pictures = [resize_and_crop(picture, resolution) for picture in pictures]
    sizes = {picture.size: f"{picture.width}x{picture.height}" for picture in pictures}
    if len(sizes) > 1:
        raise UserError(f"images of several sizes: {', '.join(sizes.values())} pixels; give those of one size")
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def to_masks(masks: list[Image.Image], resolution: int) -> Tensor:
    """bool (B, 1, s, s), scaled and cropped as their images are: True where a mask touches a pixel at all."""
    arrays = [np.asarray(resize_and_crop(mask, resolution, "box")) > 0 for mask in masks]
    return torch.from_numpy(np.stack(arrays))[:, None]


def to_arrays(images: Tensor) -> np.ndarray:
    """uint8 (B, 3, H, W) -> (B, H, W, 3)."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 (B, 3, H, W) -> as many PIL images."""
    return [Image.fromarray(array) for array in to_arrays(images)]


OUTPUTS: Mapping[str, Callable[[Tensor], Any]] = {"pil": to_pil, "numpy": to_arrays, "tensor": lambda images: images}

_POSSIBLE = (
    "PIL images, paths, uint8 arrays (H, W, 3) or (B, H, W, 3), or uint8 tensors (3, H, W) or (B, 3, H, W), the same of"
    " floats in 0..1, or a list of these"
)
_POSSIBLE_MASKS = (
    "PIL images, paths, or arrays of bool, uint8 or floats in 0..1, (H, W) or (B, H, W), or a list of these"
)


def _items(given: Any) -> Iterator[Any]:
    """What a sequence holds, or the thing itself."""
    return iter(given) if isinstance(given, (list, tuple)) else iter([given])


def _pictures_of(item: Any) -> list[Image.Image]:
    if isinstance(item, (str, os.PathLike)):
        return [_read(Path(item))]
    if isinstance(item, Image.Image):
        return [_to_rgb(item)]
    array = _array_of(item.movedim(-3, -1) if isinstance(item, Tensor) and item.ndim >= 3 else item)
    levels = _to_levels(array) if array is not None and array.dtype != np.bool_ else None
    if levels is None or levels.ndim not in (3, 4) or levels.shape[-1] != 3:
        raise UserError(f"no images: {_describe(item)}; give {_POSSIBLE}")
    return [Image.fromarray(np.ascontiguousarray(each)) for each in (levels if levels.ndim == 4 else levels[None])]


def _masks_of(item: Any) -> list[Image.Image]:
    if isinstance(item, (str, os.PathLike)):
        item = _read(Path(item))
    if isinstance(item, Image.Image):
        return [_marked(np.asarray(_to_rgb(item).convert("L")))]
    array = _array_of(item[:, 0] if isinstance(item, Tensor) and item.ndim == 4 and item.shape[1] == 1 else item)
    levels = _to_levels(array) if array is not None else None
    if array is None or levels is None or levels.ndim not in (2, 3):
        raise UserError(f"no masks: {_describe(item)}; give {_POSSIBLE_MASKS}")
    least = MASKED if array.dtype.kind == "f" else 1
    return [_marked(each, least) for each in (levels if levels.ndim == 3 else levels[None])]


def _marked(levels: np.ndarray, least: int = MASKED) -> Image.Image:
    return Image.fromarray(np.uint8(255) * (levels >= least))


def _array_of(item: Any) -> np.ndarray | None:
    """An array or a tensor as array; None of anything else."""
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        return (item.float() if item.is_floating_point() else item).numpy()  # numpy has no bfloat16
    return item if isinstance(item, np.ndarray) else None


def _to_levels(array: np.ndarray) -> np.ndarray | None:
    """Grey levels of uint8 and bool, as they are, and of floats in 0..1; None for numbers of other kinds."""
    if array.dtype.kind != "f":
        return array.astype(np.uint8) if array.dtype in (np.uint8, np.bool_) else None
    if not ((array >= 0) & (array <= 1)).all():  # NaN too
        raise UserError(
            f"floats from {array.min():g} to {array.max():g}; give them in 0..1, from black to white, or uint8"
        )
    return np.rint(255 * array.astype(np.float64)).astype(np.uint8)


def _read(path: Path) -> Image.Image:
    try:
        return read_picture(path).image
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise UserError(f"{path}: cannot be read as an image ({error}); give a PNG, JPEG or WebP file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rules of files: transparent pixels on white, 16 bits scaled to 8."""
    if image.mode == "F":
        levels = _to_levels(np.asarray(image))
        assert levels is not None
        image = Image.fromarray(levels)
    if image.mode in ("RGB", "L"):
        return image.convert("RGB")
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except OSError as error:
        raise UserError(f"a PIL image of mode {image.mode} cannot be used; convert it to RGB") from error
    return read_picture(buffer).image


def _describe(item: Any) -> str:
    if isinstance(item, (np.ndarray, Tensor)):
        return f"{type(item).__name__} of {item.dtype}, shape {tuple(item.shape)}"
    return type(item).__name__

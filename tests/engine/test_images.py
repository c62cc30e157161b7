"""Images: exact bytes through every conversion, pixels where the grid should have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldgan.engine.images import encode_lossless, enlarge, from_uint8, image_grid, load_png, save_png, to_uint8


def test_every_byte_survives_the_round_trip() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = from_uint8(every_byte)
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), every_byte)


def test_rounding_is_to_nearest_and_outliers_are_clamped() -> None:
    half_step = 1 / 255
    values = torch.tensor([-7.0, -1 + 0.9 * half_step, -1 + 1.1 * half_step, 1 - 0.9 * half_step, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]


def test_half_precision_input_is_converted_in_fp32() -> None:
    values = torch.linspace(-1, 1, 50).bfloat16()
    assert torch.equal(to_uint8(values), to_uint8(values.float()))


@pytest.mark.parametrize("padding", [0, 2])
def test_grid_places_images_row_by_row(padding: int) -> None:
    images = torch.randint(1, 256, (5, 3, 4, 6), dtype=torch.uint8)
    grid = image_grid(images, columns=3, padding=padding)
    assert grid.shape == (3, 2 * 4 + padding, 3 * 6 + 2 * padding)
    rest = grid.clone()
    for index, image in enumerate(images):
        top, left = index // 3 * (4 + padding), index % 3 * (6 + padding)
        assert torch.equal(grid[:, top : top + 4, left : left + 6], image)
        rest[:, top : top + 4, left : left + 6] = 0
    assert rest.sum() == 0  # gaps and the sixth place are black


def test_grid_is_no_wider_than_its_images() -> None:
    image = torch.full((1, 1, 4, 4), 9, dtype=torch.uint8)
    assert torch.equal(image_grid(image, columns=8), image[0])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(tmp_path: Path, channels: int, mode: str) -> None:
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / "samples" / "image.png"
    save_png(path, image)
    with Image.open(path) as read:
        assert read.mode == mode
        assert np.array_equal(np.asarray(read).reshape(5, 7, channels), image.permute(1, 2, 0).numpy())
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_read_back_to_the_same_pixels(tmp_path: Path, channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(tmp_path / "image.png", image)
    assert torch.equal(load_png(tmp_path / "image.png"), image)


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_format_loses_a_bit(image_format: str, channels: int) -> None:
    image = torch.randint(0, 256, (channels, 33, 17), dtype=torch.uint8)
    with Image.open(io.BytesIO(encode_lossless(image, image_format))) as read:
        assert read.format == image_format.upper()
        pixels = np.array(read.convert("RGB"))
    assert np.array_equal(pixels, image.expand(3, -1, -1).permute(1, 2, 0).numpy())


def test_enlarged_pixels_are_squares_of_themselves() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]], dtype=torch.uint8)
    assert torch.equal(enlarge(images, 2), expected.view(1, 1, 4, 4))

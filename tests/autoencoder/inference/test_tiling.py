"""Tiled decoding: equal to decoding at once where the decoder is local, and never more than a tile at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.inference.tiling import decode_tiled, tiles_of_axis

SIZES = [(40, 40), (17, 53), (64, 5), (33, 16)]  # latent pixels, for tiles of 16: all sorts of remainders
OVERLAPS = [0, 1, 4, 7, 8]


def nearest(latents: Tensor) -> Tensor:
    """The simplest decoder: each latent pixel becomes 4 x 4 pixels."""
    return F.interpolate(latents, scale_factor=4, mode="nearest")


@pytest.mark.parametrize("factor", [1, 4, 8])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("length", [16, 17, 31, 32, 61, 200])
def test_weights_add_up_to_exactly_one_and_tiles_reach_the_ends(length: int, overlap: int, factor: int) -> None:
    tiles = tiles_of_axis(length, 16, overlap, factor)
    total = torch.zeros(length * factor)
    for tile in tiles:
        assert (tile.pixels.start, tile.pixels.stop) == (tile.latents.start * factor, tile.latents.stop * factor)
        assert tile.latents.stop - tile.latents.start == 16
        assert tile.weights.min() >= 0
        total[tile.pixels] += tile.weights
    assert torch.equal(total, torch.ones_like(total))
    shared = [left.latents.stop - right.latents.start for left, right in itertools.pairwise(tiles)]
    assert all(number >= overlap for number in shared)


@pytest.mark.parametrize("overlap", [4, 8])
def test_the_outer_quarters_of_an_overlap_are_not_used(overlap: int) -> None:
    left, right, *_ = tiles_of_axis(16 + 2 * (16 - overlap), 16, overlap, 4)
    margin = overlap // 4 * 4
    assert left.weights[-margin:].max() == right.weights[:margin].max() == 0
    assert left.weights[-margin - 1] > 0
    # Between them, a straight line.
    ramp = right.weights[margin : overlap * 4 - margin]
    torch.testing.assert_close(ramp, (torch.arange(len(ramp)) + 0.5) / len(ramp))


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_has_no_seams(size: tuple[int, int], overlap: int) -> None:
    latents = torch.full((2, 3, *size), 0.7)
    images = decode_tiled(nearest, latents, tile=16, overlap=overlap, factor=4)
    torch.testing.assert_close(images, nearest(latents), rtol=0, atol=2e-7)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_stays_a_gradient(size: tuple[int, int], overlap: int) -> None:
    height, width = size
    latents = torch.linspace(-1, 1, height)[:, None] + torch.linspace(0, 3, width).expand(1, 2, height, width)
    images = decode_tiled(nearest, latents, tile=16, overlap=overlap, factor=4)
    torch.testing.assert_close(images, nearest(latents), rtol=0, atol=1e-6)


def conv_decoder() -> nn.Sequential:
    """Convolutions only: each pixel depends on two latent pixels to every side, zero padding at the borders."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(8, 3, 3, padding=1),
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_decoder_that_sees_a_quarter_of_the_overlap_decodes_as_without_tiles(size: tuple[int, int]) -> None:
    decoder, latents = conv_decoder(), torch.randn(1, 3, *size)
    with torch.no_grad():
        whole = decoder(latents)
        tiled = decode_tiled(decoder, latents, tile=16, overlap=8, factor=4)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_without_overlap_one_sees_the_padding_of_the_tiles() -> None:
    decoder, latents = conv_decoder(), torch.randn(1, 3, 16, 32)
    with torch.no_grad():
        difference = (decode_tiled(decoder, latents, tile=16, overlap=0, factor=4) - decoder(latents)).abs()
    assert difference[..., 56:72].max() > 1e-2  # two latent pixels on either side of the seam, and only there
    assert max(difference[..., :56].max(), difference[..., 72:].max()) < 1e-5


def test_tiles_larger_than_the_image_change_no_bit() -> None:
    decoder, latents = conv_decoder(), torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        assert torch.equal(decode_tiled(decoder, latents, tile=12, overlap=3, factor=4), decoder(latents))


@pytest.mark.parametrize("size", SIZES)
def test_no_more_than_a_tile_is_decoded_at_a_time(size: tuple[int, int]) -> None:
    seen = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(tuple(latents.shape[-2:]))
        return nearest(latents)

    decode_tiled(decode, torch.zeros(1, 1, *size), tile=16, overlap=4, factor=4)
    assert set(seen) == {(min(size[0], 16), min(size[1], 16))}
    # The fewest tiles: 12 new latent pixels each after the first 16.
    fewest = [1 + -(-max(side - 16, 0) // 12) for side in size]
    assert len(seen) == fewest[0] * fewest[1]


@pytest.mark.parametrize("overlap", [-1, 9, 16])
def test_overlaps_of_more_than_half_a_tile_are_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"tiles of 16 latent pixels cannot overlap by {overlap}"):
        decode_tiled(nearest, torch.zeros(1, 1, 8, 8), tile=16, overlap=overlap, factor=4)

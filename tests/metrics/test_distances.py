"""Blocks of distances against differences in float64, and what they keep in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldgan.metrics.distances import BLOCK_SIZE, distance_blocks, mean_of
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import prdc
from ldgan.metrics.neighbours import nearest


def gaussian(seed: int, num_images: int, num_features: int) -> Tensor:
    return 5 + torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def squared_differences(a: Tensor, b: Tensor) -> Tensor:
    return (a.double()[:, None] - b.double()).square().sum(dim=-1)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_blocks_cover_the_matrix_up_to_their_rounding(shift: float) -> None:
    a, b = gaussian(0, 25, 7) + shift, gaussian(1, 17, 7) + shift
    expected, seen = squared_differences(a, b), torch.zeros(25, 17)
    for rows, columns, squared, rounding in distance_blocks(a, b, torch.zeros(7).double(), block_size=10):
        assert bool(((squared - expected[rows, columns]).abs() <= rounding).all())
        seen[rows, columns] += 1
    assert bool((seen == 1).all())


def test_an_origin_among_the_features_keeps_the_digits() -> None:
    a, b = gaussian(0, 25, 7) + 1e4, gaussian(1, 17, 7) + 1e4
    (block,) = distance_blocks(a, b, mean_of(a))
    torch.testing.assert_close(block.squared, squared_differences(a, b), rtol=1e-12, atol=0)
    assert float((block.rounding / block.squared).max()) < 1e-12


def test_half_of_the_blocks_and_their_mirror_images_cover_the_matrix() -> None:
    points = gaussian(0, 25, 7)
    covered = torch.zeros(25, 25)
    for rows, columns, squared, _ in distance_blocks(points, points, mean_of(points), half=True, block_size=10):
        covered[rows, columns] = squared.float()
        covered[columns, rows] = squared.T.float()
    torch.testing.assert_close(covered, squared_differences(points, points).float())


def test_the_mean_is_that_in_double_precision() -> None:
    points = gaussian(0, 2 * BLOCK_SIZE + 100, 3) + 1e4
    torch.testing.assert_close(mean_of(points), points.double().mean(dim=0), rtol=1e-14, atol=0)


class LargestDouble(TorchDispatchMode):
    """Notes how many numbers the largest tensor in float64 holds."""

    numel = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        doubles = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float64]
        self.numel = max(self.numel, *doubles, 0)
        return result


@pytest.mark.parametrize(
    "metric",
    [prdc, lambda real, fake: nearest(fake, real, 3), lambda real, fake: kernel_distance(real, fake, num_subsets=1)],
    ids=["manifold", "neighbours", "kernel distance"],
)
def test_no_metric_holds_more_than_a_block_in_double_precision(metric: Callable[[Tensor, Tensor], object]) -> None:
    real, fake = gaussian(0, 6000, 700), gaussian(1, 3000, 700)
    with LargestDouble() as largest:
        metric(real, fake)
    assert BLOCK_SIZE * 600 < largest.numel < 1.01 * BLOCK_SIZE * BLOCK_SIZE < fake.numel()

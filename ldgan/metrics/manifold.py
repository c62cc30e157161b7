"""Quality and coverage apart: does an image lie among the real ones, and do all real ones have images among them?

The set of images that a sample of features stands for is estimated as the union of balls around its features,
each as large as the distance to its k-th nearest neighbour among the others. From that come

- improved precision and recall (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
  Generative Models", NeurIPS 2019, arXiv 1904.06991), and
- density and coverage (Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
  arXiv 2002.09797), which a single outlier with its large ball cannot lift.

Balls are closed. The sets may differ in size, but all numbers depend on how many images there are: compare values for
the same numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.distances import BLOCK_SIZE, Progress, check_pair, distance_blocks, mean_of


class PRDC(NamedTuple):
    """Shares, 0 to 1, but for the density.

    precision: of fake images among the real ones.
    recall: of real images among the fake ones.
    density: fakes per real ball as a multiple of k, about 1 for real images.
    coverage: of real balls with a fake inside.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    real: Tensor,
    fake: Tensor,
    *,
    k_manifold: int = 3,
    k_density: int = 5,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> PRDC:
    """Improved precision and recall, density and coverage of features (N, d) and (M, d), all at once.

    Beyond the features it takes memory for a few blocks of ``block_size`` x max(``block_size``, d) numbers in float64,
    and time for (N + M)^2 d operations: 50,000 images on either side and 2,048 features take minutes.

    Args:
        real: features of real images, of any floating-point type; distances are computed on their device, in float64.
        fake: features of generated images; there may be more or fewer.
        k_manifold: the ball of an image reaches to this neighbour for precision and recall.
        k_density: and to this one for density and coverage.
        block_size: features on either side of a block of distances.
        progress: is told now and then how many more distances are done, of `num_distances` in all.

    Raises:
        UserError: a set has not more than k features, and hence no k-th nearest neighbour, or NaN or infinite ones.
    """
    check_pair(real, fake)
    most, fewest = max(k_manifold, k_density), min(len(real), len(fake))
    if fewest <= most:
        raise UserError(
            f"the {most} nearest neighbours of an image need more than {most} images, not {fewest}; take more"
        )
    fake = fake.to(real.device)
    origin = mean_of(real)
    manifold, neighbourhood = _squared_radii(real, (k_manifold, k_density), origin, block_size, progress)
    (fake_manifold,) = _squared_radii(fake, (k_manifold,), origin, block_size, progress)

    precise, covered, recalled = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (fake, real, real))
    hits = 0
    blocks = distance_blocks(fake, real, origin, block_size=block_size, progress=progress)
    for rows, columns, squared, rounding in blocks:
        # Without the allowance, balls of duplicates, whose radius is zero, would miss their own centre.
        squared -= rounding
        precise[rows] |= (squared <= manifold[columns]).any(dim=1)
        recalled[columns] |= (squared <= fake_manifold[rows, None]).any(dim=0)
        inside = squared <= neighbourhood[columns]
        covered[columns] |= inside.any(dim=0)
        hits += int(inside.sum())
    precision, recall, coverage = (found.double().mean().item() for found in (precise, recalled, covered))
    return PRDC(precision, recall, density=hits / (k_density * len(fake)), coverage=coverage)


def num_distances(num_real: int, num_fake: int) -> int:
    """How many distances `prdc` computes: one for each pair of all images, and one of each image to itself."""
    return math.comb(num_real + num_fake + 1, 2)


def _squared_radii(
    points: Tensor, ks: Sequence[int], origin: Tensor, block_size: int, progress: Progress | None
) -> list[Tensor]:
    """For each k, the squared distances of ``points`` (N, d) to their k-th nearest neighbours, float64 (N,)."""
    # The nearest is the point itself: a duplicate of it is a neighbour like any other.
    nearest = torch.full((len(points), max(ks) + 1), torch.inf, dtype=torch.float64, device=points.device)

    def update(rows: slice, squared: Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], squared], dim=1).topk(nearest.shape[1], largest=False).values

    blocks = distance_blocks(points, points, origin, half=True, block_size=block_size, progress=progress)
    for rows, columns, squared, _ in blocks:
        update(rows, squared)
        if columns != rows:
            update(columns, squared.T)
    return [nearest[:, k] for k in ks]

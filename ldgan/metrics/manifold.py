"""Quality and coverage apart: does an image lie among the real ones, and do all real ones have images among them?

The set of images that a sample of features stands for is estimated as the union of balls around its features,
each as large as the distance to its k-th nearest neighbour among the others. From that come

- improved precision and recall (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
  Generative Models", NeurIPS 2019, arXiv 1904.06991), and
- density and coverage (Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
  arXiv 2002.09797), which a single outlier with its large ball cannot lift.

Balls are closed. All numbers depend on how many images there are: compare values for the same numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldgan.engine.cli import UserError

BLOCK_SIZE = 512  # features whose distances to all others are in memory at a time


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1: of fake images among the real ones, and of real images among the fake ones."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Fakes per real ball as a multiple of k, about 1 for real images; share of real balls with a fake inside."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block_size: int = BLOCK_SIZE) -> PrecisionRecall:
    """Improved precision and recall of features (N, d) and (M, d); memory grows with ``block_size`` x max(N, M).

    Raises:
        UserError: a set has not more than ``k`` features, and hence no k-th nearest neighbour.
    """
    real, fake = _prepare(real, fake, k)
    return PrecisionRecall(
        precision=_share_inside(fake, real, k, block_size), recall=_share_inside(real, fake, k, block_size)
    )


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, block_size: int = BLOCK_SIZE) -> DensityCoverage:
    """Density and coverage of features (N, d) and (M, d); memory grows with ``block_size`` x N.

    Raises:
        UserError: a set has not more than ``k`` features.
    """
    real, fake = _prepare(real, fake, k)
    hits, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for inside in _inside_balls(fake, real, k, block_size):
        hits += int(inside.sum())
        covered |= inside.any(dim=0)
    return DensityCoverage(density=hits / (k * len(fake)), coverage=covered.double().mean().item())


def _prepare(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the device of ``real``, with their common origin moved to the mean of ``real``."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, d) and (M, d), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if (fewest := min(len(real), len(fake))) <= k:
        raise UserError(f"the {k} nearest neighbours of an image need more than {k} images, not {fewest}; take more")
    real, fake = real.double(), fake.to(real.device).double()
    centre = real.mean(dim=0)
    return real - centre, fake - centre


def _share_inside(points: Tensor, centres: Tensor, k: int, block_size: int) -> float:
    """Share of ``points`` that lie in the ball of at least one of ``centres``."""
    hits = sum(int(inside.any(dim=1).sum()) for inside in _inside_balls(points, centres, k, block_size))
    return hits / len(points)


def _inside_balls(points: Tensor, centres: Tensor, k: int, block_size: int) -> Iterator[Tensor]:
    """For each block of ``points``: which of the balls around ``centres`` (N, d) hold them, bool (block, N)."""
    # The nearest is the centre itself: a duplicate of it is a neighbour like any other.
    radii = torch.cat(
        [_distances(block, centres)[0].kthvalue(k + 1, dim=1).values for block in centres.split(block_size)]
    )
    for block in points.split(block_size):
        distances, rounding = _distances(block, centres)
        yield distances <= radii + rounding


def _distances(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (B, N), and how far rounding may have moved two of them apart that are equal.

    |p|^2 + |c|^2 - 2 p.c is a matrix product, tens of times faster than differences, but zero only up to rounding.
    Without the allowance, balls of duplicates, whose radius is zero, would miss their own centre.
    """
    norms = points.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
    distances = torch.addmm(norms, points, centres.T, alpha=-2)
    return distances, norms * (8 * points.shape[1] * torch.finfo(points.dtype).eps)

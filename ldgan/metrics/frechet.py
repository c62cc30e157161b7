"""The Frechet distance between two sets of images, in the features of a network.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017 (arXiv 1706.08500): the distance
between Gaussians with the mean and covariance of the features of either set (Dowson and Landau 1982). It bears
the name FID for features of Inception only; see `ldgan.metrics.features.FeatureNetwork.distance_name`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.features import FeatureNetwork


class FeatureStatistics:
    """Number, mean and covariance of features, accumulated over batches; processes add theirs up by ``sums``.

    ``sums``, float64 (1 + d, 1 + d), is the sum of [1, f] [1, f]^T over features f: it holds their number,
    their sum and the sum of their products.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(1 + num_features, 1 + num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features (B, d)."""
        rows = torch.nn.functional.pad(features.to(self.sums), (1, 0), value=1.0)
        self.sums += rows.T @ rows

    def merge(self, other: FeatureStatistics) -> None:
        """Add all that ``other`` has seen."""
        self.sums += other.sums.to(self.sums)

    @property
    def num_images(self) -> int:
        """How many features were added."""
        return round(self.sums[0, 0].item())

    @property
    def mean(self) -> Tensor:
        """Mean, float64 (d,)."""
        return self.sums[0, 1:] / self.num_images

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divided by N - 1), float64 (d, d)."""
        mean = self.mean
        return (self.sums[1:, 1:] - self.num_images * torch.outer(mean, mean)) / (self.num_images - 1)


def feature_statistics(network: FeatureNetwork, images: Iterable[Tensor]) -> FeatureStatistics:
    """Statistics of the features of batches of images, uint8 (B, 3, H, W)."""
    statistics = FeatureStatistics(network.num_features)
    for batch in images:
        statistics.add(network(batch))
    return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance ||m_a - m_b||^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians N(m_a, A) and N(m_b, B).

    Fewer images give larger distances: compare values for the same numbers of images only.

    Raises:
        UserError: one of the sets has fewer than two images, and hence no covariance.
    """
    fewest = min(a.num_images, b.num_images)
    if fewest < 2:
        raise UserError(f"a Frechet distance needs two images or more in each set, not {fewest}; take more images")
    shift = (a.mean - b.mean).square().sum()
    covariances = a.covariance, b.covariance
    # With A = F F^T and B = G G^T the eigenvalues of A B are the squared singular values of F^T G. Unlike a square
    # root of the matrix product, these stay exact where A and B are singular, as they are for fewer images than
    # features.
    factor_a, factor_b = map(_factor, covariances)
    overlap = torch.linalg.svdvals(factor_a.T @ factor_b.to(factor_a)).sum()
    spread = sum(covariance.trace().item() for covariance in covariances)
    return max(0.0, shift.item() + spread - 2 * overlap.item())


def _factor(covariance: Tensor) -> Tensor:
    """F (d, rank) with F F^T = covariance; directions whose variance is rounding error are left out."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > len(variances) * torch.finfo(variances.dtype).eps * variances[-1]
    return directions[:, kept] * variances[kept].sqrt()

"""The Frechet distance between two sets of images, in the features of a network.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017 (arXiv 1706.08500): the distance
between Gaussians with the mean and covariance of the features of either set (Dowson and Landau 1982). It bears
the name FID for features of Inception only; see `ldgan.metrics.features.FeatureNetwork.metric_name`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.distances import check_finite


class GaussianFit(NamedTuple):
    """The Gaussian that stands for a set of images: mean, float64 (d,), unbiased covariance, float64 (d, d)."""

    mean: Tensor
    covariance: Tensor


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

    def fit(self) -> GaussianFit:
        """Mean, and covariance divided by N - 1, of all features added.

        Raises:
            UserError: they are fewer than two, which have no covariance, or one of them is NaN or infinite.
        """
        number = self.num_images
        if number < 2:
            raise UserError(f"a Frechet distance needs two images or more in each set, not {number}; take more images")
        check_finite(self.sums, f"features of {number:,} images")  # one such feature makes the sums so
        mean = self.sums[0, 1:] / number
        covariance = (self.sums[1:, 1:] - number * torch.outer(mean, mean)) / (number - 1)
        return GaussianFit(mean, covariance)


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """Squared Frechet distance ||m_a - m_b||^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians N(m_a, A) and N(m_b, B).

    Fewer images give larger distances: compare values for the same numbers of images only.

    Raises:
        ValueError: the Gaussians are of different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Gaussians of {len(a.mean)} and {len(b.mean)} dimensions have no distance")
    b = GaussianFit(*(tensor.to(a.mean) for tensor in b))
    shift = (a.mean - b.mean).square().sum()
    # With A = F F^T and B = G G^T the eigenvalues of A B are the squared singular values of F^T G. Unlike a square
    # root of the matrix product, these stay exact where A and B are singular, as they are for fewer images than
    # features.
    overlap = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    spread = a.covariance.trace() + b.covariance.trace()
    return max(0.0, (shift + spread - 2 * overlap).item())


def _factor(covariance: Tensor) -> Tensor:
    """F (d, rank) with F F^T = covariance; directions whose variance is rounding error are left out."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > len(variances) * torch.finfo(variances.dtype).eps * variances[-1]
    return directions[:, kept] * variances[kept].sqrt()

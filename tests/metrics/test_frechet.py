"""The Frechet distance against closed forms, a peer library and exact computations of low rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance


def features(seed: int, num_images: int, num_features: int) -> Tensor:
    """Correlated features whose mean is not zero."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, dtype=torch.float64, generator=random)
    latent = torch.randn(num_images, num_features, dtype=torch.float64, generator=random)
    return latent @ mixing / num_features**0.5 + torch.randn(num_features, generator=random).double()


def statistics(points: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(points.shape[1])
    result.add(points)
    return result


def fit(points: Tensor) -> GaussianFit:
    return statistics(points).fit()


def cross(mean: Tensor, variances: Tensor, directions: Tensor) -> Tensor:
    """2 d points whose mean and covariance (unbiased) are exactly these; the covariance's axes are ``directions``."""
    num_points = 2 * len(variances)
    arms = (variances * (num_points - 1) / 2).sqrt()[:, None] * directions.T
    return torch.cat([mean + arms, mean - arms])


def rotation(size: int) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random)).Q


def low_rank_distance(a: Tensor, b: Tensor) -> float:
    """From the points themselves: tr (A B)^(1/2) is the nuclear norm of the product of the centred points."""
    centred = [(x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")
    spread = sum(x.square().sum() for x in centred)
    return float((a.mean(dim=0) - b.mean(dim=0)).square().sum() + spread - 2 * overlap)


def test_statistics_are_those_of_numpy() -> None:
    points = features(0, 50, 7)
    result = statistics(points)
    assert result.num_images == 50
    mean, covariance = result.fit()
    np.testing.assert_allclose(mean.numpy(), points.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(points.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_a_stream_gives_what_all_at_once_gives() -> None:
    points, streamed, other = features(0, 50, 7), FeatureStatistics(7), FeatureStatistics(7)
    for batch in points[:30].split(8):
        streamed.add(batch)
    other.add(points[30:])
    streamed.merge(other)
    torch.testing.assert_close(streamed.sums, statistics(points).sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("directions", [torch.eye(6, dtype=torch.float64), rotation(6)])
def test_covariances_that_commute_have_a_closed_form(directions: Tensor) -> None:
    means = torch.tensor([[0.0] * 6, [1.0, -2.0, 0.0, 0.5, 0.0, 3.0]], dtype=torch.float64)
    variances = torch.tensor([[1.0, 4.0, 9.0, 0.25, 2.0, 0.0], [4.0, 4.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    a, b = (fit(cross(mean, variance, directions)) for mean, variance in zip(means, variances))
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def by_torch_fidelity(a: Tensor, b: Tensor) -> float:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    fits = map(metric_fid.fid_features_to_statistics, (a, b))
    return metric_fid.fid_statistics_to_metric(*fits, verbose=False)[metric_fid.KEY_METRIC_FID]


def test_it_equals_that_of_torch_fidelity() -> None:
    a, b = features(0, 400, 24), features(1, 300, 24)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(by_torch_fidelity(a, b), rel=1e-8)


def test_it_equals_that_of_torch_fidelity_where_covariances_are_singular() -> None:
    a, b = features(0, 30, 100), features(1, 40, 100)
    # Its square roots of eigenvalues that should be zero, each about 1e-8, add up.
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(by_torch_fidelity(a, b), rel=1e-5)


def test_it_equals_that_of_torch_fidelity_on_real_features(real_features: tuple[Tensor, Tensor]) -> None:
    train, test = (points.double() for points in real_features)  # fewer images than features
    ours = frechet_distance(fit(train), fit(test))
    assert ours == pytest.approx(by_torch_fidelity(train, test), rel=1e-5)
    assert ours == pytest.approx(low_rank_distance(train, test), rel=1e-9)


@pytest.mark.parametrize(("num_a", "num_b"), [(5, 9), (9, 200), (2, 2)])
def test_singular_covariances(num_a: int, num_b: int) -> None:
    a, b = features(0, num_a, 64), features(1, num_b, 64)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(low_rank_distance(a, b), rel=1e-10)


def test_equal_features_leave_their_difference_alone() -> None:
    a, b = torch.zeros(3, 4), torch.ones(5, 4)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(4.0)


@pytest.mark.parametrize("num_images", [6, 100])  # fewer than features, and more
def test_a_set_has_no_distance_to_itself(num_images: int) -> None:
    points = features(0, num_images, 32)
    shuffled = points[torch.randperm(num_images, generator=torch.Generator().manual_seed(0))]
    assert frechet_distance(fit(points), fit(shuffled)) == pytest.approx(0.0, abs=1e-9)


def test_the_order_of_the_sets_does_not_matter() -> None:
    a, b = fit(features(0, 40, 16)), fit(features(1, 10, 16))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_a_single_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="needs two images or more in each set, not 1"):
        fit(features(0, 1, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    points = features(0, 20, 4)
    points[7, 2] = value
    with pytest.raises(UserError, match="features of 20 images hold NaN or infinity; check"):
        fit(points)


def test_features_of_two_networks_have_no_distance() -> None:
    with pytest.raises(ValueError, match="of 4 and 5 dimensions"):
        frechet_distance(fit(features(0, 9, 4)), fit(features(0, 9, 5)))

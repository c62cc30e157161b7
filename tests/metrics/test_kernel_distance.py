"""The kernel distance against its definition in float64, a peer library, and its expectation."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.kernel_distance import kernel_distance


def gaussian(seed: int, num_images: int, num_features: int, mean: float = 0.5) -> Tensor:
    return mean + torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared MMD of m points each: Binkowski et al., equation 4 (Gretton et al. 2012, lemma 6), pair by pair."""

    def mean_kernel(a: np.ndarray, b: np.ndarray, omit_same: bool) -> float:
        values = [
            (p @ q / len(p) + 1) ** 3
            for i, p in enumerate(a.astype(float))
            for j, q in enumerate(b.astype(float))
            if not (omit_same and i == j)
        ]
        return float(np.mean(values))

    return mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)


def by_torch_fidelity(real: Tensor, fake: Tensor, **settings: int) -> tuple[float, float]:
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    result = peer.kid_features_to_metric(fake, real, verbose=False, **settings)
    return result[peer.KEY_METRIC_KID_MEAN], result[peer.KEY_METRIC_KID_STD]


def test_of_all_images_it_is_the_unbiased_estimate() -> None:
    real, fake = gaussian(0, 30, 6), gaussian(1, 30, 6, mean=0.7)
    result = kernel_distance(real, fake, num_subsets=3)
    assert result.subset_size == 30
    assert result.mean == pytest.approx(unbiased_mmd(real.numpy(), fake.numpy()), rel=1e-10)
    assert result.std == pytest.approx(0.0, abs=1e-12)  # each subset is the whole set, in another order


def test_it_is_the_mean_over_random_subsets() -> None:
    real, fake = gaussian(0, 60, 4), gaussian(1, 40, 4, mean=0.9)
    random = np.random.RandomState(7)
    distances = []
    for _ in range(5):
        of_fake, of_real = (random.choice(number, 20, replace=False) for number in (40, 60))
        distances.append(unbiased_mmd(real.numpy()[of_real], fake.numpy()[of_fake]))
    result = kernel_distance(real, fake, num_subsets=5, max_subset_size=20, seed=7)
    assert result == pytest.approx((np.mean(distances), np.std(distances), 20), rel=1e-10)


def test_single_precision_would_lose_the_distance() -> None:
    # Sums of about 1000^3 whose difference is about 1e4: a few digits in single precision.
    real, fake = gaussian(0, 50, 4, mean=32), gaussian(1, 50, 4, mean=32)
    expected = unbiased_mmd(real.numpy(), fake.numpy())
    assert kernel_distance(real, fake, num_subsets=1).mean == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_real", "num_fake"), [(1200, 1100), (1000, 1500)])
def test_it_equals_that_of_torch_fidelity(num_real: int, num_fake: int) -> None:
    real, fake = gaussian(0, num_real, 8).double(), gaussian(1, num_fake, 8, mean=0.6).double()
    mean, std = by_torch_fidelity(real, fake, kid_subsets=4)
    assert kernel_distance(real, fake, num_subsets=4) == pytest.approx((mean, std, 1000), rel=1e-10)


def test_it_equals_that_of_torch_fidelity_on_real_features(real_features: tuple[Tensor, Tensor]) -> None:
    train, test = real_features
    mean, std = by_torch_fidelity(train.double(), test.double(), kid_subset_size=100, kid_subsets=20)
    ours = kernel_distance(train, test, max_subset_size=100, num_subsets=20)
    assert ours == pytest.approx((mean, std, 100), rel=1e-9)


def test_the_defaults_are_those_of_torch_fidelity() -> None:
    peer = pytest.importorskip("torch_fidelity.defaults").DEFAULTS
    ours = inspect.signature(kernel_distance).parameters
    for name, theirs in {
        "num_subsets": "kid_subsets",
        "max_subset_size": "kid_subset_size",
        "seed": "rng_seed",
    }.items():
        assert ours[name].default == peer[theirs], name


def test_the_set_that_it_is_drawn_from_is_at_a_distance_of_zero_on_average() -> None:
    # Disjoint pairs of sets: their distances are independent, and their mean has a standard error.
    distances = [
        kernel_distance(gaussian(2 * i, 40, 3), gaussian(2 * i + 1, 40, 3), num_subsets=1).mean for i in range(200)
    ]
    error = np.std(distances) / 200**0.5
    assert abs(np.mean(distances)) < 4 * error
    assert min(distances) < 0 < max(distances)
    assert kernel_distance(gaussian(0, 40, 3), gaussian(1, 40, 3, mean=1.5), num_subsets=1).mean > 100 * error


@pytest.mark.parametrize(("num_real", "num_fake", "size"), [(40, 30, 30), (20, 60, 20), (90, 70, 50)])
def test_subsets_are_no_larger_than_the_smaller_set(num_real: int, num_fake: int, size: int) -> None:
    result = kernel_distance(gaussian(0, num_real, 2), gaussian(1, num_fake, 2), num_subsets=2, max_subset_size=50)
    assert result.subset_size == size


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="needs two images or more in each set, not 1"):
        kernel_distance(gaussian(0, 1, 2), gaussian(1, 9, 2))
    with pytest.raises(UserError, match="features of 9 images hold NaN or infinity"):
        kernel_distance(gaussian(0, 5, 2), gaussian(1, 9, 2) * torch.nan)
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(9, 3\)"):
        kernel_distance(gaussian(0, 5, 2), gaussian(1, 9, 3))

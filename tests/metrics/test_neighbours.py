"""Nearest neighbours against brute force; the copying check against scipy, copies and independent draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics import neighbours
from ldgan.metrics.neighbours import copying, copying_from_distances, nearest


def gaussian(seed: int, num_images: int, num_features: int = 6, spread: float = 1.0) -> Tensor:
    return 2 + spread * torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def lattice(seed: int, num_images: int, num_features: int) -> Tensor:
    """Points with small whole coordinates: distances tie everywhere, and many points are duplicates."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (num_images, num_features), generator=random).float()


def by_differences(points: Tensor, candidates: Tensor) -> np.ndarray:
    """All distances, float64 (N, M)."""
    return np.sqrt(squares(points, candidates))


def squares(points: Tensor, candidates: Tensor) -> np.ndarray:
    """The squares of all distances, float64 (N, M)."""
    return np.square(points.double().numpy()[:, None] - candidates.double().numpy()[None]).sum(axis=-1)


PAIRS = {
    "no ties": (gaussian(0, 40), gaussian(1, 60)),
    "ties and duplicates": (lattice(0, 50, 3), lattice(1, 90, 3)),
    "all the same": (torch.ones(9, 4), torch.ones(30, 4)),
    "far from zero": (gaussian(0, 20) + 1e4, gaussian(1, 30) + 1e4),
    "one candidate of k": (gaussian(0, 5), gaussian(1, 4)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("block_size", [3, 16, 1000])
def test_they_are_those_of_a_brute_force(pair: tuple[Tensor, Tensor], k: int, block_size: int) -> None:
    distances = by_differences(*pair)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :k]  # of equals, lower numbers first
    found = nearest(*pair, k, block_size=block_size)
    np.testing.assert_array_equal(found.numbers.numpy(), expected)
    np.testing.assert_allclose(found.distances.numpy(), np.take_along_axis(distances, expected, axis=1), rtol=1e-12)


def test_many_pairs_are_measured_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = PAIRS["ties and duplicates"]
    expected = nearest(*pair, 4)
    monkeypatch.setattr(neighbours, "NUM_PAIRS", 7)
    for found, wanted in zip(nearest(*pair, 4), expected):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_copy_is_at_a_distance_of_exactly_zero() -> None:
    candidates = 1e3 * gaussian(0, 200, 50)  # squares of 1e8, whose product form would leave about 1e-4
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found = nearest(candidates[order], candidates, block_size=64)
    assert torch.equal(found.numbers[:, 0], order)
    assert not found.distances.any()


def test_features_so_near_that_products_cannot_tell_them_apart() -> None:
    point = 1e3 + gaussian(0, 1, 20, spread=1.0).double()
    steps = torch.tensor([5, 3, 4, 1, 2], dtype=torch.float64)[:, None] * 1e-9
    candidates = torch.cat([point + steps, 3e3 + gaussian(1, 20, 20).double()])
    assert nearest(point, candidates, 5).numbers.tolist() == [[3, 4, 1, 2, 0]]


def test_real_images_are_nearest_to_themselves(real_features: tuple[Tensor, Tensor]) -> None:
    train, test = real_features
    mixed = torch.cat([test[:20], train[40:60]])
    found = nearest(mixed, train)
    assert found.numbers[20:, 0].tolist() == list(range(40, 60))
    assert not found.distances[20:].any()
    np.testing.assert_allclose(found.distances[:, 0], by_differences(mixed, train).min(axis=1), rtol=1e-12)


def test_progress_counts_every_distance() -> None:
    done: list[int] = []
    nearest(gaussian(0, 45), gaussian(1, 31), block_size=10, progress=done.append)
    assert (sum(done), len(done)) == (45 * 31, 5 * 4)
    done.clear()
    copying(gaussian(0, 45), gaussian(1, 20), gaussian(2, 31), progress=done.append)
    assert sum(done) == (45 + 20) * 31


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_the_probability_is_that_of_the_mann_whitney_test(spread: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    training, heldout = lattice(0, 40, 4), lattice(1, 30, 4)  # many ties
    samples = torch.cat([spread * lattice(2, 20, 4), training[:5]])
    # The squares are exact, and one library takes all roots: on some processors torch's differ from numpy's by a bit.
    ours, theirs = (torch.from_numpy(squares(x, training).min(axis=1)).sqrt().numpy() for x in (samples, heldout))
    result = copying(samples, heldout, training)
    assert result == copying_from_distances(torch.from_numpy(ours), torch.from_numpy(theirs))
    expected = stats.mannwhitneyu(theirs, ours).statistic / (30 * 25)
    assert result.nearer_than_heldout == pytest.approx(expected, rel=1e-12)
    pairs = np.mean(ours[:, None] < theirs) + np.mean(ours[:, None] == theirs) / 2
    assert result.nearer_than_heldout == pytest.approx(pairs, rel=1e-12)
    assert result.median_distance_samples == pytest.approx(np.median(ours))
    assert result.median_distance_heldout == pytest.approx(np.median(theirs))


def test_copies_are_nearer_than_all_held_out_images() -> None:
    training = gaussian(0, 300)
    result = copying(training[:100], gaussian(1, 200), training)
    assert result[:3] == (1.0, 1.0, 0.0)


def test_a_few_copies_show_in_the_share_of_very_near_samples() -> None:
    training, fresh = gaussian(0, 300), gaussian(2, 180)
    result = copying(torch.cat([fresh, training[:20]]), gaussian(1, 500), training)
    among_fresh = copying(fresh, gaussian(1, 500), training)
    assert result.very_near_share == pytest.approx((20 + 180 * among_fresh.very_near_share) / 200)
    assert result.nearer_than_heldout == pytest.approx((20 + 180 * among_fresh.nearer_than_heldout) / 200)


@pytest.mark.parametrize("num_heldout", [99, 100, 700])
def test_very_near_is_nearer_than_over_99_percent_of_held_out_images(num_heldout: int) -> None:
    heldout = torch.arange(1.0, num_heldout + 1)
    for number in range(1, 12):
        result = copying_from_distances(torch.tensor([number - 0.5]), heldout)
        farther = num_heldout - (number - 1)
        assert result.very_near_share == float(farther / num_heldout > 0.99)


def test_new_images_are_as_far_from_training_images_as_held_out_ones() -> None:
    num_samples, num_heldout = 400, 600
    training = gaussian(0, 500)
    result = copying(gaussian(1, num_samples), gaussian(2, num_heldout), training)
    deviation = ((num_samples + num_heldout + 1) / (12 * num_samples * num_heldout)) ** 0.5
    assert abs(result.nearer_than_heldout - 0.5) < 4 * deviation
    assert result.very_near_share < 0.01 + 4 * (0.01 * (1 / num_samples + 1 / num_heldout)) ** 0.5


def test_images_unlike_any_others_are_farther_than_held_out_ones() -> None:
    result = copying(gaussian(1, 50) + 100, gaussian(2, 60), gaussian(0, 70))
    assert result[:2] == (0.0, 0.0)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="only 2 images to find the 3 nearest among"):
        nearest(gaussian(0, 5), gaussian(1, 2), 3)
    with pytest.raises(UserError, match="features of 9 images hold NaN or infinity"):
        nearest(gaussian(0, 5), gaussian(1, 9) * torch.inf)
    with pytest.raises(UserError, match="needs samples and held-out images"):
        copying(gaussian(0, 0), gaussian(1, 9), gaussian(2, 9))

"""Precision, recall, density and coverage against a brute force from the definitions, a peer, and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.manifold import num_distances, prdc


def gaussian(seed: int, num_images: int, num_features: int, spread: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_images, num_features, generator=random) + 3.0


def lattice(seed: int, num_images: int, num_features: int) -> Tensor:
    """Points with small whole coordinates: distances tie everywhere, and many points are duplicates."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (num_images, num_features), generator=random).float()


def brute_force(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage by differences in float64; whole coordinates make them exact."""
    x, y = real.double().numpy(), fake.double().numpy()

    def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.square(a[:, None] - b[None]).sum(axis=-1)

    def radii(points: np.ndarray) -> np.ndarray:
        distances = squared_distances(points, points)
        return np.array([np.sort(np.delete(row, number))[k - 1] for number, row in enumerate(distances)])

    fake_in_real = squared_distances(y, x) <= radii(x)
    real_in_fake = squared_distances(x, y) <= radii(y)
    return (
        fake_in_real.any(axis=1).mean(),
        real_in_fake.any(axis=1).mean(),
        fake_in_real.sum() / (k * len(y)),
        fake_in_real.any(axis=0).mean(),
    )


def measured(real: Tensor, fake: Tensor, k: int, block_size: int) -> tuple[float, float, float, float]:
    return prdc(real, fake, k_manifold=k, k_density=k, block_size=block_size)


PAIRS = {
    "apart": (gaussian(0, 90, 8), gaussian(1, 70, 8, spread=0.7) + 0.5),
    "wider": (gaussian(0, 60, 3), gaussian(1, 80, 3, spread=2.0)),
    "ties and duplicates": (lattice(0, 120, 3), lattice(1, 100, 3) + torch.tensor([0.0, 1.0, 0.0])),
    "the same": (lattice(0, 50, 4), lattice(0, 50, 4)),
    "far from zero": (gaussian(0, 60, 5) + 1e3, gaussian(1, 60, 5) + 1e3),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_what_the_definitions_say(pair: tuple[Tensor, Tensor], k: int) -> None:
    expected = brute_force(*pair, k)
    for block_size in (7, 1000):
        assert measured(*pair, k, block_size) == pytest.approx(expected, abs=1e-9)


def test_all_at_once_each_with_its_own_k() -> None:
    pair = PAIRS["ties and duplicates"]
    expected = (*brute_force(*pair, 4)[:2], *brute_force(*pair, 2)[2:])
    assert prdc(*pair, k_manifold=4, k_density=2, block_size=50) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["apart", "wider", "real"])
@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(name: str, k: int, request: pytest.FixtureRequest) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = peers_input(name, request)
    theirs = metric.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    ours = prdc(real, fake, k_manifold=k)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0 < ours.recall != ours.precision > 0


@pytest.mark.parametrize("name", ["apart", "wider", "real"])
@pytest.mark.parametrize("k", [3, 5])
def test_all_four_are_those_of_their_authors(name: str, k: int, request: pytest.FixtureRequest) -> None:
    compute_prdc = pytest.importorskip("prdc").compute_prdc
    real, fake = peers_input(name, request)
    theirs = compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)  # open balls: the same where nothing ties
    ours = prdc(real, fake, k_manifold=k, k_density=k)
    assert ours._asdict() == pytest.approx(theirs, rel=1e-6)
    assert 0 < ours.coverage < 1


def peers_input(name: str, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Features in float64, in which the peers compute as given: single precision would break their own ties."""
    train, test = request.getfixturevalue("real_features") if name == "real" else PAIRS[name]
    return train.double(), test[:250].double()


def test_single_precision_is_computed_in_double_precision() -> None:
    # Far from zero, where products in single precision would have no digits left for the distances.
    real, fake = PAIRS["far from zero"]
    assert prdc(real, fake) == prdc(real.double(), fake.double())


def test_a_set_compared_with_itself_is_as_good_as_a_copy_of_it() -> None:
    points = gaussian(0, 90, 3)
    assert prdc(points, points, block_size=20) == prdc(points, points.clone())


def test_progress_counts_every_distance() -> None:
    done: list[int] = []
    prdc(gaussian(0, 45, 3), gaussian(1, 31, 3), block_size=10, progress=done.append)
    # Within the sets a pair counts once, and each point once with itself.
    assert sum(done) == num_distances(45, 31) == 45 * 46 // 2 + 31 * 32 // 2 + 45 * 31
    assert len(done) == 15 + 10 + 4 * 5  # blocks


def test_sets_far_from_each_other_share_nothing() -> None:
    real, fake = gaussian(0, 30, 4), gaussian(1, 30, 4) + 100
    assert measured(real, fake, 3, 512) == (0, 0, 0, 0)


def test_duplicates_have_balls_that_hold_them() -> None:
    # Four copies of each point: radius zero for k = 3, so that an image is inside only if it is such a point.
    points = gaussian(0, 10, 300) * 10
    real = points.repeat(4, 1)
    fake = torch.cat([points[:5], points[5:] + 1e-3]).repeat(4, 1)
    # Half of the fakes lie in the four balls of their copies: density 1/2 * 4 / k.
    assert measured(real, fake, 3, 512) == pytest.approx((0.5, 0.5, 2 / 3, 0.5))


def test_one_mode_of_four_has_full_precision_and_a_quarter_of_the_coverage() -> None:
    centres = torch.tensor(list(itertools.product((0.0, 100.0), repeat=2)))
    real = centres.repeat_interleave(25, dim=0) + gaussian(0, 100, 2)
    fake = real[:25].repeat(4, 1)
    precision, recall, _, coverage = measured(real, fake, 3, 512)
    assert (precision, recall, coverage) == (1.0, 0.25, 0.25)


def test_an_outlier_lifts_precision_but_not_density() -> None:
    # Figure 3 of Naeem et al.: a real outlier's ball reaches over fakes that resemble nothing else.
    real = torch.cat([gaussian(0, 99, 2), torch.full((1, 2), 60.0)])
    fake = gaussian(1, 100, 2) + torch.tensor([30.0, 30.0])
    precision, _, density, coverage = prdc(real, fake)
    assert precision == 1.0
    assert (density, coverage) == pytest.approx((1 / 5, 1 / 100))


def test_two_samples_of_one_distribution_have_a_density_of_about_one() -> None:
    # A real image's ball holds k - 1 of its k neighbours and the k-th on its border: of as many fakes, about k.
    _, _, density, coverage = prdc(gaussian(0, 2000, 2), gaussian(1, 2000, 2))
    assert density == pytest.approx(1.0, abs=0.05)
    # E[coverage] = 1 - (1/2)^k for N = M (Naeem et al., section 3.3), 0.969 at k = 5.
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.02)


def test_fewer_images_than_neighbours_are_refused() -> None:
    with pytest.raises(UserError, match="need more than 3 images, not 3"):
        prdc(gaussian(0, 10, 2), gaussian(1, 3, 2), k_density=3)
    with pytest.raises(UserError, match="need more than 5 images, not 4"):
        prdc(gaussian(0, 4, 2), gaussian(1, 10, 2))
    with pytest.raises(ValueError, match=r"\(10, 2\) and \(10, 3\)"):
        prdc(gaussian(0, 10, 2), gaussian(1, 10, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_features_that_are_no_numbers_are_refused(value: float, place: int) -> None:
    sets = [gaussian(0, 10, 2), gaussian(1, 20, 2)]
    sets[place][-1, 1] = value
    with pytest.raises(UserError, match=f"features of {len(sets[place])} images hold NaN or infinity"):
        prdc(*sets)

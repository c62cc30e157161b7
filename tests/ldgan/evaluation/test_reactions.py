"""Metrics react as theory says: on mixtures of Gaussians, where it says by how much, and on damaged photos.

Ten modes lie at +c and -c on the first five axes, so far apart that no neighbourhood reaches from one to another. The
photos are CIFAR-10's, where LDGAN_DATA holds cifar10.zip and LDGAN_WEIGHTS the weights of EfficientNet-Lite0.
"""

from __future__ import annotations

import itertools
import os
import runpy
import zipfile
from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldgan.engine.shares import batches
from ldgan.evaluation.image_sets import Batch, ImageSet
from ldgan.metrics.features import feature_network
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import prdc
from ldgan.metrics.neighbours import copying

DIMENSIONS, NUM_MODES, DISTANCE = 8, 10, 100.0  # the modes' standard deviation is 1
PER_MODE = 100
NUM_PHOTOS = 1000

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "reactions.py"


def mixture(seed: int, per_mode: int = PER_MODE, modes: range = range(NUM_MODES)) -> Tensor:
    """As many points of each mode, float64 (N, 8); even modes are the positive ones."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(len(modes), per_mode, DIMENSIONS, generator=random, dtype=torch.float64)
    for place, mode in enumerate(modes):
        points[place, :, mode // 2] += DISTANCE * (1 - 2 * (mode % 2))
    return points.flatten(0, 1)


POSITIVE = range(0, NUM_MODES, 2)  # half of the modes


def fit(points: Tensor) -> GaussianFit:
    statistics = FeatureStatistics(points.shape[1])
    statistics.add(points)
    return statistics.fit()


def expected_coverage(num_real: int, num_fake: int, k: int = 5) -> float:
    """Coverage of one mode by fakes of the same distribution.

    A ball is empty if its real neighbours are the k nearest of all other points, among which any order is as likely.
    """
    others = num_real - 1
    return 1 - prod((others - place) / (others + num_fake - place) for place in range(k))


@pytest.fixture(scope="module")
def real() -> Tensor:
    return mixture(0)


@pytest.fixture(scope="module")
def floor(real: Tensor) -> Any:
    """What another draw of the same points reaches."""
    return prdc(real, mixture(1))


def test_another_draw_is_the_floor(real: Tensor, floor: Any) -> None:
    assert floor.coverage == pytest.approx(expected_coverage(PER_MODE, PER_MODE), abs=0.015)
    assert floor.density == pytest.approx(1, abs=0.1)
    assert floor.precision == pytest.approx(floor.recall, abs=0.05)  # the two sets might change places
    copies = copying(mixture(1), mixture(2), real)
    num = len(real)
    assert copies.nearer_than_heldout == pytest.approx(0.5, abs=4 * sqrt((2 * num + 1) / (12 * num**2)))


def test_collapse_to_half_of_the_modes_halves_recall_and_coverage_alone(real: Tensor, floor: Any) -> None:
    collapsed = mixture(1, 2 * PER_MODE, POSITIVE)
    result = prdc(real, collapsed)
    kept = torch.cat([real[mode * PER_MODE : (mode + 1) * PER_MODE] for mode in POSITIVE])
    within = prdc(kept, collapsed)
    assert result.recall == within.recall / 2  # no ball reaches the modes that are left out
    assert result.coverage == within.coverage / 2
    assert 0.7 < within.recall < 1
    assert within.coverage == pytest.approx(expected_coverage(PER_MODE, 2 * PER_MODE), abs=0.015)
    assert result.precision == within.precision == pytest.approx(floor.precision, abs=0.03)
    assert result.density == pytest.approx(floor.density, abs=0.1)


def test_collapse_costs_the_frechet_distance_what_the_closed_form_says(real: Tensor) -> None:
    # The mean of the positive modes is (c / 5)(1, 1, 1, 1, 1, 0, ...). Along it, their variance is 1 where that of all
    # modes is 1 + c^2 / 5; in all directions across it both are the same.
    variance = 1 + DISTANCE**2 / 5
    expected = DISTANCE**2 / 5 + (sqrt(variance) - 1) ** 2
    collapsed = mixture(1, 2 * PER_MODE, POSITIVE)
    assert frechet_distance(fit(real), fit(collapsed)) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(fit(real), fit(mixture(1))) < 0.001 * expected


def test_collapse_costs_the_kernel_distance_what_the_closed_form_says() -> None:
    # Of points at the modes themselves, the kernel (x.y / d + 1)^3 is (1 + u)^3 for x and y at one mode, (1 - u)^3 at
    # opposite ones and 1 at all others, with u = c^2 / d. So E k is the same between real and real points as between
    # real and collapsed ones, and the distance is the difference to that between collapsed and collapsed ones.
    u = DISTANCE**2 / DIMENSIONS
    between = ((1 + u) ** 3 + (1 - u) ** 3 + 8) / 10
    expected = ((1 + u) ** 3 + 4) / 5 - between
    real, fake = mixture(0), mixture(1, 2 * PER_MODE, POSITIVE)
    options = {"num_subsets": 20, "max_subset_size": 200}
    floor, collapsed = (kernel_distance(real, other, **options).mean for other in (mixture(1), fake))
    assert collapsed == pytest.approx(expected, rel=0.1)
    assert abs(floor) < 0.1 * expected


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_noise_costs_the_frechet_distance_what_the_closed_form_says(std: float) -> None:
    mode = range(1)
    noise = torch.randn(20_000, DIMENSIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = DIMENSIONS * (sqrt(1 + std**2) - 1) ** 2
    fake = mixture(1, len(noise), mode) + std * noise
    assert frechet_distance(fit(mixture(0, len(noise), mode)), fit(fake)) == pytest.approx(expected, rel=0.05)


def test_the_more_noise_the_less_precision_and_coverage(real: Tensor, floor: Any) -> None:
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(len(real), DIMENSIONS, generator=random, dtype=torch.float64)
    results = [floor, *(prdc(real, mixture(1) + std * noise) for std in (0.5, 1, 2, 4))]
    for milder, stronger in itertools.pairwise(results):
        assert stronger.precision < milder.precision
        assert stronger.coverage < milder.coverage
        assert stronger.density < milder.density
    assert results[-1].precision < 0.02
    assert results[-1].recall > 0.9  # in the large balls of scattered fakes there is everything


def test_images_of_nothing_cost_precision_and_density_alone(real: Tensor) -> None:
    """Half of the fakes are a heap far away, no matter how they lie there."""
    half = mixture(1, PER_MODE // 2)
    heap = torch.randn(len(half), DIMENSIONS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    heap[:, -1] += 10 * DISTANCE
    alone, result = prdc(real, half), prdc(real, torch.cat([half, heap]))
    assert result.precision == alone.precision / 2
    assert result.density == alone.density / 2
    assert (result.recall, result.coverage) == (alone.recall, alone.coverage)


def test_outliers_lift_recall_and_not_coverage(real: Tensor) -> None:
    """What coverage was made for (Naeem et al. 2020): a fake far from all others has a ball as large as that."""
    collapsed = mixture(1, 2 * PER_MODE, POSITIVE)
    outliers = -10 * DISTANCE * torch.eye(DIMENSIONS, dtype=torch.float64)[:5]  # each beyond a mode that is left out
    alone, result = prdc(real, collapsed), prdc(real, torch.cat([collapsed, outliers]))
    assert result.recall >= alone.recall + 0.5
    assert result.coverage == alone.coverage == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_copies_are_perfect_by_all_but_the_copying_check(real: Tensor, share: float) -> None:
    num_copies = int(share * len(real))
    shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(5))]
    samples = torch.cat([shuffled[:num_copies], mixture(1)[num_copies:]])
    copies = copying(samples, mixture(2), real)
    # A copy is always nearer than a new point, and a new point as often as not.
    assert copies.nearer_than_heldout == pytest.approx(share + (1 - share) / 2, abs=0.05)
    assert copies.very_near_share == pytest.approx(share + (1 - share) * 0.01, abs=0.015)
    if share == 1:
        assert copies.nearer_than_heldout == copies.very_near_share == 1
        assert prdc(real, samples)[:2] == (1, 1)
        assert prdc(real, samples).coverage == 1
        assert frechet_distance(fit(real), fit(samples)) == pytest.approx(0, abs=1e-6)


class Photos(ImageSet):
    """Pictures in memory."""

    def __init__(self, name: str, images: Tensor) -> None:
        self.name, self.size, self._images = name, (32, 32), images

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        for wanted in batches(numbers, batch_size):
            yield Batch(list(wanted), self._images[wanted.start : wanted.stop])

    def read(self, number: int) -> Tensor:
        return self._images[number]

    def describe(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> str:
        return ""


def read_photos(archive: zipfile.ZipFile, part: str, per_class: int) -> tuple[Photos, list[int]]:
    """The first pictures of each class in ``part``, the classes in turn, and their labels."""
    names = [name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg")]
    class_names = sorted({name.split("/")[1] for name in names})
    by_class = [sorted(name for name in names if name.split("/")[1] == class_name) for class_name in class_names]
    pictures = []
    for turn in zip(*(names[:per_class] for names in by_class)):
        for name in turn:
            with archive.open(name) as file:
                pictures.append(np.asarray(Image.open(file).convert("RGB")))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Photos(part, images), list(range(len(class_names))) * per_class


@pytest.fixture(scope="module")
def photos() -> dict[str, dict[str, float]]:
    """What the benchmark measures, by row and by metric: of 1,000 photos each, half a minute of features."""
    for variable in ("LDGAN_DATA", "LDGAN_WEIGHTS"):
        if variable not in os.environ:
            pytest.skip(f"{variable} names no folder")
    benchmark = runpy.run_path(str(BENCHMARK))
    weights = Path(os.environ["LDGAN_WEIGHTS"]) / "efficientnet_lite0_timm.safetensors"
    network = feature_network("timm:tf_efficientnet_lite0@96", weights, "cpu")
    with zipfile.ZipFile(Path(os.environ["LDGAN_DATA"]) / "cifar10.zip") as archive:
        train, labels = read_photos(archive, "train", 300)
        test, _ = read_photos(archive, "test", 100)
    animals = [2, 3, 4, 5, 6]  # bird, cat, deer, dog, frog
    rows = benchmark["damaged_copies"](train, labels, animals, test, NUM_PHOTOS)
    rows = {benchmark[name]: rows[benchmark[name]] for name in ("TEST", "BLURRED", "NOISED", "COLLAPSED", "SAME")}
    accelerator = Accelerator(cpu=True)
    features = {
        name: benchmark["features_of"](accelerator, network, images, batch_size=25, label=name)
        for name, images in rows.items()
    }
    reference = features[benchmark["SAME"]].features
    results = {}
    for row in benchmark["measure"](("fid", "is", "pr", "dc"), network, features):
        results[row.name] = {metric.name.partition(" (")[0]: metric.value for metric in row.metrics}
        kernel = kernel_distance(reference, features[row.name].features, num_subsets=3)
        results[row.name] |= {"kernel distance": kernel.mean, "nearer than held-out": row.nearer_than_heldout}
    return results


@pytest.mark.parametrize("damage", ["blurred, sigma 1 px", "noised, std 10 of 255", "some classes only"])
@pytest.mark.parametrize("distance", ["Frechet distance", "kernel distance"])
def test_damage_to_photos_costs_distance(photos: dict[str, dict[str, float]], damage: str, distance: str) -> None:
    floor = abs(photos["test images"][distance])
    assert photos[damage][distance] > 1.2 * floor


@pytest.mark.parametrize("damage", ["blurred, sigma 1 px", "noised, std 10 of 255", "some classes only"])
def test_damage_to_photos_costs_recall_and_coverage(photos: dict[str, dict[str, float]], damage: str) -> None:
    floor = photos["test images"]
    assert photos[damage]["recall"] < floor["recall"] - 0.1
    assert photos[damage]["coverage"] < floor["coverage"] - 0.02


def test_collapse_of_photos_costs_coverage_and_score_and_not_precision(photos: dict[str, dict[str, float]]) -> None:
    floor, collapsed = photos["test images"], photos["some classes only"]
    assert collapsed["coverage"] < floor["coverage"] - 0.1
    assert collapsed["precision"] == pytest.approx(floor["precision"], abs=0.04)
    assert collapsed["classifier score"] < floor["classifier score"]


def test_memorised_photos_are_found(photos: dict[str, dict[str, float]]) -> None:
    assert photos["test images"]["nearer than held-out"] == 0.5
    assert photos["the same training images"]["nearer than held-out"] > 0.99
    for metric in ("precision", "recall", "coverage"):
        assert photos["the same training images"][metric] == 1

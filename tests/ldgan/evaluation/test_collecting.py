"""From images to numbers: exactly as many as asked, the same over two processes, and no metric but the named one.

As a script, under torch.distributed.run, it writes what two processes collect; a test compares that with one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.engine.session import make_accelerator
from ldgan.engine.shares import batches
from ldgan.evaluation.collecting import FeatureMeter, FeatureSet, check_number, collect, gather_rows, measure_quality
from ldgan.evaluation.image_sets import Batch, ImageSet
from ldgan.metrics.classifier_score import classifier_score
from ldgan.metrics.features import Extractor, FeatureNetwork, Features
from ldgan.metrics.frechet import FeatureStatistics, frechet_distance
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import prdc

ROOT = Path(__file__).resolve().parents[3]
BATCH_SIZE = 2


class Sums(Extractor):
    """Sums of the upper and the lower pixels of each channel: whole numbers, exact in whatever order they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {}

    def forward(self, images: Tensor) -> Features:
        pooled = images.float().unflatten(2, (2, -1)).sum(dim=(3, 4)).flatten(1)
        return Features(pooled, logits=-pooled[:, :4])


def sums(name: str = "sums") -> FeatureNetwork:
    return FeatureNetwork(name, Sums(), "cpu")


class Images(ImageSet):
    """Noise, uint8 (N, 3, 4, 4); those whose numbers are ``unreadable`` are skipped."""

    name, size = "noise", (4, 4)

    def __init__(self, num_images: int, unreadable: Collection[int] = ()) -> None:
        random = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (num_images, 3, 4, 4), dtype=torch.uint8, generator=random)
        self.unreadable, self.skipped = unreadable, []

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        for wanted in batches(numbers, batch_size):
            self.skipped += [number for number in wanted if number in self.unreadable]
            if readable := [number for number in wanted if number not in self.unreadable]:
                yield Batch(readable, self.pixels[readable])

    def read(self, number: int) -> Tensor:
        return self.pixels[number]

    def describe(self) -> dict[str, Any]:
        return {}

    def fingerprint(self, num_images: int | None = None) -> str:
        return ""

    def notes(self) -> dict[str, Any]:
        return {"unreadable": [f"noise {number}" for number in self.skipped], "num_unreadable": len(self.skipped)}


class Numbers:
    """A meter that remembers what it was shown."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.images: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        assert len(batch.numbers) == len(batch.images) > 0
        self.numbers += batch.numbers
        self.images += batch.images


class Case(NamedTuple):
    """A set of images and what is asked of it."""

    total: int
    unreadable: set[int]
    num_images: int
    end: int | None


CASES = (
    Case(5, set(), 5, None),  # 2 and 3 images
    Case(9, {0, 1, 2}, 6, None),  # rank 0 reads none at first
    Case(12, {1, 5, 8, 9}, 7, 4),
    Case(3, {0}, 2, None),  # rank 0 reads none at all
    Case(4, set(), 3, 0),
)


def collected(case: Case, accelerator: Accelerator) -> tuple[FeatureSet, dict[str, Any]]:
    meter = FeatureMeter(sums(), case.end)
    images = Images(case.total, case.unreadable)
    notes = collect(accelerator, images, case.num_images, [meter], batch_size=BATCH_SIZE, label="test")
    return meter.finish(accelerator), notes


def tensors_of(features: FeatureSet) -> dict[str, Tensor]:
    assert features.logits is not None
    return {
        "mean": features.fit.mean,
        "covariance": features.fit.covariance,
        "features": features.features,
        "logits": features.logits,
        "numbers": features.numbers,
    }


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def readable(case: Case) -> list[int]:
    """The first numbers that can be read, as many as asked."""
    return [number for number in range(case.total) if number not in case.unreadable][: case.num_images]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_meters_see_the_first_images_that_can_be_read_once_and_no_more(
    accelerator: Accelerator, case: Case, batch_size: int
) -> None:
    images, meters = Images(case.total, case.unreadable), [Numbers(), Numbers()]
    notes = collect(accelerator, images, case.num_images, meters, batch_size=batch_size, label="test")
    for meter in meters:
        assert meter.numbers == readable(case)
        assert torch.equal(torch.stack(meter.images), images.pixels[meter.numbers])
    skipped = [number for number in sorted(case.unreadable) if number < readable(case)[-1]]
    assert notes == {"unreadable": [f"noise {number}" for number in skipped], "num_unreadable": len(skipped)}


def test_too_few_images_are_an_error_whether_they_are_missing_or_unreadable(accelerator: Accelerator) -> None:
    meter = Numbers()
    with pytest.raises(UserError, match=r"^noise: holds 5 images, and 6 are asked; ask for no more than there are$"):
        collect(accelerator, Images(5), 6, [meter], batch_size=2, label="test")
    assert meter.numbers == []
    message = r"^noise: 2 of the first 5 images cannot be read, which leaves fewer than the 5 that are asked; ask for"
    with pytest.raises(UserError, match=message):
        collect(accelerator, Images(6, {1, 3}), 5, [Numbers()], batch_size=2, label="test")
    check_number(Images(5), 5)
    with pytest.raises(UserError, match="holds 5 images, and 1,000 are asked"):
        check_number(Images(5), 1000)


def test_without_a_number_all_that_can_be_read_are_shown(accelerator: Accelerator) -> None:
    meter = Numbers()
    notes = collect(accelerator, Images(7, {0, 6}), None, [meter], batch_size=2, label="test")
    assert meter.numbers == [1, 2, 3, 4, 5]
    assert notes["num_unreadable"] == 2


@pytest.mark.parametrize("case", CASES)
def test_the_fit_is_of_all_images_and_features_are_kept_below_the_end(accelerator: Accelerator, case: Case) -> None:
    features, _ = collected(case, accelerator)
    numbers = readable(case)
    pooled, logits = sums().features_and_logits(Images(case.total).pixels[numbers])
    expected = pooled.double().numpy()
    np.testing.assert_allclose(features.fit.mean, expected.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(features.fit.covariance, np.cov(expected, rowvar=False), rtol=1e-9, atol=1e-6)
    kept = [place for place, number in enumerate(numbers) if case.end is None or number < case.end]
    assert features.num_images == case.num_images
    assert features.numbers.tolist() == [numbers[place] for place in kept]
    assert features.numbers.dtype == torch.int64
    assert torch.equal(features.features, pooled[kept])
    assert torch.equal(features.logits, logits[kept])


def test_a_network_without_classes_gives_no_logits(accelerator: Accelerator) -> None:
    class Means(Sums):
        def forward(self, images: Tensor) -> Features:
            return Features(super().forward(images).pooled, logits=None)

    meter = FeatureMeter(FeatureNetwork("means", Means(), "cpu"))
    collect(accelerator, Images(4), 4, [meter], batch_size=3, label="test")
    assert meter.finish(accelerator).logits is None


def test_features_below_a_number_are_those_of_images_and_not_of_rows(accelerator: Accelerator) -> None:
    features, _ = collected(Case(9, {0, 1, 4}, 6, None), accelerator)
    below = features.below(5)
    assert below.numbers.tolist() == [2, 3]
    assert torch.equal(below.features, features.features[:2])
    assert torch.equal(below.logits, features.logits[:2])
    assert (below.fit, below.num_images) == (features.fit, 6)


def run_two_processes(out: Path) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_two_processes_collect_the_same_bits_as_one(accelerator: Accelerator, tmp_path: Path) -> None:
    run_two_processes(tmp_path)
    for rank in range(2):
        written = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert written["num_read"] == [[2, 3], [1, 5], [3, 4], [0, 2], [1, 2]]
        for case, (tensors, notes) in zip(CASES, written["collected"], strict=True):
            features, expected_notes = collected(case, accelerator)
            assert sorted(notes["unreadable"]) == sorted(expected_notes["unreadable"])
            assert notes["num_unreadable"] == expected_notes["num_unreadable"]
            for name, expected in tensors_of(features).items():
                assert torch.equal(tensors[name], expected), (case, name)
        for (first, second), (vector, matrix) in zip(GATHERED, written["gathered"], strict=True):
            assert vector.tolist() == [0.0] * first + [1.0] * second
            assert matrix.tolist() == [[0, 0, 0]] * first + [[1, 1, 1]] * second


GATHERED = ((2, 3), (3, 1), (0, 2), (2, 0), (0, 0))  # rows of either process


def main(out: Path) -> None:
    """What each process has at the end."""
    accelerator = make_accelerator("fp32", num_threads=1)
    rank = accelerator.process_index
    num_read = []
    for case in CASES:
        meter = Numbers()
        images = Images(case.total, case.unreadable)
        collect(accelerator, images, case.num_images, [meter], batch_size=BATCH_SIZE, label="test")
        num_read.append(accelerator.gather(torch.tensor([len(meter.numbers)])).tolist())
    results = [(tensors_of(features), notes) for features, notes in (collected(case, accelerator) for case in CASES)]
    gathered = []
    for counts in GATHERED:
        rows = torch.full((counts[rank], 3), rank)
        gathered.append((gather_rows(accelerator, rows[:, 0].float()), gather_rows(accelerator, rows)))
    torch.save({"num_read": num_read, "collected": results, "gathered": gathered}, out / f"{rank}.pt")
    accelerator.end_training()


def normal(num_images: int, shift: float, scale: float, seed: int) -> Tensor:
    """Random features, fp32 (N, 6)."""
    return shift + scale * torch.randn(num_images, 6, generator=torch.Generator().manual_seed(seed))


def feature_set(features: Tensor, more: Tensor | None = None) -> FeatureSet:
    """``more`` are features of which only mean and covariance are kept."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features if more is None else torch.cat([features, more]))
    return FeatureSet(statistics.fit(), features, features[:, :4], torch.arange(len(features)), statistics.num_images)


@pytest.fixture(scope="module")
def samples() -> FeatureSet:
    return feature_set(normal(40, 0.2, 0.6, seed=0))


@pytest.fixture(scope="module")
def reference() -> FeatureSet:
    return feature_set(normal(30, 0.0, 1.0, seed=1), more=normal(50, 1.0, 2.0, seed=2))


def measured(metrics: Sequence[str], samples: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
    return {metric.name: metric.value for metric in measure_quality(metrics, samples, reference, sums())}


def test_every_number_is_that_of_its_own_function(samples: FeatureSet, reference: FeatureSet) -> None:
    metrics = measure_quality(["dc", "is", "pr", "kid", "fid"], samples, reference, sums())
    kernel, score = kernel_distance(reference.features, samples.features), classifier_score(samples.logits)
    manifold = prdc(reference.features, samples.features, k_manifold=3, k_density=5)
    assert manifold.precision != manifold.recall
    numbers = {"num_images": 40, "num_reference_images": 30}
    assert [tuple(metric) for metric in metrics] == [
        (
            "Frechet distance (sums)",
            pytest.approx(frechet_distance(samples.fit, reference.fit)),
            *(None, "lower"),
            {"num_images": 40, "num_reference_images": 80},
        ),
        ("kernel distance (sums)", kernel.mean, kernel.std, "lower", numbers | {"subset_size": 30}),
        ("classifier score (sums)", score.mean, score.std, "higher", {"num_images": 40}),
        ("precision (sums)", manifold.precision, None, "higher", {"k": 3, **numbers}),
        ("recall (sums)", manifold.recall, None, "higher", {"k": 3, **numbers}),
        ("density (sums)", manifold.density, None, "higher", {"k": 5, **numbers}),
        ("coverage (sums)", manifold.coverage, None, "higher", {"k": 5, **numbers}),
    ]


def test_a_deviation_between_equal_subsets_is_not_told(samples: FeatureSet, reference: FeatureSet) -> None:
    for number, other, told in ((30, 30, False), (31, 30, True), (30, 40, True)):
        few = [
            feature_set(features[:count])
            for features, count in ((samples.features, number), (normal(40, 0, 1, 4), other))
        ]
        (metric,) = measure_quality(["kid"], *few, sums())
        assert (metric.std is not None) == told


def test_a_metric_that_is_not_asked_is_not_there(samples: FeatureSet, reference: FeatureSet) -> None:
    everything = measured(["fid", "kid", "is", "pr", "dc"], samples, reference)
    assert len(everything) == 7
    names = {
        "fid": ["Frechet distance (sums)"],
        "kid": ["kernel distance (sums)"],
        "is": ["classifier score (sums)"],
        "pr": ["precision (sums)", "recall (sums)"],
        "dc": ["density (sums)", "coverage (sums)"],
    }
    for metric, expected in names.items():
        assert measured([metric], samples, reference) == {name: everything[name] for name in expected}


def test_a_classifier_score_needs_no_reference_and_all_else_does(samples: FeatureSet) -> None:
    assert measured(["is"], samples, None) == {"classifier score (sums)": classifier_score(samples.logits).mean}
    for metric in ("fid", "kid", "pr", "dc"):
        with pytest.raises(ValueError, match="compares with a reference"):
            measured([metric], samples, None)


def test_names_of_inception_are_inceptions_alone(samples: FeatureSet, reference: FeatureSet) -> None:
    inception = measure_quality(["fid", "kid", "is", "pr"], samples, reference, sums("inception"))
    names = [metric.name for metric in inception]
    assert names == ["FID", "KID", "Inception score", "precision (inception)", "recall (inception)"]


def test_too_few_images_for_a_metric_are_said(reference: FeatureSet) -> None:
    few = feature_set(normal(5, 0, 1, seed=3))
    with pytest.raises(UserError, match="10 splits needs as many images, not 5"):
        measured(["is"], few, None)
    with pytest.raises(UserError, match="5 nearest neighbours of an image need more than 5 images, not 5"):
        measured(["dc"], few, reference)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

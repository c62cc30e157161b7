"""What samples are compared with: measured once, found again in a file, and refused where the file is of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.engine.images import load_png, save_png
from ldgan.evaluation.collecting import FeatureSet
from ldgan.evaluation.image_sets import open_images
from ldgan.evaluation.references import MeasuredReference, ReferenceImages, check_size, open_reference
from ldgan.metrics.features import Extractor, FeatureNetwork, Features
from ldgan.metrics.frechet import frechet_distance

SIZE = (4, 4)
NUM_IMAGES = 12


class Averages(Extractor):
    """Means of a channel's upper and lower pixels, times ``scale``; counts the images that it has seen."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.preprocessing = {"scale": scale}
        self.scale, self.num_seen = scale, 0

    def forward(self, images: Tensor) -> Features:
        self.num_seen += len(images)
        means = self.scale * images.float().unflatten(2, (2, -1)).mean(dim=(3, 4))
        return Features(means.flatten(1), logits=None)


class Network(FeatureNetwork):
    """Says how many images it has looked at."""

    def __init__(self, name: str = "averages", scale: float = 1.0) -> None:
        self.averages = Averages(scale)
        super().__init__(name, self.averages, "cpu")
        self.averages.num_seen = 0  # it looks at one to know itself

    @property
    def num_seen(self) -> int:
        return self.averages.num_seen


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Numbered images, so that their order is that of their names."""
    random = torch.Generator().manual_seed(0)
    for number in range(NUM_IMAGES):
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=random)
        save_png(tmp_path / "real" / f"{number:09d}.png", image)
    return tmp_path / "real"


@pytest.fixture
def measure(accelerator: Accelerator, folder: Path) -> Callable[..., tuple[MeasuredReference, int]]:
    """Measures the reference at a path; the result, and how many images the network has looked at."""

    def measure(
        path: Path = folder, *, network: Network | None = None, num_kept: int = 1000, skip: bool = True, **options: Any
    ) -> tuple[MeasuredReference, int]:
        network = network or Network()
        reference = open_reference(path, partial(open_images, skip_unreadable=skip), SIZE, **options)
        measured = reference.measure(accelerator, network, num_kept=num_kept, batch_size=5)
        return measured, network.num_seen

    return measure


def features_of(folder: Path, numbers: list[int]) -> Tensor:
    return Network()(torch.stack([load_png(folder / f"{number:09d}.png") for number in numbers]))


def assert_same(found: FeatureSet, expected: FeatureSet) -> None:
    for name in ("mean", "covariance"):
        assert torch.equal(getattr(found.fit, name), getattr(expected.fit, name))
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.numbers, expected.numbers)
    assert found.num_images == expected.num_images


def damage(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number:09d}.png").write_bytes(b"no image")


def test_a_reference_is_measured_as_its_images_are(folder: Path, measure: Callable[..., Any]) -> None:
    measured, num_seen = measure()
    expected = features_of(folder, list(range(NUM_IMAGES)))
    assert torch.equal(measured.features.features, expected)
    np.testing.assert_allclose(measured.features.fit.mean, expected.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(measured.features.fit.covariance, np.cov(expected.double().T), rtol=1e-9)
    assert num_seen == measured.features.num_images == NUM_IMAGES
    assert measured.description["num_images"] == NUM_IMAGES
    assert measured.description["path"] == str(folder)
    assert measured.description["fingerprint"] == open_images(folder).fingerprint()
    assert measured.description["statistics"] is None


def test_the_first_ones_may_do_and_fewer_may_be_kept(folder: Path, measure: Callable[..., Any]) -> None:
    measured, num_seen = measure(num_images=8, num_kept=3)
    assert (num_seen, measured.features.num_images, measured.description["num_images"]) == (8, 8, 8)
    expected = features_of(folder, list(range(8)))
    np.testing.assert_allclose(measured.features.fit.mean, expected.double().mean(dim=0), rtol=1e-12)
    assert torch.equal(measured.features.features, expected[:3])


def test_a_cache_is_written_once_and_then_nothing_is_computed(
    tmp_path: Path, measure: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache.safetensors"
    without, _ = measure()
    first, first_seen = measure(cache=cache)
    assert f"statistics of the reference kept in {cache}\n" in capsys.readouterr().out
    written = cache.read_bytes()
    again, again_seen = measure(cache=cache)
    assert (first_seen, again_seen) == (NUM_IMAGES, 0)
    assert cache.read_bytes() == written
    assert_same(first.features, without.features)
    assert_same(again.features, first.features)
    assert again.description["statistics"] == first.description["statistics"] == str(cache)
    libraries = again.description.pop("libraries")
    assert "torch" in libraries
    assert again.description == first.description


def test_a_cache_serves_where_fewer_features_are_needed_and_not_where_more_are(
    tmp_path: Path, measure: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache.safetensors"
    measure(cache=cache, num_kept=6)
    for num_kept in (0, 4, 6):
        found, num_seen = measure(cache=cache, num_kept=num_kept)
        assert num_seen == 0
        assert_same(found.features, measure(num_kept=num_kept)[0].features)
    for num_kept, needed in ((7, 7), (1000, NUM_IMAGES)):
        with pytest.raises(UserError, match=f"features: of 6 images in the file, {needed} needed; delete the file"):
            measure(cache=cache, num_kept=num_kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 11}, "num_images: 12 in the file, 11 asked"),
        ({"network": ("averages", 2.0)}, "network_fingerprint: "),
        ({"network": ("others", 1.0)}, "network: averages in the file, others asked"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, measure: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    cache = tmp_path / "cache.safetensors"
    measure(cache=cache)
    written = cache.read_bytes()
    network = Network(*changes.pop("network", ("averages", 1.0)))
    with pytest.raises(UserError) as error:
        measure(cache=cache, network=network, **changes)
    assert str(error.value).startswith(f"{cache}: {message}")
    assert network.num_seen == 0
    assert cache.read_bytes() == written


def test_a_cache_of_other_pixels_or_another_size_is_refused(
    tmp_path: Path, folder: Path, accelerator: Accelerator, measure: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache.safetensors"
    measure(cache=cache)
    resized = open_reference(folder, partial(open_images, resolution=2), (2, 2), cache=cache)
    with pytest.raises(UserError, match="safetensors: size: 4x4 px in the file, 2x2 px asked; resize: null in"):
        resized.measure(accelerator, Network(), num_kept=0, batch_size=5)
    image = load_png(folder / "000000003.png")
    image[0, 0, 0] ^= 1
    save_png(folder / "000000003.png", image)
    with pytest.raises(UserError, match="data_fingerprint: "):
        measure(cache=cache)


@pytest.mark.parametrize(
    ("num_kept", "unreadable"),
    [(1000, {0, 4, 10}), (9, {0, 4, 10}), (8, {0, 4, 10}), (5, {1, 4}), (5, {4, 8}), (2, {0, 1}), (3, {9})],
)
def test_rows_of_a_cache_are_still_those_of_their_images_where_some_are_unreadable(
    tmp_path: Path, folder: Path, measure: Callable[..., Any], num_kept: int, unreadable: set[int]
) -> None:
    damage(folder, *unreadable)
    cache = tmp_path / "cache.safetensors"
    num_images = NUM_IMAGES - len(unreadable)
    first, first_seen = measure(cache=cache, num_kept=num_kept, num_images=num_images)
    again, again_seen = measure(cache=cache, num_kept=num_kept, num_images=num_images)
    assert (first_seen, again_seen) == (num_images, 0)
    end = num_kept if num_kept < num_images else NUM_IMAGES  # all are kept where there are no more
    numbers = [number for number in range(end) if number not in unreadable]
    for measured in (first, again):
        assert measured.features.numbers.tolist() == numbers
        assert measured.features.num_images == num_images
        if numbers:
            assert torch.equal(measured.features.features, features_of(folder, numbers))
        assert measured.description["notes"]["num_unreadable"] == len(unreadable)


def test_pictures_that_are_no_images_of_the_set_stay_in_the_description(
    tmp_path: Path, folder: Path, measure: Callable[..., Any]
) -> None:
    save_png(folder / "grid.png", torch.zeros(3, 50, 50, dtype=torch.uint8))
    damage(folder, 2)
    options = {"cache": tmp_path / "cache.safetensors", "num_images": NUM_IMAGES - 1}
    for _ in range(2):
        measured, _ = measure(**options)
        assert measured.description["left_out"] == ["grid.png"]
        assert 2 not in measured.features.numbers.tolist()


def test_a_file_of_statistics_needs_no_images(tmp_path: Path, folder: Path, measure: Callable[..., Any]) -> None:
    cache = tmp_path / "cache.safetensors"
    expected, _ = measure(cache=cache, num_kept=7)
    for file in folder.iterdir():
        file.unlink()
    found, num_seen = measure(cache, num_kept=7)
    assert num_seen == 0
    assert_same(found.features, expected.features)
    assert found.description["path"] == str(folder)
    assert found.description["num_images"] == NUM_IMAGES
    with pytest.raises(UserError, match="network_fingerprint"):
        measure(cache, network=Network(scale=3.0), num_kept=0)
    with pytest.raises(UserError, match="features: of 7 images in the file, 8 needed"):
        measure(cache, num_kept=8)
    with safe_open(cache, framework="pt") as file:
        assert json.loads(file.metadata()["conditions"])["num_images"] == NUM_IMAGES


def test_an_npz_file_serves_for_mean_and_covariance_of_inception_alone(
    tmp_path: Path, folder: Path, accelerator: Accelerator, measure: Callable[..., Any], capsys
) -> None:
    features = features_of(folder, list(range(NUM_IMAGES))).double().numpy()
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    found, num_seen = measure(path, network=Network("inception"), num_kept=0)
    assert num_seen == 0
    assert "taken for FID's Inception" in capsys.readouterr().out
    assert found.features.num_images is None
    assert found.features.features.shape == (0, 6)
    expected, _ = measure(network=Network("inception"))
    assert frechet_distance(found.features.fit, expected.features.fit) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.features.fit.mean, features.mean(axis=0))
    with pytest.raises(UserError, match="features of averages are compared"):
        measure(path, num_kept=0)
    with pytest.raises(UserError, match="the features of 1 images are needed; give the images themselves"):
        measure(path, network=Network("inception"), num_kept=1)


def test_sizes_must_be_those_of_the_samples(tmp_path: Path, folder: Path, measure: Callable[..., Any]) -> None:
    cache = tmp_path / "cache.safetensors"
    measure(cache=cache)
    for path in (folder, cache):
        message = f"^{path}: images of 4x4 px, and those that are measured have 8x4 px; --resolution PIXELS brings"
        with pytest.raises(UserError, match=message):
            open_reference(path, open_images, (8, 4))
    check_size("x", (8, 4), (8, 4))
    resized = open_reference(folder, partial(open_images, resolution=8), (8, 8))
    assert isinstance(resized, ReferenceImages)
    assert resized.images.size == (8, 8)


def test_what_cannot_be_measured_is_said_when_it_is_opened(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="real: holds 12 images, and 13 are asked"):
        open_reference(folder, open_images, SIZE, num_images=13)
    with pytest.raises(UserError, match=r"cache\.npz: statistics are kept as \.safetensors only"):
        open_reference(folder, open_images, SIZE, cache=tmp_path / "cache.npz")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        open_reference(tmp_path / "nowhere", open_images, SIZE)
    with pytest.raises(UserError, match="no such file of statistics"):
        open_reference(tmp_path / "nowhere.safetensors", open_images, SIZE)
    for options in ({"num_images": 3}, {"cache": tmp_path / "other.safetensors"}):
        with pytest.raises(UserError, match="is a file of statistics as it is; leave out"):
            open_reference(tmp_path / "nowhere.npz", open_images, SIZE, **options)


def test_an_unreadable_image_stops_a_reference_unless_it_may_be_skipped(
    folder: Path, measure: Callable[..., Any]
) -> None:
    damage(folder, 4)
    with pytest.raises(UserError, match=r"000000004\.png cannot be read .*--skip-unreadable"):
        measure(skip=False)
    with pytest.raises(UserError, match="1 of the first 12 images cannot be read"):
        measure()
    grey = np.full(SIZE, 7, dtype=np.uint8)
    Image.fromarray(grey).save(folder / "000000005.png")
    measured, _ = measure(num_images=10)
    assert measured.description["notes"]["grey"] == 1
    assert measured.description["notes"]["unreadable"] == [str(folder / "000000004.png")]

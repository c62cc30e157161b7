"""Pictures of neighbours that hold the right pixels, and copies that are found out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.engine.images import enlarge, image_grid, load_png, save_png
from ldgan.evaluation.collecting import FeatureMeter, FeatureSet, collect, measure_quality
from ldgan.evaluation.feature_metrics import GAP, FeatureMetrics, RealFeatures, find_neighbours
from ldgan.evaluation.image_sets import ImageSet, open_images
from ldgan.evaluation.references import ReferenceImages
from ldgan.metrics.features import Extractor, FeatureNetwork, Features

SIDE, TILE = 4, 96
NUM_REAL, NUM_HELDOUT = 30, 25


class Pixels(Extractor):
    """The pixels themselves: the nearest image is the one with the least squared difference."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {}

    def forward(self, images: Tensor) -> Features:
        pixels = images[:, :, :SIDE, :SIDE].flatten(1).float()
        return Features(pixels, logits=pixels[:, :11] / 50)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork("pixels", Pixels(), "cpu")


def noise(num_images: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, 3, SIDE, SIDE), dtype=torch.uint8, generator=random)


def save(folder: Path, images: Sequence[Tensor] | Tensor) -> Path:
    for number, image in enumerate(images):
        save_png(folder / f"{number:09d}.png", image)
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return save(tmp_path / "real", noise(NUM_REAL, seed=0))


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    return save(tmp_path / "heldout", noise(NUM_HELDOUT, seed=1))


def metrics_of(
    network: FeatureNetwork, real: Path, heldout: Path | None = None, metrics: str = "neighbours", **changes: Any
) -> FeatureMetrics:
    images = open_images(real, skip_unreadable=True)
    reference = ReferenceImages(images, changes.get("num_images", len(images)), changes.get("cache"))
    others = open_images(heldout, skip_unreadable=True) if heldout is not None else None
    return FeatureMetrics(network, metrics.split(","), reference, others)


def features_of(accelerator: Accelerator, network: FeatureNetwork, images: ImageSet, num_images: int) -> FeatureSet:
    meter = FeatureMeter(network)
    collect(accelerator, images, num_images, [meter], batch_size=4, label="samples")
    return meter.finish(accelerator)


def results(
    accelerator: Accelerator, metrics: FeatureMetrics, samples: Path, num_images: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], RealFeatures]:
    images = open_images(samples, skip_unreadable=True)
    number = num_images or len(images)
    features = metrics.measure_real(accelerator, number, batch_size=7)
    return *metrics.results(images, features_of(accelerator, metrics.network, images, number), features), features


def tiles(picture: Tensor) -> list[list[Tensor]]:
    """Rows of images, (3, SIDE, SIDE) each, out of a picture: samples, and behind a gap their neighbours."""
    factor = TILE // SIDE
    lefts = [0, *range(TILE + GAP, picture.shape[2], TILE + 2)]
    return [
        [picture[:, top : top + TILE : factor, left : left + TILE : factor] for left in lefts]
        for top in range(0, picture.shape[1], TILE + 2)
    ]


def number_of(image: Tensor, images: Tensor) -> int:
    (number,) = [number for number, other in enumerate(images) if torch.equal(image, other)]
    return number


def nearly(image: Tensor, by: int) -> Tensor:
    """An image of which one pixel is ``by`` grey levels off."""
    changed = image.int()
    changed[0, 0, 0] += by if changed[0, 0, 0] < 128 else -by
    return changed.to(torch.uint8)


def test_beside_each_sample_is_the_image_it_was_made_from(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, tmp_path: Path
) -> None:
    images, sources = noise(NUM_REAL, seed=0), [17, 3, 3, 29, 0, 8, 21, 5, 14, 11]
    errors = [40, 10, 90, 50, 60, 20, 70, 30, 0, 80]
    samples = [nearly(images[source], by) for source, by in zip(sources, errors)]
    _, pictures, _ = results(accelerator, metrics_of(network, real), save(tmp_path / "samples", samples))
    for name, order in (("neighbours.png", range(8)), ("nearest_pairs.png", [8, 1, 5, 7, 0, 3, 4, 6])):
        rows = tiles(pictures[name])
        assert [len(row) for row in rows] == [8] * 8
        for row, number in zip(rows, order):
            assert torch.equal(row[0], samples[number])
            shown = [number_of(tile, images) for tile in row[1:]]
            distances = (images.double() - samples[number].double()).square().sum(dim=(1, 2, 3))
            assert shown == distances.argsort()[:7].tolist()
            assert shown[0] == sources[number]
        near = enlarge(torch.stack([tile for row in rows for tile in row[1:]]))
        assert torch.equal(pictures[name][:, :, TILE + GAP :], image_grid(near, columns=7))
        assert pictures[name][:, :, TILE : TILE + GAP].unique().tolist() == [255]


def test_of_few_images_all_are_shown(accelerator: Accelerator, network: FeatureNetwork, tmp_path: Path) -> None:
    images = noise(3, seed=0)
    metrics = metrics_of(network, save(tmp_path / "real", images))
    _, pictures, _ = results(accelerator, metrics, save(tmp_path / "samples", images[[2, 0]]))
    rows = tiles(pictures["neighbours.png"])
    assert [number_of(row[1], images) for row in rows] == [2, 0]
    assert [sorted(number_of(tile, images) for tile in row[1:]) for row in rows] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("cached", [False, True])
def test_skipped_files_do_not_shift_what_is_shown(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, tmp_path: Path, cached: bool
) -> None:
    images, sources = noise(NUM_REAL, seed=0), [17, 3, 29, 0, 8, 21]
    samples = save(tmp_path / "samples", [nearly(images[source], 5) for source in sources])
    distances = (images.double() - images[3].double()).square().sum(dim=(1, 2, 3))
    nearest_readable = next(number for number in distances.argsort().tolist() if number not in (3, 10))
    for file in (real / "000000003.png", real / "000000010.png", samples / "000000002.png"):
        file.write_bytes(b"no image")
    cache = tmp_path / "cache.safetensors"
    metrics = metrics_of(network, real, num_images=NUM_REAL - 2, cache=cache)
    if cached:
        metrics.measure_real(accelerator, 5, batch_size=3)
        assert cache.exists()
    result, pictures, _ = results(accelerator, metrics, samples, 5)
    rows = tiles(pictures["neighbours.png"])
    assert [number_of(row[1], images) for row in rows] == [17, nearest_readable, 0, 8, 21]
    for row, number in zip(rows, (0, 1, 3, 4, 5), strict=True):
        assert torch.equal(row[0], load_png(samples / f"{number:09d}.png"))
    assert result["reference"]["notes"]["num_unreadable"] == 2


def test_copies_are_found_out_and_new_images_are_not(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, heldout: Path, tmp_path: Path
) -> None:
    copies = save(tmp_path / "copies", [nearly(image, 9) for image in noise(NUM_REAL, seed=0)[:20]])
    new = save(tmp_path / "new", noise(200, seed=2))
    far = save(tmp_path / "far", noise(20, seed=3) // 255 * 255)
    metrics = metrics_of(network, real, heldout)
    found = {path.name: results(accelerator, metrics, path)[0]["copying"] for path in (copies, new, far)}
    assert found["copies"]["nearer_than_heldout"] == found["copies"]["very_near_share"] == 1
    assert found["copies"]["median_distance_samples"] == 9
    assert found["new"]["nearer_than_heldout"] == pytest.approx(0.5, abs=0.25)  # four standard deviations
    assert found["new"]["very_near_share"] < 0.15
    assert found["far"]["nearer_than_heldout"] < 0.05
    assert [found[name]["num_images"] for name in ("copies", "new", "far")] == [20, 200, 20]
    assert found["new"]["num_heldout_images"] == NUM_HELDOUT
    assert found["new"]["heldout"]["path"] == str(heldout)
    assert json.loads(json.dumps(found)) == found


def test_copying_compares_the_distances_to_the_nearest_images(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, heldout: Path, tmp_path: Path
) -> None:
    samples = noise(9, seed=2)
    result, _, _ = results(accelerator, metrics_of(network, real, heldout), save(tmp_path / "samples", samples))
    training = noise(NUM_REAL, seed=0).flatten(1).double()
    ours, theirs = (
        torch.cdist(images.flatten(1).double(), training).min(dim=1).values
        for images in (samples, noise(NUM_HELDOUT, seed=1))
    )
    nearer = (ours[:, None] < theirs).double() + (ours[:, None] == theirs).double() / 2
    assert result["copying"]["nearer_than_heldout"] == pytest.approx(nearer.mean().item())
    assert result["copying"]["median_distance_samples"] == pytest.approx(ours.median().item())
    assert result["copying"]["median_distance_heldout"] == pytest.approx(theirs.median().item())


def test_an_unreadable_held_out_image_is_left_out_and_counted(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, heldout: Path
) -> None:
    (heldout / "000000002.png").write_bytes(b"no image")
    result, _, features = results(accelerator, metrics_of(network, real, heldout), real)
    assert result["copying"]["num_heldout_images"] == NUM_HELDOUT - 1
    assert result["copying"]["heldout"]["notes"]["num_unreadable"] == 1
    assert torch.equal(
        features.heldout.features.features, network(noise(NUM_HELDOUT, seed=1)[[0, 1, *range(3, NUM_HELDOUT)]])
    )


def test_without_held_out_images_nothing_is_said_about_copies(
    accelerator: Accelerator, network: FeatureNetwork, real: Path
) -> None:
    result, pictures, _ = results(accelerator, metrics_of(network, real), real)
    assert "copying" not in result
    assert pictures.keys() == {"neighbours.png", "nearest_pairs.png"}


@pytest.mark.parametrize("num_samples", [12, 50])
def test_neighbours_change_no_other_number(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, tmp_path: Path, num_samples: int
) -> None:
    (real / "000000005.png").write_bytes(b"no image")
    samples = save(tmp_path / "samples", noise(num_samples, seed=4) // 2 + 60)
    alone, beside = (
        results(accelerator, metrics_of(network, real, metrics=names, num_images=NUM_REAL - 1), samples)
        for names in ("fid,kid,is,pr,dc", "fid,kid,is,pr,dc,neighbours")
    )
    assert alone[0] == beside[0]
    assert alone[1] == {}
    reference = alone[2].reference.features
    assert reference.numbers.tolist() == [n for n in range(NUM_REAL) if n != 5 and n < num_samples]
    features = features_of(accelerator, network, open_images(samples), num_samples)
    expected = measure_quality(["fid", "kid", "is", "pr", "dc"], features, reference, network)
    assert alone[0]["metrics"] == [metric._asdict() for metric in expected]
    assert alone[0]["network"] == {"name": "pixels", "fingerprint": network.fingerprint}


def test_features_that_no_metric_needs_are_not_kept(
    accelerator: Accelerator, network: FeatureNetwork, real: Path
) -> None:
    for names, number in (("fid", 0), ("fid,is", 0), ("kid", 4), ("pr", 4), ("fid,dc", 4), ("neighbours", NUM_REAL)):
        measured = metrics_of(network, real, metrics=names).measure_real(accelerator, 4, batch_size=8)
        assert len(measured.reference.features.features) == number
        assert measured.reference.features.num_images == NUM_REAL


def test_a_classifier_score_needs_no_real_images(accelerator: Accelerator, network: FeatureNetwork, real: Path) -> None:
    result, pictures, features = results(accelerator, FeatureMetrics(network, ["is"], None, None), real)
    assert [metric["name"] for metric in result["metrics"]] == ["classifier score (pixels)"]
    assert "reference" not in result
    assert (pictures, features) == ({}, RealFeatures(None, None))


def test_neighbours_are_found_among_all_candidates(
    network: FeatureNetwork, accelerator: Accelerator, real: Path
) -> None:
    features = features_of(accelerator, network, open_images(real), NUM_REAL)
    found = find_neighbours("test", features.below(4), features)
    assert found.numbers[:, 0].tolist() == [0, 1, 2, 3]
    assert found.distances[:, 0].tolist() == [0, 0, 0, 0]
    assert found.numbers.shape == (4, 7)


def test_an_unreadable_image_of_an_unskipping_set_stops_everything(
    accelerator: Accelerator, network: FeatureNetwork, real: Path, heldout: Path
) -> None:
    (heldout / "000000002.png").write_bytes(b"no image")
    metrics = FeatureMetrics(network, ["neighbours"], ReferenceImages(open_images(real), 5), open_images(heldout))
    with pytest.raises(UserError, match=r"000000002\.png cannot be read"):
        metrics.measure_real(accelerator, 5, batch_size=4)

"""What an evaluation measures in the features of a network: quality beside a reference, neighbours, copies."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldgan.engine.images import enlarge, image_grid
from ldgan.engine.progress import progress_bar
from ldgan.evaluation.collecting import NEED_FEATURES, FeatureMeter, FeatureSet, collect, measure_quality
from ldgan.evaluation.image_sets import ImageSet
from ldgan.evaluation.references import MeasuredReference, ReferenceFile, ReferenceImages
from ldgan.metrics.features import FeatureNetwork
from ldgan.metrics.neighbours import Neighbours, copying_from_distances, nearest

NUM_ROWS, NUM_NEIGHBOURS = 8, 7  # of a picture
GAP = 8  # pixels, white, between samples and their neighbours


@dataclass(frozen=True)
class FeatureMetrics:
    """Which metrics, in which network's features, beside which real images."""

    network: FeatureNetwork
    metrics: Collection[str]
    reference: ReferenceImages | ReferenceFile | None
    heldout: ImageSet | None

    def measure_real(self, accelerator: Accelerator, num_images: int, batch_size: int) -> RealFeatures:
        """Features of reference and held-out images, over all processes, for ``num_images`` that will be measured."""
        reference = heldout = None
        if self.reference is not None:
            if {"neighbours", "text"} & set(self.metrics):
                num_kept = sys.maxsize  # any image may be the one that is copied, or the one that a prompt is of
            else:
                num_kept = num_images if NEED_FEATURES & set(self.metrics) else 0
            reference = self.reference.measure(accelerator, self.network, num_kept=num_kept, batch_size=batch_size)
        if self.heldout is not None:
            meter = FeatureMeter(self.network)
            label = "held-out images"
            notes = collect(accelerator, self.heldout, None, [meter], batch_size=batch_size, label=label)
            description = self.heldout.describe() | {"notes": notes}
            heldout = MeasuredReference(meter.finish(accelerator), description)
        return RealFeatures(reference, heldout)

    def results(
        self, images: ImageSet, samples: FeatureSet, real: RealFeatures
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All numbers as JSON, and pictures, uint8 (3, H, W), by file name."""
        reference = real.reference.features if real.reference is not None else None
        result: dict[str, Any] = {"network": {"name": self.network.name, "fingerprint": self.network.fingerprint}}
        if real.reference is not None:
            result["reference"] = real.reference.description
        beside, num_images = reference, len(samples.features)
        if reference is not None and num_images < len(reference.features):
            beside = reference.below(num_images)  # the rest is for neighbours, and must not change other numbers
        measured = measure_quality(self.metrics, samples, beside, self.network, show_progress=True)
        result["metrics"] = [metric._asdict() for metric in measured]
        if "neighbours" not in self.metrics:
            return result, {}
        assert reference is not None
        assert isinstance(self.reference, ReferenceImages)
        neighbours = find_neighbours("nearest images", samples, reference)
        if real.heldout is not None:
            theirs = find_neighbours("nearest images of held-out ones", real.heldout.features, reference)
            check = copying_from_distances(neighbours.distances[:, 0], theirs.distances[:, 0])
            numbers = {"num_images": len(samples.features), "num_heldout_images": len(real.heldout.features.features)}
            result["copying"] = check._asdict() | numbers | {"heldout": real.heldout.description}
        pair = (images, samples), (self.reference.images, reference)
        nearest_first = neighbours.distances[:, 0].argsort().tolist()
        return result, {
            "neighbours.png": neighbour_picture(*pair, neighbours, range(len(nearest_first))[:NUM_ROWS]),
            "nearest_pairs.png": neighbour_picture(*pair, neighbours, nearest_first[:NUM_ROWS]),
        }


@dataclass(frozen=True)
class RealFeatures:
    """Features of real images: what samples are compared with, and images held out of training."""

    reference: MeasuredReference | None
    heldout: MeasuredReference | None


def find_neighbours(label: str, points: FeatureSet, candidates: FeatureSet) -> Neighbours:
    """The `NUM_NEIGHBOURS` nearest candidates to each point, with a progress bar."""
    num_points, num_candidates = len(points.features), len(candidates.features)
    with progress_bar(label, num_points * num_candidates, "distances") as bar:
        k = min(NUM_NEIGHBOURS, num_candidates)
        return nearest(points.features, candidates.features, k=k, progress=bar.advance)


def neighbour_picture(
    samples: tuple[ImageSet, FeatureSet],
    reference: tuple[ImageSet, FeatureSet],
    neighbours: Neighbours,
    rows: Sequence[int],
) -> Tensor:
    """A row for each of these rows of ``neighbours``: the sample, and the images nearest to it; uint8 (3, H, W)."""
    (images, features), (real_images, real_features) = samples, reference
    shown = [images.read(int(features.numbers[row])) for row in rows]
    near = [real_images.read(int(real_features.numbers[column])) for row in rows for column in neighbours.numbers[row]]
    left, right = (
        image_grid(enlarge(torch.stack(tiles)), columns=columns)
        for tiles, columns in ((shown, 1), (near, neighbours.numbers.shape[1]))
    )
    return torch.cat([left, left.new_full((3, left.shape[1], GAP), 255), right], dim=2)

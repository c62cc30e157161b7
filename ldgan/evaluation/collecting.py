"""From images to numbers: features of exactly as many images as asked, over all processes, and what they tell.

A set of images, be it a folder, shards or samples of a model, is shown to meters batch by batch. Each process has
its share; what the meters of all processes have seen is brought together when they finish.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar
from ldgan.engine.shares import share
from ldgan.evaluation.image_sets import Batch, ImageSet, merge_notes
from ldgan.metrics.classifier_score import classifier_score
from ldgan.metrics.features import FeatureNetwork
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import num_distances, prdc

# Metrics of features, by the names that commands and configs take.
QUALITY_METRICS = ("fid", "kid", "is", "pr", "dc")
K_MANIFOLD, K_DENSITY = 3, 5  # the papers' neighbours
# What a pass over all distances tells, and the neighbour that each number's balls reach to.
PRDC_METRICS = {
    "pr": {"precision": K_MANIFOLD, "recall": K_MANIFOLD},
    "dc": {"density": K_DENSITY, "coverage": K_DENSITY},
}
NEED_FEATURES = frozenset({"kid", "pr", "dc"})  # of the reference's images one by one; mean and covariance do not do


class Meter(Protocol):
    """Looks at batches of images, and remembers what it needs of them."""

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        ...


@dataclass
class FeatureSet:
    """What metrics know of images, on the CPU.

    ``fit`` is of all ``num_images``, None where a file does not tell how many. ``features``, fp32 (M, d), and
    ``logits``, fp32 (M, K), are those of the first M that could be read; ``numbers``, int64 (M,), are theirs in the set
    of images. ``logits`` are None of a network that is no classifier.
    """

    fit: GaussianFit
    features: Tensor
    logits: Tensor | None
    numbers: Tensor
    num_images: int | None

    def below(self, end: int) -> FeatureSet:
        """The same images, with the features and logits of those alone whose numbers lie below ``end``."""
        kept = self.numbers < end
        logits = self.logits[kept] if self.logits is not None else None
        return FeatureSet(self.fit, self.features[kept], logits, self.numbers[kept], self.num_images)


class FeatureMeter:
    """Statistics of the features of all images, and one by one those of images whose numbers lie below ``end``.

    None keeps the features of all images.
    """

    def __init__(self, network: FeatureNetwork, end: int | None = None) -> None:
        self._network, self._end = network, end
        self._statistics = FeatureStatistics(network.num_features)
        self._numbers: list[int] = []
        self._features = [torch.empty(0, network.num_features)]
        self._logits = [torch.empty(0, network.num_classes)]

    def add(self, batch: Batch) -> None:
        """Compute features of a batch."""
        pooled, logits = self._network.features_and_logits(batch.images)
        self._statistics.add(pooled)
        kept = [place for place, number in enumerate(batch.numbers) if self._end is None or number < self._end]
        self._numbers += [batch.numbers[place] for place in kept]
        self._features.append(pooled[kept].cpu())
        if logits is not None:
            self._logits.append(logits[kept].cpu())

    def finish(self, accelerator: Accelerator) -> FeatureSet:
        """The features of all processes' images, in the order of their numbers."""
        sums = accelerator.reduce(self._statistics.sums.to(accelerator.device), "sum")
        self._statistics.sums = sums.cpu()
        numbers = gather_rows(accelerator, torch.tensor(self._numbers, dtype=torch.int64))
        order = numbers.argsort()
        features = gather_rows(accelerator, torch.cat(self._features))[order]
        logits = None
        if self._network.num_classes:
            logits = gather_rows(accelerator, torch.cat(self._logits))[order]
        return FeatureSet(self._statistics.fit(), features, logits, numbers[order], self._statistics.num_images)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """All processes' rows, (n, ...) with an n of each, on the CPU: those of rank 0 first."""
    if accelerator.num_processes == 1:
        return rows.cpu()
    rows = rows.to(accelerator.device)
    counts: list[int] = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padding = [0, 0] * (rows.ndim - 1) + [0, max(counts) - len(rows)]
    parts = accelerator.gather(F.pad(rows, padding)).cpu().split(max(counts) or 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def check_number(images: ImageSet, num_images: int) -> None:
    """Raise a UserError unless a set has ``num_images``, be they readable or not."""
    if num_images > len(images):
        raise UserError(
            f"{images.name}: holds {len(images):,} images, and {num_images:,} are asked; ask for no more than there are"
        )


def collect(
    accelerator: Accelerator,
    images: ImageSet,
    num_images: int | None,
    meters: Sequence[Meter],
    *,
    batch_size: int,
    label: str,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Show the first ``num_images`` images that can be read to the meters, over all processes, with a progress bar.

    None shows all that can be read. Returns what had to be done to images on the way, counted, of all processes; see
    `ImageSet.notes`.

    Raises:
        UserError: there are not that many.
    """
    wanted = len(images) if num_images is None else num_images
    check_number(images, wanted)
    first, missing = 0, wanted
    mine = share(wanted, accelerator.process_index, accelerator.num_processes)
    with progress_bar(label, len(mine), "images", enabled=show_progress and accelerator.is_main_process) as bar:
        while missing:  # once, unless images are unreadable: then the next ones take their places
            if first + missing > len(images):
                raise UserError(
                    f"{images.name}: {first - wanted + missing:,} of the first {first:,} images cannot be read, which"
                    f" leaves fewer than the {wanted:,} that are asked; ask for fewer, or mend the others"
                )
            mine = share(missing, accelerator.process_index, accelerator.num_processes)
            num_read = 0
            for batch in images.batches(range(first + mine.start, first + mine.stop), batch_size):
                for meter in meters:
                    meter.add(batch)
                num_read += len(batch.numbers)
                bar.advance(len(batch.numbers))
            first += missing
            missing -= int(accelerator.reduce(torch.tensor(num_read, device=accelerator.device), "sum"))
            if num_images is None:
                break
    return merge_notes(gather_object([images.notes()]))


class Metric(NamedTuple):
    """A number, under a name that says in which features, with what its ``details`` are (k, size of subsets)."""

    name: str
    value: float
    std: float | None  # over subsets or splits, where the metric is a mean over such
    better: Literal["higher", "lower"]
    details: Mapping[str, Any]


def measure_quality(
    metrics: Collection[str],
    samples: FeatureSet,
    reference: FeatureSet | None,
    network: FeatureNetwork,
    *,
    show_progress: bool = False,
) -> list[Metric]:
    """Those of `QUALITY_METRICS` that ``metrics`` names, of samples beside a reference, in the network's features.

    ``is`` alone needs no reference. Metrics of neighbourhoods depend on the numbers of images, which are in their
    details; a Frechet distance is of all images of either set.

    Raises:
        UserError: there are too few images for a metric.
    """
    results: list[Metric] = []
    if "fid" in metrics:
        results.append(_frechet(samples, _given(reference), network))
    if "kid" in metrics:
        results.append(_kernel(samples, _given(reference), network))
    if "is" in metrics:
        results.append(_score(samples, network))
    if wanted := PRDC_METRICS.keys() & set(metrics):
        results += _neighbourhoods(wanted, samples, _given(reference), network, show_progress=show_progress)
    return results


def _given(reference: FeatureSet | None) -> FeatureSet:
    if reference is None:
        raise ValueError("every metric but is compares with a reference")
    return reference


def _frechet(samples: FeatureSet, reference: FeatureSet, network: FeatureNetwork) -> Metric:
    value = frechet_distance(samples.fit, reference.fit)
    details = {"num_images": samples.num_images, "num_reference_images": reference.num_images}
    return Metric(network.metric_name("frechet_distance"), value, None, "lower", details)


def _kernel(samples: FeatureSet, reference: FeatureSet, network: FeatureNetwork) -> Metric:
    distance = kernel_distance(reference.features, samples.features)
    details = _numbers_of_features(samples, reference) | {"subset_size": distance.subset_size}
    # Where every subset is the whole of both sets they do not differ, which says nothing.
    std = distance.std if distance.subset_size < max(len(samples.features), len(reference.features)) else None
    return Metric(network.metric_name("kernel_distance"), distance.mean, std, "lower", details)


def _score(samples: FeatureSet, network: FeatureNetwork) -> Metric:
    if samples.logits is None:
        raise ValueError(f"{network.name} is no classifier")
    score = classifier_score(samples.logits)
    details = {"num_images": len(samples.logits)}
    return Metric(network.metric_name("classifier_score"), score.mean, score.std, "higher", details)


def _neighbourhoods(
    wanted: Collection[str],
    samples: FeatureSet,
    reference: FeatureSet,
    network: FeatureNetwork,
    *,
    show_progress: bool,
) -> list[Metric]:
    real, fake = reference.features, samples.features
    total = num_distances(len(real), len(fake))
    with progress_bar("precision, recall, density, coverage", total, "distances", enabled=show_progress) as bar:
        four = prdc(real, fake, k_manifold=K_MANIFOLD, k_density=K_DENSITY, progress=bar.advance)
    numbers = _numbers_of_features(samples, reference)
    return [
        Metric(network.metric_name(name), getattr(four, name), None, "higher", {"k": k, **numbers})
        for pair in PRDC_METRICS
        if pair in wanted
        for name, k in PRDC_METRICS[pair].items()
    ]


def _numbers_of_features(samples: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    return {"num_images": len(samples.features), "num_reference_images": len(reference.features)}

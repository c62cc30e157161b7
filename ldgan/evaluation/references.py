"""What samples are compared with: a set of images, measured once and cached in a file, or such a file alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.evaluation.collecting import FeatureMeter, FeatureSet, check_number, collect
from ldgan.evaluation.image_sets import ImageSet
from ldgan.metrics.features import FeatureNetwork
from ldgan.metrics.reference import (
    NPZ_SUFFIX,
    SUFFIX,
    Conditions,
    Reference,
    check_fits,
    load_reference,
    save_reference,
)


@dataclass
class MeasuredReference:
    """Features of real images, and what they are of."""

    features: FeatureSet
    description: dict[str, Any]


@dataclass(frozen=True)
class ReferenceImages:
    """The first ``num_images`` of a set; ``cache`` is a file that keeps their statistics, if there is to be one."""

    images: ImageSet
    num_images: int
    cache: Path | None = None

    def measure(
        self, accelerator: Accelerator, network: FeatureNetwork, *, num_kept: int, batch_size: int
    ) -> MeasuredReference:
        """Features over all processes, one by one those of numbers below ``num_kept``, or what the cache has of them.

        Raises:
            UserError: the cache is of other images, another network or another preparation, or has too few features.
        """
        conditions = Conditions(
            network=network.name,
            network_fingerprint=network.fingerprint,
            data_fingerprint=fingerprint_of(accelerator, self.images, self.num_images),
            num_images=self.num_images,
            size=self.images.size,
            resize=self.images.describe()["resize"],
        )
        if self.cache is not None and self.cache.exists():
            return _fitting(accelerator, self.cache, load_reference(self.cache), network, conditions, num_kept)
        meter = FeatureMeter(network, num_kept if num_kept < self.num_images else None)
        notes = collect(accelerator, self.images, self.num_images, [meter], batch_size=batch_size, label="reference")
        features = meter.finish(accelerator)
        skipped = _skipped(features.numbers, num_kept if num_kept < self.num_images else None)
        description = self.images.describe() | {"notes": notes, "skipped_numbers": skipped}
        reference = Reference(features.fit, features.features, conditions, description)
        if self.cache is not None and accelerator.is_main_process:
            save_reference(self.cache, reference)
            print(f"statistics of the reference kept in {self.cache}")
        return MeasuredReference(features, _described(reference, self.cache))


@dataclass(frozen=True)
class ReferenceFile:
    """Statistics that somebody has measured; of which images, only their description says."""

    path: Path
    reference: Reference

    def measure(
        self, accelerator: Accelerator, network: FeatureNetwork, *, num_kept: int, batch_size: int
    ) -> MeasuredReference:
        """What the file holds, with the features of numbers below ``num_kept`` or all of its images.

        Raises:
            UserError: it is of another network, or has too few features.
        """
        del batch_size  # nothing is computed
        return _fitting(accelerator, self.path, self.reference, network, None, num_kept)


def open_reference(
    path: Path | str,
    open_set: Callable[[Path | str], ImageSet],
    size: tuple[int, int],
    *,
    num_images: int | None = None,
    cache: Path | None = None,
) -> ReferenceImages | ReferenceFile:
    """Open the reference at ``path``, or at a URL as str, for samples of ``size`` (H, W), before anything is computed.

    A set of images is opened by ``open_set``, and ``num_images`` of them, by default all, will be measured.

    Raises:
        UserError: it is not there or damaged, has images of another size or fewer of them, or the cache cannot be
            such a file.
    """
    if isinstance(path, Path) and path.suffix in (SUFFIX, NPZ_SUFFIX):
        if num_images is not None or cache is not None:
            raise UserError(f"{path}: is a file of statistics as it is; leave out the number of images and the cache")
        reference = load_reference(path)
        if reference.conditions is not None:
            check_size(str(path), reference.conditions.size, size)
        return ReferenceFile(path, reference)
    if cache is not None and cache.suffix != SUFFIX:
        raise UserError(f"{cache}: statistics are kept as {SUFFIX} only; name such a file")
    images = open_set(path)
    check_size(images.name, images.size, size)
    check_number(images, num_images or 0)
    return ReferenceImages(images, num_images or len(images), cache)


def fingerprint_of(accelerator: Accelerator, images: ImageSet, num_images: int) -> str:
    """The fingerprint of the first ``num_images``, which one process computes for all."""
    found = [images.fingerprint(num_images) if accelerator.is_main_process else ""]
    (fingerprint,) = broadcast_object_list(found)
    return fingerprint


def check_size(name: str, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raise a UserError unless real images have the size (H, W) of those that are compared with them."""
    if found != wanted:
        texts = [f"{height}x{width} px" for height, width in (found, wanted)]
        raise UserError(
            f"{name}: images of {texts[0]}, and those that are measured have {texts[1]}; --resolution PIXELS brings"
            " files to one size"
        )


def _fitting(
    accelerator: Accelerator,
    path: Path,
    reference: Reference,
    network: FeatureNetwork,
    wanted: Conditions | None,
    num_kept: int,
) -> MeasuredReference:
    """What is known from a file, once it has been checked; says what is worth knowing about it."""
    skipped = set(reference.description.get("skipped_numbers", []))
    conditions = reference.conditions
    num_images = conditions.num_images if conditions is not None else None
    if num_images is not None and num_kept >= num_images:
        num_features = num_images
    else:
        num_features = num_kept - sum(number < num_kept for number in skipped)
    for note in check_fits(path, reference, network, wanted, num_features=num_features):
        accelerator.print(f"note: {note}")
    numbers = [number for number in range(num_features + len(skipped)) if number not in skipped][:num_features]
    features = FeatureSet(
        reference.fit,
        reference.features[:num_features],
        logits=None,
        numbers=torch.tensor(numbers, dtype=torch.int64),
        num_images=num_images,
    )
    return MeasuredReference(features, _described(reference, path))


def _skipped(numbers: Tensor, end: int | None) -> list[int]:
    """Which numbers below ``end``, by default those up to the last of ``numbers``, are not among ``numbers``."""
    if end is None:
        end = int(numbers.max()) + 1
    return sorted(set(range(end)).difference(numbers.tolist()))


def _described(reference: Reference, cache: Path | None) -> dict[str, Any]:
    """What a reference is of, as JSON."""
    conditions = reference.conditions
    return {
        **reference.description,
        "fingerprint": conditions.data_fingerprint if conditions is not None else None,
        "num_images": conditions.num_images if conditions is not None else None,
        "statistics": str(cache) if cache is not None else None,
    }

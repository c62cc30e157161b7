"""The judge of StackedMNIST at work: what the commands that measure generators share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.sources import NUM_STACKED_MNIST_CLASSES, StackedMNIST, load_digits
from ldgan.engine.images import from_uint8
from ldgan.engine.shares import batches
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier, load_or_train
from ldgan.metrics.modes import ModeCoverage, mode_coverage, stacked_digits_to_modes

REAL_IMAGES_SEED = 1_000_003  # no training set is likely to be drawn with it
FEATURES_NAME = "digit classifier"  # what distances in its features are called by
PLACES = torch.tensor([100, 10, 1])  # the mode of digits r, g and b is 100 r + 10 g + b


def load_judge(cache: Path, digits: str, digits_root: Path | None, show_progress: bool = True) -> TrainedClassifier:
    """The digit classifier in ``cache``, trained if it is not there, on the digits that `load_digits` names.

    Raises:
        UserError: it knows too few held-out digits, the digits are not there, or ``cache`` is another file.
    """
    images, labels = map(torch.from_numpy, load_digits(digits, digits_root))
    return load_or_train(cache, images, labels, show_progress=show_progress)


def real_images(
    numbers: range, batch_size: int, *, digits: str, digits_root: Path | None, seed: int = REAL_IMAGES_SEED
) -> Iterator[Tensor]:
    """Yield real StackedMNIST images by their numbers in batches, uint8 (B, 3, 32, 32).

    Image i depends on ``seed`` and i alone, so that processes may each take a share of the numbers.
    """
    source = StackedMNIST(numbers.stop, seed, digits, digits_root)
    pixels = [np.asarray(sample.image) for number, sample in enumerate(source) if number in numbers]
    for part in batches(range(len(pixels)), batch_size):
        yield torch.from_numpy(np.stack([pixels[number] for number in part])).permute(0, 3, 1, 2)


def count_modes(
    accelerator: Accelerator, judge: TrainedClassifier, images: Iterable[Tensor], num_images: int
) -> ModeCoverage:
    """Mode coverage of all processes' batches of images, uint8 (B, 3, 32, 32), together ``num_images``."""
    counts = torch.zeros(NUM_STACKED_MNIST_CLASSES, dtype=torch.int64)
    for batch in images:
        modes = stacked_digits_to_modes(batch, judge.model, device=accelerator.device)
        counts += torch.bincount(torch.from_numpy(modes), minlength=len(counts))
    coverage = coverage_of_counts(accelerator, counts)
    assert coverage.num_images == num_images
    return coverage


def coverage_of_counts(accelerator: Accelerator, counts: Tensor) -> ModeCoverage:
    """Mode coverage of all processes' images together, of which this one counted ``counts``, int64 (K,), by mode."""
    counts = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
    return mode_coverage(np.repeat(np.arange(len(counts)), counts.numpy()), len(counts))


class Judgement(NamedTuple):
    """What the digit classifier says of stacked digits, on the CPU."""

    digits: Tensor  # int64 (B, 3): what it reads in red, green and blue
    confidence: Tensor  # (B, 3): the probability that it gives each of these, 0.1 to 1
    features: Tensor  # (B, 192): see `judge_images`

    @property
    def modes(self) -> Tensor:
        """100 r + 10 g + b, int64 (B,)."""
        return self.digits @ PLACES


@torch.no_grad()
def judge_images(classifier: DigitClassifier, images: Tensor) -> Judgement:
    """Read digits, confidence and features off images, uint8 (B, 3, 32, 32), in a single pass.

    Features are those in front of the classifier's last layer, averaged over the 4 x 4 positions as Inception's
    are for the FID: 64 for each channel, the three channels one behind the other.
    """
    device = next(classifier.parameters()).device
    maps = classifier.eval().features(from_uint8(images.to(device)).flatten(0, 1).unsqueeze(1))  # (3 B, 64, 4, 4)
    confidence, digits = classifier.head(maps.flatten(1)).softmax(dim=1).max(dim=1)
    features = maps.mean(dim=(2, 3)).reshape(len(images), -1)
    return Judgement(digits.reshape(-1, 3).cpu(), confidence.reshape(-1, 3).cpu(), features.cpu())

"""The judge of StackedMNIST at work: what the commands that measure generators share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.sources import StackedMNIST, load_digits
from ldgan.engine.cli import UserError
from ldgan.engine.images import from_uint8
from ldgan.engine.shares import batches
from ldgan.metrics.digits import RESOLUTION, DigitClassifier, TrainedClassifier, load_or_train
from ldgan.metrics.features import Extractor, FeatureNetwork, Features, feature_network
from ldgan.metrics.modes import ModeCoverage, mode_coverage

REAL_IMAGES_SEED = 1_000_003  # no training set is likely to be drawn with it
DIGITS = "digits"  # its name among feature networks
FEATURES_NAME = "digit classifier"  # what metrics in its features are called by
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
    logits, features = _read(classifier.eval(), images.to(device))
    confidence, digits = logits.softmax(dim=2).max(dim=2)
    return Judgement(digits.cpu(), confidence.cpu(), features.cpu())


def _read(classifier: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the digits in each channel, (B, 3, 10), and features (B, 192) of images, uint8 (B, 3, 32, 32)."""
    maps = classifier.features(from_uint8(images).flatten(0, 1).unsqueeze(1))  # (3 B, 64, 4, 4)
    logits = classifier.head(maps.flatten(1)).unflatten(0, (len(images), 3))
    return logits, maps.mean(dim=(2, 3)).reshape(len(images), -1)


class ModeExtractor(Extractor):
    """The features of `judge_images`, and log-probabilities of the 1,000 modes as logits."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.preprocessing = {"range": [-1, 1]}

    def forward(self, images: Tensor) -> Features:
        """See `Extractor`; images must be 32 px."""
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            height, width = images.shape[-2:]
            raise UserError(
                f"feature network {FEATURES_NAME}: images are {height}x{width} px, and it reads {RESOLUTION} px only;"
                " choose another network"
            )
        logits, features = _read(self.classifier, images)
        red, green, blue = logits.log_softmax(dim=2).unbind(dim=1)
        # Channels are judged independently of each other: p(r, g, b) = p(r) p(g) p(b).
        modes = red[:, :, None, None] + green[:, None, :, None] + blue[:, None, None, :]
        return Features(features, modes.flatten(1))


def digit_network(judge: TrainedClassifier, device: torch.device | str) -> FeatureNetwork:
    """The digit classifier as a feature network: 192 features, and logits of the modes 100 r + 10 g + b."""
    return FeatureNetwork(FEATURES_NAME, ModeExtractor(judge.model), device)


def open_features(
    name: str,
    weights: Path | None,
    device: torch.device | str,
    *,
    digits: str,
    digits_root: Path | None,
    digit_cache: Path,
) -> FeatureNetwork:
    """The feature network ``name``: `DIGITS`, whose other arguments are those of `load_judge`, or a pretrained one.

    Raises:
        UserError: as `load_judge` and `feature_network` do.
    """
    if name != DIGITS:
        return feature_network(name, weights, device)
    if weights is not None:
        raise UserError(f"feature network {DIGITS}: is trained here and takes no weights; leave {weights} out")
    return digit_network(load_judge(digit_cache, digits, digits_root), device)

"""The metrics of StackedMNIST, counted batch by batch: which modes there are, and who shows what they should."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.sources import NUM_STACKED_MNIST_CLASSES
from ldgan.engine.shares import share
from ldgan.evaluation.image_sets import Batch
from ldgan.evaluation.judging import PLACES, coverage_of_counts, judge_images, real_images
from ldgan.inference.jobs import Job, class_names_of
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier

# By how much a label is multiplied to give the mode 100 r + 10 g + b: a grey digit is three equal ones.
MODES_OF_CLASSES = {NUM_STACKED_MNIST_CLASSES: 1, 10: 111}


class DigitMeter:
    """Reads the digits of images, uint8 (B, 3, 32, 32): a meter for `ldgan.evaluation.collecting.collect`.

    ``wanted`` maps image numbers to the modes that the images should show, int64 (B,); None where nobody says.
    """

    def __init__(self, classifier: DigitClassifier, wanted: Callable[[Sequence[int]], Tensor] | None = None) -> None:
        self._classifier, self._wanted = classifier, wanted
        self._modes = torch.zeros(NUM_STACKED_MNIST_CLASSES, dtype=torch.int64)
        self._right = torch.zeros(4, dtype=torch.int64)  # red, green, blue digit as wanted, and all three

    def add(self, batch: Batch) -> None:
        """Read a batch."""
        judgement = judge_images(self._classifier, batch.images)
        self._modes += torch.bincount(judgement.modes, minlength=len(self._modes))
        if self._wanted is not None:
            self._right += count_right(judgement.digits, self._wanted(batch.numbers))

    def coverage(self, accelerator: Accelerator) -> dict[str, Any]:
        """Mode coverage of all processes' images, as JSON."""
        coverage = coverage_of_counts(accelerator, self._modes)
        return asdict(coverage) | {"sampling_floor_kl": coverage.sampling_floor}

    def label_accuracy(self, accelerator: Accelerator) -> dict[str, float]:
        """Share of all processes' images whose red, green, blue digit is the wanted one, and of which all three are."""
        counts = torch.cat([self._right, self._modes.sum()[None]]).to(accelerator.device)
        *right, total = accelerator.reduce(counts, "sum").tolist()
        return dict(zip(("red", "green", "blue", "all_three"), (number / total for number in right)))


@dataclass(frozen=True)
class DigitMetrics:
    """The judge of digits, which metrics it serves, and the real digits that are judged beside samples."""

    judge: TrainedClassifier
    metrics: Collection[str]
    digits: str
    digits_root: Path | None

    def meter(self, job: Job | None) -> DigitMeter:
        """A meter for samples of ``job``, or for images of files."""
        return DigitMeter(self.judge.model, wanted_modes(job) if job is not None and "labels" in self.metrics else None)

    def results(self, accelerator: Accelerator, meter: DigitMeter, num_images: int, batch_size: int) -> dict[str, Any]:
        """What a meter has counted over all processes, and as many real images judged alike; as JSON."""
        result: dict[str, Any] = {
            "classifier": {
                "digits": self.digits,
                "heldout_accuracy": self.judge.heldout_accuracy,
                "num_heldout": self.judge.num_heldout,
                "seconds": self.judge.seconds,
            }
        }
        if "modes" in self.metrics:
            real, numbers = self.meter(None), share(num_images, accelerator.process_index, accelerator.num_processes)
            for images in real_images(numbers, batch_size, digits=self.digits, digits_root=self.digits_root):
                real.add(Batch([], images))
            result["modes"] = {"samples": meter.coverage(accelerator), "real_images": real.coverage(accelerator)}
        if "labels" in self.metrics:
            result["label_accuracy"] = meter.label_accuracy(accelerator)
        return result


def count_right(digits: Tensor, modes: Tensor) -> Tensor:
    """How many images have the red, green, blue digit of the mode they should be, and all three: int64 (4,).

    ``digits``, int64 (B, 3), are what was read; ``modes``, int64 (B,), are 100 r + 10 g + b.
    """
    right = digits == modes[:, None] // PLACES % 10
    return torch.cat([right, right.all(dim=1, keepdim=True)], dim=1).sum(dim=0)


def wanted_modes(job: Job) -> Callable[[Sequence[int]], Tensor]:
    """The function from image numbers to the modes, int64 (B,), that a job's labels ask for."""
    factor = MODES_OF_CLASSES[len(class_names_of(job.model))]
    return lambda numbers: torch.tensor(job.labels_of(numbers)) * factor

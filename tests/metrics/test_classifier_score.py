"""The classifier score against closed forms, its definition in float64, and a peer library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.classifier_score import classifier_score


def random_logits(num_images: int = 200, num_classes: int = 7) -> Tensor:
    return 3 * torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(0))


def by_definition(logits: np.ndarray) -> float:
    """exp(E KL(p(y | x) || p(y))) of one split: Salimans et al., section 4."""
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    return math.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1)))


@pytest.mark.parametrize("logits", [torch.zeros(50, 9), random_logits()[:1].expand(50, -1)], ids=["even", "uneven"])
def test_images_that_look_alike_to_the_classifier_score_1(logits: Tensor) -> None:
    assert classifier_score(logits) == pytest.approx((1.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("certainty", [50.0, 5000.0])  # of the latter, probabilities are below the smallest number
def test_sure_and_balanced_classes_score_their_number(num_classes: int, certainty: float) -> None:
    logits = certainty * torch.eye(num_classes).repeat(4, 1)
    assert classifier_score(logits, num_splits=1) == pytest.approx((num_classes, 0.0), rel=1e-9)


def test_unbalanced_classes_score_the_exponential_of_their_entropy() -> None:
    logits = 50 * torch.eye(3)[[0] * 10 + [1] * 6 + [2] * 4]
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert classifier_score(logits, num_splits=1).mean == pytest.approx(math.exp(entropy), rel=1e-9)


def test_a_class_that_no_image_has_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 5000.0, 0.0, -5000.0], [5000.0, 0.0, 0.0, -5000.0]]).repeat(5, 1)
    assert classifier_score(logits, num_splits=1).mean == pytest.approx(2.0, rel=1e-9)


def test_two_images_of_two_classes() -> None:
    # p = (3/4, 1/4) and (1/4, 3/4), mean 1/2: KL = 3/4 ln 3/2 + 1/4 ln 1/2.
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    expected = 1.5**0.75 * 0.5**0.25
    assert classifier_score(logits, num_splits=1).mean == pytest.approx(expected, rel=1e-7)


def test_it_is_the_mean_over_splits_of_a_random_order() -> None:
    logits = random_logits(103)
    order = np.random.RandomState(5).permutation(103)
    splits = [logits.numpy()[order[i * 103 // 4 : (i + 1) * 103 // 4]] for i in range(4)]
    scores = [by_definition(split) for split in splits]
    assert classifier_score(logits, num_splits=4, seed=5) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_it_equals_that_of_torch_fidelity() -> None:
    check_against_torch_fidelity(random_logits())


def test_it_equals_that_of_torch_fidelity_on_real_features(real_features: tuple[Tensor, Tensor]) -> None:
    train, _ = real_features
    check_against_torch_fidelity(train - train.mean(dim=0))  # without the one channel that leads in all images


def check_against_torch_fidelity(logits: Tensor) -> None:
    peer = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = peer.isc_features_to_metric(logits)  # its defaults: 10 splits, seed 2020
    expected = theirs[peer.KEY_METRIC_ISC_MEAN], theirs[peer.KEY_METRIC_ISC_STD]
    assert classifier_score(logits) == pytest.approx(expected, rel=1e-10)
    assert expected[0] > 1.01
    assert expected[1] > 0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="in 10 splits needs as many images, not 9"):
        classifier_score(random_logits(9))
    logits = random_logits()
    logits[3, 2] = torch.inf
    with pytest.raises(UserError, match="logits of 200 images hold NaN or infinity"):
        classifier_score(logits)
    with pytest.raises(ValueError, match=r"must be \(N, K\), not \(7,\)"):
        classifier_score(logits[0])

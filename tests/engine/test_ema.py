"""EMA: equal to its closed form, measured in images, and independent of the model it follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldgan.engine.ema import EMA


def test_constant_target_halves_the_distance_each_halflife() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model, halflife_images=60, rampup_ratio=None)
    start = ema.model.weight.clone()
    nn.init.constant_(model.weight, 4.0)
    for step in range(1, 31):  # 30 steps of 4 images: two half-lives
        ema.update(model, num_images_per_step=4, num_images_seen=4 * step)
    torch.testing.assert_close(ema.model.weight, 4.0 + (start - 4.0) / 4)


def test_average_is_the_weighted_sum_of_all_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = EMA(model, halflife_images=10, rampup_ratio=None)
    history = [model.weight.detach().clone()]
    for step in range(1, 8):
        nn.init.normal_(model.weight)
        history.append(model.weight.detach().clone())
        ema.update(model, num_images_per_step=5, num_images_seen=5 * step)
    beta = 0.5**0.5
    weights = [beta**7] + [(1 - beta) * beta ** (7 - step) for step in range(1, 8)]
    torch.testing.assert_close(ema.model.weight, sum(w * x for w, x in zip(weights, history)))


def test_batch_size_does_not_change_the_average_of_a_constant() -> None:
    averages = []
    for batch in (1, 8):
        ema = EMA(nn.Linear(1, 1, bias=False).requires_grad_(False), halflife_images=16, rampup_ratio=None)
        nn.init.zeros_(ema.model.weight)
        target = nn.Linear(1, 1, bias=False)
        nn.init.ones_(target.weight)
        for step in range(1, 32 // batch + 1):
            ema.update(target, batch, batch * step)
        averages.append(ema.model.weight.item())
    assert averages == pytest.approx([0.75, 0.75])


def test_rampup_shortens_the_halflife_early() -> None:
    ema = EMA(nn.Linear(1, 1), halflife_images=1000, rampup_ratio=0.05)
    assert ema.decay(10, num_images_seen=0) == 0.0
    assert ema.decay(10, num_images_seen=200) == pytest.approx(0.5)  # half-life 200 * 0.05 = 10
    assert ema.decay(10, num_images_seen=20_000) == ema.decay(10, num_images_seen=10**9) == 0.5 ** (10 / 1000)


def test_buffers_are_copied_and_the_model_stays_as_it_was() -> None:
    model = nn.BatchNorm1d(3)
    ema = EMA(model, halflife_images=1e9, rampup_ratio=None)
    model(torch.randn(16, 3) + 5)
    ema.update(model, 16, 16)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert ema.model.num_batches_tracked == 1
    assert (model.training, ema.model.training) == (True, False)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not {p.data_ptr() for p in ema.model.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_wrapped_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is it wrapped"):
        EMA(model, 10, None).update(nn.Sequential(model), 1, 1)


def test_state_has_the_names_of_the_model() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ema = EMA(model, 10, None)
    ema.load_state_dict(EMA(other, 10, None).state_dict())
    assert torch.equal(ema.model.weight, other.weight)
    assert list(ema.state_dict()) == list(model.state_dict())

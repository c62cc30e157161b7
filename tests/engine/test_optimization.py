"""The learning rate in closed form, at its landmarks and in between."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate

CONFIG = OptimizerConfig(lr=0.5, warmup_steps=10, final_lr_ratio=0.1)


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate(config, step, num_steps) for step in range(1, num_steps + 1)]


def test_landmarks_of_the_learning_rate() -> None:
    assert learning_rate(CONFIG, 1, 110) == pytest.approx(0.05)  # a tenth of the peak after one of ten steps
    assert learning_rate(CONFIG, 10, 110) == pytest.approx(0.5)
    assert learning_rate(CONFIG, 60, 110) == pytest.approx(0.5 * (1 + 0.1) / 2)  # halfway down
    assert learning_rate(CONFIG, 110, 110) == pytest.approx(0.05)


def test_the_rate_rises_linearly_and_falls_along_half_a_cosine() -> None:
    for step, rate in enumerate(rates(CONFIG, 110), start=1):
        decay = 0.05 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert rate == pytest.approx(0.5 * step / 10 if step <= 10 else decay)


def test_the_rate_has_a_single_peak() -> None:
    values = rates(CONFIG, 110)
    assert values[:10] == sorted(values[:10])
    assert values[9:] == sorted(values[9:], reverse=True)


def test_a_final_ratio_of_1_keeps_the_peak() -> None:
    assert rates(OptimizerConfig(lr=0.5, warmup_steps=0, final_lr_ratio=1.0), 5) == [0.5] * 5


@pytest.mark.parametrize("num_steps", [1, 5, 10])
def test_a_run_that_ends_within_its_warm_up_only_rises(num_steps: int) -> None:
    assert rates(CONFIG, num_steps) == pytest.approx([0.05 * step for step in range(1, num_steps + 1)])


def test_every_group_gets_the_rate() -> None:
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "lr": 9.0} for layer in layers])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_first_step_of_adamw_is_the_rate_and_its_decay_is_decoupled() -> None:
    # After one step, Adam's moments divide out: weights move by lr * sign(gradient), beside lr * decay * weight.
    weight = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = adamw([weight], OptimizerConfig(lr=0.1, beta1=0.5, beta2=0.9, weight_decay=0.25))
    (weight * torch.tensor([3.0, -7.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2 - 0.1 - 0.05, -4 + 0.1 + 0.1]))
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)

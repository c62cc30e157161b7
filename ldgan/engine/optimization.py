"""Optimizers and the learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ldgan.engine.config import option


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = option(2e-4, "peak learning rate")
    beta1: float = option(0.9, "decay of the gradient's running mean")
    beta2: float = option(0.99, "decay of the squared gradient's running mean")
    weight_decay: float = option(0.0, "decoupled weight decay")
    warmup_steps: int = option(100, "steps over which the rate rises linearly to its peak")
    final_lr_ratio: float = option(0.01, "rate at the last step over the peak rate; 1 switches the decay off")


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``parameters``; `set_learning_rate` sets its rate at every step."""
    return torch.optim.AdamW(
        parameters, config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Rate of step 1..num_steps: linear warm-up, then half a cosine from the peak to its ``final_lr_ratio``."""
    warmup = min(1.0, step / max(config.warmup_steps, 1))
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * warmup * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

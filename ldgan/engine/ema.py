"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """The running average of a model, held in a copy of it: ``ema.model``, in eval mode, without gradients.

    The half-life is counted in images, so that it means the same at any batch size. It grows with training,
    min(``halflife_images``, ``rampup_ratio`` * images seen), so that the random initial weights are soon
    forgotten; a ``rampup_ratio`` of None keeps it constant (StyleGAN2, arXiv 1912.04958, and its code).
    """

    def __init__(self, model: M, halflife_images: float, rampup_ratio: float | None) -> None:
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)
        self.halflife_images = halflife_images
        self.rampup_ratio = rampup_ratio

    def decay(self, num_images_per_step: int, num_images_seen: int) -> float:
        """Return the weight of the old average: 0.5 ** (images per step / half-life)."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, num_images_seen * self.rampup_ratio)
        return 0.5 ** (num_images_per_step / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, num_images_per_step: int, num_images_seen: int) -> None:
        """Move the average towards ``model``'s parameters and copy its buffers.

        ``model`` is the bare module, no wrapper around it. Both numbers count the images of all processes;
        ``num_images_seen`` includes those of this step.

        Raises:
            ValueError: if names of parameters or buffers are not those of the averaged model.
        """
        averages, parameters = _matching(dict(self.model.named_parameters()), dict(model.named_parameters()))
        weight = 1.0 - self.decay(num_images_per_step, num_images_seen)
        torch._foreach_lerp_(averages, parameters, weight)
        for average, buffer in zip(*_matching(dict(self.model.named_buffers()), dict(model.named_buffers()))):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averaged model, under the model's own names."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an average; names must match exactly."""
        self.model.load_state_dict(state_dict)


def _matching(averages: dict[str, Tensor], sources: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return both sides in one order; they must have the same names."""
    if different := averages.keys() ^ sources.keys():
        raise ValueError(f"not the averaged model (is it wrapped?): names differ, {min(different)!r} first")
    return list(averages.values()), [sources[name] for name in averages]

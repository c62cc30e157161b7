"""Samplers: plain functions of a denoiser, a process and noise.

A diffusion GAN and a DDPM are sampled by the same function, `ancestral`: they differ in what stands for x_0 at
each step, one of many plausible x_0 that z chooses, or their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldgan.diffusion import Denoised, Diffusion, at
from ldgan.engine.cli import UserError
from ldgan.engine.config import option

Denoiser = Callable[[Tensor, Tensor], Denoised]
"""(x_t, t) -> p(x_{t-1} | x_t), with t, int64 (B,), in the steps of the process that is sampled."""

Noise = Callable[[Sequence[int]], Tensor]
"""Shape of one sample -> standard normal noise (B, *shape), new at every call, as of `noise_from_seeds`."""

Guidance = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> scale * gradient of log p(y | x_t) with respect to x_t, in its shape."""

Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with t, the estimate of x_0 and x_{t-1}."""


class Process(NamedTuple):
    """What a sampler works with."""

    denoiser: Denoiser
    diffusion: Diffusion
    guidance: Guidance | None


class Start(NamedTuple):
    """Where sampling begins in place of x_T ~ N(0, I)."""

    step: int  # t, in the steps of the process that is sampled
    x_t: Tensor  # (B, *shape)


@dataclass
class SamplerConfig:
    """How a trained model is sampled."""

    method: Literal["ancestral", "ddim"] = option("ancestral", "ancestral: as it was trained; ddim: of a DDPM run")
    num_steps: int = option(0, "steps, evenly among those of training; 0: all of them")
    eta: float = option(0.0, "noise of ddim: 0 is deterministic, 1 is as much as ancestral sampling has")
    guidance_scale: float = option(1.0, "classifier-free guidance: 1 is without, more follows the label closer")
    classifier: str | None = option(None, "run of ldgan/train_classifier.py that guides")
    classifier_scale: float = option(1.0, "scale of the classifier's gradient")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        if self.method == "ancestral" and self.eta != 0:
            raise UserError(f"eta is {self.eta}, but only the ddim sampler has one; leave it out")
        if self.num_steps < 0 or self.eta < 0:
            raise UserError(f"num_steps is {self.num_steps} and eta {self.eta}; choose 0 or more")


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    diffusion: Diffusion,
    noise: Noise,
    shape: Sequence[int],
    *,
    start: Start | None = None,
    guidance: Guidance | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample x_{t-1} ~ p(x_{t-1} | x_t) for t = T..1 from x_T ~ N(0, I): samples of x_0, (B, *shape).

    Ho et al., Algorithm 2, and Xiao et al., section 4. No noise is added at t = 1. ``guidance`` shifts each
    mean by the variance times it (Dhariwal and Nichol, arXiv 2105.05233, Algorithm 1). With ``start``, t runs from
    there, as editing does (Meng et al., SDEdit, arXiv 2108.01073).
    """
    first_step, x = start or Start(diffusion.num_steps, noise(shape))
    for step in range(first_step, 0, -1):
        t = torch.full((len(x),), step, device=x.device)
        denoised = denoiser(x, t)
        if guidance is not None:
            denoised = denoised._replace(mean=denoised.mean + denoised.std.square() * guidance(x, t))
        x = denoised.sample(noise(shape)) if step > 1 else denoised.mean
        if callback is not None:
            callback(step, denoised.x_0, x)
    return x


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    diffusion: Diffusion,
    noise: Noise,
    shape: Sequence[int],
    *,
    eta: float = 0.0,
    start: Start | None = None,
    guidance: Guidance | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by denoising diffusion implicit models (Song et al., arXiv 2010.02502, eq. 12): x_0, (B, *shape).

    With ``eta`` 0 each step is deterministic, with 1 it has the posterior's variance. ``guidance`` is taken from
    the noise estimate, times sqrt(1 - abar_t) (Dhariwal and Nichol, Algorithm 2). ``start`` is as of `ancestral`.
    """
    first_step, x = start or Start(diffusion.num_steps, noise(shape))
    for step in range(first_step, 0, -1):
        t = torch.full((len(x),), step, device=x.device)
        x_0 = denoiser(x, t).x_0
        estimate = diffusion.noise_of_x_0(x_0, x, t)
        if guidance is not None:
            estimate = estimate - at((1.0 - diffusion.alphas_bar).sqrt(), t, x) * guidance(x, t)
            x_0 = diffusion.x_0_of_noise(estimate, x, t)
        variance = eta**2 * diffusion.posterior_variance[step]
        previous_bar = diffusion.alphas_bar[step - 1]
        x = previous_bar.sqrt().to(x) * x_0 + (1.0 - previous_bar - variance).clamp(min=0).sqrt().to(x) * estimate
        if variance > 0:
            x = x + variance.sqrt().to(x) * noise(shape)
        if callback is not None:
            callback(step, x_0, x)
    return x

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

from ldgan.diffusion.process import Denoised, Diffusion, at
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


class Process(NamedTuple):
    """What a sampler works with."""

    denoiser: Denoiser
    diffusion: Diffusion
    guidance: Guidance | None

    def steps(self, sampler: SamplerConfig) -> Denoiser:
        """The steps that ``sampler`` takes, guidance included, as p(x_{t-1} | x_t)."""
        if sampler.method == "ddim":
            return ddim_steps(self.denoiser, self.diffusion, sampler.eta, self.guidance)
        return ancestral_steps(self.denoiser, self.guidance)


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

    Ho et al., Algorithm 2, and Xiao et al., section 4. No noise is added at t = 1. ``guidance`` is that of
    `ancestral_steps`. With ``start``, t runs from there, as editing does (Meng et al., SDEdit, arXiv 2108.01073).
    """
    steps = ancestral_steps(denoiser, guidance)
    return _descend(steps, diffusion, noise, shape, noisy=True, start=start, callback=callback)


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

    ``eta`` and ``guidance`` are those of `ddim_steps`, ``start`` is that of `ancestral`.
    """
    steps = ddim_steps(denoiser, diffusion, eta, guidance)
    return _descend(steps, diffusion, noise, shape, noisy=eta > 0, start=start, callback=callback)


def ancestral_steps(denoiser: Denoiser, guidance: Guidance | None = None) -> Denoiser:
    """The steps of `ancestral`: those of the denoiser, each mean shifted by the variance times ``guidance``.

    Dhariwal and Nichol (arXiv 2105.05233), Algorithm 1.
    """
    if guidance is None:
        return denoiser

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = denoiser(x_t, t)
        return denoised._replace(mean=denoised.mean + denoised.std.square() * guidance(x_t, t))

    return guided


def ddim_steps(denoiser: Denoiser, diffusion: Diffusion, eta: float, guidance: Guidance | None = None) -> Denoiser:
    """The steps of `ddim`: with ``eta`` 0 deterministic, with 1 of the posterior's variance.

    ``guidance`` is taken from the noise estimate, times sqrt(1 - abar_t) (Dhariwal and Nichol, Algorithm 2).
    """
    previous_bar = torch.cat([torch.ones_like(diffusion.alphas_bar[:1]), diffusion.alphas_bar[:-1]])
    variance = eta**2 * diffusion.posterior_variance
    estimate_coefficient = (1.0 - previous_bar - variance).clamp(min=0).sqrt()

    def step(x_t: Tensor, t: Tensor) -> Denoised:
        x_0 = denoiser(x_t, t).x_0
        estimate = diffusion.noise_of_x_0(x_0, x_t, t)
        if guidance is not None:
            estimate = estimate - at((1.0 - diffusion.alphas_bar).sqrt(), t, x_t) * guidance(x_t, t)
            x_0 = diffusion.x_0_of_noise(estimate, x_t, t)
        mean = at(previous_bar.sqrt(), t, x_t) * x_0 + at(estimate_coefficient, t, x_t) * estimate
        return Denoised(x_0, mean, at(variance.sqrt(), t, x_t))

    return step


@torch.no_grad()
def _descend(
    steps: Denoiser,
    diffusion: Diffusion,
    noise: Noise,
    shape: Sequence[int],
    *,
    noisy: bool,
    start: Start | None,
    callback: Callback | None,
) -> Tensor:
    """x_0, (B, *shape), from x_T ~ N(0, I) or ``start`` on; steps that are not ``noisy`` draw no noise."""
    first_step, x = start or Start(diffusion.num_steps, noise(shape))
    for step in range(first_step, 0, -1):
        t = torch.full((len(x),), step, device=x.device)
        denoised = steps(x, t)
        x = denoised.sample(noise(shape)) if noisy and step > 1 else denoised.mean
        if callback is not None:
            callback(step, denoised.x_0, x)
    return x

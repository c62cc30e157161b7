"""The few-step sampler: a plain function of generator, process and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldgan.diffusion import Diffusion
from ldgan.engine.seeding import randn_per_sample

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, z, t) -> estimate of x_0; a `ldgan.networks.Generator` or anything else that is called like one."""


class SamplingNoise(NamedTuple):
    """All randomness of a batch of samples; entry t - 1 of ``z`` and ``posterior`` belongs to step t."""

    x_T: Tensor  # (B, C, s, s)
    z: Tensor  # (T, B, z_dim)
    posterior: Tensor  # (T, B, C, s, s); step 1 adds no noise, so its entry has no effect


def noise_from_seeds(
    seeds: Sequence[int], shape: Sequence[int], z_dim: int, num_steps: int, device: torch.device | str
) -> SamplingNoise:
    """Noise in which row i depends on ``seeds[i]`` alone: a seed is the same image in any batch, on any process."""
    size = torch.Size(shape).numel()
    flat = randn_per_sample([size + num_steps * (z_dim + size)], seeds, "sample", device)
    x_T, z, posterior = flat.split([size, num_steps * z_dim, num_steps * size], dim=1)
    return SamplingNoise(
        x_T.unflatten(1, tuple(shape)),
        z.unflatten(1, (num_steps, z_dim)).transpose(0, 1),
        posterior.unflatten(1, (num_steps, *shape)).transpose(0, 1),
    )


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    diffusion: Diffusion,
    noise: SamplingNoise,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoise x_T to samples of x_0, (B, C, s, s), with one evaluation of ``denoiser`` for each t = T..1.

    ``callback(t, x_0_estimate, x_previous)`` is called after each step.
    """
    x = noise.x_T
    for step in range(diffusion.num_steps, 0, -1):
        t = torch.full((len(x),), step, device=x.device)
        x_0 = denoiser(x, noise.z[step - 1], t)
        x = diffusion.posterior_sample(x_0, x, t, noise.posterior[step - 1])
        if callback is not None:
            callback(step, x_0, x)
    return x

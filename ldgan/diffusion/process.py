"""The diffusion process: schedules, the forward process q and its posterior.

One index convention everywhere: t = 0 is data, t = 1..T are noise levels, x_T is nearly pure noise. Names
follow Ho et al. (arXiv 2006.11239) and Xiao et al. (arXiv 2112.07804).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BETA_MAX = 20.0  # of Song et al. and Xiao et al.

Predicts = Literal["x_0", "noise", "x_previous"]
"""What a network's output estimates: x_0, the noise in x_t, or x_{t-1} itself."""

Schedule = Literal["vp", "geometric", "linear", "cosine"]
"""How noise grows with t: see `vp_betas`, `geometric_betas`, `linear_betas`, `cosine_betas`."""

Variance = Literal["posterior", "beta", "learned"]
"""The variance of p(x_{t-1} | x_t): that of q(x_{t-1} | x_t, x_0), b_t, or between both as the network says."""


class Denoised(NamedTuple):
    """What a network says of x_{t-1}: p(x_{t-1} | x_t) = N(mean, std^2)."""

    x_0: Tensor  # the estimate of x_0 behind it, (B, ...); where a network predicts x_{t-1}, that
    mean: Tensor  # (B, ...)
    std: Tensor  # broadcastable to mean; zero at t = 1 unless the variance is "beta" or "learned"

    def sample(self, noise: Tensor) -> Tensor:
        """x_{t-1} from standard normal ``noise``."""
        return self.mean + self.std * noise


def vp_betas(num_steps: int, beta_min: float = 0.1, beta_max: float = BETA_MAX, epsilon: float = 1e-3) -> Tensor:
    """Betas b_1..b_T, float64 (T,), of the variance-preserving SDE cut into ``num_steps`` large steps.

    var(s) = 1 - exp(-s^2 (beta_max - beta_min) / 2 - s beta_min) at s_t = epsilon + (1 - epsilon) t / T
    (Song et al., arXiv 2011.13456, eq. 33; Xiao et al., appendix C).
    """
    s = epsilon + (1.0 - epsilon) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha_bar = -0.5 * s.square() * (beta_max - beta_min) - s * beta_min
    return 1.0 - torch.exp(log_alpha_bar[1:] - log_alpha_bar[:-1])


def geometric_betas(num_steps: int, variance_min: float = 0.01, variance_max: float = 0.9999) -> Tensor:
    """Betas b_1..b_T, float64 (T,), for which 1 - abar_t grows geometrically up to ``variance_max`` at T.

    1 - abar_t = variance_min (variance_max / variance_min)^(t / T), the variance-exploding schedule of Song et
    al. (arXiv 2011.13456) put to a process that preserves variance: most of its steps lie at little noise.
    """
    powers = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    return betas_of(1.0 - variance_min * (variance_max / variance_min) ** powers)


def linear_betas(num_steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Betas b_1..b_T, float64 (T,), from ``first`` to ``last`` in equal steps (Ho et al., section 4)."""
    return torch.linspace(first, last, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int, offset: float = 0.008) -> Tensor:
    """Betas b_1..b_T, float64 (T,), of abar_t = cos^2((t / T + offset) / (1 + offset) pi / 2), over its value at 0.

    Nichol and Dhariwal (arXiv 2102.09672), eq. 17, which caps them at 0.999.
    """
    angles = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + offset) / (1.0 + offset)
    f = torch.cos(angles * math.pi / 2).square()
    return betas_of(f[1:] / f[0]).clamp(max=0.999)


def build_diffusion(schedule: Schedule, num_steps: int, beta_max: float = BETA_MAX) -> Diffusion:
    """The process with ``num_steps`` steps of a schedule by name; only "vp" has a ``beta_max``."""
    if schedule == "vp":
        return Diffusion(vp_betas(num_steps, beta_max=beta_max))
    if schedule == "geometric":
        return Diffusion(geometric_betas(num_steps))
    return Diffusion(linear_betas(num_steps) if schedule == "linear" else cosine_betas(num_steps))


def betas_of(alphas_bar: Tensor) -> Tensor:
    """The betas b_1..b_T of a process with these abar_1..abar_T, float64 (T,)."""
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar[:-1]])
    return 1.0 - alphas_bar / previous


class Diffusion:
    """q(x_t | x_{t-1}) = N(sqrt(a_t) x_{t-1}, b_t I) and what follows from it, for t = 1..T.

    Tables are float64 and indexed by t itself: entry 0 stands for data (abar_0 = 1). Methods take samples
    (B, ...) and steps t, int64 (B,); they compute in the dtype of the samples.

    ``timesteps``, int64 (T + 1,), is what a network is told for each t: t itself, unless the process is a
    `respaced` one.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        """``betas``: float64 (T,), each in (0, 1]; ``timesteps``: int64 (T + 1,), by default 0..T."""
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must be a vector with values in (0, 1], not {betas.tolist()}")
        self.num_steps = len(betas)
        self.timesteps = torch.arange(self.num_steps + 1) if timesteps is None else timesteps
        self.betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas.double()])
        self.alphas = 1.0 - self.betas
        self.alphas_bar = self.alphas.cumprod(0)
        previous_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        # q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, posterior_variance I): Ho et al., eq. 6 and 7.
        noise_bar = (1.0 - self.alphas_bar).clamp(min=torch.finfo(torch.float64).tiny)  # entry 0 is never read
        self.posterior_coefficient_x_0 = previous_bar.sqrt() * self.betas / noise_bar
        self.posterior_coefficient_x_t = self.alphas.sqrt() * (1.0 - previous_bar) / noise_bar
        self.posterior_variance = (1.0 - previous_bar) / noise_bar * self.betas  # zero at t = 1
        # The same, but for t = 1 that of t = 2: the lower bound of a learned variance, which must be positive.
        self.least_variance = self.posterior_variance.clone()
        self.least_variance[1] = self.posterior_variance[2] if self.num_steps > 1 else self.betas[1]

    def forward_step(self, x_previous: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_{t-1}) from x_{t-1}."""
        return at(self.alphas.sqrt(), t, noise) * x_previous + at(self.betas.sqrt(), t, noise) * noise

    def diffuse(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) from data in one go; t = 0 gives x_0 itself."""
        return at(self.alphas_bar.sqrt(), t, x_0) * x_0 + at((1.0 - self.alphas_bar).sqrt(), t, x_0) * noise

    def pair(self, x_0: Tensor, t: Tensor, noise_previous: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A real pair (x_{t-1}, x_t): x_{t-1} ~ q(x_{t-1} | x_0), then x_t ~ q(x_t | x_{t-1})."""
        x_previous = self.diffuse(x_0, t - 1, noise_previous)
        return x_previous, self.forward_step(x_previous, t, noise)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """q(x_{t-1} | x_t, x_0); at t = 1 that is x_0 itself, with std 0."""
        mean = at(self.posterior_coefficient_x_0, t, x_t) * x_0 + at(self.posterior_coefficient_x_t, t, x_t) * x_t
        return Denoised(x_0, mean, at(self.posterior_variance.sqrt(), t, x_t))

    def denoised(
        self, output: Tensor, x_t: Tensor, t: Tensor, predicts: Predicts = "x_0", variance: Variance = "posterior"
    ) -> Denoised:
        """p(x_{t-1} | x_t) of a network whose ``output`` at x_t, (B, C, ...), is what it ``predicts``.

        With a learned variance the output has 2C channels; the second half tells the variance.
        """
        if predicts == "x_previous":
            return Denoised(output, output, torch.zeros_like(output[:1]))
        if variance == "learned":
            output, interpolation = output.chunk(2, dim=1)
        x_0 = output if predicts == "x_0" else self.x_0_of_noise(output, x_t, t)
        denoised = self.posterior(x_0, x_t, t)
        if variance == "beta":
            return denoised._replace(std=at(self.betas.sqrt(), t, x_t))
        if variance == "learned":
            return denoised._replace(std=self.learned_std(interpolation, t))
        return denoised

    def x_0_of_noise(self, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 for which x_t is `diffuse` with this noise."""
        return (x_t - at((1.0 - self.alphas_bar).sqrt(), t, x_t) * noise) / at(self.alphas_bar.sqrt(), t, x_t)

    def noise_of_x_0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise for which x_t is `diffuse` of this x_0."""
        return (x_t - at(self.alphas_bar.sqrt(), t, x_t) * x_0) / at((1.0 - self.alphas_bar).sqrt(), t, x_t)

    def learned_std(self, interpolation: Tensor, t: Tensor) -> Tensor:
        """Between b_t (at 1) and the posterior variance (at -1), geometrically: Nichol and Dhariwal, eq. 15.

        As in their code the network's output runs from -1 to 1 where the paper's v runs from 0 to 1, and the
        posterior variance of t = 1, which is zero, is that of t = 2.
        """
        v = (interpolation + 1) / 2
        log_upper, log_lower = (at(table.log(), t, interpolation) for table in (self.betas, self.least_variance))
        return torch.exp(0.5 * (v * log_upper + (1 - v) * log_lower))

    def respaced(self, num_steps: int) -> Diffusion:
        """The process that visits only ``num_steps`` of the T noise levels, evenly from 1 to T and both among them.

        Its abar are those of the levels it visits, its betas follow from them (Nichol and Dhariwal, section 4).

        Raises:
            ValueError: unless 1 <= ``num_steps`` <= T.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"{num_steps} steps of a process of {self.num_steps}")
        visited = torch.linspace(self.num_steps, 1, num_steps, dtype=torch.float64).round().long().flip(0)
        zero = torch.zeros(1, dtype=torch.int64)
        return Diffusion(betas_of(self.alphas_bar[visited]), torch.cat([zero, self.timesteps[visited]]))


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries ``table[t]`` in the dtype and on the device of ``like``, shaped (B, 1, ...) to multiply it."""
    values = table.to(like.device)[t].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))

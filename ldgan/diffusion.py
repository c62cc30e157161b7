"""The diffusion process: schedules, the forward process q and its posterior.

One index convention everywhere: t = 0 is data, t = 1..T are noise levels, x_T is nearly pure noise. Names
follow Ho et al. (arXiv 2006.11239) and Xiao et al. (arXiv 2112.07804).
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA_MAX = 20.0  # of Song et al. and Xiao et al.


def vp_betas(num_steps: int, beta_min: float = 0.1, beta_max: float = BETA_MAX, epsilon: float = 1e-3) -> Tensor:
    """Betas b_1..b_T, float64 (T,), of the variance-preserving SDE cut into ``num_steps`` large steps.

    var(s) = 1 - exp(-s^2 (beta_max - beta_min) / 2 - s beta_min) at s_t = epsilon + (1 - epsilon) t / T
    (Song et al., arXiv 2011.13456, eq. 33; Xiao et al., appendix C).
    """
    s = epsilon + (1.0 - epsilon) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha_bar = -0.5 * s.square() * (beta_max - beta_min) - s * beta_min
    return 1.0 - torch.exp(log_alpha_bar[1:] - log_alpha_bar[:-1])


class Diffusion:
    """q(x_t | x_{t-1}) = N(sqrt(a_t) x_{t-1}, b_t I) and what follows from it, for t = 1..T.

    Tables are float64 and indexed by t itself: entry 0 stands for data (abar_0 = 1). Methods take samples
    (B, ...) and steps t, int64 (B,); they compute in the dtype of the samples.
    """

    def __init__(self, betas: Tensor) -> None:
        """``betas``: float64 (T,), each in (0, 1]."""
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must be a vector with values in (0, 1], not {betas.tolist()}")
        self.num_steps = len(betas)
        self.betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas.double()])
        self.alphas = 1.0 - self.betas
        self.alphas_bar = self.alphas.cumprod(0)
        previous_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        # q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, posterior_variance I): Ho et al., eq. 6 and 7.
        noise_bar = (1.0 - self.alphas_bar).clamp(min=torch.finfo(torch.float64).tiny)  # entry 0 is never read
        self.posterior_coefficient_x_0 = previous_bar.sqrt() * self.betas / noise_bar
        self.posterior_coefficient_x_t = self.alphas.sqrt() * (1.0 - previous_bar) / noise_bar
        self.posterior_variance = (1.0 - previous_bar) / noise_bar * self.betas  # zero at t = 1

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

    def posterior_sample(self, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} ~ q(x_{t-1} | x_t, x_0); at t = 1 that is x_0, and the noise has no part in it."""
        mean = at(self.posterior_coefficient_x_0, t, x_t) * x_0 + at(self.posterior_coefficient_x_t, t, x_t) * x_t
        return mean + at(self.posterior_variance.sqrt(), t, x_t) * noise


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries ``table[t]`` in the dtype and on the device of ``like``, shaped (B, 1, ...) to multiply it."""
    values = table.to(like.device)[t].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))

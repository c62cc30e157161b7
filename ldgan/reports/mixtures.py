"""Mixtures of Gaussians, whose denoising distributions q(x_{t-1} | x_t) have a closed form, and how to judge fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldgan.diffusion.process import Diffusion
from ldgan.engine.philox import Random
from ldgan.metrics.modes import mode_coverage

HIGH_QUALITY_STDS = 3.0


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k w_k N(m_k, s_k^2 I) in d dimensions; ``weights`` (K,) that sum to 1, ``means`` (K, d), ``stds`` (K,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "stds"):
            object.__setattr__(self, name, getattr(self, name).double())

    def sample(self, num_samples: int, random: Random) -> Tensor:
        """Samples, fp32 (N, d)."""
        component = random.choices(self.weights, num_samples)
        noise = random.normal((num_samples, self.means.shape[1])).double()
        return (self.means[component] + self.stds[component, None] * noise).float()

    def density(self, x: Tensor) -> Tensor:
        """Probability density at ``x`` (N, d), float64 (N,)."""
        return torch.exp(self._log_joint(x).logsumexp(dim=1))

    def diffused(self, diffusion: Diffusion, t: int) -> GaussianMixture:
        """q(x_t) where x_0 has this distribution: each component by itself, as the process is linear."""
        bar = diffusion.alphas_bar[t]
        return GaussianMixture(self.weights, bar.sqrt() * self.means, (bar * self.stds.square() + 1 - bar).sqrt())

    def denoising(self, diffusion: Diffusion, x_t: Tensor, t: int) -> GaussianMixture:
        """q(x_{t-1} | x_t) at one ``x_t`` (d,), where x_0 has this distribution, by Bayes' rule.

        Each component of q(x_{t-1}) times the Gaussian q(x_t | x_{t-1}) is a Gaussian again, whose weight is the
        component's own times its evidence, N(x_t; sqrt(a_t) m, a_t v + b_t).
        """
        alpha, beta = diffusion.alphas[t], diffusion.betas[t]
        previous = self.diffused(diffusion, t - 1)
        variance = previous.stds.square()
        evidence_variance = alpha * variance + beta
        evidence = GaussianMixture(self.weights, alpha.sqrt() * previous.means, evidence_variance.sqrt())
        innovation = x_t.double() - evidence.means
        return GaussianMixture(
            weights=evidence._log_joint(x_t[None]).softmax(dim=1)[0],
            means=previous.means + (alpha.sqrt() * variance / evidence_variance)[:, None] * innovation,
            stds=(variance * beta / evidence_variance).sqrt(),
        )

    def matched_gaussian(self) -> GaussianMixture:
        """The Gaussian N(m, s^2 I) nearest in KL(mixture || Gaussian): the one with the same mean and variance."""
        mean = self.weights @ self.means
        variance = self.weights @ (self.stds.square() + (self.means - mean).square().mean(dim=1))
        return GaussianMixture(torch.ones(1), mean[None], variance.sqrt()[None])

    def bin_masses(self, edges: Tensor) -> Tensor:
        """Probability of each bin of a mixture of one dimension, (n,) for n + 1 ``edges``; the outer bins are open."""
        edges = torch.cat([edges.new_tensor([-math.inf]), edges[1:-1], edges.new_tensor([math.inf])]).double()
        cumulative = torch.special.ndtr((edges[:, None] - self.means[:, 0]) / self.stds) @ self.weights
        return cumulative.diff()

    def _log_joint(self, x: Tensor) -> Tensor:
        """log w_k N(x; m_k, s_k^2 I) for ``x`` (N, d), (N, K)."""
        dimensions = self.means.shape[1]
        squares = (x.double()[:, None] - self.means).square().sum(dim=2) / self.stds.square()
        return self.weights.log() - 0.5 * (squares + dimensions * (2 * math.pi * self.stds.square()).log())


def histogram_masses(samples: Tensor, edges: Tensor) -> Tensor:
    """Share of ``samples`` (N,) in each bin, float64 (n,) for n + 1 ``edges``; the outer bins are open."""
    counts = torch.bincount(torch.bucketize(samples.double(), edges[1:-1].double()), minlength=len(edges) - 1)
    return counts.double() / len(samples)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Total variation distance of two distributions over the same bins, 0 to 1: half the L1 distance."""
    return 0.5 * (p - q).abs().sum().item()


@dataclass(frozen=True)
class GridQuality:
    """How samples lie on a mixture of K equally likely, narrow modes.

    A sample has high quality if it lies within three standard deviations of the nearest mode, and a mode is
    covered if it has a high-quality sample (Srivastava et al., VEEGAN, arXiv 1705.07761; Lin et al., PacGAN,
    arXiv 1712.04086). ``kl`` is KL(samples by nearest mode || uniform) in nats.
    """

    num_modes: int
    num_covered: int
    high_quality: float  # share of the samples, 0 to 1
    kl: float
    kl_floor: float  # what perfect samples are expected to score
    num_samples: int


def grid_quality(samples: Tensor, mixture: GaussianMixture) -> GridQuality:
    """Judge ``samples`` (N, d) beside a mixture whose components are the modes, equally likely."""
    distance, nearest = (torch.cdist(samples.double(), mixture.means) / mixture.stds).min(dim=1)
    high_quality = distance <= HIGH_QUALITY_STDS
    spread = mode_coverage(np.asarray(nearest), len(mixture.means))
    return GridQuality(
        num_modes=spread.num_modes,
        num_covered=len(nearest[high_quality].unique()),
        high_quality=high_quality.double().mean().item(),
        kl=spread.kl,
        kl_floor=spread.sampling_floor,
        num_samples=len(samples),
    )

"""Losses of the denoising diffusion GAN. They know only tensors: samples (B, ...), logits (B,) or (B, N).

N logits of a sample judge its N positions. A loss is the mean over all of them; a penalty is for their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the discriminator (Goodfellow et al., 2014; Xiao et al., eq. 5)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator (Goodfellow et al., 2014; Xiao et al., eq. 6)."""
    return F.softplus(-fake_logits).mean()


def relativistic_loss(logits: Tensor, opponent_logits: Tensor) -> Tensor:
    """Logistic loss of samples that should look more real than their opponents, pair by pair and place by place.

    The discriminator's takes real logits and fake opponents, the generator's the reverse (Jolicoeur-Martineau,
    arXiv 1807.00734; Huang et al., R3GAN, arXiv 2501.05441, section 2). Only differences of logits count.
    """
    return F.softplus(opponent_logits - logits).mean()


def mismatch_loss(logits: Tensor, differs: Tensor) -> Tensor:
    """Discriminator's loss of real samples beside captions of others (Reed et al., arXiv 1605.05396, GAN-CLS): fakes.

    It is the mean over all B samples; those whose caption is no other one, by ``differs``, bool (B,), add nothing.
    """
    return (F.softplus(logits).reshape(len(logits), -1).mean(dim=1) * differs).mean()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """E ||grad_inputs D||^2: R1 on real inputs (Mescheder et al., arXiv 1801.04406), R2 on fake ones.

    ``inputs`` must require gradients and ``logits`` come from them. D is a sample's logit, or the sum of those of its
    positions. The result can be differentiated once more; the weight gamma / 2 is the caller's.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.float().square().sum(dim=tuple(range(1, inputs.ndim))).mean()


def finite_difference_penalty(logits: Tensor, shifted_logits: Tensor, epsilon: float) -> Tensor:
    """E (D(x + epsilon v) - D(x))^2 / epsilon^2, an estimate of `gradient_penalty` without second derivatives.

    ``shifted_logits`` are those of x + epsilon v with v ~ N(0, I), drawn anew in each step: E (v . grad D)^2 is
    ||grad D||^2. Where D bends, with Hessian H, epsilon^2 / 4 (tr(H)^2 + 2 ||H||_F^2) comes on top. The
    "approximated R1" of Lin et al. (arXiv 2501.08316) is this without the division by epsilon^2. D is a sample's
    logit, or the sum of those of its positions.
    """
    changes = (shifted_logits - logits) / epsilon
    return changes.reshape(len(changes), -1).sum(dim=1).square().mean()


def reconstruction_loss(x_0_estimate: Tensor, x_0: Tensor) -> Tensor:
    """Mean absolute error of the generator's x_0 estimate (Trinh and Hamagami, IEEE Access 2024)."""
    return F.l1_loss(x_0_estimate, x_0)


def energy_score(estimate: Tensor, other_estimate: Tensor, x_0: Tensor, windows: Sequence[int] = ()) -> Tensor:
    """E d(x_0^, x_0) - E d(x_0^, x_0^') / 2 for two estimates from the same x_t with independent z.

    d is the root mean square `distance`. A strictly proper scoring rule (Gneiting and Raftery, 2007): its
    expectation is least where the estimates are samples of p(x_0 | x_t), where L1 is least at its median. De
    Bortoli et al. (arXiv 2502.02483) train few-step diffusion models with it. ``windows`` adds the scores of
    parts of a sample, (B, C, s, s): proper for the parts' distributions, and sharper where the whole has many
    dimensions. The score is the mean over the whole and each window size.
    """
    to_data = (distance(estimate, x_0, windows) + distance(other_estimate, x_0, windows)) / 2
    return to_data - distance(estimate, other_estimate, windows) / 2


def distance(x: Tensor, y: Tensor, windows: Sequence[int] = ()) -> Tensor:
    """Mean over the batch of the root mean square difference of samples (B, ...); a scalar out.

    With ``windows``, for samples (B, C, s, s), the mean of that and of the same over all square windows of each
    size, which overlap by half.
    """
    squares = (x - y).square()
    means = [squares.flatten(1).mean(dim=1)]
    means += [F.avg_pool2d(squares.mean(dim=1), window, stride=max(window // 2, 1)) for window in windows]
    # The small constant keeps the root differentiable where two samples coincide.
    return torch.stack([(mean + 1e-8).sqrt().mean() for mean in means]).mean()


def sigmoid_decay(progress: float, *, midpoint: float = 0.5, sharpness: float = 10.0) -> float:
    """Weight that falls from 1 to 0 along a sigmoid while ``progress`` runs from 0 to 1."""
    return 1.0 / (1.0 + math.exp(sharpness * (progress - midpoint)))


def simple_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """L_simple (Ho et al., arXiv 2006.11239, eq. 14): mean squared error of the noise estimate, or of that of x_0."""
    return F.mse_loss(estimate, target)


def variational_bound(posterior_mean: Tensor, posterior_std: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over a batch of the terms L_{t-1} of the variational bound (Ho et al., eq. 5), in bits per dimension.

    Posterior: q(x_{t-1} | x_t, x_0), whose std is zero at t = 1. The other two, (B, ...): p(x_{t-1} | x_t) of the
    network. A term is KL(q || p) for t > 1 and -log p(x_0 | x_1) for t = 1. Latents are continuous, so that is a
    density, and the bound may be negative; the discretised likelihood of the papers is for pixels of 8 bits.
    """
    # KL(q || p) is cross entropy less entropy. At t = 1 the posterior is x_0 for sure: the cross entropy is
    # -log p(x_0 | x_1) already, and there is no entropy to take from it.
    squares = (mean - posterior_mean).square() + posterior_std.square()
    cross_entropy = 0.5 * math.log(2 * math.pi) + std.log() + 0.5 * squares / std.square()
    entropy = torch.where(posterior_std > 0, posterior_std.log() + 0.5 * math.log(2 * math.pi * math.e), 0.0)
    return (cross_entropy - entropy).mean() / math.log(2)

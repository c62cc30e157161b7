"""Losses of the denoising diffusion GAN. They know only tensors: logits (B,), samples (B, ...)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the discriminator (Goodfellow et al., 2014; Xiao et al., eq. 5)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator (Goodfellow et al., 2014; Xiao et al., eq. 6)."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """E ||grad_inputs D||^2: R1 on real inputs (Mescheder et al., arXiv 1801.04406), R2 on fake ones.

    ``inputs`` must require gradients and ``logits`` come from them, one logit a sample. The result can be
    differentiated once more; the weight gamma / 2 is the caller's.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.float().square().sum(dim=tuple(range(1, inputs.ndim))).mean()


def reconstruction_loss(x_0_estimate: Tensor, x_0: Tensor) -> Tensor:
    """Mean absolute error of the generator's x_0 estimate (Trinh and Hamagami, IEEE Access 2024)."""
    return F.l1_loss(x_0_estimate, x_0)


def sigmoid_decay(progress: float, *, midpoint: float = 0.5, sharpness: float = 10.0) -> float:
    """Weight that falls from 1 to 0 along a sigmoid while ``progress`` runs from 0 to 1."""
    return 1.0 / (1.0 + math.exp(sharpness * (progress - midpoint)))

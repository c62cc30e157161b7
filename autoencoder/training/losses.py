"""Losses of the autoencoder. They know only tensors, and every term is a mean, so that its weight means the
same at every resolution: reconstruction per pixel value, KL per latent dimension, perceptual distance per
position of a feature map, adversarial terms per patch.

Sums over an image, as in latent diffusion's code, weigh 3 H W values against c h w latent dimensions. A KL
weight of 1e-6 there is one of 1e-6 c / (3 f^2) here, f being the downsampling factor: 6e-8 for f4 and 3 latent
channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialKind = Literal["hinge", "non-saturating"]


def reconstruction_loss(reconstructions: Tensor, images: Tensor, distance: Literal["l1", "l2"]) -> Tensor:
    """Mean absolute or mean squared error over all pixel values; both (B, C, H, W), a scalar out."""
    if distance == "l1":
        return F.l1_loss(reconstructions.float(), images)
    if distance == "l2":
        return F.mse_loss(reconstructions.float(), images)
    raise ValueError(f"no reconstruction distance {distance!r}; there are 'l1' and 'l2'")


def negative_log_likelihood(distance: Tensor, log_variance: Tensor) -> Tensor:
    """distance / exp(s) + s with s = ``log_variance``; scalars all. Least over s at s = log(distance).

    Up to constants the negative log-likelihood of pixels under a Laplace (L1) or Gaussian (L2) decoder of one
    learned scale (Dai and Wipf, ICLR 2019, arXiv 1903.05789; Rombach et al., arXiv 2112.10752): the
    reconstruction counts the more against the other terms, the better it is.
    """
    return distance * torch.exp(-log_variance) + log_variance


def kl_loss(kl: Tensor) -> Tensor:
    """Mean KL divergence in nats per latent dimension, of `Posterior.kl` (B, C, h, w); a scalar out."""
    return kl.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: AdversarialKind) -> Tensor:
    """What the discriminator minimises, given logits of any shape; a scalar out.

    Hinge: Lim and Ye (arXiv 1705.02894). Non-saturating: the logistic loss of Goodfellow et al. (2014).
    """
    real_logits, fake_logits = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    if kind == "non-saturating":
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    raise ValueError(f"no adversarial loss {kind!r}; there are 'hinge' and 'non-saturating'")


def adversarial_loss(fake_logits: Tensor, kind: AdversarialKind) -> Tensor:
    """What the autoencoder minimises, given the logits of its reconstructions, of any shape; a scalar out."""
    if kind == "hinge":
        return -fake_logits.float().mean()
    if kind == "non-saturating":
        return F.softplus(-fake_logits.float()).mean()
    raise ValueError(f"no adversarial loss {kind!r}; there are 'hinge' and 'non-saturating'")


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """||grad reconstruction|| / (||grad adversarial|| + 1e-4), both by ``last_layer``, within 0 and 1e4.

    Esser et al., "Taming Transformers" (arXiv 2012.09841), equation 7, the constants as in their code. With this
    weight both losses, scalars whose graphs stay usable, pull equally at the decoder's last weights. fp32, a
    scalar without gradient.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()

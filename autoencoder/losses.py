"""Losses of the autoencoder. They know only tensors, and every term is a mean, so that its weight means the
same at every resolution: reconstruction per pixel value, KL per latent dimension.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(reconstructions: Tensor, images: Tensor, distance: Literal["l1", "l2"]) -> Tensor:
    """Mean absolute or mean squared error over all pixel values; both (B, C, H, W), a scalar out."""
    if distance == "l1":
        return F.l1_loss(reconstructions.float(), images)
    if distance == "l2":
        return F.mse_loss(reconstructions.float(), images)
    raise ValueError(f"no reconstruction distance {distance!r}; there are 'l1' and 'l2'")


def kl_loss(kl: Tensor) -> Tensor:
    """Mean KL divergence in nats per latent dimension, of `Posterior.kl` (B, C, h, w); a scalar out."""
    return kl.mean()

"""Steering samples: by a model trained with and without labels or captions, or by a classifier of noisy latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldgan.diffusion.process import Diffusion
from ldgan.diffusion.samplers import Guidance
from ldgan.models.conditions import Conditions


def classifier_free(
    network: Callable[..., Tensor],
    x_t: Tensor,
    z: Tensor | None,
    t: Tensor,
    conditions: Conditions,
    *,
    null_label: int,
    scale: float,
) -> Tensor:
    """The network's output for ``conditions``, moved away from the one for no label and no text by ``scale``.

    uncond + scale (cond - uncond): Ho and Salimans (arXiv 2207.12598), eq. 6, whose w is scale - 1. x_0 and noise
    estimates are affine in each other, so it does not matter which of both the network predicts. Both outputs
    come from the same x_t and z in one call of 2B samples; at scale 1 there is one plain call. Where a network
    also says its variance, in channels behind the C of ``x_t``, that is the conditional one.
    """
    if scale == 1:
        return network(x_t, z, t, **conditions.given())
    both_conditions = conditions.followed_by(conditions.null(null_label))
    both_z = torch.cat([z, z]) if z is not None else None
    output = network(torch.cat([x_t, x_t]), both_z, torch.cat([t, t]), **both_conditions.given())
    conditional, unconditional = output.chunk(2)
    channels = x_t.shape[1]
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], diffusion: Diffusion, labels: Tensor, scale: float
) -> Guidance | None:
    """Guidance ``scale`` * grad_{x_t} log p(y | x_t) by a classifier (x_t, t) -> logits (B, K); None at scale 0.

    Dhariwal and Nichol (arXiv 2105.05233), section 4. ``labels``, int64 (B,), are in 0..K - 1. ``diffusion`` is
    the process that is sampled; the classifier is told its ``timesteps``, the levels that it was trained on.
    """
    if scale == 0:
        return None

    def guidance(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            logits = classifier(x_t, diffusion.timesteps.to(t.device)[t])
            log_likelihood = -F.cross_entropy(logits.float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(log_likelihood, x_t)
        return scale * gradient

    return guidance

"""The step of a DDPM, the baseline: one network, one loss.

Ho et al. (arXiv 2006.11239), Algorithm 1. With a learned variance it is the improved DDPM of Nichol and Dhariwal
(arXiv 2102.09672).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldgan.diffusion.process import Diffusion, Predicts, Variance
from ldgan.engine.accumulation import Accumulation, mean_terms
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random
from ldgan.models.unet import UNet
from ldgan.training.data import DataSource, drop_labels
from ldgan.training.losses import simple_loss, variational_bound


@dataclass
class Denoising:
    """A network with its optimizer and the average of its weights."""

    network: UNet
    optimizer: torch.optim.Optimizer
    ema: EMA[UNet]


class DDPMTrainer:
    """Takes optimisation steps on a network that denoises; knows neither files nor schedules."""

    def __init__(
        self,
        accumulation: Accumulation,
        diffusion: Diffusion,
        learner: Denoising,
        *,
        predicts: Predicts,
        variance: Variance,
        vlb_weight: float,
        label_dropout: float,
        max_gradient_norm: float,
    ) -> None:
        """``max_gradient_norm`` 0 leaves gradients as they are; ``vlb_weight`` counts for a learned variance alone."""
        self._accumulation, self._diffusion, self._learner = accumulation, diffusion, learner
        self._reduced_network = accumulation.prepare(learner.network)  # averages gradients over processes
        self._predicts, self._variance, self._vlb_weight = predicts, variance, vlb_weight
        self._label_dropout, self._max_gradient_norm = label_dropout, max_gradient_norm

    def step(self, step: int, source: DataSource, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take step number ``step``; return the detached loss terms, unweighted."""
        self._learner.optimizer.zero_grad(set_to_none=True)
        terms = []
        for number in self._accumulation.micro_batches(self._reduced_network):
            batch = next(batches)
            x_0 = source.x_0(batch, self._accumulation.random("x_0", step, number))
            labels = source.labels(batch, x_0.device) if self._learner.network.num_classes > 0 else None
            terms.append(self.losses(x_0, labels, self._accumulation.random("network", step, number)))
            weights = {"simple": 1.0, "vlb": self._vlb_weight}
            self._accumulation.backward(*(weights[name] * term for name, term in terms[-1].items()))
        if self._max_gradient_norm > 0:
            nn.utils.clip_grad_norm_(self._learner.network.parameters(), self._max_gradient_norm)
        self._learner.optimizer.step()
        self._accumulation.average(self._learner.ema, self._learner.network, step)
        return mean_terms(terms)

    def losses(self, x_0: Tensor, labels: Tensor | None, random: Random) -> dict[str, Tensor]:
        """L_simple and, with a learned variance, an estimate of the variational bound in bits per dimension.

        t is uniform on 1..T, so T times the mean of the terms L_{t-1} estimates their sum. The term L_T of the
        bound depends on no weight and is left out.
        """
        t = random.integers(1, self._diffusion.num_steps + 1, (len(x_0),))
        noise = random.normal_like(x_0)
        x_t = self._diffusion.diffuse(x_0, t, noise)
        if labels is not None:
            labels = drop_labels(labels, self._label_dropout, self._learner.network.num_classes, random)
        output = self._reduced_network(x_t, None, t, labels)
        target = noise if self._predicts == "noise" else x_0
        if self._variance != "learned":
            return {"simple": simple_loss(output, target)}
        estimate, interpolation = output.chunk(2, dim=1)
        # The bound is a noisy guide for the mean; it teaches the variance alone (Nichol and Dhariwal, section 3.1).
        output = torch.cat([estimate.detach(), interpolation], dim=1)
        true = self._diffusion.posterior(x_0, x_t, t)
        learned = self._diffusion.denoised(output, x_t, t, self._predicts, "learned")
        bound = variational_bound(true.mean, true.std, learned.mean, learned.std)
        return {"simple": simple_loss(estimate, target), "vlb": self._diffusion.num_steps * bound}

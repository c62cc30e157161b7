"""The step of the classifier of noisy samples (Dhariwal and Nichol, arXiv 2105.05233, section 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ldgan.diffusion.process import Diffusion
from ldgan.engine.accumulation import Accumulation, mean_terms
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random
from ldgan.models.classifier import Classifier
from ldgan.training.data import DataSource

NUM_PARTS = 4  # of 1..T, from little noise to much, whose accuracies are told apart


class ClassifierTrainer:
    """Takes optimisation steps on p(y | x_t); knows neither files nor schedules."""

    def __init__(
        self,
        accumulation: Accumulation,
        diffusion: Diffusion,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        ema: EMA[Classifier],
    ) -> None:
        self._accumulation, self._diffusion = accumulation, diffusion
        self._classifier, self._optimizer, self._ema = classifier, optimizer, ema
        # The same weights behind a wrapper that averages gradients over processes.
        self._reduced_classifier = accumulation.prepare(classifier)

    def step(self, step: int, source: DataSource, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take step number ``step`` on this process's share of the batch; return the detached terms."""
        self._optimizer.zero_grad(set_to_none=True)
        terms = []
        for number in self._accumulation.micro_batches(self._reduced_classifier):
            batch = next(batches)
            x_0 = source.x_0(batch, self._accumulation.random("x_0", step, number))
            labels = source.labels(batch, x_0.device)
            terms.append(self.terms(x_0, labels, self._accumulation.random("classifier", step, number)))
            self._accumulation.backward(terms[-1]["loss"])
        self._optimizer.step()
        self._accumulation.average(self._ema, self._classifier, step)
        return mean_terms(terms)

    def terms(self, x_0: Tensor, labels: Tensor, random: Random) -> dict[str, Tensor]:
        """Cross-entropy in nats, and the accuracy (0 to 1) in each quarter of 1..T: ``accuracy_1`` has least noise."""
        t = spread_timesteps(len(x_0), self._diffusion.num_steps, random)
        logits = self._reduced_classifier(self._diffusion.diffuse(x_0, t, random.normal_like(x_0)), t)
        right = (logits.detach().argmax(dim=1) == labels).float()
        parts = right.tensor_split(min(NUM_PARTS, len(right)))  # t rises along the batch
        accuracies = {f"accuracy_{number}": part.mean() for number, part in enumerate(parts, start=1)}
        return {"loss": F.cross_entropy(logits, labels), **accuracies}


def spread_timesteps(batch_size: int, num_steps: int, random: Random) -> Tensor:
    """t in 1..T, int64 (B,) and rising: one uniform draw from each of B equal parts of the range.

    A batch as a whole is uniform over 1..T, at less variance than independent draws. Rows of a batch are in random
    order anyway, so that sample and t stay independent of each other.
    """
    positions = torch.arange(batch_size, device=random.device, dtype=torch.float64)
    shares = positions + random.uniform((batch_size,))
    return 1 + (num_steps * shares / batch_size).long().clamp(max=num_steps - 1)

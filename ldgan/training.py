"""The two steps of the game: one for the discriminator, one for the generator.

Xiao et al. (arXiv 2112.07804), section 4: for t uniform on 1..T, the discriminator sees real pairs
(x_{t-1}, x_t) ~ q and fake pairs whose x_{t-1} ~ q(x_{t-1} | x_t, x_0 = G(x_t, z, t)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan.data import DataSource
from ldgan.diffusion import Diffusion
from ldgan.engine.accumulation import mean_terms, micro_batch_weight, micro_batches
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.seeding import generator as random_generator
from ldgan.losses import (
    discriminator_loss,
    energy_score,
    generator_loss,
    gradient_penalty,
    reconstruction_loss,
    sigmoid_decay,
)
from ldgan.networks import Discriminator, Generator


@dataclass
class LossConfig:
    """Weights of the losses."""

    r1_gamma: float = option(0.02, "weight of the R1 penalty, gamma / 2 ||grad D||^2, on the steps that compute it")
    r1_every_steps: int = option(15, "steps from one R1 penalty to the next")
    l1_weight: float = option(0.0, "weight of the L1 distance between the x_0 estimate and x_0 at the start")
    l1_weight_final: float = option(0.0, "the same at the end; in between it falls along a sigmoid")
    energy_weight: float = option(0.0, "weight of the energy score of two x_0 estimates; costs a second forward pass")
    energy_windows: list[int] = option([], "sides of windows, in latent pixels, that the energy score sees apart")

    def l1_weight_at(self, progress: float) -> float:
        """Weight of the L1 term at ``progress``, 0 to 1, of the run (Trinh and Hamagami, 2024)."""
        return self.l1_weight_final + (self.l1_weight - self.l1_weight_final) * sigmoid_decay(progress)


@dataclass
class PhasesConfig:
    """A run may start with the generator alone, then the discriminator alone; the game of both follows."""

    pretraining_steps: int = option(0, "first steps: the generator alone, on its L1 and energy terms")
    pretraining_lr: float = option(1e-3, "peak learning rate of the generator in those steps")
    discriminator_only_steps: int = option(0, "steps after those: the discriminator alone")


@dataclass
class Players:
    """Both networks with their optimizers, and the average of the generator's weights."""

    generator: Generator
    discriminator: Discriminator
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    ema: EMA[Generator]


class DiffusionGANTrainer:
    """Takes optimisation steps on generator and discriminator; knows neither files nor schedules."""

    def __init__(
        self,
        accelerator: Accelerator,
        diffusion: Diffusion,
        players: Players,
        *,
        loss: LossConfig,
        phases: PhasesConfig,
        timestep_weights: Sequence[float],
        num_micro_batches: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._accelerator, self._diffusion, self._players = accelerator, diffusion, players
        self._loss, self._phases = loss, phases
        # The same weights behind a wrapper that averages gradients over processes. Each player's own step goes
        # through its wrapper; the other player only serves there, as the bare network.
        self._reduced_generator = accelerator.prepare(players.generator)
        self._reduced_discriminator = accelerator.prepare(players.discriminator)
        self._timestep_weights = torch.tensor(timestep_weights, device=accelerator.device)
        self._num_micro_batches, self._batch_size, self._seed = num_micro_batches, batch_size, seed

    def step(
        self, step: int, source: DataSource, batches: Iterator[dict[str, Tensor]], progress: float
    ) -> dict[str, Tensor]:
        """Take step number ``step``, at ``progress`` (0 to 1) of the run; return the detached loss terms.

        Both players train on the same x_0, but each draws t and noise of its own.
        """
        x_0 = [source.x_0(next(batches), self._random("x_0", step, number)) for number in self._micro_batches()]
        game_step = step - self._phases.pretraining_steps
        terms: dict[str, Tensor] = {}
        if game_step > 0:
            terms |= self.discriminator_step(step, x_0)
        if game_step <= 0 or game_step > self._phases.discriminator_only_steps:
            terms |= self.generator_step(step, x_0, self._loss.l1_weight_at(progress), adversarial=game_step > 0)
        return terms

    def discriminator_step(self, step: int, batches: list[Tensor]) -> dict[str, Tensor]:
        """Train the discriminator on this process's micro-batches of x_0; the generator takes no gradient."""
        self._players.discriminator.requires_grad_(True)
        self._players.discriminator_optimizer.zero_grad(set_to_none=True)
        weight = micro_batch_weight(self._accelerator, self._num_micro_batches)
        penalise = step % self._loss.r1_every_steps == 0
        terms = []
        for number, x_0 in zip(self._micro_batches(self._reduced_discriminator), batches):
            terms.append(self.discriminator_losses(x_0, self._random("discriminator", step, number), penalise))
            # One backward for both terms: a second one would not be averaged over processes.
            self._accelerator.backward(weight * sum(terms[-1].values()))
        self._players.discriminator_optimizer.step()
        return mean_terms(terms)

    def generator_step(
        self, step: int, batches: list[Tensor], l1_weight: float, adversarial: bool
    ) -> dict[str, Tensor]:
        """Train the generator on this process's micro-batches of x_0; the discriminator takes no gradient."""
        self._players.discriminator.requires_grad_(False)
        self._players.generator_optimizer.zero_grad(set_to_none=True)
        weight = micro_batch_weight(self._accelerator, self._num_micro_batches)
        terms = []
        for number, x_0 in zip(self._micro_batches(self._reduced_generator), batches):
            terms.append(self.generator_losses(x_0, self._random("generator", step, number), adversarial))
            weights = {"l1": l1_weight, "energy": self._loss.energy_weight, "generator": 1.0}
            self._accelerator.backward(weight * sum(weights[name] * term for name, term in terms[-1].items()))
        self._players.generator_optimizer.step()
        self._players.ema.update(self._players.generator, self._batch_size, step * self._batch_size)
        return mean_terms(terms)

    def discriminator_losses(self, x_0: Tensor, random: torch.Generator, penalise: bool) -> dict[str, Tensor]:
        """Adversarial loss and, with ``penalise``, the weighted R1 penalty on real pairs."""
        t, x_previous, x_t = self._real_pair(x_0, random)
        with torch.no_grad():
            fake, _ = self._fake(self._players.generator, x_t, t, random)
        x_previous.requires_grad_(penalise)
        real_logits = self._reduced_discriminator(x_previous, x_t, t)
        fake_logits = self._reduced_discriminator(fake, x_t, t)
        terms = {"discriminator": discriminator_loss(real_logits, fake_logits)}
        if penalise:
            terms["r1"] = 0.5 * self._loss.r1_gamma * gradient_penalty(real_logits, x_previous)
        return terms

    def generator_losses(self, x_0: Tensor, random: torch.Generator, adversarial: bool) -> dict[str, Tensor]:
        """L1 distance and energy score of the x_0 estimates, and the adversarial loss if asked; all unweighted."""
        t, _, x_t = self._real_pair(x_0, random)
        fake, estimate = self._fake(self._reduced_generator, x_t, t, random)
        terms = {"l1": reconstruction_loss(estimate, x_0)}
        if self._loss.energy_weight > 0:
            _, other_estimate = self._fake(self._reduced_generator, x_t, t, random)
            terms["energy"] = energy_score(estimate, other_estimate, x_0, self._loss.energy_windows)
        if adversarial:
            terms["generator"] = generator_loss(self._players.discriminator(fake, x_t, t))
        return terms

    def _real_pair(self, x_0: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """t in 1..T for each sample, drawn by the timestep weights, and (x_{t-1}, x_t) ~ q given x_0."""
        t = 1 + torch.multinomial(self._timestep_weights, len(x_0), replacement=True, generator=random)
        return t, *self._diffusion.pair(x_0, t, noise_like(x_0, random), noise_like(x_0, random))

    def _fake(self, generator: nn.Module, x_t: Tensor, t: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_{t-1} ~ q(x_{t-1} | x_t, x_0 = G(x_t, z, t)), and the estimate of x_0."""
        z = torch.randn(len(x_t), self._players.generator.z_dim, generator=random, device=x_t.device)
        x_0_estimate = generator(x_t, z, t)
        return self._diffusion.posterior_sample(x_0_estimate, x_t, t, noise_like(x_t, random)), x_0_estimate

    def _micro_batches(self, *models: nn.Module) -> Iterator[int]:
        return micro_batches(self._accelerator, self._num_micro_batches, *models)

    def _random(self, player: str, step: int, micro_batch: int) -> torch.Generator:
        """The random numbers of one player's micro-batch; nothing else draws from them."""
        return random_generator(self._accelerator.device, self._seed, player, step, micro_batch)


def noise_like(x: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal noise in the shape of ``x``."""
    return torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)

"""The two steps of the game: one for the discriminator, one for the generator.

Xiao et al. (arXiv 2112.07804), section 4: for t uniform on 1..T, the discriminator sees real pairs
(x_{t-1}, x_t) ~ q and fake pairs whose x_{t-1} ~ q(x_{t-1} | x_t, x_0 = G(x_t, z, t)).

Their ablation, section 5.2, is the one-shot GAN with the forward process as data augmentation: the generator makes
x_0 from x_T ~ N(0, I) in one go, and the discriminator sees x_{t-1} ~ q(x_{t-1} | x_0) of real and fake x_0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoencoder.models.text import Text
from ldgan.diffusion.process import Diffusion, Predicts
from ldgan.engine.accumulation import Accumulation, mean_terms
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random
from ldgan.models.conditions import Conditions, drop_text, mismatched
from ldgan.models.discriminator import Discriminator
from ldgan.models.unet import UNet
from ldgan.training.data import DataSource, drop_labels
from ldgan.training.losses import (
    discriminator_loss,
    distance,
    energy_score,
    finite_difference_penalty,
    generator_loss,
    gradient_penalty,
    mismatch_loss,
    reconstruction_loss,
    relativistic_loss,
    sigmoid_decay,
)

Objective = Literal["denoising", "one_shot"]
"""The denoising diffusion GAN, or the one-shot GAN with diffusion as augmentation."""


@dataclass
class LossConfig:
    """The losses and their weights."""

    adversarial: Literal["non_saturating", "relativistic"] = option(
        "non_saturating", "judge real and fake samples each on its own, or which of a pair is more real (R3GAN)"
    )
    r1_gamma: float = option(0.02, "weight of the R1 penalty, gamma / 2 ||grad D||^2, on the steps that compute it")
    r2_gamma: float = option(0.0, "the same of R2, on fake samples; 0: off (R3GAN has both)")
    r1_every_steps: int = option(15, "steps from one R1 penalty, or R1 and R2, to the next")
    penalty: Literal["gradient", "finite_difference"] = option(
        "gradient", "||grad D||^2 exactly, or estimated along a random direction, without second derivatives"
    )
    penalty_epsilon: float = option(
        0.1, "finite difference: standard deviation of the step in x; below 0.01, bf16 adds its own rounding"
    )
    l1_weight: float = option(0.0, "weight of the L1 distance between the x_0 estimate and x_0 at the start")
    l1_weight_final: float = option(0.0, "the same at the end; in between it falls along a sigmoid")
    energy_weight: float = option(
        0.0, "weight of the energy score of two x_0 estimates; without z they coincide and it is a distance to x_0"
    )
    energy_windows: list[int] = option([], "sides of windows, in latent pixels, that the energy score sees apart")
    mismatch_weight: float = option(
        0.0, "with captions: weight of the discriminator's loss of real samples beside captions of others (GAN-CLS)"
    )

    def validate(self) -> None:
        """Raise a UserError for weights and steps that make no sense."""
        if self.r1_gamma < 0 or self.r2_gamma < 0:
            raise UserError(f"loss.r1_gamma is {self.r1_gamma} and loss.r2_gamma {self.r2_gamma}; choose 0 or more")
        if self.r1_every_steps < 1:
            raise UserError(f"loss.r1_every_steps is {self.r1_every_steps}; choose 1 or more")
        if self.penalty_epsilon <= 0:
            raise UserError(f"loss.penalty_epsilon is {self.penalty_epsilon}; choose more than 0 (0.1 is usual)")
        if self.mismatch_weight < 0:
            raise UserError(f"loss.mismatch_weight is {self.mismatch_weight}; choose 0 or more (0.5 is Reed et al.'s)")
        if self.mismatch_weight > 0 and self.adversarial == "relativistic":
            raise UserError(
                "loss.mismatch_weight judges samples alone; set loss.adversarial=non_saturating, or it to 0"
            )

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

    generator: UNet
    discriminator: Discriminator
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    ema: EMA[UNet]


class Batch(NamedTuple):
    """What a micro-batch trains on."""

    x_0: Tensor  # (B, C, s, s)
    labels: Tensor | None  # int64 (B,); None without classes
    text: Text | None = None  # B captions; None for players that do not read them


class Drawn(NamedTuple):
    """A micro-batch as one player has drawn it: real samples, and what fakes share with them."""

    real: Tensor  # x_{t-1}, (B, C, s, s)
    x_t: Tensor | None  # (B, C, s, s); None in a one-shot game
    t: Tensor  # int64 (B,) in 1..T
    labels: Tensor | None  # int64 (B,); None without classes
    text: Text | None = None  # B captions; None for players that do not read them

    @property
    def conditions(self) -> dict[str, Any]:
        """What both players are told, as their arguments by name."""
        return Conditions(self.labels, self.text).given()

    def judge(self, discriminator: nn.Module, x_previous: Tensor) -> Tensor:
        """Logits, (B,) or (B, N), of real or fake x_{t-1}."""
        return discriminator(x_previous, self.x_t, self.t, **self.conditions)


class DiffusionGANTrainer:
    """Takes optimisation steps on generator and discriminator; knows neither files nor schedules."""

    def __init__(
        self,
        accumulation: Accumulation,
        diffusion: Diffusion,
        players: Players,
        *,
        objective: Objective,
        predicts: Predicts,
        label_dropout: float,
        caption_dropout: float = 0.0,
        loss: LossConfig,
        phases: PhasesConfig,
        timestep_weights: Sequence[float],
    ) -> None:
        """``predicts`` tells what the generator's output is; a one-shot generator's is x_0."""
        self._accumulation, self._diffusion, self._players = accumulation, diffusion, players
        self._one_shot, self._predicts = objective == "one_shot", predicts
        self._label_dropout, self._caption_dropout = label_dropout, caption_dropout
        self._loss, self._phases = loss, phases
        # The same weights behind a wrapper that averages gradients over processes. Each player's own step goes
        # through its wrapper; the other player only serves there, as the bare network.
        self._reduced_generator = accumulation.prepare(players.generator)
        self._reduced_discriminator = accumulation.prepare(players.discriminator)
        self._timestep_weights = torch.tensor(timestep_weights, dtype=torch.float64, device=accumulation.device)

    def step(
        self, step: int, source: DataSource, batches: Iterator[dict[str, Tensor]], progress: float
    ) -> dict[str, Tensor]:
        """Take step number ``step``, at ``progress`` (0 to 1) of the run; return the detached loss terms.

        Both players train on the same x_0, but each draws t and noise of its own.
        """
        data = [self._read(source, next(batches), step, number) for number in self._accumulation.micro_batches()]
        game_step = step - self._phases.pretraining_steps
        terms: dict[str, Tensor] = {}
        if game_step > 0:
            terms |= self.discriminator_step(step, data)
        if game_step <= 0 or game_step > self._phases.discriminator_only_steps:
            terms |= self.generator_step(step, data, self._loss.l1_weight_at(progress), adversarial=game_step > 0)
        return terms

    def discriminator_step(self, step: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Train the discriminator on this process's micro-batches; the generator takes no gradient."""
        self._players.discriminator.requires_grad_(True)
        self._players.discriminator_optimizer.zero_grad(set_to_none=True)
        penalise = step % self._loss.r1_every_steps == 0
        terms = []
        for number, batch in zip(self._accumulation.micro_batches(self._reduced_discriminator), batches):
            random = self._accumulation.random("discriminator", step, number)
            terms.append(self.discriminator_losses(batch, random, penalise))
            # One backward for all terms: a second one would not be averaged over processes.
            self._accumulation.backward(*terms[-1].values())
        self._players.discriminator_optimizer.step()
        return mean_terms(terms)

    def generator_step(self, step: int, batches: list[Batch], l1_weight: float, adversarial: bool) -> dict[str, Tensor]:
        """Train the generator on this process's micro-batches; the discriminator takes no gradient."""
        self._players.discriminator.requires_grad_(False)
        self._players.generator_optimizer.zero_grad(set_to_none=True)
        terms = []
        for number, batch in zip(self._accumulation.micro_batches(self._reduced_generator), batches):
            random = self._accumulation.random("generator", step, number)
            terms.append(self.generator_losses(batch, random, adversarial))
            weights = {"l1": l1_weight, "energy": self._loss.energy_weight, "generator": 1.0}
            self._accumulation.backward(*(weights[name] * term for name, term in terms[-1].items()))
        self._players.generator_optimizer.step()
        self._accumulation.average(self._players.ema, self._players.generator, step)
        return mean_terms(terms)

    def discriminator_losses(self, batch: Batch, random: Random, penalise: bool) -> dict[str, Tensor]:
        """Adversarial loss and, with ``penalise``, the weighted penalties: R1 on real and R2 on fake samples.

        With a mismatch weight also the weighted loss of real samples beside the caption of the batch's next sample,
        where there are two captions and they differ: the discriminator must look at what a caption says, and not only
        at whether an image is real.
        """
        drawn = self._draw(batch, random)
        with torch.no_grad():
            fake, _ = self._fake(self._players.generator, drawn, random)
        real, exact = drawn.real, penalise and self._loss.penalty == "gradient"
        real.requires_grad_(exact and self._loss.r1_gamma > 0)
        fake.requires_grad_(exact and self._loss.r2_gamma > 0)
        judge = partial(drawn.judge, self._reduced_discriminator)
        # The fast kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            real_logits, fake_logits = judge(real), judge(fake)
        relativistic = self._loss.adversarial == "relativistic"
        adversarial_loss = relativistic_loss if relativistic else discriminator_loss
        terms = {"discriminator": adversarial_loss(real_logits, fake_logits)}
        if self._loss.mismatch_weight > 0 and drawn.text is not None:
            other_text, differs = mismatched(drawn.text)
            other_logits = drawn._replace(text=other_text).judge(self._reduced_discriminator, real)
            terms["mismatch"] = self._loss.mismatch_weight * mismatch_loss(other_logits, differs)
        for name, gamma, x, logits in (
            ("r1", self._loss.r1_gamma, real, real_logits),
            ("r2", self._loss.r2_gamma, fake, fake_logits),
        ):
            if penalise and gamma > 0:
                terms[name] = 0.5 * gamma * self._squared_gradient(judge, x, logits, random)
        return terms

    def generator_losses(self, batch: Batch, random: Random, adversarial: bool) -> dict[str, Tensor]:
        """L1 distance and energy score of the estimates, and the adversarial loss if asked; all unweighted.

        Estimated is x_0 or, where that is what the generator predicts, x_{t-1}. A one-shot sample belongs to no
        x_0: it has no L1 distance, and its energy score is that of the distribution of x_0 itself.
        """
        drawn = self._draw(batch, random)
        target = drawn.real if self._predicts == "x_previous" else batch.x_0
        fake, estimate = self._fake(self._reduced_generator, drawn, random)
        terms = {} if self._one_shot else {"l1": reconstruction_loss(estimate, target)}
        if self._loss.energy_weight > 0:
            terms["energy"] = self._energy(estimate, target, drawn, random)
        if not adversarial:
            return terms
        judge = partial(drawn.judge, self._players.discriminator)
        if self._loss.adversarial == "relativistic":
            terms["generator"] = relativistic_loss(judge(fake), judge(drawn.real))
        else:
            terms["generator"] = generator_loss(judge(fake))
        return terms

    def _energy(self, estimate: Tensor, target: Tensor, drawn: Drawn, random: Random) -> Tensor:
        """Energy score of ``estimate`` and a second one; where no z sets them apart, the distance that is left of it.

        A one-shot generator without z still starts from an x_T of its own each time.
        """
        windows = self._loss.energy_windows
        if self._players.generator.z_dim == 0 and not self._one_shot:
            return distance(estimate, target, windows)
        _, other_estimate = self._fake(self._reduced_generator, drawn, random)
        return energy_score(estimate, other_estimate, target, windows)

    def _read(self, source: DataSource, batch: dict[str, Tensor], step: int, number: int) -> Batch:
        """x_0 and, for players with classes or text, labels or captions of a batch of the dataset."""
        x_0, generator = source.x_0(batch, self._accumulation.random("x_0", step, number)), self._players.generator
        labels = source.labels(batch, x_0.device) if generator.num_classes > 0 else None
        return Batch(x_0, labels, source.text(batch, x_0.device) if generator.text_dim > 0 else None)

    def _draw(self, batch: Batch, random: Random) -> Drawn:
        """Labels, captions, t in 1..T for each sample, by the timestep weights, and (x_{t-1}, x_t) ~ q given x_0."""
        x_0, labels, text = batch
        if labels is not None:
            # Left out for both players, for classifier-free guidance. A discriminator that knew a label which the
            # generator does not would drive it towards the likelier classes: its best answer for all of them at
            # once is not their mixture. The same goes for captions.
            labels = drop_labels(labels, self._label_dropout, self._players.generator.num_classes, random)
        if text is not None:
            text = drop_text(text, self._caption_dropout, random)
        t = 1 + random.choices(self._timestep_weights, len(x_0))
        if self._one_shot:
            return Drawn(self._diffusion.diffuse(x_0, t - 1, random.normal_like(x_0)), None, t, labels, text)
        real, x_t = self._diffusion.pair(x_0, t, random.normal_like(x_0), random.normal_like(x_0))
        return Drawn(real, x_t, t, labels, text)

    def _fake(self, generator: nn.Module, drawn: Drawn, random: Random) -> tuple[Tensor, Tensor]:
        """A fake x_{t-1} and the generator's estimate behind it: of x_0, or of x_{t-1} if it predicts that.

        x_{t-1} ~ q(x_{t-1} | x_t, x_0 = G(x_t, z, t)) or, in a one-shot game, q(x_{t-1} | x_0 = G(x_T, z, T)) from a
        fresh x_T ~ N(0, I).
        """
        x_t, t = drawn.x_t, drawn.t
        if x_t is None:
            x_t, t = random.normal_like(drawn.real), torch.full_like(t, self._diffusion.num_steps)
        z_dim = self._players.generator.z_dim
        z = random.normal((len(t), z_dim)) if z_dim > 0 else None
        output = generator(x_t, z, t, **drawn.conditions)
        noise = random.normal_like(x_t)
        if self._one_shot:
            return self._diffusion.diffuse(output, drawn.t - 1, noise), output
        denoised = self._diffusion.denoised(output, x_t, t, self._predicts)
        return denoised.sample(noise), denoised.x_0

    def _squared_gradient(self, judge: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor, random: Random) -> Tensor:
        """E ||grad D||^2 at ``x``, whose ``logits`` are known, as the config wants it."""
        if self._loss.penalty == "gradient":
            return gradient_penalty(logits, x)
        epsilon = self._loss.penalty_epsilon
        return finite_difference_penalty(logits, judge(x + epsilon * random.normal_like(x)), epsilon)

"""Diffusion GANs of points: two small perceptrons under the trainer, losses and process that images have."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

from ldgan.diffusion.process import Diffusion, vp_betas
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.philox import Random
from ldgan.engine.progress import progress_bar
from ldgan.engine.session import make_accelerator
from ldgan.inference.trained_model import TrainedModel
from ldgan.models.blocks import initialise
from ldgan.models.discriminator import Discriminator
from ldgan.models.unet import UNet
from ldgan.training.data import DataSource
from ldgan.training.gan import DiffusionGANTrainer, LossConfig, PhasesConfig, Players


@dataclass(frozen=True)
class Recipe:
    """How the players of a toy are trained; steps and seed can be set on the command line."""

    num_steps: int
    seed: int = 0
    # Less noise at the end than the paper's 20, so that all steps share the work: with 20, x_0 is decided in the last.
    beta_max: float = 7.0
    batch_size: int = 512
    z_dim: int = 4
    width: int = 128
    num_layers: int = 3
    generator_octaves: int = 4  # of waves that the networks see of the coordinates, from length 2 pi down
    discriminator_octaves: int = 4
    xavier: bool = True  # or PyTorch's own initialisation, whose functions start out nearly constant
    lr: float = 2e-3
    r1_gamma: float = 0.02
    ema_halflife: int = 20_000  # samples

    @property
    def optimizer(self) -> OptimizerConfig:
        """Settings of both players' optimizers."""
        return OptimizerConfig(lr=self.lr, beta1=0.5, beta2=0.9)

    def diffusion(self, num_timesteps: int) -> Diffusion:
        """The process of T steps."""
        return Diffusion(vp_betas(num_timesteps, beta_max=self.beta_max))


class TimedPerceptron(nn.Module):
    """Fully connected layers whose first is shifted by a vector for each t in 0..num_steps."""

    def __init__(
        self, in_features: int, out_features: int, *, num_steps: int, width: int, num_layers: int, xavier: bool
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.time = nn.Embedding(num_steps + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))
        self.last = nn.Linear(width, out_features)
        if xavier:
            initialise(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Features (B, in) and steps, int64 (B,) -> (B, out)."""
        h = F.leaky_relu(self.first(x) + self.time(t), 0.2)
        for layer in self.hidden:
            h = F.leaky_relu(layer(h), 0.2)
        return self.last(h)


class PointGenerator(nn.Module):
    """G(x_t, z, t) -> estimate of x_0, for points (B, d, 1, 1); called like `UNet`."""

    num_classes = text_dim = 0

    def __init__(self, *, channels: int, z_dim: int, num_octaves: int, **sizes: Any) -> None:
        super().__init__()
        self.z_dim, self.num_octaves = z_dim, num_octaves
        self.perceptron = TimedPerceptron(channels * (1 + 2 * num_octaves) + z_dim, channels, **sizes)

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """``z`` (B, z_dim) ~ N(0, I), None where z_dim is 0; ``t`` int64 (B,); there are no labels."""
        x = with_waves(x_t.flatten(1), self.num_octaves)
        return self.perceptron(x if z is None else torch.cat([x, z], dim=1), t).view_as(x_t)


class PointDiscriminator(nn.Module):
    """D(x_{t-1}, x_t, t) -> logit (B,), for points (B, d, 1, 1); called like `Discriminator`."""

    def __init__(self, *, channels: int, num_octaves: int, **sizes: Any) -> None:
        super().__init__()
        self.num_octaves = num_octaves
        self.perceptron = TimedPerceptron(2 * channels * (1 + 2 * num_octaves), 1, **sizes)

    def forward(self, x_previous: Tensor, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """``t`` int64 (B,); there are no labels."""
        pair = torch.cat([x_previous, x_t], dim=1).flatten(1)
        return self.perceptron(with_waves(pair, self.num_octaves), t).squeeze(1)


def with_waves(x: Tensor, num_octaves: int) -> Tensor:
    """Append sines and cosines of 1, 2, 4, ... times the coordinates: (B, n) -> (B, n (1 + 2 num_octaves)).

    A perceptron alone is slow to learn functions as fine as the modes (Tancik et al., arXiv 2006.10739).
    """
    angles = (2 ** torch.arange(num_octaves)[:, None] * x[:, None]).flatten(1)
    return torch.cat([x, angles.sin(), angles.cos()], dim=1)


class Points(Protocol):
    """A distribution of points in d dimensions."""

    @property
    def means(self) -> Tensor:
        """Of its modes, (M, d)."""
        ...

    def sample(self, num_samples: int, random: Random, /) -> Tensor:
        """Draw points."""
        ...


@dataclass
class PointSource:
    """New points at every step, in place of a `ldgan.training.data.DataSource`."""

    points: Points
    batch_size: int

    def x_0(self, batch: dict[str, Tensor], random: Random) -> Tensor:
        """Points (B, d, 1, 1): images of a single pixel, so that all that works on images works on them."""
        return self.points.sample(self.batch_size, random)[:, :, None, None]


def train(points: Points, num_timesteps: int, recipe: Recipe, name: str) -> TrainedModel:
    """Play the game of generator and discriminator on points; the model holds the averaged generator."""
    set_seed(recipe.seed)
    channels = points.means.shape[1]
    diffusion = recipe.diffusion(num_timesteps)
    players = build_players(channels, num_timesteps, recipe)
    trainer = DiffusionGANTrainer(
        Accumulation(make_accelerator("fp32", num_threads=1), 1, recipe.batch_size, recipe.seed),
        diffusion,
        players,
        objective="denoising",
        predicts="x_0",
        label_dropout=0.0,
        loss=LossConfig(r1_gamma=recipe.r1_gamma, r1_every_steps=1),
        phases=PhasesConfig(),
        timestep_weights=[1.0] * num_timesteps,
    )
    source = cast("DataSource", PointSource(points, recipe.batch_size))
    with progress_bar(name, recipe.num_steps, "steps") as bar:
        for step in range(1, recipe.num_steps + 1):
            for optimizer in (players.generator_optimizer, players.discriminator_optimizer):
                set_learning_rate(optimizer, learning_rate(recipe.optimizer, step, recipe.num_steps))
            trainer.step(step, source, itertools.repeat({}), progress=step / recipe.num_steps)
            bar.advance()
    return TrainedModel(players.ema.model, diffusion, None, (channels, 1, 1), resolution=1)


def build_players(channels: int, num_timesteps: int, recipe: Recipe) -> Players:
    """Fresh perceptrons for points of ``channels`` dimensions, and their optimizers."""
    sizes = {"num_steps": num_timesteps, "width": recipe.width, "num_layers": recipe.num_layers}
    generator = PointGenerator(
        channels=channels, z_dim=recipe.z_dim, num_octaves=recipe.generator_octaves, xavier=recipe.xavier, **sizes
    )
    discriminator = PointDiscriminator(
        channels=channels, num_octaves=recipe.discriminator_octaves, xavier=recipe.xavier, **sizes
    )
    return Players(
        cast("UNet", generator),
        cast("Discriminator", discriminator),
        adamw(generator.parameters(), recipe.optimizer),
        adamw(discriminator.parameters(), recipe.optimizer),
        EMA(cast("UNet", generator), recipe.ema_halflife, rampup_ratio=0.05),
    )

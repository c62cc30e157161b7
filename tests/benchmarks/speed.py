"""Seconds per training step of both stages, and images per second of sampling and decoding.

    python tests/benchmarks/speed.py
    python tests/benchmarks/speed.py --autoencoder configs/autoencoder/stacked_mnist_full.yaml \\
        --ldgan configs/ldgan/stacked_mnist_full.yaml --threads 1

Networks and batch sizes come from the configs, weights and data are random. Medians over --repeats, after a
warm-up, with the interquartile range behind them. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.perceptual import build_perceptual
from autoencoder.train import TrainConfig as AutoencoderTrainConfig
from autoencoder.train import build_players
from autoencoder.training.vae import AutoencoderTrainer
from ldgan.diffusion.process import build_diffusion
from ldgan.engine import cli
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.config import load_config
from ldgan.engine.session import make_accelerator
from ldgan.inference.trained_model import TrainedModel
from ldgan.train import TrainConfig
from ldgan.train import build_players as build_gan_players
from ldgan.training.gan import Batch, DiffusionGANTrainer, Players

NUM_SAMPLES = 500


def main() -> None:
    """Time the stages and print a table."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    first = load_config(AutoencoderTrainConfig, flags.autoencoder, [])
    second = load_config(TrainConfig, flags.ldgan, [])
    accelerator = make_accelerator(second.run.precision)
    autoencoder = AutoencoderKL(first.network).to(accelerator.device)

    table = Table(
        title=f"{flags.threads} threads, {accelerator.device}, {platform.machine()}, torch {torch.__version__}"
    )
    for column in ("what", "batch", "precision", "seconds (median)", "interquartile range", "images/s"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def add(what: str, batch: int, work: Callable[[], object]) -> None:
        times = timed(work, flags.repeats)
        lower, median, upper = statistics.quantiles(times, n=4)
        row = (f"{median:.3f}", f"{upper - lower:.3f}", f"{batch / median:,.0f}")
        table.add_row(what, str(batch), second.run.precision, *row)

    add("autoencoder step", first.run.batch_size, autoencoder_step(accelerator, first, flags.resolution))
    data_shape = autoencoder.latent_shape(flags.resolution)
    players, trainer = diffusion_gan(accelerator, second, data_shape)
    gan_step = game_step(accelerator, trainer, (second.run.batch_size, *data_shape), itertools.count(1))
    add("diffusion GAN step, both players", second.run.batch_size, gan_step)
    process = build_diffusion(second.schedule, second.num_timesteps, second.beta_max)
    model = TrainedModel(players.ema.model, process, autoencoder.eval(), data_shape, flags.resolution)

    def in_precision(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with accelerator.autocast():
                return work()

        return run

    latents = torch.randn(NUM_SAMPLES, *data_shape, device=accelerator.device)
    add(
        f"sampling latents, T = {second.num_timesteps}",
        NUM_SAMPLES,
        in_precision(lambda: model.sample(list(range(NUM_SAMPLES)))),
    )
    add("decoding", NUM_SAMPLES, in_precision(lambda: model.decode(latents)))
    Console(width=120).print(table)


def timed(work: Callable[[], object], repeats: int, warmup: int = 3) -> list[float]:
    """Wall-clock seconds of ``repeats`` runs after ``warmup`` untimed ones."""
    times = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[warmup:]


def autoencoder_step(accelerator: Accelerator, config: AutoencoderTrainConfig, resolution: int) -> Callable[[], object]:
    """One training step of stage 1 on random images, of both players where the config has two."""
    trainer = AutoencoderTrainer(
        Accumulation(accelerator, 1, config.run.batch_size, 0),
        build_players(config, accelerator.device),
        build_perceptual(config.perceptual, accelerator.device),
        loss=config.loss,
        perceptual_weight=config.perceptual.weight,
        adversarial=config.adversarial,
    )
    batch = {"image": torch.rand(config.run.batch_size, 3, resolution, resolution) * 2 - 1}
    steps = itertools.count(config.adversarial.start_step)
    return lambda: trainer.step(next(steps), iter([batch]))


def diffusion_gan(
    accelerator: Accelerator, config: TrainConfig, data_shape: tuple[int, int, int]
) -> tuple[Players, DiffusionGANTrainer]:
    """Fresh players of stage 2, and their trainer."""
    players = build_gan_players(config, data_shape, 0, accelerator.device)
    trainer = DiffusionGANTrainer(
        Accumulation(accelerator, 1, config.run.batch_size, 0),
        build_diffusion(config.schedule, config.num_timesteps, config.beta_max),
        players,
        objective=config.objective,
        predicts=config.predicts,
        label_dropout=0.0,
        loss=config.loss,
        phases=config.phases,
        timestep_weights=[1.0] * config.num_timesteps,
    )
    return players, trainer


def game_step(
    accelerator: Accelerator, trainer: DiffusionGANTrainer, shape: tuple[int, ...], steps: Iterable[int]
) -> Callable[[], object]:
    """One step of both players on random latents of ``shape``, numbered by ``steps``, which decide on the penalty."""
    batches, numbers = [Batch(torch.randn(shape, device=accelerator.device), None)], iter(steps)

    def both_players() -> None:
        step = next(numbers)
        trainer.discriminator_step(step, batches)
        trainer.generator_step(step, batches, l1_weight=0.1, adversarial=True)

    return both_players


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--autoencoder", type=Path, default=Path("configs/autoencoder/stacked_mnist.yaml"), metavar="FILE"
    )
    parser.add_argument("--ldgan", type=Path, default=Path("configs/ldgan/stacked_mnist.yaml"), metavar="FILE")
    parser.add_argument(
        "--resolution", type=cli.positive, default=32, help="side of the images in pixels (default: 32)"
    )
    parser.add_argument("--repeats", type=cli.positive, default=30, help="timed runs of each (default: 30)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

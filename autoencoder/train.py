"""Train a KL-regularised autoencoder on image shards: stage 1."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.latent_statistics import accumulate_moments
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.discriminator import PatchDiscriminator
from autoencoder.models.perceptual import PerceptualConfig, PerceptualDistance, build_perceptual
from autoencoder.training.vae import (
    AdversarialConfig,
    Adversary,
    AutoencoderTrainer,
    LogVariance,
    LossConfig,
    Players,
)
from data_prep.loader import ImageDataset, batches_of_run, sequential_batches
from data_prep.shards import ShardSet
from data_prep.urls import check_no_secrets
from ldgan.engine import cli
from ldgan.engine.attention import check_kernel
from ldgan.engine.checkpoint import Stateful
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, option
from ldgan.engine.ema import EMA
from ldgan.engine.images import error_maps, to_uint8
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.progress import progress_bar
from ldgan.engine.seeding import generator
from ldgan.engine.session import DTYPES, RunConfig, Session, start

NUM_PREVIEW_IMAGES = 16

EXAMPLES = """
accelerate launch autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml
accelerate launch autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml data=data/mine run.dir=runs/mine
accelerate launch autoencoder/train.py --config configs/autoencoder/folder256.yaml data=data/mine \\
    perceptual.network=lpips-vgg perceptual.backbone_weights=vgg16-397923af.pth adversarial.weight=0
torchrun --nproc_per_node 2 autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml
"""


@dataclass
class TrainConfig:
    """Everything a run of stage 1 depends on."""

    data: str = option(MISSING, "folder of image shards, as data_prep/make_shards.py writes them")
    flips: bool = option(False, "mirror half of the images left to right")
    run: RunConfig = option(RunConfig(), "")
    network: AutoencoderConfig = option(AutoencoderConfig(), "")
    loss: LossConfig = option(LossConfig(), "")
    perceptual: PerceptualConfig = option(PerceptualConfig(), "")
    adversarial: AdversarialConfig = option(AdversarialConfig(), "")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "")
    ema_halflife_images: int = option(10_000, "images in which the weights' average forgets half of the past")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other, or must not be saved."""
        check_no_secrets(self.data, "data")
        self.network.validate()
        if min(self.perceptual.weight, self.adversarial.weight, self.loss.kl_weight) < 0:
            raise cli.UserError("a loss has a weight below 0; give loss.kl_weight and the others 0 or more")
        if self.perceptual.network == "none" and self.perceptual.backbone_weights is not None:
            raise cli.UserError(
                "perceptual.backbone_weights without a network; give perceptual.network=lpips-alex, say"
            )
        if self.adversarial.weight > 0 and self.adversarial.start_step > self.run.num_steps:
            raise cli.UserError(
                f"adversarial.start_step {self.adversarial.start_step} comes after the last of {self.run.num_steps}"
                " steps; start earlier, or switch the game off by adversarial.weight=0"
            )


def main() -> None:
    """Train, measure the latent statistics, save."""
    parser = training_parser("Train a KL-regularised autoencoder on image shards (stage 1).", EXAMPLES, TrainConfig)
    _, config = parse_command(parser, TrainConfig)
    accelerator = start(config.run)
    check_kernel(config.network.attention_kernel, accelerator.device, DTYPES[config.run.precision])
    data = ImageDataset(ShardSet.open(config.data))
    players = build_players(config, accelerator.device)
    perceptual = build_perceptual(config.perceptual, accelerator.device)
    check_resolution(players, perceptual, data)
    session = Session(accelerator, config, things_to_save(players), {"kind": KIND, "data": describe_data(data)})
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return

    batches = batches_of_run(data, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = AutoencoderTrainer(
        config.run.accumulation(accelerator),
        players,
        perceptual,
        loss=config.loss,
        perceptual_weight=config.perceptual.weight,
        adversarial=config.adversarial,
    )
    autoencoder, ema = players.autoencoder, players.ema
    with session.naming_faults():
        for step in session.steps():
            set_learning_rates(config, step, players)
            session.record(step, trainer.step(step, batches))
            if session.wants_preview(step):
                rows = preview(ema.model, data)
                session.preview(step, "reconstructions", rows, columns=len(rows) // 3)

        statistics = measure_latent_statistics(accelerator, ema.model, data, config.run.batch_size)
        autoencoder.set_latent_statistics(ema.model.latent_mean, ema.model.latent_std)
        session.finish({"latent_statistics": statistics, "fingerprint": fingerprint(ema.model)})
    report(accelerator, config.run.dir, session.seconds, statistics)


def build_players(config: TrainConfig, device: torch.device) -> Players:
    """A fresh autoencoder and, where the config asks for it, its adversary, with their optimizers."""
    autoencoder = AutoencoderKL(config.network).to(device)
    log_variance = LogVariance().to(device) if config.loss.learned_variance else None
    learned = [*autoencoder.parameters(), *(log_variance.parameters() if log_variance else ())]
    return Players(
        autoencoder,
        adamw(learned, config.optimizer),
        EMA(autoencoder, config.ema_halflife_images, rampup_ratio=0.05),
        log_variance,
        build_adversary(config, device) if config.adversarial.weight > 0 else None,
    )


def build_adversary(config: TrainConfig, device: torch.device) -> Adversary:
    """A fresh discriminator and its optimizer."""
    discriminator = PatchDiscriminator(
        image_channels=config.network.image_channels,
        base_channels=config.adversarial.base_channels,
        num_layers=config.adversarial.num_layers,
    ).to(device)
    return Adversary(discriminator, adamw(discriminator.parameters(), config.adversarial.optimizer))


def things_to_save(players: Players) -> dict[str, Stateful]:
    """What a checkpoint holds, by the names of its files."""
    things: dict[str, Stateful] = {
        "autoencoder": players.autoencoder,
        WEIGHTS: players.ema,
        "optimizer": players.optimizer,
    }
    if players.log_variance is not None:
        things["log_variance"] = players.log_variance
    if players.adversary is not None:
        things["discriminator"] = players.adversary.discriminator
        things["discriminator_optimizer"] = players.adversary.optimizer
    return things


def set_learning_rates(config: TrainConfig, step: int, players: Players) -> None:
    """Set the rates of step 1..num_steps; the discriminator's warms up when the game starts."""
    num_steps = config.run.num_steps
    set_learning_rate(players.optimizer, learning_rate(config.optimizer, step, num_steps))
    steps_before = config.adversarial.start_step - 1
    if players.adversary is not None and step > steps_before:
        game = (step - steps_before, num_steps - steps_before)
        set_learning_rate(players.adversary.optimizer, learning_rate(config.adversarial.optimizer, *game))


def check_resolution(players: Players, perceptual: PerceptualDistance | None, data: ImageDataset) -> None:
    """Raise a UserError if a network cannot take images of this size."""
    resolution, factor = data.shards.manifest.details["resolution"], players.autoencoder.downsampling_factor
    if resolution % factor:
        raise cli.UserError(
            f"{data.shards.folder}: images of {resolution} px are no multiple of the autoencoder's factor {factor};"
            " change network.channel_multipliers or make shards of another --resolution"
        )
    if players.adversary is not None and resolution < players.adversary.discriminator.min_size:
        raise cli.UserError(
            f"{data.shards.folder}: images of {resolution} px are too small for the discriminator, it takes"
            f" {players.adversary.discriminator.min_size} px or more; lower adversarial.num_layers"
        )
    if perceptual is not None:
        perceptual.check_size(resolution, resolution)


def describe_data(data: ImageDataset) -> dict:
    """What a checkpoint tells about the data it was trained on."""
    manifest = data.shards.manifest
    return {
        "folder": str(data.shards.folder),
        "fingerprint": manifest.fingerprint,
        "num_images": manifest.num_samples,
        "resolution": manifest.details["resolution"],
        "seconds": manifest.seconds,
    }


@torch.no_grad()
def preview(autoencoder: AutoencoderKL, data: ImageDataset) -> Tensor:
    """The first images, their reconstructions and the `error_maps` between, a row each; uint8 (3 N, C, H, W).

    N is NUM_PREVIEW_IMAGES, or less if there are no more.
    """
    images = next(sequential_batches(data, NUM_PREVIEW_IMAGES))["image"].to(autoencoder.latent_mean.device)
    shape = (len(images), *autoencoder.latent_shape(images.shape[-1]))
    noise = torch.randn(shape, generator=generator(images.device, "preview"), device=images.device)
    originals, reconstructions = to_uint8(images), to_uint8(autoencoder(images, noise).images)
    return torch.cat([originals, reconstructions, error_maps(reconstructions, originals)]).cpu()


def measure_latent_statistics(
    accelerator: Accelerator, autoencoder: AutoencoderKL, data: ImageDataset, batch_size: int
) -> dict:
    """Measure mean and std of the latents per channel over the whole data set, and store them as buffers."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with progress_bar("latent statistics", len(data) // world_size, "images", enabled=rank == 0) as bar:

        def images():
            for batch in sequential_batches(data, batch_size, rank=rank, world_size=world_size):
                yield batch["image"]
                bar.advance(len(batch["image"]))

        moments = accumulate_moments(autoencoder, images(), accelerator.device)
    moments.sums = accelerator.reduce(moments.sums, "sum")
    mean, std = moments.statistics()
    autoencoder.set_latent_statistics(mean, std)
    return {"num_images": len(data), "mean": mean.tolist(), "std": std.tolist()}


def report(accelerator: Accelerator, run_dir: str, seconds: float, statistics: dict) -> None:
    """Say what was made and what to do next."""
    channels = "  ".join(f"{mean:+.3f} ± {std:.3f}" for mean, std in zip(statistics["mean"], statistics["std"]))
    accelerator.print(f"latents per channel over {statistics['num_images']:,} images: {channels}")
    accelerator.print(f"autoencoder in {run_dir} ({seconds:.0f} s); next: python autoencoder/encode.py --help")


command = cli.command(main)

if __name__ == "__main__":
    command()

"""Train a KL-regularised autoencoder on image shards: stage 1."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from autoencoder.latent_statistics import accumulate_moments
from autoencoder.loading import KIND, WEIGHTS, build_autoencoder, fingerprint
from autoencoder.networks import AutoencoderConfig, AutoencoderKL
from autoencoder.training import AutoencoderTrainer, LossConfig
from data_prep.loader import ImageDataset, batches_of_run, sequential_batches
from data_prep.shards import ShardSet
from ldgan.engine import cli
from ldgan.engine.checkpoint import Stateful
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, option
from ldgan.engine.ema import EMA
from ldgan.engine.images import to_uint8
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.progress import progress_bar
from ldgan.engine.seeding import generator
from ldgan.engine.session import RunConfig, Session, make_accelerator

NUM_PREVIEW_IMAGES = 16

EXAMPLES = """
accelerate launch autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml
accelerate launch autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml data=data/mine run.dir=runs/mine
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
    optimizer: OptimizerConfig = option(OptimizerConfig(), "")
    ema_halflife_images: int = option(10_000, "images in which the weights' average forgets half of the past")


def main() -> None:
    """Train, measure the latent statistics, save."""
    parser = training_parser("Train a KL-regularised autoencoder on image shards (stage 1).", EXAMPLES, TrainConfig)
    _, config = parse_command(parser, TrainConfig)
    accelerator = make_accelerator(config.run.precision, config.run.num_threads)
    set_seed(config.run.seed)
    data = ImageDataset(ShardSet.open(config.data))
    autoencoder = build_autoencoder(config.network).to(accelerator.device)
    check_resolution(autoencoder, data)
    optimizer = adamw(autoencoder.parameters(), config.optimizer)
    ema = EMA(autoencoder, config.ema_halflife_images, rampup_ratio=0.05)
    things: dict[str, Stateful] = {"autoencoder": autoencoder, WEIGHTS: ema, "optimizer": optimizer}
    session = Session(accelerator, config, things, {"kind": KIND, "data": describe_data(data)})
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return

    batches = batches_of_run(data, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = AutoencoderTrainer(
        accelerator,
        autoencoder,
        optimizer,
        ema,
        loss=config.loss,
        num_micro_batches=config.run.micro_batches(accelerator.num_processes)[0],
        batch_size=config.run.batch_size,
        seed=config.run.seed,
    )
    for step in session.steps():
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, config.run.num_steps))
        session.record(step, trainer.step(step, batches))
        if session.wants_preview(step):
            session.preview(step, "reconstructions", reconstructions(ema.model, data), NUM_PREVIEW_IMAGES)

    statistics = measure_latent_statistics(accelerator, ema.model, data, config.run.batch_size)
    autoencoder.set_latent_statistics(ema.model.latent_mean, ema.model.latent_std)
    session.finish({"latent_statistics": statistics, "fingerprint": fingerprint(ema.model)})
    report(accelerator, config.run.dir, session.seconds, statistics)


def check_resolution(autoencoder: AutoencoderKL, data: ImageDataset) -> None:
    """Raise a UserError if the images' size is no multiple of the downsampling factor."""
    resolution, factor = data.shards.manifest.details["resolution"], autoencoder.downsampling_factor
    if resolution % factor:
        raise cli.UserError(
            f"{data.shards.folder}: images of {resolution} px are no multiple of the autoencoder's factor {factor};"
            " change network.channel_multipliers or make shards of another --resolution"
        )


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
def reconstructions(autoencoder: AutoencoderKL, data: ImageDataset) -> Tensor:
    """The first images and, in the row below, their reconstructions; uint8 (2 * NUM_PREVIEW_IMAGES, C, H, W)."""
    images = next(sequential_batches(data, NUM_PREVIEW_IMAGES))["image"].to(autoencoder.latent_mean.device)
    shape = (len(images), *autoencoder.latent_shape(images.shape[-1]))
    noise = torch.randn(shape, generator=generator(images.device, "preview"), device=images.device)
    return to_uint8(torch.cat([images, autoencoder(images, noise).images])).cpu()


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


if __name__ == "__main__":
    cli.run(main)

"""Train a light decoder to match the decoder of a finished autoencoder on its own latents."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.latents import check_latents
from autoencoder.inference.light_decoder import KIND, WEIGHTS, light_decoder_folder
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder, LightDecoderConfig, build_light_decoder
from autoencoder.models.perceptual import PerceptualConfig, PerceptualDistance, build_perceptual
from autoencoder.training.distillation import (
    DistillationTrainer,
    agreement_metrics,
    measure_agreement,
    posterior_moments,
)
from data_prep.loader import ImageDataset, LatentDataset, batches_of_run, sequential_batches
from data_prep.shards import ShardSet
from data_prep.urls import check_no_secrets
from ldgan.engine import cli
from ldgan.engine.checkpoint import DESCRIPTION_FILE, Stateful, read_description, save_checkpoint
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, option, to_dict
from ldgan.engine.ema import EMA
from ldgan.engine.images import error_maps, to_uint8
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.run import RunFolder
from ldgan.engine.session import RunConfig, Session, start

NUM_PREVIEW_IMAGES = 16

EXAMPLES = """
accelerate launch autoencoder/distill.py --config configs/autoencoder/light_small.yaml \\
    autoencoder=runs/mine/autoencoder latents=data/mine_latents
accelerate launch autoencoder/distill.py --config configs/autoencoder/light_medium.yaml \\
    autoencoder=runs/mine/autoencoder latents=data/mine_latents \\
    perceptual.network=lpips-alex perceptual.backbone_weights=alexnet-owt-7be5be79.pth perceptual.weight=0.1
"""


@dataclass
class DistillConfig:
    """Everything the training of a light decoder depends on."""

    autoencoder: str = option(MISSING, "finished run of autoencoder/train.py, whose decoder is imitated")
    latents: str = option(MISSING, "folder of its latent shards, or of image shards (encoded on the fly)")
    flips: bool = option(False, "mirror half of the images; latent shards must hold the mirror images")
    out: str | None = option(
        None, "new folder for the finished light decoder; null: inside the autoencoder's run, where others find it"
    )
    run: RunConfig = option(RunConfig(), "")
    network: LightDecoderConfig = option(LightDecoderConfig(), "")
    distance: Literal["l1", "l2"] = option("l1", "distance between pixels in [-1, 1]")
    perceptual: PerceptualConfig = option(PerceptualConfig(), "")
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=2e-3), "")
    ema_halflife_images: int = option(10_000, "images in which the weights' average forgets half of the past")
    num_evaluation_latents: int = option(256, "first latents on which both decoders are compared when training ends")

    def validate(self) -> None:
        """Raise a UserError for settings that make no sense."""
        self.network.validate()
        if self.perceptual.weight < 0:
            raise cli.UserError(f"perceptual.weight is {self.perceptual.weight}; give 0 or more")
        check_no_secrets(self.latents, "latents")
        if self.num_evaluation_latents < 2:
            raise cli.UserError(f"num_evaluation_latents is {self.num_evaluation_latents}; give 2 or more")


def main() -> None:
    """Train, compare with the full decoder, save beside it."""
    parser = training_parser("Train a light decoder to match a full one on its latents.", EXAMPLES, DistillConfig)
    _, config = parse_command(parser, DistillConfig)
    accelerator = start(config.run)
    out = Path(config.out) if config.out is not None else light_decoder_folder(Path(config.autoencoder))
    if made_before(out, config):
        accelerator.print(f"{out}: finished before; nothing to do")
        return
    autoencoder = load_autoencoder(Path(config.autoencoder), accelerator.device)
    data = open_latents(config, autoencoder)
    perceptual = build_perceptual(config.perceptual, accelerator.device)
    check_resolution(data, autoencoder, perceptual)
    light = build_light_decoder(config.network, autoencoder).to(accelerator.device)
    optimizer = adamw(light.parameters(), config.optimizer)
    ema = EMA(light, config.ema_halflife_images, rampup_ratio=0.05)
    things: dict[str, Stateful] = {"light_decoder": light, WEIGHTS: ema, "optimizer": optimizer}
    session = Session(accelerator, config, things, describe_run(data, autoencoder))

    if not session.finished:
        batches = batches_of_run(data, config.run, accelerator, first_step=session.first_step, flips=config.flips)
        trainer = DistillationTrainer(
            config.run.accumulation(accelerator),
            autoencoder,
            light,
            optimizer,
            ema,
            perceptual,
            distance=config.distance,
            perceptual_weight=config.perceptual.weight,
        )
        with session.naming_faults():
            for step in session.steps():
                set_learning_rate(optimizer, learning_rate(config.optimizer, step, config.run.num_steps))
                session.record(step, trainer.step(step, batches))
                if session.wants_preview(step):
                    images = preview(ema.model, autoencoder, data)
                    session.preview(step, "decoders", images, columns=len(images) // 3)
            session.finish({"agreement": compare(accelerator, ema.model, autoencoder, data, perceptual, config)})
    if accelerator.is_main_process:
        publish(session.run, ema, out)


def made_before(out: Path, config: DistillConfig) -> bool:
    """Whether ``out`` holds what this very config made; raises a UserError if it holds anything else."""
    if not out.exists():
        return False
    if (out / DESCRIPTION_FILE).is_file() and read_description(out).get("config") == to_dict(config):
        return True
    raise cli.UserError(f"{out}: exists already, and other settings made it; remove it, or choose a folder by out=DIR")


def open_latents(config: DistillConfig, autoencoder: AutoencoderKL) -> LatentDataset | ImageDataset:
    """The data to train on: posteriors of ``autoencoder``, or images for it to encode."""
    shards = ShardSet.open(config.latents)
    if shards.manifest.kind == "images":
        return ImageDataset(shards)
    check_latents(shards, autoencoder, flips=config.flips)
    return LatentDataset(shards)


def check_resolution(
    data: LatentDataset | ImageDataset, autoencoder: AutoencoderKL, perceptual: PerceptualDistance | None
) -> None:
    """Raise a UserError if a network cannot take images of this size."""
    resolution = data.shards.manifest.details["resolution"]
    autoencoder.latent_shape(resolution)
    if perceptual is not None:
        perceptual.check_size(resolution, resolution)


def describe_run(data: LatentDataset | ImageDataset, autoencoder: AutoencoderKL) -> dict[str, Any]:
    """What a checkpoint tells about itself besides config and progress."""
    manifest = data.shards.manifest
    latents = {
        "folder": str(data.shards.folder),
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "num_samples": manifest.num_samples,
        "resolution": manifest.details["resolution"],
    }
    return {"kind": KIND, "autoencoder": fingerprint(autoencoder), "latents": latents}


@torch.no_grad()
def preview(light: LightDecoder, autoencoder: AutoencoderKL, data: LatentDataset | ImageDataset) -> Tensor:
    """Three rows of images, uint8 (3 N, C, H, W): the first N latents by the full decoder, by the light one, and the
    `error_maps` between; N is NUM_PREVIEW_IMAGES, or less if there are no more.
    """
    latents, _ = posterior_moments(autoencoder, next(sequential_batches(data, NUM_PREVIEW_IMAGES)))
    reference, images = to_uint8(autoencoder.decode(latents)), to_uint8(light.decode(latents))
    return torch.cat([reference, images, error_maps(images, reference)]).cpu()


def compare(
    accelerator: Accelerator,
    light: LightDecoder,
    autoencoder: AutoencoderKL,
    data: LatentDataset | ImageDataset,
    perceptual: PerceptualDistance | None,
    config: DistillConfig,
) -> dict[str, Any]:
    """Measure both decoders' agreement on the first latents, in fp32; mean and standard error of each metric."""
    metrics = agreement_metrics(perceptual)
    num_latents = min(config.num_evaluation_latents, len(data))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = sequential_batches(data, config.run.batch_size, rank=rank, world_size=world_size, limit=num_latents)
    results = {}
    for metric, mean in zip(metrics, measure_agreement(light, autoencoder, batches, metrics)):
        mean.sums = accelerator.reduce(mean.sums, "sum")
        results[metric.name] = {"mean": mean.mean, "standard_error": mean.standard_error, "unit": metric.unit}
    return {"latents": str(data.shards.folder), "num_latents": num_latents, "metrics": results}


def publish(run: RunFolder, ema: EMA[LightDecoder], out: Path) -> None:
    """Save the averaged weights and the description of the run's end as ``out``; say what was made."""
    latest = run.latest_checkpoint()
    assert latest is not None, "the run has ended"
    source = read_description(latest)
    description = {key: value for key, value in source.items() if key not in ("format", "libraries", "things")}
    save_checkpoint(out, {WEIGHTS: ema}, description)
    agreement = description["agreement"]
    numbers = ", ".join(
        f"{name} {metric['mean']:.4g} ± {metric['standard_error']:.2g} {metric['unit']}".rstrip()
        for name, metric in agreement["metrics"].items()
    )
    print(f"to the full decoder on the first {agreement['num_latents']:,} latents of {agreement['latents']}: {numbers}")
    print(f"light decoder in {out} ({description['seconds']:.0f} s); next: decode with --decoder light")


command = cli.command(main)

if __name__ == "__main__":
    command()

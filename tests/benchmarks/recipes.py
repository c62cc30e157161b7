"""What the latent recipes of configs/ldgan cost: multiply-adds, seconds per training step and per sampled image.

    python tests/benchmarks/recipes.py
    python tests/benchmarks/recipes.py --recipes latent256 --batch-size 16 --precision bf16 --threads 1

Each piece of work runs with both memory formats, all pieces of a recipe taking turns in one process: medians over
--repeats. Weights and data are random. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from decoders import alternating_medians, count_macs
from rich.console import Console
from rich.table import Table
from speed import diffusion_gan, game_step
from torch import nn

from autoencoder.distill import DistillConfig
from autoencoder.models.light_decoder import LightDecoder
from ldgan.diffusion.process import build_diffusion
from ldgan.engine import cli
from ldgan.engine.config import load_config
from ldgan.engine.session import make_accelerator
from ldgan.inference.trained_model import TrainedModel
from ldgan.models.unet import UNet
from ldgan.train import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

Work = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Recipe:
    """The shape of a recipe's latents, the images' size, and the light decoder that belongs to it."""

    data_shape: tuple[int, int, int]
    resolution: int
    light_decoder: str | None


RECIPES = {
    "lddgan_cifar10": Recipe((4, 16, 16), 32, None),
    "latent256": Recipe((4, 32, 32), 256, "light_medium"),
}


def main() -> None:
    """Count, time, and print a table for each recipe."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    accelerator = make_accelerator(flags.precision, flags.threads)
    threads = f"{flags.threads} threads, " if accelerator.device.type == "cpu" else ""
    machine = f"{threads}{accelerator.device}, {platform.machine()}, torch {torch.__version__}, {flags.precision}"
    for name in flags.recipes:
        config = load_config(TrainConfig, CONFIGS / "ldgan" / f"{name}.yaml", [f"run.batch_size={flags.batch_size}"])
        work: Work = {}
        for memory_format in FORMATS:
            work |= pieces(accelerator, config, RECIPES[name], memory_format)
        seconds = alternating_medians(work, flags.repeats)
        table = Table(title=f"{name}: {costs(config, RECIPES[name])}\n{machine}, batches of {flags.batch_size}")
        for column in ("what", "seconds", "seconds per image", "images/s"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for what, median in seconds.items():
            per_image = median / flags.batch_size
            table.add_row(what, f"{median:.3f}", f"{per_image:.4f}", f"{1 / per_image:,.1f}")
        Console(width=120).print(table)


def pieces(accelerator: Accelerator, config: TrainConfig, recipe: Recipe, memory_format: str) -> Work:
    """The work of one recipe in one memory format, by name."""
    device, batch_size = accelerator.device, config.run.batch_size
    players, trainer = diffusion_gan(accelerator, config, recipe.data_shape)
    light = build_light_decoder(recipe).to(device) if recipe.light_decoder else None
    for network in (players.generator, players.discriminator, players.ema.model, light or nn.Identity()):
        network.to(memory_format=FORMATS[memory_format])
    process = build_diffusion(config.schedule, config.num_timesteps, config.beta_max)
    model = TrainedModel(players.ema.model, process, None, recipe.data_shape, recipe.resolution, light_decoder=light)

    shape, interval = (batch_size, *recipe.data_shape), config.loss.r1_every_steps
    plain = (step for step in itertools.count(1) if step % interval)
    work: Work = {
        "training step without penalty": game_step(accelerator, trainer, shape, plain),
        f"training step with penalty (every {interval}th)": game_step(
            accelerator, trainer, shape, itertools.count(interval, interval)
        ),
        f"sampling latents, T = {config.num_timesteps}": lambda: model.sample(range(batch_size)),
    }
    if light is not None:
        latents = torch.randn(shape, device=device)
        work["light decoder"] = lambda: model.decode(latents)

    def in_precision(run: Callable[[], object]) -> Callable[[], object]:
        def wrapped() -> object:
            with accelerator.autocast():
                return run()

        return wrapped

    # The trainer's networks enter autocast themselves.
    return {
        f"{what}, {memory_format}": run if what.startswith("training") else in_precision(run)
        for what, run in work.items()
    }


def build_light_decoder(recipe: Recipe) -> LightDecoder:
    """A fresh light decoder of the recipe's latents."""
    network = load_config(DistillConfig, CONFIGS / "autoencoder" / f"{recipe.light_decoder}.yaml", []).network
    return LightDecoder(latent_channels=recipe.data_shape[0], image_channels=3, **vars(network))


def costs(config: TrainConfig, recipe: Recipe) -> str:
    """Parameters of the generator, and GMAC of its call and of an image."""
    channels, side, _ = recipe.data_shape
    with torch.device("meta"):
        unet = UNet(config.generator, channels=channels, resolution=side, out_channels=channels, num_classes=0)
        latents, z, t = torch.empty(1, *recipe.data_shape), torch.empty(1, unet.z_dim), torch.ones(1, dtype=torch.int64)
        call = count_macs(unet, latents, z, t) / 1e9
        decoding = count_macs(build_light_decoder(recipe).decode, latents) / 1e9 if recipe.light_decoder else 0.0
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    text = f"generator of {parameters:.2f} M parameters, {call:.2f} GMAC a call"
    if not recipe.light_decoder:
        return text
    return (
        f"{text}; {config.num_timesteps * call + decoding:.1f} GMAC for an image, of which its decoder {decoding:.2f}"
    )


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--batch-size", type=cli.positive, default=8, help="images per step and call (default: 8)")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="timed turns of each (default: 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks (default: fp32)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

"""Trained generators on disk, and the folder that makes them whole: averaged weights, process, autoencoder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from autoencoder.light_decoder import LightDecoder, light_decoder_folder, load_light_decoder
from autoencoder.loading import copy_autoencoder, load_autoencoder
from autoencoder.networks import AutoencoderKL
from ldgan.diffusion import BETA_MAX, Diffusion, vp_betas
from ldgan.engine.checkpoint import load_thing, read_description
from ldgan.engine.cli import UserError
from ldgan.engine.config import from_dict
from ldgan.engine.images import to_uint8
from ldgan.engine.run import resolve_checkpoint
from ldgan.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from ldgan.sampling import noise_from_seeds, sample

KIND = "diffusion GAN"
WEIGHTS = "generator_ema"  # the averaged weights are the ones that are sampled from
AUTOENCODER_FOLDER = "autoencoder"  # a run on latents holds a copy of the autoencoder they belong to


def build_generator(config: GeneratorConfig, data_shape: tuple[int, int, int]) -> Generator:
    """A fresh generator for square data of shape (C, s, s)."""
    return Generator(channels=data_shape[0], resolution=data_shape[1], **vars(config))


def build_discriminator(config: DiscriminatorConfig, data_shape: tuple[int, int, int]) -> Discriminator:
    """A fresh discriminator for pairs of shape (C, s, s)."""
    return Discriminator(channels=data_shape[0], **vars(config))


@dataclass
class TrainedModel:
    """A generator in eval mode with all it needs to make images; ``autoencoder`` is None for pixels.

    ``light_decoder``, where given, decodes instead of the autoencoder.
    """

    generator: Generator
    diffusion: Diffusion
    autoencoder: AutoencoderKL | None
    data_shape: tuple[int, int, int]
    resolution: int  # of the images, in pixels
    light_decoder: LightDecoder | None = None

    def sample(self, seeds: list[int]) -> Tensor:
        """Samples of x_0, (B, C, s, s): one for each seed, the same whatever the batch."""
        device = next(self.generator.parameters()).device
        noise = noise_from_seeds(seeds, self.data_shape, self.generator.z_dim, self.diffusion.num_steps, device)
        return sample(self.generator, self.diffusion, noise)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W) on the CPU, of samples of x_0."""
        decoder = self.light_decoder or self.autoencoder
        return to_uint8(x_0 if decoder is None else decoder.decode(x_0)).cpu()


def load_model(
    path: Path, device: torch.device | str = "cpu", decoder: Literal["full", "light"] = "full"
) -> TrainedModel:
    """Load a run of ldgan/train.py, at its latest checkpoint, or one of its checkpoints.

    The ``decoder`` is the autoencoder's own, or the light one that lies in the run's copy of the autoencoder.

    Raises:
        UserError: ``path`` is neither, or is damaged, or the run's copy of the autoencoder is missing, or it has
            no light decoder.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if description.get("kind") != KIND:
        raise UserError(f"{path}: holds an {description.get('kind')}, not a {KIND}; give a run of ldgan/train.py")
    config = description["config"]
    channels, side, _ = description["data_shape"]
    generator = build_generator(from_dict(GeneratorConfig, config["generator"], str(folder)), (channels, side, side))
    load_thing(folder, WEIGHTS, generator)
    autoencoder = light_decoder = None
    if config["latent"]:  # RUN/checkpoints/step_... lies two levels below RUN
        autoencoder_folder = folder.parent.parent / AUTOENCODER_FOLDER
        autoencoder = load_autoencoder(autoencoder_folder, device)
        light_decoder = load_light_decoder(autoencoder_folder, device) if decoder == "light" else None
    elif decoder == "light":
        raise UserError(f"{path}: works on pixels and has no decoder; leave out --decoder light")
    return TrainedModel(
        generator.to(device).eval().requires_grad_(False),
        Diffusion(vp_betas(config["num_timesteps"], beta_max=config.get("beta_max", BETA_MAX))),
        autoencoder,
        (channels, side, side),
        description["resolution"],
        light_decoder,
    )


def keep_autoencoder(autoencoder: Path, run: Path) -> None:
    """Copy an autoencoder, with its light decoder if it has one, into a run that then can make images alone."""
    folder = run / AUTOENCODER_FOLDER
    if folder.exists():
        return
    copy_autoencoder(autoencoder, folder)
    if (light_decoder := light_decoder_folder(autoencoder)).exists():
        shutil.copytree(light_decoder, light_decoder_folder(folder))

"""Trained generators on disk, and the folder that makes them whole: averaged weights, process, autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.loading import load_autoencoder
from autoencoder.networks import AutoencoderKL
from ldgan.diffusion import Diffusion, vp_betas
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
    """A generator in eval mode with all it needs to make images; ``autoencoder`` is None for pixels."""

    generator: Generator
    diffusion: Diffusion
    autoencoder: AutoencoderKL | None
    data_shape: tuple[int, int, int]
    resolution: int  # of the images, in pixels

    def sample(self, seeds: list[int]) -> Tensor:
        """Samples of x_0, (B, C, s, s): one for each seed, the same whatever the batch."""
        device = next(self.generator.parameters()).device
        noise = noise_from_seeds(seeds, self.data_shape, self.generator.z_dim, self.diffusion.num_steps, device)
        return sample(self.generator, self.diffusion, noise)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W) on the CPU, of samples of x_0."""
        return to_uint8(self.autoencoder.decode(x_0) if self.autoencoder is not None else x_0).cpu()


def load_model(path: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Load a run of ldgan/train.py, at its latest checkpoint, or one of its checkpoints.

    Raises:
        UserError: ``path`` is neither, or is damaged, or the run's copy of the autoencoder is missing.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if description.get("kind") != KIND:
        raise UserError(f"{path}: holds an {description.get('kind')}, not a {KIND}; give a run of ldgan/train.py")
    config = description["config"]
    channels, side, _ = description["data_shape"]
    generator = build_generator(from_dict(GeneratorConfig, config["generator"], str(folder)), (channels, side, side))
    load_thing(folder, WEIGHTS, generator)
    autoencoder = None
    if config["latent"]:  # RUN/checkpoints/step_... lies two levels below RUN
        autoencoder = load_autoencoder(folder.parent.parent / AUTOENCODER_FOLDER, device)
    return TrainedModel(
        generator.to(device).eval().requires_grad_(False),
        Diffusion(vp_betas(config["num_timesteps"], beta_max=config["beta_max"])),
        autoencoder,
        (channels, side, side),
        description["resolution"],
    )

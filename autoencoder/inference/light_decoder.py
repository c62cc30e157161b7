"""Light decoders on disk, each beside the autoencoder whose decoder it imitates."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.diffusers_format import is_diffusers_folder
from autoencoder.models.light_decoder import LightDecoder, LightDecoderConfig, build_light_decoder
from autoencoder.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from ldgan.engine.checkpoint import read_description
from ldgan.engine.cli import UserError
from ldgan.engine.rebuilding import field, load_network, read_numbers
from ldgan.engine.run import resolve_checkpoint, run_of

KIND = "light decoder"
WEIGHTS = "light_decoder_ema"  # the averaged weights are the ones that are used
FOLDER = "light_decoder"
NUM_FIT_IMAGES, FIT_SIDE = 4, 8  # on which an AutoencoderTiny is tried, and the height and width of their latents
# A distilled decoder of digits explained 78 to 93 % on images that it was never shown, and up to 6 % with the channels
# of its latents exchanged or negated.
MIN_EXPLAINED = 0.5
NUM_LEAVES = 40  # of an image


def light_decoder_folder(run: str | os.PathLike[str]) -> Path:
    """Where the light decoder of an autoencoder lives: inside its run, or its folder if it has no run."""
    return run_of(Path(run)) / FOLDER


def load_light_decoder(run: str | os.PathLike[str], device: torch.device | str = "cpu") -> LightDecoder:
    """Load the light decoder of the autoencoder in ``run``, in eval mode and without gradients.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another autoencoder.
    """
    folder = light_decoder_folder(run)
    if not folder.exists():
        raise UserError(f"{folder}: there is no light decoder of this autoencoder yet; {_how_to_train(run)}")
    return read_light_decoder(folder, load_autoencoder(run), device)


def read_light_decoder(
    path: str | os.PathLike[str], autoencoder: AutoencoderKL, device: torch.device | str = "cpu"
) -> LightDecoder:
    """Load the averaged weights of a light decoder for the latents of ``autoencoder``: as `load_light_decoder`,
    from any folder that holds one, a run of autoencoder/distill.py included.

    An AutoencoderTiny that diffusers saved (TAESD, say) is one too, where `fit_scale` finds that it knows the latents.

    Raises:
        UserError: ``path`` holds none, is damaged, or belongs to another autoencoder.
    """
    light = _load_tiny(Path(path), autoencoder) if is_diffusers_folder(path) else _load_light(Path(path), autoencoder)
    # A tenth to a third faster in this memory format on a CPU.
    return light.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _load_light(path: Path, autoencoder: AutoencoderKL) -> LightDecoder:
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if description.get("kind") != KIND:
        raise UserError(f"{path}: holds {description.get('kind')!r}, not a {KIND}; give one of autoencoder/distill.py")
    made_for, given = field(folder, description, "autoencoder", str), fingerprint(autoencoder)
    if made_for != given:
        raise UserError(
            f"{path}: light decoder of another autoencoder (fingerprint {made_for[:12]}, given {given[:12]});"
            f" give the autoencoder it was trained for, or {_how_to_train('RUN')}"
        )
    config = read_numbers(LightDecoderConfig, folder, field(folder, description, "config", dict), "network")
    return load_network(folder, WEIGHTS, lambda: build_light_decoder(config, autoencoder))


def _load_tiny(folder: Path, autoencoder: AutoencoderKL) -> TinyDecoder:
    tiny = load_tiny_decoder(folder).to(autoencoder.latent_mean.device)
    numbers = (autoencoder.config.latent_channels, autoencoder.config.image_channels, autoencoder.downsampling_factor)
    if (found := (tiny.layers[0].in_channels, tiny.layers[-1].out_channels, tiny.downsampling_factor)) != numbers:
        raise UserError(
            f"{folder}: its latent channels, image channels and factor are {found}, the autoencoder's {numbers};"
            " give an AutoencoderTiny of this autoencoder"
        )
    explained = fit_scale(tiny, autoencoder)
    if explained < MIN_EXPLAINED:
        raise UserError(
            f"{folder}: does not know these latents, it explains {explained:.0%} of the variance of what the"
            f" autoencoder decodes, and {MIN_EXPLAINED:.0%} is needed; give an AutoencoderTiny of this autoencoder"
        )
    return tiny


@torch.no_grad()
def fit_scale(tiny: TinyDecoder, autoencoder: AutoencoderKL) -> float:
    """Set the scale of latents with which ``tiny`` comes closest to the autoencoder's own decoder, and tell how close.

    Both decode the latents of `dead_leaves`: far from the latents of images, in N(0, I) say, a decoder that was
    distilled on those of images has nothing in common with its original. The scale stays 1, as for an autoencoder with
    its published statistics, unless another halves the squared error at least.

    Returns:
        The share of the variance of the autoencoder's pixels, around the mean of each channel, that ``tiny`` explains:
        1 for equal images, at most 0 for images that have nothing to do with each other.
    """
    side = FIT_SIDE * autoencoder.downsampling_factor
    images = dead_leaves(NUM_FIT_IMAGES, autoencoder.config.image_channels, side)
    latents = autoencoder.encode(images.to(autoencoder.latent_mean.device)).mean
    reference = autoencoder.decode(latents)

    def squared_error(log_scale: float) -> float:
        tiny.scale.fill_(2.0**log_scale)
        return (tiny.decode(latents) - reference).square().mean().item()

    best, error_of_1 = 0.0, squared_error(0.0)
    for step in (1.0, 0.25, 0.05):  # octaves
        best = min((best + step * number for number in range(-4, 5)), key=squared_error)
    if squared_error(best) > error_of_1 / 2:
        best = 0.0
    error = squared_error(best)  # which leaves the scale as it shall be
    return 1 - error / (reference - reference.mean(dim=(0, 2, 3), keepdim=True)).square().mean().item()


def dead_leaves(num_images: int, channels: int, side: int) -> Tensor:
    """Images (N, C, side, side) in [-1, 1] of opaque discs one over the other, the same at every call.

    Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001: with radii r of density 1 / r^2 they have
    the statistics of photographs.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.zeros(num_images, channels, side, side)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
    for image in images:
        for _ in range(NUM_LEAVES):
            centre, radius = side * torch.rand(2, generator=random), side / 40 / torch.rand(1, generator=random)
            disc = (places - centre).square().sum(dim=-1) < radius.clamp(max=side / 2).square()
            image[:, disc] = 2 * torch.rand(channels, 1, generator=random) - 1
    return images


def add_decoder_flag(parser: argparse.ArgumentParser) -> None:
    """``--decoder``: which of an autoencoder's two decoders a command uses."""
    parser.add_argument(
        "--decoder",
        choices=("full", "light"),
        default="full",
        help="the autoencoder's own, or the light one in its folder light_decoder, which autoencoder/distill.py made or"
        " which is diffusers' AutoencoderTiny of these latents, TAESD say (default: full)",
    )


def _how_to_train(run: str | os.PathLike[str]) -> str:
    command = "accelerate launch autoencoder/distill.py --config configs/autoencoder/light_small.yaml"
    return f"train one: {command} autoencoder={os.fspath(run)} latents=SHARDS"

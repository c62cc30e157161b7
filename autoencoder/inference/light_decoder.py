"""Light decoders on disk, each beside the autoencoder whose decoder it imitates."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder, LightDecoderConfig, build_light_decoder
from ldgan.engine.checkpoint import read_description
from ldgan.engine.cli import UserError
from ldgan.engine.rebuilding import field, load_network, read_numbers
from ldgan.engine.run import resolve_checkpoint, run_of

KIND = "light decoder"
WEIGHTS = "light_decoder_ema"  # the averaged weights are the ones that are used
FOLDER = "light_decoder"


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

    Raises:
        UserError: ``path`` holds none, is damaged, or belongs to another autoencoder.
    """
    folder = resolve_checkpoint(Path(path))
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
    light = load_network(folder, WEIGHTS, lambda: build_light_decoder(config, autoencoder))
    # A tenth to a third faster in this memory format on a CPU.
    return light.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def add_decoder_flag(parser: argparse.ArgumentParser) -> None:
    """``--decoder``: which of an autoencoder's two decoders a command uses."""
    parser.add_argument(
        "--decoder",
        choices=("full", "light"),
        default="full",
        help="the autoencoder's own, or the one that autoencoder/distill.py made of it (default: full)",
    )


def _how_to_train(run: str | os.PathLike[str]) -> str:
    command = "accelerate launch autoencoder/distill.py --config configs/autoencoder/light_small.yaml"
    return f"train one: {command} autoencoder={os.fspath(run)} latents=SHARDS"

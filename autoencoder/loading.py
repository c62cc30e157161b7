"""Finished autoencoders on disk, and the fingerprint that ties latents to the autoencoder that made them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from autoencoder.networks import AutoencoderConfig, AutoencoderKL
from ldgan.engine.checkpoint import load_thing, read_description, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import from_dict
from ldgan.engine.run import resolve_checkpoint

KIND = "autoencoder"
WEIGHTS = "autoencoder_ema"  # the averaged weights are the ones that are used


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """A fresh autoencoder with the numbers of ``config``."""
    return AutoencoderKL(**vars(config))


def load_autoencoder(path: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Load the averaged weights of a finished run, or of one checkpoint, in eval mode and without gradients.

    Raises:
        UserError: ``path`` is no autoencoder, is damaged, or its training has not ended yet, so that its
            latent statistics are unknown.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if description.get("kind") != KIND:
        raise UserError(f"{path}: holds a {description.get('kind')}, not an {KIND}; give a run of autoencoder/train.py")
    if "latent_statistics" not in description:
        raise UserError(f"{path}: its training has not ended; run the same autoencoder/train.py command to the end")
    autoencoder = build_autoencoder(from_dict(AutoencoderConfig, description["config"]["network"], str(folder)))
    load_thing(folder, WEIGHTS, autoencoder)
    return autoencoder.to(device).eval().requires_grad_(False)


def copy_autoencoder(path: Path, folder: Path) -> None:
    """Save a finished autoencoder of ``path`` again as ``folder``, without what only training needs."""
    source = read_description(resolve_checkpoint(path))
    kept = {key: value for key, value in source.items() if key not in ("format", "libraries", "things")}
    save_checkpoint(folder, {WEIGHTS: load_autoencoder(path)}, kept)


def fingerprint(autoencoder: AutoencoderKL) -> str:
    """SHA-256 (hex) over names, shapes and bytes of all weights and latent statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Trained classifiers on disk, checked against the model that they are to guide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldgan.diffusion.process import Diffusion
from ldgan.engine.checkpoint import read_description
from ldgan.engine.cli import UserError
from ldgan.engine.rebuilding import field, load_network, read_numbers
from ldgan.engine.run import resolve_checkpoint
from ldgan.inference.descriptions import DataDescription, ProcessDescription
from ldgan.models.classifier import Classifier, ClassifierConfig, build_classifier

KIND = "classifier of noisy samples"
WEIGHTS = "classifier_ema"  # the averaged weights are the ones that guide


def load_classifier(
    path: Path, device: torch.device | str, diffusion: Diffusion, guided: Mapping[str, Any]
) -> Classifier:
    """Load a run of ldgan/train_classifier.py, or one of its checkpoints, to guide a model.

    ``diffusion`` is the model's process, ``guided`` the description in its checkpoint.

    Raises:
        UserError: ``path`` is neither, or is damaged, or the classifier was trained on another process, other latents
            or other classes than the model.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if description.get("kind") != KIND:
        raise UserError(
            f"{path}: holds a {description.get('kind')}, no {KIND}; give a run of ldgan/train_classifier.py"
        )
    config = field(folder, description, "config", dict)
    data, process = DataDescription.of(folder, description), ProcessDescription.of(config, str(folder))
    if not same_process(process.diffusion(), diffusion):
        settings = f"schedule={process.schedule} num_timesteps={process.num_timesteps} beta_max={process.beta_max}"
        raise UserError(
            f"{path}: was trained with {settings}, the model with other noise levels; train one with its own"
        )
    for key, what in (("data_shape", "samples of another shape"), ("autoencoder", "latents of another autoencoder")):
        if description.get(key) != guided.get(key):
            raise UserError(f"{path}: was trained on {what} than the model's; train one on the model's data")
    if guided.get("class_names") not in (None, data.class_names):
        raise UserError(f"{path}: was trained on other classes than the model's; train one on the model's data")
    numbers = read_numbers(ClassifierConfig, folder, config, "network")
    classifier = load_network(folder, WEIGHTS, lambda: build_classifier(numbers, data.shape, data.class_names or []))
    return classifier.to(device).eval().requires_grad_(False)


def same_process(first: Diffusion, second: Diffusion) -> bool:
    """Whether both have the same noise levels."""
    return first.num_steps == second.num_steps and torch.allclose(first.betas, second.betas, atol=0)

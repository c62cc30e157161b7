"""The judge of StackedMNIST: a small classifier of grey digits, trained here on real ones.

A KL on StackedMNIST is only as good as the classifier behind it. This one is trained in less than a minute on
two CPU cores, measures itself on digits that it never saw, and refuses to judge where it is not good enough.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

MINIMUM_ACCURACY = 0.98  # on held-out digits; below it a classifier refuses to judge
RESOLUTION = 32  # pixels

# A cached classifier of another format is trained anew: a change of the network or its training counts it up.
FORMAT = "ldgan digit classifier 1"
BATCH_SIZE = 100
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.1


class DigitClassifier(nn.Module):
    """Grey digits in [-1, 1], (N, 1, 32, 32), to logits, (N, 10): 3.7 M multiply-adds each."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_block(1, 16, kernel_size=5, stride=2),  # (N, 16, 16, 16)
            _conv_block(16, 32),
            _conv_block(32, 32, stride=2),  # (N, 32, 8, 8)
            _conv_block(32, 64),
            _conv_block(64, 64, stride=2),  # (N, 64, 4, 4)
        )
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.features(images).flatten(1))


def _conv_block(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    padding = kernel_size // 2
    # The norm brings the bias.
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in eval mode and how it came about.

    ``heldout_accuracy`` (0 to 1) is measured on ``num_heldout`` digits apart from the ``num_train`` that it
    learnt from; ``seconds`` is the wall-clock time of the training.
    """

    model: DigitClassifier
    heldout_accuracy: float
    num_train: int
    num_heldout: int
    seconds: float


def classify(model: DigitClassifier, images: Tensor, batch_size: int = 1000) -> np.ndarray:
    """Name the digit in each grey image, uint8 (N, 32, 32): integers 0..9, (N,).

    The work happens where the model lies; the model is left in eval mode.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (RESOLUTION, RESOLUTION):
        raise UserError(f"digits are {images.dtype} of shape {tuple(images.shape)}; give uint8 of shape (N, 32, 32)")
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = [model(_to_input(batch.to(device))).cpu() for batch in images.split(batch_size)]
    return torch.cat(logits).argmax(dim=1).numpy()


def train_digit_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_heldout: int,
    num_epochs: int,
    seed: int,
    show_progress: bool,
) -> TrainedClassifier:
    """Train on all but ``num_heldout`` digits, on the CPU, and measure the accuracy on those.

    Every training digit is bent, turned, scaled and shifted a little each time it is seen: a few thousand are
    then enough, and the judge is used to digits that are not quite like any real one. The same arguments give
    the same weights.

    Args:
        images: real digits, uint8 (N, 32, 32).
        labels: which digits they are, integers 0..9, (N,).
        num_heldout: digits set apart, in the proportions of ``labels``.
        num_epochs: passes over the remaining digits.
        seed: decides the split, the initial weights, the order and the distortions.
        show_progress: show a bar on stderr.

    Raises:
        UserError: shapes, types or label values are wrong, or ``num_heldout`` leaves nothing to train on.
    """
    _check_digits(images, labels, num_heldout)
    start = time.monotonic()
    train, heldout = _stratified_split(labels, num_heldout, seed)
    with torch.random.fork_rng(devices=[]):  # initial weights come from torch's global generator
        torch.manual_seed(seed)
        model = DigitClassifier()
    _fit(model, _to_input(images[train]), labels[train].long(), num_epochs, seed, show_progress)
    accuracy = float(np.mean(classify(model, images[heldout]) == labels[heldout].numpy()))
    return TrainedClassifier(model, accuracy, len(train), len(heldout), seconds=time.monotonic() - start)


def load_or_train(
    cache: Path,
    images: Tensor,
    labels: Tensor,
    *,
    num_heldout: int = 1000,
    num_epochs: int = 20,
    seed: int = 0,
    show_progress: bool = True,
) -> TrainedClassifier:
    """`train_digit_classifier`, remembered in the safetensors file ``cache``.

    The file tells which digits and settings its weights come from; for any others the classifier is trained
    anew and replaces it. The other arguments are those of `train_digit_classifier`.

    Raises:
        UserError: held-out accuracy is below `MINIMUM_ACCURACY`, or ``cache`` is not a classifier's file.
    """
    training = {"num_heldout": num_heldout, "num_epochs": num_epochs, "seed": seed}
    recipe = {"format": FORMAT, "data_sha256": _sha256(images, labels), **training}
    trained = _load(cache, recipe)
    if trained is None:
        trained = train_digit_classifier(images, labels, **training, show_progress=show_progress)
        _save(cache, trained, recipe)
    if trained.heldout_accuracy < MINIMUM_ACCURACY:
        raise UserError(
            f"the digit classifier {cache} refuses to judge: it knows {trained.heldout_accuracy:.2%} of "
            f"{trained.num_heldout:,} held-out digits, and {MINIMUM_ACCURACY:.0%} are needed; "
            "train it on more digits or for more epochs"
        )
    return trained


def _check_digits(images: Tensor, labels: Tensor, num_heldout: int) -> None:
    if images.dtype != torch.uint8 or images.shape != (len(labels), RESOLUTION, RESOLUTION):
        raise UserError(
            f"digits are {images.dtype} of shape {tuple(images.shape)} for {len(labels)} labels; "
            f"give uint8 of shape ({len(labels)}, 32, 32)"
        )
    if not 0 < num_heldout <= len(labels) - BATCH_SIZE:
        raise UserError(
            f"{num_heldout} of {len(labels)} digits are to be held out; "
            f"hold out at least one and leave {BATCH_SIZE} to train on"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"labels run from {labels.min()} to {labels.max()}; digits are 0 to 9")


def _stratified_split(labels: Tensor, num_heldout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to hold out; each digit is held out in its proportion, give or take one."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_digit = shuffled[np.argsort(labels.numpy()[shuffled], kind="stable")]  # in random order within a digit
    held = np.linspace(0, len(labels), num_heldout, endpoint=False).astype(int)
    return np.delete(by_digit, held), by_digit[held]


def _to_input(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float() / 127.5 - 1  # NHW, uint8 => NCHW, [-1, 1]


def _fit(
    model: DigitClassifier, images: Tensor, labels: Tensor, num_epochs: int, seed: int, show_progress: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_batches = len(images) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=num_batches * num_epochs)
    model.train()
    with progress_bar("digit classifier", num_epochs, "epochs", enabled=show_progress) as progress:
        for _ in range(num_epochs):
            order = torch.randperm(len(images), generator=generator)[: num_batches * BATCH_SIZE]
            for batch in order.split(BATCH_SIZE):
                logits = model(_distort(images[batch], generator))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.advance(notes=f"loss {loss.item():.3f}")


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 15 degrees, scale by 15 %, shear by 0.2, shift by 2.4 pixels, and bend smoothly."""
    num_images = len(images)
    angle, scale, shear, dx, dy = 2 * torch.rand(5, num_images, generator=generator) - 1  # each in [-1, 1)
    cos, sin = torch.cos(math.radians(15) * angle), torch.sin(math.radians(15) * angle)
    scale = 1 + 0.15 * scale
    rows = torch.stack([scale * cos, 0.2 * shear - sin, 0.15 * dx, sin, scale * cos, 0.15 * dy], dim=1)
    grid = F.affine_grid(rows.view(num_images, 2, 3), list(images.shape), align_corners=False)
    # Elastic distortion (Simard et al. 2003): displacements of about a pixel on a coarse grid, made smooth.
    bend = 0.06 * torch.randn(num_images, 2, 5, 5, generator=generator)
    bend = F.interpolate(bend, size=images.shape[-2:], mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)  # (N, 32, 32, 2)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def _sha256(images: Tensor, labels: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes() + labels.long().numpy().tobytes()).hexdigest()


def _save(cache: Path, trained: TrainedClassifier, recipe: dict[str, Any]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_name(f".{cache.name}.{os.getpid()}")
    result = {field.name: getattr(trained, field.name) for field in fields(trained) if field.name != "model"}
    metadata = {"recipe": json.dumps(recipe), "result": json.dumps(result)}  # safetensors holds strings only
    save_file(trained.model.state_dict(), unfinished, metadata)
    os.replace(unfinished, cache)


def _load(cache: Path, recipe: dict[str, Any]) -> TrainedClassifier | None:
    """The classifier in ``cache``, or None where there is none or it comes from another recipe."""
    if not cache.exists():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError:
        raise UserError(f"{cache} is not a safetensors file; delete it, or name another cache") from None
    if "recipe" not in metadata:
        raise UserError(f"{cache} holds no digit classifier; name another cache")
    if json.loads(metadata["recipe"]) != recipe:
        return None
    model = DigitClassifier()
    model.load_state_dict(weights)
    return TrainedClassifier(model.eval(), **json.loads(metadata["result"]))

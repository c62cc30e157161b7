"""Samples by the number: flags and loop that sampling and evaluation share, and previews in training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.progress import progress_bar
from ldgan.engine.run import resolve_checkpoint
from ldgan.engine.session import Session
from ldgan.engine.shares import batches, share
from ldgan.loading import TrainedModel, load_model
from ldgan.sampling import Callback, SamplerConfig

NUM_PREVIEW_IMAGES, PREVIEW_COLUMNS = 64, 16


@dataclass(frozen=True)
class Job:
    """Samples to be made: image number i from seed ``first_seed`` + i, whatever the batch and the number of processes.

    Its label is ``labels[i]``, where they are given; they are gone through again and again.
    """

    model: TrainedModel
    sampler: SamplerConfig
    labels: list[int] | None
    num_images: int
    first_seed: int
    batch_size: int

    def sample(self, numbers: Sequence[int], callback: Callback | None = None) -> Tensor:
        """Samples of x_0, (B, C, s, s), of the images with these numbers."""
        seeds = [self.first_seed + number for number in numbers]
        return self.model.sample(seeds, self.labels_of(numbers), self.sampler, callback)

    def labels_of(self, numbers: Sequence[int]) -> list[int] | None:
        """The labels of the images with these numbers."""
        return [self.labels[number % len(self.labels)] for number in numbers] if self.labels else None

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return self.sampler.num_steps or self.model.diffusion.num_steps

    @property
    def evaluations_per_image(self) -> int:
        """How often the network is evaluated for one sample; a classifier, once a step, is not counted."""
        return self.num_steps * (1 if self.sampler.guidance_scale == 1 else 2)


def job_of(flags: argparse.Namespace, device: torch.device) -> Job:
    """What a command's flags ask for: ``--checkpoint``, ``--num-images``, ``--seed``, ``--batch-size``,
    ``--decoder`` and those of `add_sampler_flags`.
    """
    sampler = sampler_of(flags)
    model = open_model(flags.checkpoint, sampler, device, flags.decoder)
    labels = labels_of(flags.labels, model)
    return Job(model, sampler, labels, flags.num_images, flags.seed, flags.batch_size)


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is sampled, and which classes; `job_of` reads the flags."""
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler",
        choices=("ancestral", "ddim"),
        default="ancestral",
        help="ancestral: as a model was trained; ddim: for a DDPM run in few steps (default: ancestral)",
    )
    group.add_argument(
        "--steps",
        type=cli.positive,
        metavar="N",
        help="steps, evenly among those of training: 50, say, for a DDPM run with ddim (default: all)",
    )
    group.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="noise of ddim, from 0, none, to 1 (default: 0)"
    )
    group.add_argument(
        "--labels",
        metavar="LIST",
        help="classes of the images, gone through again and again: numbers from 0, ranges or names of class folders,"
        " as in 3,7,100-199 or cat,dog, or the word all (default: drawn from the seeds, for a model that was trained"
        " with classes)",
    )
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="classifier-free guidance of a model trained with label_dropout: 0 ignores labels, 1 is the plain model,"
        " 2 to 8 follow labels closer at twice the evaluations (default: 1)",
    )
    group.add_argument(
        "--classifier",
        type=Path,
        metavar="RUN",
        help="a run of ldgan/train_classifier.py, which guides to --labels; the model itself may know no classes",
    )
    group.add_argument(
        "--classifier-scale", type=float, default=1.0, metavar="S", help="scale of its gradient: 1 to 10 (default: 1)"
    )


def sampler_of(flags: argparse.Namespace) -> SamplerConfig:
    """The sampler that the flags of `add_sampler_flags` ask for; a UserError where they contradict each other."""
    sampler = SamplerConfig(
        method=flags.sampler,
        num_steps=flags.steps or 0,
        eta=flags.eta,
        guidance_scale=flags.guidance,
        classifier=str(flags.classifier) if flags.classifier else None,
        classifier_scale=flags.classifier_scale,
    )
    sampler.validate()
    return sampler


def open_model(
    checkpoint: Path,
    sampler: SamplerConfig,
    device: torch.device | str = "cpu",
    decoder: Literal["full", "light"] = "full",
) -> TrainedModel:
    """Load a model with the classifier of its sampler.

    Raises:
        UserError: see `load_model`; or the model cannot be sampled this way.
    """
    classifier = Path(sampler.classifier) if sampler.classifier else None
    model = load_model(checkpoint, device, decoder, classifier)
    if sampler.guidance_scale != 1:
        _check_guidance(checkpoint, model)
    all_steps = model.diffusion.num_steps
    num_steps = sampler.num_steps or all_steps
    if num_steps > all_steps:
        raise cli.UserError(
            f"{checkpoint}: has {all_steps} steps, and {num_steps} are asked; give --steps 1 to {all_steps}"
        )
    if model.predicts == "x_previous" and (sampler.method != "ancestral" or num_steps < all_steps):
        raise cli.UserError(f"{checkpoint}: predicts x_{{t-1}} itself, step by step; leave out --sampler and --steps")
    # At t = 1 the posterior is a point.
    certain = model.predicts == "x_previous" or (num_steps == 1 and model.variance == "posterior")
    if classifier is not None and sampler.method == "ancestral" and certain:
        raise cli.UserError(f"{checkpoint}: its steps have no variance for --classifier to act on; leave it out")
    return model


def _check_guidance(checkpoint: Path, model: TrainedModel) -> None:
    """Raise a UserError unless the model has learnt to do with labels and without."""
    if not model.class_names:
        raise cli.UserError(f"{checkpoint}: was trained without classes; leave out --guidance, or use --classifier")
    if not read_description(resolve_checkpoint(checkpoint))["config"].get("label_dropout"):
        raise cli.UserError(
            f"{checkpoint}: cannot do without labels, as --guidance needs; train with label_dropout=0.1"
        )


def labels_of(text: str | None, model: TrainedModel) -> list[int] | None:
    """The labels that ``--labels`` names, None where it is not given.

    Raises:
        UserError: the model knows no classes or no such class, or it has a classifier and would need labels.
    """
    names = class_names_of(model)
    if text is None:
        if names and not model.class_names:
            raise cli.UserError(f"--classifier guides to labels; give --labels, such as --labels 0-{len(names) - 1}")
        return None
    if not names:
        raise cli.UserError("--labels: the model was trained without classes; leave it out, or add --classifier RUN")
    if text == "all" and "all" not in names:
        return list(range(len(names)))
    return [label for item in text.split(",") for label in _labels_of_item(item.strip(), names)]


def class_names_of(model: TrainedModel) -> list[str]:
    """Names of the classes 0, 1, ... that the model's labels may be, its classifier's if it has none itself."""
    return model.class_names or (model.classifier.class_names if model.classifier is not None else [])


def _labels_of_item(item: str, names: Sequence[str]) -> Sequence[int]:
    """The labels of ``7``, ``100-199`` or a class's name."""
    if item in names and not item.isdecimal():
        return [names.index(item)]
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first <= last < len(names):
            return range(first, last + 1)
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise cli.UserError(f"--labels: no class {item!r}; the model knows 0 to {len(names) - 1}, or by name: {some}")


def generate(accelerator: Accelerator, job: Job) -> Iterator[tuple[range, Tensor]]:
    """Yield this process's image numbers and their samples of x_0 (B, C, s, s), with a progress bar."""
    mine = share(job.num_images, accelerator.process_index, accelerator.num_processes)
    with progress_bar("sampling", len(mine), "images", enabled=accelerator.is_main_process) as bar:
        for numbers in batches(mine, job.batch_size):
            with accelerator.autocast():
                x_0 = job.sample(numbers)
            yield numbers, x_0
            bar.advance(len(numbers))


def generate_images(accelerator: Accelerator, job: Job) -> Iterator[tuple[range, Tensor]]:
    """The same, decoded: image numbers and images, uint8 (B, 3, H, W)."""
    for numbers, x_0 in generate(accelerator, job):
        with accelerator.autocast():
            images = job.model.decode(x_0)
        yield numbers, images


def preview(
    session: Session, step: int, model: TrainedModel, accelerator: Accelerator, sampler: SamplerConfig | None = None
) -> None:
    """Log a grid of samples if it is time for one."""
    if session.wants_preview(step):
        with accelerator.autocast():
            images = model.decode(model.sample(range(NUM_PREVIEW_IMAGES), sampler=sampler))
        session.preview(step, "samples", images, PREVIEW_COLUMNS)

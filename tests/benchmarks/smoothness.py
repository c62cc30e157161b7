"""How smooth interpolation is: the largest step from frame to frame in a feature space.

    python tests/benchmarks/smoothness.py --checkpoint runs/mine/gan --features squeezenet --feature-weights SQUEEZENET
    python tests/benchmarks/smoothness.py --checkpoint runs/mine/gan --num-pairs 20 --num-frames 33

Pairs of seeds are joined by --num-frames frames, along z, along x_T and along both. A step is the distance of the
features of neighbouring frames, over the mean distance of the samples of the pairs' seeds. In F frames the least that
the largest step of a way between two such samples can be is 1 / (F - 1); a way that jumps has one of about 1.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ldgan.engine import cli
from ldgan.engine.progress import progress_bar
from ldgan.inference.editing import Along, interpolate
from ldgan.inference.trained_model import TrainedModel, load_model
from ldgan.metrics.features import FeatureNetwork, add_feature_flags, chosen_features, feature_network


def main() -> None:
    """Interpolate, measure, print a table."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    name, weights = chosen_features(flags, "squeezenet")
    assert name is not None
    model, network = load_model(flags.checkpoint), feature_network(name, weights, "cpu")
    pairs = [(2 * pair, 2 * pair + 1) for pair in range(flags.num_pairs)]
    unit = mean_distance(model, network, pairs)
    table = Table(title=f"{flags.num_pairs} pairs of seeds, {flags.num_frames} frames, features of {name}")
    for column in ("along", "end to end", "largest step (median)", "largest step (most)", "mean step"):
        table.add_column(column, justify="left" if column == "along" else "right")
    with progress_bar("interpolating", len(pairs) * len(get_args(Along)), "ways") as bar:
        for along in get_args(Along):
            ways = []
            for pair in pairs:
                images = interpolate(model, *pair, flags.num_frames, along=along)
                ways.append(network(images).double() / unit)
                bar.advance()
            table.add_row(along, *(f"{number:.3f}" for number in summary(torch.stack(ways))))
    Console(width=110).print(table)


def mean_distance(model: TrainedModel, network: FeatureNetwork, pairs: list[tuple[int, int]]) -> float:
    """Mean distance of the features of the samples of two seeds."""
    first, second = (network(model.decode(model.sample(seeds))).double() for seeds in zip(*pairs))
    return (first - second).norm(dim=1).mean().item()


def summary(ways: Tensor) -> tuple[float, float, float, float]:
    """Of features (ways, frames, d): mean distance of the ends; median and maximum of largest steps; mean step."""
    steps = ways.diff(dim=1).norm(dim=2)  # (ways, frames - 1)
    ends = (ways[:, -1] - ways[:, 0]).norm(dim=1)
    largest = steps.amax(dim=1)
    return ends.mean().item(), largest.median().item(), largest.max().item(), steps.mean().item()


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run of ldgan/train.py")
    parser.add_argument("--num-pairs", type=cli.positive, default=20, help="pairs of seeds (default: 20)")
    parser.add_argument("--num-frames", type=cli.positive, default=17, help="frames of a way (default: 17)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    add_feature_flags(parser, "squeezenet")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

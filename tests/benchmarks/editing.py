"""Seconds per edit by a diffusion GAN and by a diffusion model on the same latents: SDEdit, and inpainting by RePaint.

    python tests/benchmarks/editing.py --gan runs/mine/gan --ddpm runs/mine/ddpm --images data/mine
    python tests/benchmarks/editing.py --gan runs/mine/gan --ddpm runs/mine/ddpm --images photos --batch-size 16 \\
        --strength 0.5 --num-resamples 5 --repeats 5

Every sampler edits the same --batch-size images (a folder of pictures, or image shards), encoding and decoding
included, at the same strength, and fills the same hole, the right half, with the same number of resamples. All take
turns in one process: medians over --repeats, after an untimed turn each, with the interquartile range behind them.
Evaluations of the network are counted. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoencoder.inference.trained_autoencoder import fingerprint
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine import cli
from ldgan.engine.progress import progress_bar
from ldgan.evaluation.image_sets import open_images
from ldgan.inference.editing import edit, inpaint, step_of_strength
from ldgan.inference.timing import Spread, count_samples, now
from ldgan.inference.trained_model import TrainedModel, load_model


class Row(NamedTuple):
    """An edit by one sampler."""

    task: str
    name: str
    model: TrainedModel
    work: Callable[[], Tensor]


def main() -> None:
    """Time the edits in turn, print a table."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gan, ddpm = (load_model(path, device) for path in (flags.gan, flags.ddpm))
    check_same_latents(gan, ddpm)
    images = torch.stack(
        [open_images(flags.images, resolution=gan.resolution).read(i) for i in range(flags.batch_size)]
    )
    rows = edits(gan, ddpm, images, flags)
    seconds, evaluations = take_turns(rows, flags.repeats)
    print_table(rows, [Spread.of(each) for each in seconds], evaluations, flags, device)


def check_same_latents(gan: TrainedModel, ddpm: TrainedModel) -> None:
    """Raise a UserError unless both models work on the same latents, or both on pixels of the same size."""
    made_by = [fingerprint(model.autoencoder) if model.autoencoder else None for model in (gan, ddpm)]
    if made_by[0] != made_by[1] or gan.resolution != ddpm.resolution:
        raise cli.UserError("--gan and --ddpm work on different latents; give runs with the same autoencoder")


def edits(gan: TrainedModel, ddpm: TrainedModel, images: Tensor, flags: argparse.Namespace) -> list[Row]:
    """All rows: both tasks by the diffusion GAN, by DDIM and by ancestral sampling in all steps."""
    samplers = [
        (f"diffusion GAN, T = {gan.diffusion.num_steps}", gan, SamplerConfig()),
        (f"DDPM, ddim, {flags.ddim_steps} steps", ddpm, SamplerConfig("ddim", flags.ddim_steps)),
        (f"DDPM, ancestral, {ddpm.diffusion.num_steps} steps", ddpm, SamplerConfig()),
    ]
    masks = torch.zeros(len(images), 1, *images.shape[-2:], dtype=torch.bool)
    masks[..., images.shape[-1] // 2 :] = True
    seeds, rows = range(len(images)), []
    for name, model, sampler in samplers:
        step = step_of_strength(flags.strength, sampler.num_steps or model.diffusion.num_steps)
        work = functools.partial(edit, model, images, seeds, step=step, sampler=sampler)
        rows.append(Row(f"SDEdit, strength {flags.strength:g}", name, model, work))
    for name, model, sampler in samplers:
        work = functools.partial(
            inpaint, model, images, masks, seeds, num_resamples=flags.num_resamples, sampler=sampler
        )
        rows.append(Row(f"inpainting, {flags.num_resamples} resamples", name, model, work))
    return rows


def take_turns(rows: list[Row], repeats: int) -> tuple[list[list[float]], list[int]]:
    """Seconds of each row in each turn but the first, and samples that passed through its network in one."""
    seconds: list[list[float]] = [[] for _ in rows]
    evaluations = [0] * len(rows)
    with progress_bar("editing", (1 + repeats) * len(rows), "edits") as bar:
        for turn in range(1 + repeats):
            for number, row in enumerate(rows):
                with count_samples(row.model.network) as count:
                    started = now()
                    row.work()
                    seconds[number] += [now() - started] if turn else []
                evaluations[number] = count()
                bar.advance()
    return seconds, evaluations


def print_table(
    rows: list[Row], seconds: list[Spread], evaluations: list[int], flags: argparse.Namespace, device: str
) -> None:
    """One line for each row; speeds are beside the diffusion GAN at the same task."""
    threads = f"{flags.threads} threads, " if device == "cpu" else ""
    machine = f"{threads}{device}, {platform.machine()}, torch {torch.__version__}"
    table = Table(title=f"{machine}; {flags.batch_size} images of {rows[0].model.resolution} px at a time")
    columns = ("edit", "sampler", "evaluations an image", "s an image (median)", "interquartile range", "times as long")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    fastest: dict[str, float] = {}
    for row, spread, count in zip(rows, seconds, evaluations):
        size = flags.batch_size
        own = fastest.setdefault(row.task, spread.median)
        times = (
            f"{spread.median / size:.4g}",
            f"{(spread.upper - spread.lower) / size:.2g}",
            f"{spread.median / own:.1f}",
        )
        table.add_row(row.task, row.name, f"{count / size:,.0f}", *times)
    Console(width=140).print(table)


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gan", type=Path, required=True, metavar="RUN", help="run of ldgan/train.py")
    parser.add_argument("--ddpm", type=Path, required=True, metavar="RUN", help="run of ldgan/train_ddpm.py")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures, or image shards")
    parser.add_argument("--batch-size", type=cli.positive, default=1, help="images edited together (default: 1)")
    parser.add_argument("--strength", type=float, default=0.5, help="of SDEdit, above 0 to 1 (default: 0.5)")
    parser.add_argument("--num-resamples", type=cli.positive, default=5, help="of inpainting (default: 5)")
    parser.add_argument("--ddim-steps", type=cli.positive, default=50, help="steps of ddim (default: 50)")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="timed turns of each (default: 5)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

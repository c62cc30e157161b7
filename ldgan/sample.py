"""Sample from a trained diffusion GAN or DDPM: numbered PNG files and a grid, or latents to decode later."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import math
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.latents import describe_latents, pack_caption, pack_moments
from data_prep.shards import ShardWriter
from ldgan.engine import cli
from ldgan.engine.files import BackgroundWrites, new_folder, temporary_name
from ldgan.engine.images import enlarge, image_grid, load_png, save_png
from ldgan.engine.session import add_precision_flag, make_accelerator
from ldgan.inference.jobs import (
    Job,
    add_model_flags,
    add_sampler_flags,
    class_names_of,
    generate,
    generate_images,
    job_of,
)

GRID_FILE, MAX_GRID_IMAGES = "grid.png", 64
STEPS_FILE, MAX_STEPS_ROWS, MAX_STEPS_COLUMNS = "steps.png", 8, 10

EXAMPLES = """
examples:
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 64 --out samples/png
  accelerate launch ldgan/sample.py --checkpoint runs/gan/checkpoints/step_000001000 --num-images 64 --out samples/early
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 10000 --out samples/latents --save latents
  python autoencoder/decode.py --autoencoder runs/ae --latents samples/latents --out samples/png
  accelerate launch ldgan/sample.py --checkpoint runs/ddpm --sampler ddim --steps 50 --num-images 64 --out samples/ddim
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 8 --steps-grid --out samples/steps
  accelerate launch ldgan/sample.py --checkpoint runs/classes --labels 3,7 --guidance 2 --num-images 64 --out samples/b
  accelerate launch ldgan/sample.py --checkpoint runs/gan --classifier runs/classifier --classifier-scale 4 \\
      --labels 100-199 --num-images 100 --out samples/guided

Image number i is made from seed --seed + i, whatever the batch size and the number of processes.
"""


def main() -> None:
    """Sample, decode, write."""
    flags = parse_flags()
    accelerator = make_accelerator(flags.precision)
    if flags.save == "latents" and flags.steps_grid:
        raise cli.UserError("--steps-grid is a picture, which --save latents does not make; leave one of them out")
    job = job_of(flags, accelerator.device)
    if flags.save == "latents" and job.model.autoencoder is None:
        raise cli.UserError(f"{flags.checkpoint}: works on pixels and has no latents to save; leave out --save latents")
    if flags.save == "latents" and accelerator.num_processes > 1:
        raise cli.UserError("--save latents writes from one process; launch it with --num_processes 1")
    if flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    started = time.monotonic()
    if flags.save == "latents":
        save_latents(accelerator, job, flags.out)
    else:
        save_images(accelerator, job, flags.out, steps_grid=flags.steps_grid)
    seconds = time.monotonic() - started
    accelerator.print(f"{flags.num_images:,} {flags.save} in {flags.out} ({flags.num_images / seconds:,.1f} a second)")


def save_images(accelerator: Accelerator, job: Job, out: Path, *, steps_grid: bool) -> None:
    """Write ``000000000.png``, ... and a grid of the first ones; every process writes its own images."""
    made_here = new_folder(out) if accelerator.is_main_process else nullcontext(temporary_name(out))
    with made_here as folder:
        accelerator.wait_for_everyone()  # until the folder is there
        with BackgroundWrites(max_pending=2 * job.batch_size) as writes:  # zlib works beside the networks
            for numbers, images in generate_images(accelerator, job):
                for number, image in zip(numbers, images):
                    writes.submit(save_png, folder / image_name(number), image)
        accelerator.wait_for_everyone()  # until all images are there
        if accelerator.is_main_process:
            save_grid(folder, min(job.num_images, MAX_GRID_IMAGES))
            if steps_grid:
                save_steps(accelerator, job, folder)


def save_grid(folder: Path, num_images: int) -> None:
    """Lay the first images in ``folder`` out in one picture, small ones enlarged."""
    images = torch.stack([load_png(folder / image_name(number)) for number in range(num_images)])
    save_png(folder / GRID_FILE, image_grid(enlarge(images), columns=math.ceil(math.sqrt(num_images))))


def save_steps(accelerator: Accelerator, job: Job, folder: Path) -> None:
    """Show how the first images come about: a row for each, with the estimates of x_0 from t = T to t = 1.

    Of very many steps the picture shows some, evenly, the first and the last among them.
    """
    num_columns = min(job.num_steps, MAX_STEPS_COLUMNS)
    shown = torch.linspace(job.num_steps, 1, num_columns, dtype=torch.float64).round().tolist()
    estimates = []

    def keep(t: int, x_0: Tensor, x_previous: Tensor) -> None:
        if t in shown:
            estimates.append(x_0)

    with accelerator.autocast():
        job.sample(range(min(job.num_images, MAX_STEPS_ROWS)), keep)
        columns = [job.model.decode(x_0) for x_0 in estimates]
    images = torch.stack(columns, dim=1).flatten(0, 1)  # (rows, columns, 3, H, W), row by row
    save_png(folder / STEPS_FILE, image_grid(enlarge(images), columns=num_columns))


def image_name(number: int) -> str:
    """File name of image ``number``."""
    return f"{number:09d}.png"


def save_latents(accelerator: Accelerator, job: Job, out: Path) -> None:
    """Write latent shards whose posteriors are points, std 0, for autoencoder/decode.py."""
    autoencoder = job.model.autoencoder
    assert autoencoder is not None
    details = describe_latents(autoencoder, job.model.resolution, flips=False) | {"seed": job.first_seed}
    class_names = class_names_of(job.model) if job.labels else None
    with ShardWriter(out, "latents", class_names=class_names, details=details) as writer:
        for numbers, x_0 in generate(accelerator, job):
            labels = job.labels_of(numbers) or [-1] * len(numbers)
            points = torch.cat([x_0, torch.zeros_like(x_0)], dim=1).cpu()
            for label, caption, moments in zip(labels, job.captions_of(numbers), points):
                writer.write(pack_moments(moments, label=label) | pack_caption(caption))


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--num-images", type=cli.positive, required=True, metavar="N", help="how many images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for what is written")
    parser.add_argument(
        "--save", choices=("images", "latents"), default="images", help="PNG files, or latent shards (default: images)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first image (default: 0)")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=256, metavar="N", help="images per forward pass (default: 256)"
    )
    parser.add_argument(
        "--steps-grid",
        action="store_true",
        help=f"also write {STEPS_FILE}: how the first images come about, the estimates of x_0 step by step",
    )
    add_precision_flag(parser)
    add_sampler_flags(parser)
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()

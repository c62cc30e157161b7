"""Sample from a trained diffusion GAN: numbered PNG files and a grid, or latents to decode later."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name (`evaluate`, say) for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import math
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from autoencoder.latents import describe_latents, pack_moments
from autoencoder.light_decoder import add_decoder_flag
from data_prep.shards import ShardWriter
from ldgan.engine import cli
from ldgan.engine.files import BackgroundWrites, new_folder, temporary_name
from ldgan.engine.images import enlarge, image_grid, load_png, save_png
from ldgan.engine.session import add_precision_flag, make_accelerator
from ldgan.generation import generate
from ldgan.loading import TrainedModel, load_model

GRID_FILE, MAX_GRID_IMAGES = "grid.png", 64
MIN_GRID_TILE = 96  # pixels; smaller images are enlarged by a whole factor

EXAMPLES = """
examples:
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 64 --out samples/png
  accelerate launch ldgan/sample.py --checkpoint runs/gan/checkpoints/step_000001000 --num-images 64 --out samples/early
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 10000 --out samples/latents --save latents
  python autoencoder/decode.py --autoencoder runs/ae --latents samples/latents --out samples/png

Image number i is made from seed --seed + i, whatever the batch size and the number of processes.
"""


def main() -> None:
    """Sample, decode, write."""
    flags = parse_flags()
    accelerator = make_accelerator(flags.precision)
    model = load_model(flags.checkpoint, accelerator.device, flags.decoder)
    if flags.save == "latents" and model.autoencoder is None:
        raise cli.UserError(f"{flags.checkpoint}: works on pixels and has no latents to save; leave out --save latents")
    if flags.save == "latents" and accelerator.num_processes > 1:
        raise cli.UserError("--save latents writes from one process; launch it with --num_processes 1")
    if flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    started = time.monotonic()
    save = save_latents if flags.save == "latents" else save_images
    save(accelerator, model, flags)
    seconds = time.monotonic() - started
    accelerator.print(f"{flags.num_images:,} {flags.save} in {flags.out} ({flags.num_images / seconds:,.1f} a second)")


def save_images(accelerator: Accelerator, model: TrainedModel, flags: argparse.Namespace) -> None:
    """Write ``000000000.png``, ... and a grid of the first ones; every process writes its own images."""
    made_here = new_folder(flags.out) if accelerator.is_main_process else nullcontext(temporary_name(flags.out))
    with made_here as folder:
        accelerator.wait_for_everyone()  # until the folder is there
        with BackgroundWrites(max_pending=2 * flags.batch_size) as writes:  # zlib works beside the networks
            for numbers, x_0 in generate(
                accelerator, model, num_images=flags.num_images, first_seed=flags.seed, batch_size=flags.batch_size
            ):
                with accelerator.autocast():
                    images = model.decode(x_0)
                for number, image in zip(numbers, images):
                    writes.submit(save_png, folder / image_name(number), image)
        accelerator.wait_for_everyone()  # until all images are there
        if accelerator.is_main_process:
            save_grid(folder, min(flags.num_images, MAX_GRID_IMAGES))


def save_grid(folder: Path, num_images: int) -> None:
    """Lay the first images in ``folder`` out in one picture, small ones enlarged."""
    images = torch.stack([load_png(folder / image_name(number)) for number in range(num_images)])
    images = enlarge(images, max(1, MIN_GRID_TILE // images.shape[-1]))
    save_png(folder / GRID_FILE, image_grid(images, columns=math.ceil(math.sqrt(num_images))))


def image_name(number: int) -> str:
    """File name of image ``number``."""
    return f"{number:09d}.png"


def save_latents(accelerator: Accelerator, model: TrainedModel, flags: argparse.Namespace) -> None:
    """Write latent shards whose posteriors are points, std 0, for autoencoder/decode.py."""
    assert model.autoencoder is not None
    details = describe_latents(model.autoencoder, model.resolution, flips=False) | {"seed": flags.seed}
    with ShardWriter(flags.out, "latents", details=details) as writer:
        for _, x_0 in generate(
            accelerator, model, num_images=flags.num_images, first_seed=flags.seed, batch_size=flags.batch_size
        ):
            for moments in torch.cat([x_0, torch.zeros_like(x_0)], dim=1).cpu():
                writer.write(pack_moments(moments, label=-1))


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="a run of ldgan/train.py, or a checkpoint in it"
    )
    parser.add_argument("--num-images", type=cli.positive, required=True, metavar="N", help="how many images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for what is written")
    parser.add_argument(
        "--save", choices=("images", "latents"), default="images", help="PNG files, or latent shards (default: images)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first image (default: 0)")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=256, metavar="N", help="images per forward pass (default: 256)"
    )
    add_decoder_flag(parser)
    add_precision_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

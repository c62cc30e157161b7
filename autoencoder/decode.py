"""Decode latent shards to numbered PNG files, in batches."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from autoencoder.latents import check_latents
from autoencoder.loading import load_autoencoder
from autoencoder.networks import AutoencoderKL
from data_prep.loader import LatentDataset, sequential_batches
from data_prep.shards import ShardSet
from ldgan.engine import cli
from ldgan.engine.files import new_folder
from ldgan.engine.images import save_png, to_uint8
from ldgan.engine.progress import progress_bar

EXAMPLES = """
examples:
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 1000 --out samples/latents --save latents
  python autoencoder/decode.py --autoencoder runs/ae --latents samples/latents --out samples/png
"""


def main() -> None:
    """Read latent shards, write PNGs."""
    flags = parse_flags()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(flags.autoencoder, device)
    latents = LatentDataset(ShardSet.open(flags.latents))
    check_latents(latents.shards, autoencoder)
    if flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    with (
        new_folder(flags.out) as folder,
        ThreadPoolExecutor() as pool,  # zlib works beside the network
        progress_bar("decoding", len(latents), "images") as bar,
    ):
        first = 0
        for batch in sequential_batches(latents, flags.batch_size):
            images = decode_uint8(autoencoder, batch["mean"].to(device))
            paths = [folder / f"{first + index:09d}.png" for index in range(len(images))]
            list(pool.map(save_png, paths, images))
            first += len(images)
            bar.advance(len(images))
    print(f"{first:,} images in {flags.out}")


@torch.inference_mode()
def decode_uint8(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images, uint8 (B, C, H, W) on the CPU, of standardised latents (B, c, h, w)."""
    return to_uint8(autoencoder.decode(latents)).cpu()


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder", type=Path, required=True, metavar="RUN", help="finished run of autoencoder/train.py"
    )
    parser.add_argument(
        "--latents",
        type=Path,
        required=True,
        metavar="SHARDS",
        help="latent shards; posteriors are decoded at their means",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the PNG files")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=256, metavar="N", help="images per forward pass (default: 256)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

"""Encode image shards to latent shards, once, so that stage 2 never runs the encoder."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

import torch
from torch import Tensor

from autoencoder.latents import describe_latents, pack_moments
from autoencoder.loading import load_autoencoder
from autoencoder.networks import AutoencoderKL
from data_prep.loader import ImageDataset, sequential_batches
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine import cli
from ldgan.engine.progress import progress_bar

EXAMPLES = """
examples:
  python autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents
  python autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents --flips
"""


def main() -> None:
    """Read image shards, write latent shards."""
    flags = parse_flags()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(flags.autoencoder, device)
    images = ImageDataset(ShardSet.open(flags.data))
    manifest = images.shards.manifest
    details = describe_latents(autoencoder, manifest.details["resolution"], flips=flags.flips) | {
        "images": {"fingerprint": manifest.fingerprint, "seconds": manifest.seconds}
    }
    with (
        ShardWriter(flags.out, "latents", class_names=manifest.class_names, details=details) as writer,
        progress_bar("encoding", len(images), "images") as bar,
    ):
        for batch in sequential_batches(images, flags.batch_size, num_workers=flags.workers):
            moments = encode_moments(autoencoder, batch["image"].to(device), flips=flags.flips)
            for index, label in enumerate(batch["label"].tolist()):
                # fp16 keeps 11 bits of the moments of unit-variance latents; the noise of a sample hides the rest.
                writer.write(pack_moments(moments[index].half(), label))
            bar.advance(len(moments))
    print(f"{writer.manifest.num_samples:,} latents of shape {details['latent_shape']} in {flags.out}")


@torch.inference_mode()
def encode_moments(autoencoder: AutoencoderKL, images: Tensor, *, flips: bool) -> Tensor:
    """Moments (B, 2C, h, w), mean and std along channels, of images in [-1, 1]; on the CPU.

    With ``flips`` (B, 2, 2C, h, w): a flipped latent is not the latent of a flipped image, so both are encoded.
    """

    def moments(batch: Tensor) -> Tensor:
        posterior = autoencoder.encode(batch)
        return torch.cat([posterior.mean, posterior.std], dim=1)

    if not flips:
        return moments(images).cpu()
    return torch.stack([moments(images), moments(images.flip(-1))], dim=1).cpu()


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder", type=Path, required=True, metavar="RUN", help="finished run of autoencoder/train.py"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="folder of image shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the latent shards")
    parser.add_argument("--flips", action="store_true", help="also encode the mirror image of every image")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=256, metavar="N", help="images per forward pass (default: 256)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)

"""Decode latents to images, at any size: numbered PNG or WebP files, or image shards."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.decoding import (
    TASK,
    ImageFiles,
    ImageShards,
    Output,
    decode_batches,
    unfinished_blocks,
)
from autoencoder.inference.latents import check_latents
from autoencoder.inference.light_decoder import add_decoder_flag, load_light_decoder
from autoencoder.inference.tiling import decode_tiled
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from data_prep.loader import LatentDataset
from data_prep.resuming import batches_of_blocks, begin, finish
from data_prep.shards import ShardSet
from ldgan.engine import cli
from ldgan.engine.images import MAX_WEBP_SIDE
from ldgan.engine.progress import progress_bar
from ldgan.engine.session import add_precision_flag, make_accelerator

EXAMPLES = """
examples:
  accelerate launch ldgan/sample.py --checkpoint runs/gan --num-images 1000 --out samples/latents --save latents
  accelerate launch autoencoder/decode.py --autoencoder runs/ae --latents samples/latents --out samples/png

  # Several processes, a light decoder (autoencoder/distill.py), and shards that autoencoder/encode.py reads
  accelerate launch --multi_gpu autoencoder/decode.py --autoencoder runs/ae --latents samples/latents \\
      --out samples/shards --format shards --decoder light

  # Images of 2048 x 2048 pixels in tiles of 512 x 512 (latents 8 times smaller), in the memory of a tile
  python autoencoder/decode.py --autoencoder runs/ae --latents samples/latents --out samples/png \\
      --batch-size 1 --tile 64 --overlap 16

Image number i is row i of the latents, whatever the number of processes. A run that was stopped goes on when the same
command is given again: what is on the disk is not written again, and is what an uninterrupted run would have written.
"""


def main() -> None:
    """Read latent shards, decode, write what is not there yet."""
    flags = parse_flags()
    started = time.monotonic()
    accelerator = make_accelerator(flags.precision)
    latents = LatentDataset(ShardSet.open(flags.latents))
    autoencoder = load_autoencoder(flags.autoencoder, accelerator.device)
    check_latents(latents.shards, autoencoder)
    check_size(flags.format, latents.shards.manifest.details["resolution"])
    decoder = autoencoder if flags.decoder == "full" else load_light_decoder(flags.autoencoder, accelerator.device)
    decoding = describe(latents.shards, autoencoder, decoder, flags)
    finished = accelerator.is_main_process and begin(flags.out, TASK, decoding)
    accelerator.wait_for_everyone()  # until the folder is there

    output = make_output(flags, len(latents))
    decode = decode_function(accelerator, decoder, flags.tile, flags.overlap)
    num_decoded = decode_rest(accelerator, decode, latents, output, flags.batch_size)
    if finished and num_decoded == 0:
        print(f"{flags.out} was finished before; nothing to do")
    elif accelerator.is_main_process:
        seconds = time.monotonic() - started
        if isinstance(output, ImageShards):
            manifest = latents.shards.manifest
            details = {"resolution": manifest.details["resolution"], "image_format": "png", "decoding": decoding}
            output.write_manifest(manifest.class_names, details, seconds, has_captions=manifest.has_captions)
        finish(flags.out, TASK, decoding)
        print(f"{len(latents):,} images in {flags.out} ({num_decoded:,} decoded now, {seconds:.1f} s)")


def decode_rest(
    accelerator: Accelerator,
    decode: Callable[[Tensor], Tensor],
    latents: LatentDataset,
    output: Output,
    batch_size: int,
) -> int:
    """Decode this process's share of the blocks that are not complete; how many images all shares hold."""
    blocks = unfinished_blocks(output, len(latents))
    accelerator.wait_for_everyone()  # until all have seen the same, before anything is added
    share = blocks[accelerator.process_index :: accelerator.num_processes]
    with progress_bar("decoding", sum(map(len, share)), "images", enabled=accelerator.is_main_process) as bar:
        batches = batches_of_blocks(share, batch_size)
        decode_batches(decode, latents, output, batches, accelerator.device, bar)
    accelerator.wait_for_everyone()  # until all images are there
    return sum(map(len, blocks))


def decode_function(
    accelerator: Accelerator, decoder: AutoencoderKL | LightDecoder, tile: int, overlap: int
) -> Callable[[Tensor], Tensor]:
    """Latents -> images, in the accelerator's precision and in tiles; tile 0: as a whole."""

    def decode(latents: Tensor) -> Tensor:
        with accelerator.autocast():
            return decoder.decode(latents)

    if tile == 0:
        return decode
    return functools.partial(decode_tiled, decode, tile=tile, overlap=overlap, factor=decoder.downsampling_factor)


def describe(
    shards: ShardSet, autoencoder: AutoencoderKL, decoder: AutoencoderKL | LightDecoder, flags: argparse.Namespace
) -> dict[str, Any]:
    """All that the images depend on; a folder is continued only if it is the same."""
    return {
        "format": "ldgan-decoding/1",
        "latents": shards.manifest.fingerprint,
        "num_images": len(shards),
        "autoencoder": fingerprint(autoencoder),
        "decoder": flags.decoder,
        "decoder_fingerprint": fingerprint(decoder),
        "precision": flags.precision,
        "tile": flags.tile,
        "overlap": flags.overlap,
        "images": flags.format,
        "samples_per_shard": flags.samples_per_shard if flags.format == "shards" else None,
    }


def check_size(image_format: str, side: int) -> None:
    """Raise a UserError for images, ``side`` pixels a side, that the format cannot hold."""
    if image_format == "webp" and side > MAX_WEBP_SIDE:
        raise cli.UserError(
            f"--format webp holds at most {MAX_WEBP_SIDE} pixels a side, and these images have {side}; give png"
        )


def make_output(flags: argparse.Namespace, num_images: int) -> Output:
    """Where images go, as ``--format`` says."""
    if flags.format == "shards":
        return ImageShards(flags.out, num_images, flags.samples_per_shard)
    return ImageFiles(flags.out, flags.format, block_size=flags.batch_size)


def parse_flags() -> argparse.Namespace:
    """Parse the command line; raises a UserError for tiles that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--autoencoder", type=Path, required=True, metavar="RUN", help="finished run of autoencoder/train.py")
    add(
        "--latents",
        required=True,
        metavar="SHARDS",
        help="latent shards; posteriors are decoded at their means",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="new folder, or one that the same command began")
    add(
        "--format",
        choices=("png", "webp", "shards"),
        default="png",
        help="numbered files, both kinds lossless, or image shards of PNGs with the latents' labels and captions"
        " (default: png); of shards, those that were complete when a run was stopped are kept",
    )
    add(
        "--samples-per-shard",
        type=cli.positive,
        default=1000,
        metavar="N",
        help="images in a tar, for --format shards (default: 1000)",
    )
    add_decoder_flag(parser)
    add_precision_flag(parser)
    add("--batch-size", type=cli.positive, default=256, metavar="N", help="images per forward pass (default: 256)")
    add(
        "--tile",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side of a tile in latent pixels, for images of 1024 pixels and more: 64 means 512 pixels of the image"
        " where latents are 8 times smaller; 0: decode images as a whole (default: 0)",
    )
    add(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help="latent pixels that neighbouring tiles share at least (default: a quarter of a tile)",
    )
    flags = parser.parse_args()
    if flags.overlap is None:
        flags.overlap = flags.tile // 4
    if not 0 <= 2 * flags.overlap <= flags.tile:
        raise cli.UserError(
            f"--tile {flags.tile} cannot go with --overlap {flags.overlap}; give an overlap from 0 to half a tile"
        )
    return flags


command = cli.command(main)

if __name__ == "__main__":
    command()

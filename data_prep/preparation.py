"""From images of any source to a shard set: decoded, filtered, cropped, encoded and packed, by several processes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.images import encode_image, read_picture, resize_and_crop
from data_prep.prepared import Prepared, PreparedBlocks, Rejected, Why
from data_prep.processes import ALONE, Processes
from data_prep.resuming import ResumableShardWriter
from data_prep.shards import Manifest
from data_prep.sources import Content, RawSample, Source, read_text, stable_fraction
from data_prep.workers import map_in_processes
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

CHUNK_SAMPLES = 16  # samples per task: small images would spend their time between processes otherwise
MAX_CLASSES = 100_000  # where the source does not say how many there are; a larger label is an error in the data
REJECTED_NAME = "rejected.jsonl"
CROPS = ("center", "random")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to each image.

    Attributes:
        resolution: side of an image in pixels.
        image_format: "png", "jpg" or "webp"; ``quality``, 1 to 100, is for the latter two.
        crop: which square along the long side, "center" or "random": fixed for each image by its name and ``seed``.
        min_side: images with a short side of fewer pixels are left out.
        max_aspect: images whose long side is longer than so many short ones are left out.
        deduplicate: of images with the same pixels keep the first; see `Tally`.
        seed: of random crops, and noted in the manifest as that of the source's order.
    """

    resolution: int
    image_format: str = "png"
    quality: int = 95
    crop: str = "center"
    min_side: int = 1
    max_aspect: float | None = None
    deduplicate: bool = False
    seed: int = 0


def prepare(chunk: list[RawSample], preparation: Preparation, num_classes: int) -> list[Prepared | Rejected]:
    """Decode, scale, crop and encode some samples; runs in a worker process."""
    return [_prepare_or_reject(sample, preparation, num_classes) for sample in chunk]


def _prepare_or_reject(sample: RawSample, preparation: Preparation, num_classes: int) -> Prepared | Rejected:
    try:
        return _prepare_one(sample, preparation, num_classes)
    except Exception as error:  # decoders raise nearly anything; one bad file must not end a run of hours
        return Rejected(sample.name, "unreadable", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _prepare_one(sample: RawSample, preparation: Preparation, num_classes: int) -> Prepared | Rejected:
    image = _read_image(sample)
    if fault := _fault(image, preparation):
        return Rejected(sample.name, "filtered", fault)
    position = stable_fraction(f"{preparation.seed}/{sample.name}") if preparation.crop == "random" else 0.5
    square = resize_and_crop(image, preparation.resolution, position=position)
    members = {preparation.image_format: encode_image(square, preparation.image_format, preparation.quality)}
    label = _read_label(sample.label, num_classes) if sample.label is not None else None
    if label is not None:
        members["cls"] = str(label).encode("ascii")
    if sample.caption is not None and (caption := read_text(sample.caption)):
        members["txt"] = caption.encode("utf-8")
    return Prepared(sample.name, members, label, _digest(image) if preparation.deduplicate else None)


def _read_image(sample: RawSample) -> Image.Image:
    """Decode a sample's image to 8-bit RGB."""
    if isinstance(sample.image, np.ndarray):
        return Image.fromarray(sample.image)
    try:
        return read_picture(io.BytesIO(sample.image.read())).image
    except UnidentifiedImageError:  # its text has an address in memory, different in each run
        raise UnidentifiedImageError("cannot identify image file") from None


def _read_label(label: Content | int, num_classes: int) -> int:
    number = label if isinstance(label, int) else int(label.read())
    if not 0 <= number < num_classes:
        raise ValueError(f"label {number} is not from 0 to {num_classes - 1}")
    return number


def _fault(image: Image.Image, preparation: Preparation) -> str | None:
    """Say why an image is not wanted, if it is not."""
    short, long = sorted(image.size)
    if short < preparation.min_side:
        return f"its short side of {short} pixels is below {preparation.min_side}"
    if preparation.max_aspect is not None and long > preparation.max_aspect * short:
        return f"its sides of {long} and {short} pixels have a ratio above {preparation.max_aspect:g}"
    return None


def _digest(image: Image.Image) -> bytes:
    """128 bits that two images share only if their pixels and sizes are the same."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()[:16]


def prepare_all(
    samples: Iterable[RawSample], preparation: Preparation, num_classes: int, num_workers: int
) -> Iterator[Prepared | Rejected]:
    """Yield every prepared sample in the order of ``samples``, whatever the number of worker processes."""
    prepare_chunk = functools.partial(prepare, preparation=preparation, num_classes=num_classes)
    return itertools.chain.from_iterable(map_in_processes(prepare_chunk, _chunks(samples, CHUNK_SAMPLES), num_workers))


def _chunks(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class Tally:
    """What became of the samples so far; noted with each shard, so that a later run can go on from there.

    Images with equal pixels are told by digests, with about 200 bytes of memory for each image. Pixels and not files
    are compared, since the same picture is often found saved anew, in another format or with other metadata; and
    before they are scaled, since another crop does not make another picture.
    """

    def __init__(self) -> None:
        self.num_read, self.last_name, self.max_label = 0, "", -1
        self.rejected: dict[str, int] = dict.fromkeys(get_args(Why), 0)
        self.first_rejected: Rejected | None = None
        self._first_names: dict[bytes, str] = {}  # by digest
        self._new_rejected: list[Rejected] = []
        self._new_names: dict[str, str] = {}  # digest, hexadecimal -> name

    def add(self, sample: Prepared | Rejected) -> Prepared | Rejected:
        """Take the next sample; an image that was there before comes back rejected."""
        self.num_read, self.last_name = self.num_read + 1, sample.name
        if isinstance(sample, Prepared) and sample.pixels in self._first_names:
            first_name = self._first_names[sample.pixels]
            sample = Rejected(sample.name, "duplicate", f"the same pixels as {first_name}")
        if isinstance(sample, Rejected):
            self._count(sample)
            self._new_rejected.append(sample)
            return sample
        if sample.label is not None:
            self.max_label = max(self.max_label, sample.label)
        if sample.pixels is not None:
            self._first_names[sample.pixels] = self._new_names[sample.pixels.hex()] = sample.name
        return sample

    def _count(self, image: Rejected) -> None:
        self.rejected[image.why] += 1
        self.first_rejected = self.first_rejected or image

    def notes(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON; of images what came after the notes before."""
        rejected, self._new_rejected = self._new_rejected, []
        names, self._new_names = self._new_names, {}
        cumulative = {"num_read": self.num_read, "last_name": self.last_name, "max_label": self.max_label}
        return cumulative | {"rejected": rejected, "names": names}

    def restore(self, notes: Mapping[str, Any]) -> list[Rejected]:
        """Take over notes of an earlier run, in their order; returns the images that they reject."""
        self.num_read, self.last_name = notes["num_read"], notes["last_name"]
        self.max_label = notes["max_label"]
        self._first_names |= {bytes.fromhex(digest): name for digest, name in notes["names"].items()}
        rejected = [Rejected(*image) for image in notes["rejected"]]
        for image in rejected:
            self._count(image)
        return rejected


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    preparation: Preparation,
    *,
    samples_per_shard: int = 1000,
    num_workers: int = 1,
    processes: Processes = ALONE,
) -> Manifest | None:
    """Write ``source``, in its order, as image shards into folder ``out``, which must not exist.

    Images that are left out, those that cannot be read included, are listed with the reason in ``rejected.jsonl`` and
    counted in the manifest. The bytes of the shards depend neither on ``num_workers``, processes that prepare images,
    nor on ``processes``, those that write this set together, all called with the same arguments. Called again after it
    was interrupted, it goes on after what was finished, and the set has the bytes that it would have had.

    Returns the manifest, on the main process; None on others. Raises `UserError` as `ResumableShardWriter` does, if the
    source has changed since then, and if no image is left.
    """
    num_classes = len(source.class_names) if source.class_names is not None else MAX_CLASSES
    tally = Tally()
    writer = ResumableShardWriter(
        out,
        "images",
        notes=tally.notes,
        samples_per_shard=samples_per_shard,
        class_names=source.class_names,
        details=dataclasses.asdict(preparation) | {"source": source.description, "num_raw_images": len(source)},
        processes=processes,
    )
    with writer:
        rejected_file = RejectedFile(writer.folder / REJECTED_NAME, enabled=processes.is_main)
        for notes in writer.earlier_notes:
            rejected_file.write(tally.restore(notes))
        _check_source(source, tally.num_read - 1, tally.last_name, writer.folder)
        blocks = PreparedBlocks(writer.scratch, len(source))
        prepare_some = functools.partial(
            prepare_all, preparation=preparation, num_classes=num_classes, num_workers=num_workers
        )
        if processes.count == 1 and not blocks.folder.exists():
            description, samples = "preparing", prepare_some(_samples(source, range(tally.num_read, len(source))))
        else:
            _prepare_blocks(source, blocks, tally.num_read, prepare_some, processes)
            description, samples = "packing", _read_blocks(source, blocks, tally.num_read, writer.folder)
        with progress_bar(
            description, len(source), "images", initial=tally.num_read, enabled=processes.is_main
        ) as progress:
            for prepared in samples:
                sample = tally.add(prepared)
                if isinstance(sample, Rejected):
                    rejected_file.write([sample])
                else:
                    writer.write(sample.members)
                progress.advance()
        _complete(writer, tally)
    return writer.manifest if processes.is_main else None


def _samples(source: Source, numbers: Iterable[int]) -> Iterator[RawSample]:
    return (source[number] for number in numbers)


def _check_source(source: Source, number: int, name: str, folder: Path) -> None:
    """Raise a `UserError` unless sample ``number`` has the name that it had in an earlier run."""
    if number >= 0 and source[number].name != name:
        raise UserError(f"the source has changed since {folder} was begun with it; remove that folder to begin anew")


def _prepare_blocks(
    source: Source,
    blocks: PreparedBlocks,
    first: int,
    prepare_some: Callable[[Iterable[RawSample]], Iterator[Prepared | Rejected]],
    processes: Processes,
) -> None:
    """Prepare this process's share of the samples from ``first`` on; return when all processes have done theirs.

    Which images are left out decides in which shard the others lie, and duplicates may lie anywhere. So everything is
    prepared before anything is packed.
    """
    mine = range(len(blocks))[processes.index :: processes.count]
    missing = [block for block in mine if blocks.numbers(block).stop > first and not blocks.is_finished(block)]
    prepared = prepare_some(_samples(source, itertools.chain.from_iterable(map(blocks.numbers, missing))))
    num_images = sum(len(blocks.numbers(block)) for block in missing)
    with progress_bar("preparing", num_images, "images", enabled=processes.is_main) as progress:
        for block in missing:
            blocks.write(block, prepared)
            progress.advance(len(blocks.numbers(block)))
    processes.wait()


def _read_blocks(source: Source, blocks: PreparedBlocks, first: int, folder: Path) -> Iterator[Prepared | Rejected]:
    """Yield the prepared samples from ``first`` on."""
    for block in range(len(blocks)):
        numbers = blocks.numbers(block)
        if numbers.stop > first:
            with blocks.open(block) as samples:
                _check_source(source, numbers[-1], samples[-1].name, folder)
                yield from samples[max(first - numbers.start, 0) :]


def _complete(writer: ResumableShardWriter, tally: Tally) -> None:
    """Say in the manifest what was found on the way."""
    if writer.num_samples == 0 and tally.first_rejected is not None:
        name, _, reason = tally.first_rejected
        raise UserError(f"none of {tally.num_read} images can be used; the first is {name} ({reason})")
    writer.details["rejected"] = tally.rejected
    if writer.class_names is None and tally.max_label >= 0:
        writer.class_names = [str(label) for label in range(tally.max_label + 1)]


class RejectedFile:
    """A file with a line of JSON for each image that is left out; an older one is removed.

    Not ``enabled``, which it is on the main process alone, it leaves everything as it is.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        if enabled:
            path.unlink(missing_ok=True)

    def write(self, images: Iterable[Rejected]) -> None:
        """Append a line for each."""
        lines = [json.dumps(image._asdict()) + "\n" for image in images]
        if lines and self._enabled:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)

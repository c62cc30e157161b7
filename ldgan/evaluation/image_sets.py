"""Sets of images to measure: pictures in a folder, image shards, samples straight from a model. One form for all.

An image has a number, and is the same whatever the batch and the process that asks for it. What reaches a metric is
8-bit RGB of one size; each conversion on the way there is counted, and what cannot be converted is an error.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageFile
from torch import Tensor

from autoencoder.inference.decoding import DESCRIPTION
from autoencoder.inference.trained_autoencoder import fingerprint
from data_prep.images import CONVERSIONS, image_member, read_picture, resize_and_crop
from data_prep.shards import MANIFEST_NAME, ShardSet
from data_prep.sources import ImageFolder
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar
from ldgan.engine.shares import batches
from ldgan.engine.threads import map_ahead
from ldgan.inference.jobs import Job

NUM_NAMES = 5  # of many files that have something in common, so many are named
NUM_HASHING_THREADS = 8
MIN_HASHING_BAR = 1000  # images; hashing fewer takes no time that a bar could show
NOTES = (*CONVERSIONS, "resized", "unreadable")

_NUMBERED_FILE = re.compile(r"[0-9]{9}\.[a-z]+")  # what ldgan/sample.py and autoencoder/decode.py write
_FORMAT_NAMES = {"jpeg": "jpg", "tiff": "tif"}  # of suffixes that are not the format's name
_LOSSY_FORMATS = frozenset({"avif", "gif", "jpg", "webp"})  # GIF has 256 colours an image
_LOSSLESS_WEBP = b"WEBPVP8L"  # bytes 8 to 15 of such a file


class Batch(NamedTuple):
    """Some images of a set: their numbers, and uint8 (B, 3, H, W) on the CPU."""

    numbers: list[int]
    images: Tensor


class ImageSet(abc.ABC):
    """Images number 0, 1, ..., all of one ``size`` (height, width) in pixels; ``name`` is for messages."""

    name: str
    size: tuple[int, int]

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are, unreadable ones included."""

    @abc.abstractmethod
    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        """Yield the images with these numbers in order, ``batch_size`` at a time.

        Those that are skipped are missing in their batch; a batch of which nothing is left is missing itself.

        Raises:
            UserError: an image cannot be read, or has another size than the others.
        """

    @abc.abstractmethod
    def read(self, number: int) -> Tensor:
        """A single image, uint8 (3, H, W) on the CPU; raises what `batches` does, even where it would skip."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the images are and how they are read, for JSON: ``kind``, ``num_images``, ``size``, ``resize``, ..."""

    @abc.abstractmethod
    def fingerprint(self, num_images: int | None = None) -> str:
        """SHA-256 (hex) of what the first ``num_images`` (None: all) are made of, before they are resized."""

    def notes(self) -> dict[str, Any]:
        """What this process had to do to the images that `batches` gave it, counted; see `merge_notes`."""
        return {}


def merge_notes(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The notes of several processes, each of which had images of its own, as those of all of them."""
    merged: dict[str, Any] = {}
    for each in notes:
        for key, value in each.items():
            merged[key] = merged[key] + value if key in merged else value
    return {key: value[:NUM_NAMES] if isinstance(value, list) else value for key, value in merged.items()}


class Reading(NamedTuple):
    """How image files become pixels; see `open_images`."""

    resolution: int | None = None
    resize_filter: str = "lanczos"
    skip_unreadable: bool = False
    num_workers: int = 0


def open_images(
    path: Path | str,
    *,
    resolution: int | None = None,
    resize_filter: str = "lanczos",
    skip_unreadable: bool = False,
    num_workers: int = 0,
) -> StoredImages:
    """Open a folder of pictures or of image shards, or image shards behind a URL.

    Args:
        path: the folder, or the URL as str.
        resolution: scale the short side of each image to so many pixels and keep the central square; None: leave
            images as they are, which then must have one size.
        resize_filter: one of `data_prep.images.RESIZE_FILTERS`.
        skip_unreadable: leave out images that cannot be read, and count them.
        num_workers: threads that decode in advance; 0: decode when asked.

    Raises:
        UserError: ``path`` holds no images, not images alone, or a decoding that is not finished; or its first image
            cannot be read.
    """
    # Whoever uses this module may have switched it on, and the grey lower half of a cut file is no picture.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    reading = Reading(resolution, resize_filter, skip_unreadable, num_workers)
    if isinstance(path, str):
        return ShardImages(path, reading)
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a folder of images or of image shards")
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder of images or of image shards; unpack it if it is an archive")
    _check_finished(path)
    if (path / MANIFEST_NAME).exists() or any(path.glob("shard-*.tar")):
        return ShardImages(path, reading)
    return FolderImages(path, reading)


def _check_finished(folder: Path) -> None:
    """Raise a UserError if autoencoder/decode.py was stopped before it had written all images of ``folder``."""
    path = folder / DESCRIPTION
    try:
        finished = not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["finished"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); decode into a new folder") from error
    if not finished:
        raise UserError(f"{folder}: is not finished; run the same autoencoder/decode.py command again")


class _Decoded(NamedTuple):
    """An image, uint8 (H, W, 3), and what was done to it, out of `NOTES`."""

    pixels: np.ndarray
    notes: tuple[str, ...]


class _UnreadableError(UserError):
    """An image that may be skipped."""


class StoredImages(ImageSet):
    """Images that are decoded from files; made by `open_images`."""

    def __init__(self, location: str, reading: Reading) -> None:
        """``location`` is for messages and descriptions; subclasses must be ready to give files."""
        self.name, self._reading = location, reading
        self._noted: dict[str, set[int]] = {note: set() for note in NOTES}  # numbers, as some may be read twice
        self._first = 0  # the image that sets the size
        if reading.resolution is not None:
            self.size = reading.resolution, reading.resolution
        else:
            self._first, self.size = self._first_readable()

    @abc.abstractmethod
    def _file(self, number: int) -> Path | BinaryIO:
        """An image's file; called by one thread."""

    @abc.abstractmethod
    def _where(self, number: int) -> str:
        """Where an image lies, for messages."""

    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        """See `ImageSet.batches`."""
        files = ((number, self._file(number)) for number in numbers)
        with closing(map_ahead(self._attempt, files, self._reading.num_workers)) as attempts:
            for wanted in batches(numbers, batch_size):
                images = dict(zip(wanted, attempts))
                readable = {
                    number: self._checked(number, image) for number, image in images.items() if image is not None
                }
                self._noted["unreadable"].update(images.keys() - readable.keys())
                if readable:
                    yield Batch(list(readable), _to_tensor(list(readable.values())))

    def read(self, number: int) -> Tensor:
        """See `ImageSet.read`."""
        decoded = self._decode(number, self._file(number))
        self._check_size(number, decoded.pixels)
        return _to_tensor([decoded.pixels])[0]

    def notes(self) -> dict[str, Any]:
        """Counts of grey, alpha, 16-bit, resized and unreadable images, and where the first of the latter are."""
        unreadable = sorted(self._noted["unreadable"])
        counts = {note: len(numbers) for note, numbers in self._noted.items() if note != "unreadable"}
        names = [self._where(number) for number in unreadable[:NUM_NAMES]]
        return counts | {"unreadable": names, "num_unreadable": len(unreadable)}

    def describe(self) -> dict[str, Any]:
        """See `ImageSet.describe`; what is common to all files."""
        resolution, resize_filter = self._reading.resolution, self._reading.resize_filter
        return {
            "path": self.name,
            "num_images": len(self),
            "size": list(self.size),
            "resize": {"resolution": resolution, "filter": resize_filter} if resolution is not None else None,
        }

    def _first_readable(self) -> tuple[int, tuple[int, int]]:
        """Number and size (H, W) of the first image that can be read."""
        for number in range(len(self)):
            image = self._attempt((number, self._file(number)))
            if image is not None:
                return number, image.pixels.shape[:2]
        raise UserError(f"{self.name}: none of {len(self):,} images can be read; are these images?")

    def _attempt(self, numbered: tuple[int, Path | BinaryIO]) -> _Decoded | None:
        """A decoded image, or None if it cannot be read and may be skipped."""
        try:
            return self._decode(*numbered)
        except _UnreadableError:
            if self._reading.skip_unreadable:
                return None
            raise

    def _decode(self, number: int, file: Path | BinaryIO) -> _Decoded:
        try:
            image, notes = read_picture(file, max_pixels=Image.MAX_IMAGE_PIXELS)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            reason = f"{type(error).__name__}: {error}"
            raise _UnreadableError(
                f"{self._where(number)} cannot be read ({reason}); mend it, or add --skip-unreadable"
            ) from error
        resolution = self._reading.resolution
        if resolution is not None and image.size != self.size:
            image = resize_and_crop(image, resolution, self._reading.resize_filter)
            notes += ("resized",)
        return _Decoded(np.asarray(image), notes)

    def _checked(self, number: int, image: _Decoded) -> np.ndarray:
        """The pixels of an image of the right size; takes note of what was done to it."""
        self._check_size(number, image.pixels)
        for note in image.notes:
            self._noted[note].add(number)
        return image.pixels

    def _check_size(self, number: int, pixels: np.ndarray) -> None:
        if pixels.shape[:2] != self.size:
            first, other = (f"{width} x {height} pixels" for height, width in (self.size, pixels.shape[:2]))
            raise UserError(
                f"{self._where(number)} has {other}, and {self._where(self._first)} has {first}; give images of one"
                " size, or add --resolution PIXELS"
            )


class FolderImages(StoredImages):
    """All pictures below a folder, in an order shuffled once and for all, so that the first ones are a fair draw.

    A folder that ldgan/sample.py or autoencoder/decode.py has written holds numbered files: these are the images
    then, by number, and other pictures (the grid, say) are left out.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        names = [sample.name for sample in ImageFolder(path, seed=0)]
        numbered = sorted(filter(_NUMBERED_FILE.fullmatch, names))
        self._names = numbered or names
        self._left_out = sorted(set(names).difference(self._names))
        self.path = path
        super().__init__(str(path), reading)

    def __len__(self) -> int:
        """See `ImageSet`."""
        return len(self._names)

    def describe(self) -> dict[str, Any]:
        """See `ImageSet.describe`; of many pictures that are left out, some are named."""
        formats = Counter(map(_format_of, self._names))
        return {
            "kind": "folder",
            **super().describe(),
            "formats": dict(formats),
            "lossy": any(self._is_lossy(name) for name in self._names),
            "left_out": self._left_out[:NUM_NAMES],
            "num_left_out": len(self._left_out),
        }

    def fingerprint(self, num_images: int | None = None) -> str:
        """SHA-256 (hex) over names and contents of images in order; shows a progress bar where they are many.

        Where unreadable images may be skipped, any may stand in for them, and all are looked at.
        """
        digest = hashlib.sha256()
        names = self._names if self._reading.skip_unreadable else self._names[:num_images]
        files = (self.path / name for name in names)
        with progress_bar("hashing", len(names), "images", enabled=len(names) >= MIN_HASHING_BAR) as bar:
            for name, content in zip(names, map_ahead(_sha256, files, NUM_HASHING_THREADS)):
                digest.update(content + os.fsencode(name) + b"\0")
                bar.advance()
        return digest.hexdigest()

    def _file(self, number: int) -> Path:
        return self.path / self._names[number]

    def _where(self, number: int) -> str:
        return str(self._file(number))

    def _is_lossy(self, name: str) -> bool:
        if _format_of(name) not in _LOSSY_FORMATS:
            return False
        with (self.path / name).open("rb") as file:
            return file.read(16)[8:] != _LOSSLESS_WEBP


class ShardImages(StoredImages):
    """The images of a shard set, in its order."""

    def __init__(self, path: Path | str, reading: Reading) -> None:
        self._shards = ShardSet.open(path)
        folder = str(self._shards.folder)  # a URL without its password
        if self._shards.manifest.kind != "images":
            raise UserError(f"{folder}: holds latents, not images; decode them first with autoencoder/decode.py")
        super().__init__(folder, reading)

    def __len__(self) -> int:
        """See `ImageSet`."""
        return len(self._shards)

    def describe(self) -> dict[str, Any]:
        """See `ImageSet.describe`; the format is that of the first image, as shards are written in one format."""
        extension, content = self._member(0)
        return {
            "kind": "shards",
            **super().describe(),
            "formats": {extension: len(self)},
            "lossy": extension in _LOSSY_FORMATS and content[8:16] != _LOSSLESS_WEBP,
        }

    def fingerprint(self, num_images: int | None = None) -> str:
        """The fingerprint of the shards' manifest, which is that of all their images."""
        return self._shards.manifest.fingerprint

    def _file(self, number: int) -> BinaryIO:
        return io.BytesIO(self._member(number)[1])

    def _where(self, number: int) -> str:
        return self._shards.locate(number)

    def _member(self, number: int) -> tuple[str, bytes]:
        try:
            return image_member(self._shards.read(number))
        except ValueError as error:
            raise UserError(f"{self._where(number)} holds no image ({error}); write the shards again") from error


class Samples(ImageSet):
    """Images that a model makes when they are asked for: number i from seed ``job.first_seed`` + i."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.name = "samples"
        self.size = job.model.resolution, job.model.resolution
        self._job, self._accelerator = job, accelerator

    def __len__(self) -> int:
        """See `ImageSet`."""
        return self._job.num_images

    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        """See `ImageSet.batches`."""
        for wanted in batches(numbers, batch_size):
            with self._accelerator.autocast():
                images = self._job.model.decode(self._job.sample(wanted))
            yield Batch(list(wanted), images)

    def read(self, number: int) -> Tensor:
        """See `ImageSet.read`."""
        (batch,) = self.batches(range(number, number + 1), batch_size=1)
        return batch.images[0]

    def describe(self) -> dict[str, Any]:
        """See `ImageSet.describe`; the caller knows which checkpoint, decoder and labels it asked for."""
        return {
            "kind": "samples",
            "num_images": len(self),
            "size": list(self.size),
            "resize": None,
            "formats": {},
            "lossy": False,
            "first_seed": self._job.first_seed,
            "sampler": asdict(self._job.sampler),
            "evaluations_per_image": self._job.evaluations_per_image,
        }

    def fingerprint(self, num_images: int | None = None) -> str:
        """SHA-256 (hex) of the weights of all networks that make the images, and of how they are sampled."""
        model = self._job.model
        networks = model.network, model.autoencoder, model.light_decoder, model.classifier
        made_by = {
            "weights": [fingerprint(network) for network in networks if network is not None],
            "alphas_bar": model.diffusion.alphas_bar.tolist(),
            "predicts": model.predicts,
            "variance": model.variance,
            "labels": self._job.labels,
            "precision": self._accelerator.mixed_precision,
        }
        if self._job.prompts is not None:
            made_by["prompts"] = self._job.prompts.captions
            made_by["text_encoder"] = model.text_encoder.fingerprint if model.text_encoder is not None else None
        return hashlib.sha256(json.dumps(self.describe() | made_by, sort_keys=True).encode()).hexdigest()


def _format_of(name: str) -> str:
    """The image format that a file's suffix stands for: "png", "jpg", ..."""
    suffix = Path(name).suffix.lower().removeprefix(".")
    return _FORMAT_NAMES.get(suffix, suffix)


def _sha256(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions, or remove it") from error


def _to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) each -> uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

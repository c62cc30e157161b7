"""Images of data sets that libraries know: torchvision's by name, and Hugging Face `datasets` saved to disk.

Everything is read from local folders; nothing is ever downloaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.sources import FilePart, ListedSource, RawSample, Which, check_size
from ldgan.engine.cli import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

TORCHVISION_SETS = ("CIFAR10", "CIFAR100", "CelebA", "LSUN")
CELEBA_PARTS = ("train", "valid", "test", "all")
CAPTION_COLUMNS = ("caption", "text")


class CIFAR(ListedSource):
    """The images of CIFAR-10 or CIFAR-100 with their classes, ``part`` "train" or "test".

    ``root`` holds ``cifar-10-batches-py`` (or ``cifar-100-python``), the unpacked archive. Its files are pickles, which
    torchvision reads only if their MD5 sums are those of the published ones. Raises `UserError` where they are not.
    """

    def __init__(self, name: str, root: str | os.PathLike[str], part: str = "train", **which: Unpack[Which]) -> None:
        # Imported here, since it brings torch along: seconds that folders of images need not spend.
        from torchvision import datasets

        _check_part(name, part, ("train", "test"))
        dataset = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[name]
        folder = Path(root, dataset.base_folder)
        try:
            images = dataset(root, train=part == "train", download=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder} is not the unpacked archive {dataset.filename}, or is damaged") from error
        self._prefix = f"{name}/{part}"
        self._pixels, self._labels = images.data, images.targets
        self.class_names = list(images.classes)
        self.description = {"type": "torchvision", "name": name, "part": part, "path": str(folder)}
        super().__init__(len(self._pixels), **which)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        return RawSample(f"{self._prefix}/{number}", self._pixels[number], self._labels[number])


class CelebA(ListedSource):
    """The aligned and cropped photos of CelebA, 178 x 218 pixels, without labels.

    ``root`` holds ``celeba/img_align_celeba/000001.jpg``, ... and the text files beside that folder. Raises `UserError`
    where torchvision does not find them, or other ones.
    """

    def __init__(self, root: str | os.PathLike[str], part: str = "train", **which: Unpack[Which]) -> None:
        from torchvision import datasets

        _check_part("CelebA", part, CELEBA_PARTS)
        folder = Path(root, datasets.CelebA.base_folder)
        try:
            self._files = datasets.CelebA(root, split=part, download=False).filename
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{folder} is not a complete CelebA; it needs the folder img_align_celeba and all five .txt files"
            ) from error
        self._folder = folder / "img_align_celeba"
        self.class_names = None
        self.description = {"type": "torchvision", "name": "CelebA", "part": part, "path": str(folder)}
        super().__init__(len(self._files), **which)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        return RawSample(self._files[number], FilePart(self._folder / self._files[number]))


class LSUN(ListedSource):
    """The images of one LSUN category, without labels, from the LMDB ``{root}/{part}_lmdb``.

    Read by the package `lmdb` directly: torchvision's class keeps a list of keys as a pickle in the current folder, and
    would load any that lies there. Raises `UserError` where the package or the data base is missing.
    """

    def __init__(self, root: str | os.PathLike[str], part: str, **which: Unpack[Which]) -> None:
        self._path = Path(root, f"{part}_lmdb")
        self._keys = _lmdb_keys(self._path)
        self.class_names = None
        self.description = {"type": "torchvision", "name": "LSUN", "part": part, "path": str(self._path)}
        super().__init__(len(self._keys), **which)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        key = self._keys[number]
        return RawSample(key.decode("latin-1"), LmdbValue(self._path, key))


class LmdbValue(NamedTuple):
    """The value of a key in an LMDB."""

    path: Path
    key: bytes

    def read(self) -> bytes:
        """See `Content`."""
        with _open_lmdb(self.path).begin(buffers=True) as transaction:
            value = transaction.get(self.key)
            check_size(len(value))
            return bytes(value)


def _lmdb_keys(path: Path) -> list[bytes]:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LSUN is read with lmdb: pip install lmdb") from error
    try:
        with _open_lmdb(path).begin() as transaction:
            return list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"{path} is no LMDB of LSUN ({error}); unpack the category's zip file there") from error


@functools.lru_cache(maxsize=1)
def _open_lmdb(path: Path) -> Any:
    import lmdb

    return lmdb.open(str(path), max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)


def open_torchvision(name: str, root: str | os.PathLike[str], **which: Unpack[Which]) -> ListedSource:
    """Open ``SET`` or ``SET/PART``, one of `TORCHVISION_SETS`, below ``root``; the part is "train" if it is not named.

    Raises `UserError` for other names, and as the sets do.
    """
    dataset, _, part = name.partition("/")
    if dataset not in TORCHVISION_SETS:
        raise UserError(f"torchvision:{name}: known data sets are {', '.join(TORCHVISION_SETS)}")
    if dataset == "LSUN":
        if not part.replace("_", "").isalnum():  # it becomes part of a path
            raise UserError(f"torchvision:{name}: say which category, such as torchvision:LSUN/church_outdoor_train")
        return LSUN(root, part, **which)
    if dataset == "CelebA":
        return CelebA(root, part or "train", **which)
    return CIFAR(dataset, root, part or "train", **which)


def _check_part(name: str, part: str, parts: Sequence[str]) -> None:
    if part not in parts:
        raise UserError(f"torchvision:{name}/{part}: its parts are {', '.join(parts)}")


class HuggingFaceDataset(ListedSource):
    """A data set of the library `datasets` in folder ``path``, where ``save_to_disk`` has put it.

    Images are the first column of type Image, labels the first of type ClassLabel, captions the column ``caption`` or
    ``text``. Images must be inside the data set, as save_to_disk puts them: paths to files elsewhere are not followed.

    Raises `UserError` where the package is missing, or ``path`` holds something else, or several parts.
    """

    def __init__(self, path: str | os.PathLike[str], **which: Unpack[Which]) -> None:
        path = Path(path)
        rows = _load_rows(path)
        self._image = _first_column(rows, "Image")
        if self._image is None:
            raise UserError(f"{path}: no column holds images; its columns are {', '.join(rows.features)}")
        self._label = _first_column(rows, "ClassLabel")
        self._caption = next((name for name in CAPTION_COLUMNS if name in rows.features), None)
        self.class_names = list(rows.features[self._label].names) if self._label is not None else None
        self._rows = rows.cast_column(self._image, type(rows.features[self._image])(decode=False))
        self.description = {"type": "huggingface_dataset", "path": str(path), "column": self._image}
        super().__init__(len(rows), **which)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        row = self._rows[number]
        label = row[self._label] if self._label is not None else None
        return RawSample(
            f"row {number}",
            _Bytes(row[self._image]["bytes"] or b""),
            label if label is not None and label >= 0 else None,  # -1: a test set without labels
            row[self._caption] if self._caption is not None else None,
        )


class _Bytes(NamedTuple):
    content: bytes

    def read(self) -> bytes:
        check_size(len(self.content))
        return self.content


def _load_rows(path: Path) -> Any:
    """A `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("data sets of Hugging Face are read with datasets: pip install datasets") from error
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no data set that save_to_disk has written ({error})") from error
    if isinstance(rows, datasets.DatasetDict):
        raise UserError(f"{path} holds the parts {', '.join(rows)}; choose one, such as hf:{path / next(iter(rows))}")
    return rows


def _first_column(rows: Any, kind: str) -> str | None:
    """The first column whose type has that name."""
    return next((name for name, feature in rows.features.items() if type(feature).__name__ == kind), None)

"""Prepared samples, and files of them that processes of several machines leave for each other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZipFile

from ldgan.engine.cli import UserError
from ldgan.engine.files import commit, temporary_name

BLOCK_SAMPLES = 512  # samples in a file: many enough for few files, few enough to share out evenly
_INDEX_NAME = "samples.json"

Why = Literal["unreadable", "filtered", "duplicate"]


class Rejected(NamedTuple):
    """An image left out, and why."""

    name: str
    why: Why
    reason: str


class Prepared(NamedTuple):
    """A sample to write, as extension -> content; ``pixels`` is a digest of its image before it was scaled."""

    name: str
    members: Mapping[str, bytes]
    label: int | None
    pixels: bytes | None


class PreparedBlocks:
    """Samples 0 to ``num_samples`` - 1 of a source, prepared, in blocks of `BLOCK_SAMPLES` that any process writes.

    A block is an uncompressed zip file of the members of its samples and of JSON that says what became of each sample.
    """

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder = folder
        self._num_samples = num_samples

    def __len__(self) -> int:
        """How many blocks there are, finished or not."""
        return -(-self._num_samples // BLOCK_SAMPLES)

    def numbers(self, block: int) -> range:
        """The samples of a block."""
        return range(block * BLOCK_SAMPLES, min((block + 1) * BLOCK_SAMPLES, self._num_samples))

    def is_finished(self, block: int) -> bool:
        """Whether a block can be read."""
        return self._path(block).exists()

    def write(self, block: int, samples: Iterable[Prepared | Rejected]) -> None:
        """Write the samples of a block, all of them and in their order."""
        self.folder.mkdir(exist_ok=True)
        path, entries = self._path(block), []
        with ZipFile(temporary_name(path), "w") as archive:
            for number, sample in enumerate(itertools.islice(samples, len(self.numbers(block)))):
                entries.append(sample._asdict())
                if isinstance(sample, Prepared):
                    pixels = sample.pixels.hex() if sample.pixels is not None else None
                    entries[-1] |= {"members": list(sample.members), "pixels": pixels}
                    for extension, content in sample.members.items():
                        archive.writestr(f"{number}.{extension}", content)
            archive.writestr(_INDEX_NAME, json.dumps(entries))
        commit(path)

    @contextmanager
    def open(self, block: int) -> Iterator[list[Prepared | Rejected]]:
        """The samples of a block, whose members are read when they are asked for, until it is closed.

        Raises:
            UserError: the block is not there, or damaged.
        """
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(ZipFile(self._path(block)))
                entries = json.loads(archive.read(_INDEX_NAME))
                samples = [_unpacked(number, entry, archive) for number, entry in enumerate(entries)]
                if len(samples) != len(self.numbers(block)):
                    raise ValueError(f"{len(samples)} samples")
            except Exception as error:  # zipfile raises nearly anything on damaged files
                raise _damaged(self._path(block), error) from error
            yield samples

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.zip"


def _unpacked(number: int, entry: Mapping[str, Any], archive: ZipFile) -> Prepared | Rejected:
    if "why" in entry:
        return Rejected(**entry)
    pixels = bytes.fromhex(entry["pixels"]) if entry["pixels"] is not None else None
    return Prepared(entry["name"], _MembersInZip(archive, number, entry["members"]), entry["label"], pixels)


class _MembersInZip(Mapping[str, bytes]):
    """Extension -> content of sample ``number``, read when it is asked for."""

    def __init__(self, archive: ZipFile, number: int, extensions: list[str]) -> None:
        self._archive, self._number, self._extensions = archive, number, extensions

    def __getitem__(self, extension: str) -> bytes:
        try:
            return self._archive.read(f"{self._number}.{extension}")
        except Exception as error:  # zipfile raises nearly anything on damaged files
            raise _damaged(self._archive.filename, error) from error

    def __contains__(self, extension: object) -> bool:
        return extension in self._extensions  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._extensions)

    def __len__(self) -> int:
        return len(self._extensions)


def _damaged(path: Path | str | None, reason: object) -> UserError:
    return UserError(f"{path} is missing or damaged ({reason}); remove its folder to prepare anew")

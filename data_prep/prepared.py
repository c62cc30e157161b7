"""Prepared samples, and files of them that processes of several machines leave for each other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from ldgan.engine.cli import UserError
from ldgan.engine.files import commit, temporary_name, write_atomically

BLOCK_SAMPLES = 512  # samples in a file: many enough for few files, few enough to share out evenly

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

    A block is a file with the members of its samples, one after another, and one of JSON that says what became of each
    sample and where its members lie. The latter is written last: without it the block is not finished.
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
        return self._index_path(block).exists()

    def write(self, block: int, samples: Iterable[Prepared | Rejected]) -> None:
        """Write the samples of a block, all of them and in their order."""
        self.folder.mkdir(exist_ok=True)
        path, entries, position = self._content_path(block), [], 0
        with temporary_name(path).open("wb") as file:
            for sample in itertools.islice(samples, len(self.numbers(block))):
                entry, content = _packed(sample, position)
                file.write(content)
                entries.append(entry)
                position += len(content)
        commit(path)
        write_atomically(self._index_path(block), json.dumps(entries))

    @contextmanager
    def open(self, block: int) -> Iterator[list[Prepared | Rejected]]:
        """The samples of a block, whose members are read when they are asked for, until it is closed.

        Raises:
            UserError: the block is not there, or damaged.
        """
        with ExitStack() as stack:
            try:
                entries = json.loads(self._index_path(block).read_text(encoding="utf-8"))
                file = stack.enter_context(self._content_path(block).open("rb"))
                samples = [_unpacked(entry, file) for entry in entries]
                if len(samples) != len(self.numbers(block)):
                    raise ValueError(f"{len(samples)} samples")
            except (KeyError, OSError, TypeError, ValueError) as error:
                raise _damaged(self._index_path(block), error) from error
            yield samples

    def _content_path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.bin"

    def _index_path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.json"


def _packed(sample: Prepared | Rejected, position: int) -> tuple[dict[str, Any], bytes]:
    """A sample as JSON, and the bytes of its members, which lie at ``position`` of a file."""
    if isinstance(sample, Rejected):
        return sample._asdict(), b""
    extents = {}
    for extension, content in sample.members.items():
        extents[extension] = (position, len(content))
        position += len(content)
    pixels = sample.pixels.hex() if sample.pixels is not None else None
    entry = {"name": sample.name, "members": extents, "label": sample.label, "pixels": pixels}
    return entry, b"".join(sample.members.values())


def _unpacked(entry: Mapping[str, Any], file: BinaryIO) -> Prepared | Rejected:
    if "why" in entry:
        return Rejected(**entry)
    pixels = bytes.fromhex(entry["pixels"]) if entry["pixels"] is not None else None
    return Prepared(entry["name"], _MembersInFile(file, entry["members"]), entry["label"], pixels)


class _MembersInFile(Mapping[str, bytes]):
    """Extension -> content, read when it is asked for; ``extents`` are offset and size in an open file."""

    def __init__(self, file: BinaryIO, extents: Mapping[str, tuple[int, int]]) -> None:
        self._file, self._extents = file, extents

    def __getitem__(self, extension: str) -> bytes:
        offset, size = self._extents[extension]
        self._file.seek(offset)
        content = self._file.read(size)
        if len(content) != size:
            raise _damaged(self._file.name, "it ends too early")
        return content

    def __contains__(self, extension: object) -> bool:
        return extension in self._extents  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)


def _damaged(path: Path | str, reason: object) -> UserError:
    return UserError(f"{path} is missing or damaged ({reason}); remove its folder to prepare anew")

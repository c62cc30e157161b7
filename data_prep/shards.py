"""The shard set: a folder of webdataset tar files and a manifest, written once and read by sample index.

    shard-000000.tar    members {index:09d}.{extension}: 000000000.cls, 000000000.png, 000000001.cls, ...
    shard-000001.tar
    manifest.json       what is inside; a folder without it is not finished

Shards are ordinary webdataset tars that other tools can stream. We read them by index instead, since an order
of samples that is a function of seed and step alone can be resumed anywhere and split over any number of
processes.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, NoReturn

from data_prep.remote import Cache, RemoteFile, RemoteFolder, is_url
from ldgan.engine.cli import UserError
from ldgan.engine.files import commit, sha256_of_file, temporary_name

FORMAT = "ldgan-shards/1"
KINDS = ("images", "latents")
EXTENSIONS = ("png", "jpg", "webp", "cls", "txt", "npy", "text.npy")
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 27  # a shard takes some 200 bytes
MAX_SAMPLES = 10**9  # as many as names of nine digits can tell apart
# Of a member's long name or attributes. Python 3.11 takes time and memory by the square of this (CVE-2024-6232).
MAX_HEADER_BYTES = 1 << 14
MAX_OPEN_SHARDS = 64

_SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMBER_NAME = re.compile(rf"([0-9]{{9}})\.({'|'.join(map(re.escape, EXTENSIONS))})")


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One tar file of a shard set."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], num_samples: int) -> ShardInfo:
        """What the manifest should say of a file, which is read; raises OSError."""
        path = Path(path)
        return cls(path.name, num_samples, path.stat().st_size, sha256_of_file(path))

    def check(self) -> None:
        """Raise ValueError for what cannot be true of a shard."""
        # Names become paths: nothing that could lead out of the folder may pass.
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no shard's name")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.sha256[:80]!r} is no SHA-256")
        # A sample takes at least the header of its member. The order of samples takes memory for their number.
        if self.num_samples * tarfile.BLOCKSIZE > self.num_bytes:
            raise ValueError(f"{self.num_samples:,} samples in {self.num_bytes:,} bytes of {self.name}")


class _Details(dict[str, Any]):
    """The details of a manifest that was read: one that is asked for and missing is a `UserError`."""

    def __missing__(self, key: str) -> NoReturn:
        raise UserError(f'these shards have no "{key}" among the details in their {MANIFEST_NAME}; write them again')


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a shard set holds. ``details`` is the writer's own JSON; ``seconds`` is how long writing took."""

    kind: str
    num_samples: int
    shards: tuple[ShardInfo, ...]
    class_names: list[str] | None
    has_captions: bool  # at least one sample has a caption
    seconds: float
    details: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the shards' hashes in order: equal for equal data, wherever it lies."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.num_bytes for shard in self.shards)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``manifest.json`` into ``folder``."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        partial = Path(folder, f".{MANIFEST_NAME}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, Path(folder, MANIFEST_NAME))

    @classmethod
    def read(cls, folder: str | os.PathLike[str] | RemoteFolder) -> Manifest:
        """Read and check ``manifest.json`` in ``folder``; raises `UserError` where it is missing or wrong."""
        path = f"{folder}/{MANIFEST_NAME}"
        try:
            if isinstance(folder, RemoteFolder):
                return folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES, cls._parse)
            return cls._parse(_read_at_most(Path(folder, MANIFEST_NAME), MAX_MANIFEST_BYTES))
        except FileNotFoundError:
            raise UserError(
                f"no {path}: not a folder of finished shards; write one with data_prep/make_shards.py"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a valid manifest ({str(error)[:500]}); restore it or write the shards again"
            ) from error

    @classmethod
    def _parse(cls, content: bytes) -> Manifest:
        fields = json.loads(content.decode("utf-8"))
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f'"format" is not "{FORMAT}"')
        shards = tuple(ShardInfo(**shard) for shard in fields.pop("shards"))
        manifest = cls(shards=shards, **fields)
        manifest._check()
        return dataclasses.replace(manifest, details=_Details(manifest.details))

    def _check(self) -> None:
        """Raise ValueError (or TypeError) where fields have other types, or contradict each other."""
        self._check_types()
        if self.kind not in KINDS:
            raise ValueError(f'"kind" is none of {", ".join(KINDS)}')
        if not self.shards or any(shard.num_samples < 1 for shard in self.shards):
            raise ValueError("a shard without samples")
        if self.num_samples != sum(shard.num_samples for shard in self.shards):
            raise ValueError('"num_samples" is not the sum over the shards')
        if self.num_samples > MAX_SAMPLES:
            raise ValueError(f"{self.num_samples:,} samples; at most {MAX_SAMPLES:,} are read")
        for shard in self.shards:
            shard.check()
        self._check_details()

    def _check_types(self) -> None:
        numbers = [self.num_samples, *(number for s in self.shards for number in (s.num_samples, s.num_bytes))]
        right = {
            "num_samples or num_bytes": all(type(number) is int for number in numbers),
            "name or sha256": all(isinstance(text, str) for s in self.shards for text in (s.name, s.sha256)),
            "class_names": self.class_names is None
            or (isinstance(self.class_names, list) and all(isinstance(name, str) for name in self.class_names)),
            "has_captions": isinstance(self.has_captions, bool),
            "seconds": isinstance(self.seconds, int | float),
            "details": isinstance(self.details, dict),
        }
        for key, is_right in right.items():
            if not is_right:
                raise TypeError(f'"{key}" has the wrong type')

    def _check_details(self) -> None:
        """The same for those details that commands read; whoever wrote the rest reads it."""
        right: dict[str, Callable[[Any], bool]] = {
            "resolution": _is_positive,
            "latent_shape": lambda shape: isinstance(shape, list) and len(shape) == 3 and all(map(_is_positive, shape)),
            "flips": lambda flips: isinstance(flips, bool),
            "autoencoder": lambda fingerprint: isinstance(fingerprint, str),
        }
        for key, is_right in right.items():
            if key in self.details and not is_right(self.details[key]):
                raise ValueError(f'"{key}" of the details cannot be {str(self.details[key])[:100]!r}')


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


def _read_at_most(path: Path, max_bytes: int) -> bytes:
    """A file's bytes; ValueError if there are more."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return content


def shard_name(number: int) -> str:
    """The file name of shard ``number`` of a set."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes a shard set; a context manager that leaves ``out`` either complete or absent.

    Shards are built in a hidden folder beside ``out`` that is renamed once the manifest is in it; after an
    exception it is removed. The same samples give the same bytes. What is put into ``folder`` (a report, say)
    goes along, and ``details`` and ``class_names`` may be completed until the end. ``manifest`` is set on success.

    Raises `UserError` where ``out`` exists already or cannot be written, or where no sample was written.
    """

    manifest: Manifest

    def __init__(
        self,
        out: str | os.PathLike[str],
        kind: str,
        *,
        samples_per_shard: int = 1000,
        class_names: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = Path(out)
        self.folder = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self.details = dict(details or {})
        self.class_names = list(class_names) if class_names is not None else None
        self.num_samples = 0
        self._kind = kind
        self._samples_per_shard = samples_per_shard
        self._has_captions = False
        self._shards: list[ShardInfo] = []
        self._shard: ShardFile | None = None

    def __enter__(self) -> ShardWriter:
        self._started = time.monotonic()
        self._make_folder()
        return self

    def _make_folder(self, exist_ok: bool = False) -> None:
        if os.path.lexists(self.out):
            raise UserError(f"{self.out} exists already; remove it or choose another output folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            raise UserError(f"cannot create {self.out}: {error.strerror}; choose another output folder") from error

    def write(self, sample: Mapping[str, bytes]) -> None:
        """Append one sample, given as extension -> content; its index is the number of samples before it."""
        if unknown := set(sample).difference(EXTENSIONS):
            raise ValueError(f"unknown extensions {sorted(unknown)}; known are {', '.join(EXTENSIONS)}")
        if self._shard is None:
            self._shard = self._open_shard(len(self._shards))
        self._shard.write(self.num_samples, sample)
        self.num_samples += 1
        self._has_captions |= "txt" in sample
        if self._shard.num_samples == self._samples_per_shard:
            self._end_shard()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self.folder, ignore_errors=True)  # gone already if it was renamed

    def _open_shard(self, number: int) -> ShardFile:
        return ShardFile(self.folder / shard_name(number))

    def _close_shard(self, number: int, shard: ShardFile) -> ShardInfo:
        return shard.close()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._close_shard(len(self._shards), self._shard))
            self._shard = None

    def _finish(self) -> None:
        self._end_shard()
        self._complete(time.monotonic() - self._started)

    def _complete(self, seconds: float) -> None:
        """Make a set of the finished shards, and give it its name."""
        if not self._shards:
            raise UserError(f"nothing to write to {self.out}: there was not a single sample")
        manifest = Manifest(
            kind=self._kind,
            num_samples=self.num_samples,
            shards=tuple(self._shards),
            class_names=self.class_names,
            has_captions=self._has_captions,
            seconds=round(seconds, 3),
            details=self.details,
        )
        manifest.write(self.folder)
        try:
            os.rename(self.folder, self.out)
        except OSError as error:
            raise UserError(f"cannot move the finished shards to {self.out}: {error.strerror}") from error
        self.manifest = manifest


class ShardFile:
    """One tar in the making, which gets its name when it is complete; hashes its bytes on their way to the disk."""

    def __init__(self, path: Path) -> None:
        # Imported here, since it brings torch along: seconds that other commands and workers need not spend.
        from webdataset import TarWriter

        self.num_samples = 0
        self._path = path
        self._sink = _HashingFile(temporary_name(path))
        # Tar headers hold a time and an owner; both are fixed, so that equal samples give equal files.
        self._tar = TarWriter(self._sink, encoder=False, mtime=0, user="ldgan", group="ldgan")

    def write(self, index: int, sample: Mapping[str, bytes]) -> None:
        """Add a sample: extension -> content."""
        self._tar.write({"__key__": f"{index:09d}", **sample})
        self.num_samples += 1

    def close(self) -> ShardInfo:
        """Complete the file, and wait until it is on the disk; what the manifest says of it."""
        self._tar.close()
        self._sink.file.close()
        commit(self._path)
        return ShardInfo(self._path.name, self.num_samples, self._sink.num_bytes, self._sink.sha256.hexdigest())

    def abandon(self) -> None:
        """Remove what there is of the file."""
        self._sink.abandoned = True
        self._sink.file.close()
        temporary_name(self._path).unlink(missing_ok=True)


class _HashingFile:
    """The file object that a tar is written to."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)  # tarfile has a buffer of its own
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        # Even after a failed write tarfile flushes its buffer when it is deleted; then nobody may listen.
        self.abandoned = False

    def write(self, data: bytes) -> int:
        if not self.abandoned:
            unwritten = memoryview(data)
            while unwritten:
                unwritten = unwritten[self.file.write(unwritten) :]
            self.sha256.update(data)
            self.num_bytes += len(data)
        return len(data)


class ShardSet:
    """Random access to the samples of a shard set, in memory that does not grow with it.

    Where a shard's members lie is found out when one of its samples is first read; this and the open file are
    kept for the `MAX_OPEN_SHARDS` shards used last. Can be pickled, and shared with forked processes.

    ``folder`` is for messages and descriptions too: as text it is the path, or the URL without credentials.

    A shard that cannot be read stops the run with its name, the first one already. To leave it out instead would
    shift or shorten every epoch, on one process sooner than on another: batches would then depend on what the network
    did, and a resumed run would see others than the run that it goes on with.
    """

    def __init__(self, folder: Path | RemoteFolder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shard_sizes = [shard.num_samples for shard in manifest.shards]
        self._first_indices = [0, *itertools.accumulate(self.shard_sizes)][:-1]
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardSet:
        """Open a shard set: a folder, or a URL of one as str (see `data_prep.remote`).

        Of a URL the manifest is fetched now, and each shard when one of its samples is first read.

        Raises:
            UserError: a bad manifest, a missing or cut shard of a folder, or a URL that cannot be read.
        """
        if is_url(path):
            remote = RemoteFolder(path, Cache.from_environment())
            return cls(remote, Manifest.read(remote))
        folder = Path(path)
        manifest = Manifest.read(folder)
        for shard in manifest.shards:
            file = folder / shard.name
            try:
                num_bytes = file.stat().st_size
            except OSError as error:
                raise _damaged(file, error.strerror) from error
            if num_bytes != shard.num_bytes:
                raise _damaged(file, f"{num_bytes:,} bytes instead of {shard.num_bytes:,}")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, index: int) -> dict[str, bytes]:
        """Return sample ``index`` (0 <= index < len) as extension -> content.

        Raises IndexError outside that range, and `UserError` where the shard is damaged or cannot be fetched.
        """
        return self._open_shard(self._shard_number(index)).read(index)

    def locate(self, index: int) -> str:
        """Say where sample ``index`` lies, for messages: the shard's path or URL and the sample's key."""
        return f"{self._location(self._shard_number(index))}, sample {index:09d}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": OrderedDict()}  # files cannot be pickled

    def _shard_number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return bisect.bisect_right(self._first_indices, index) - 1

    def _open_shard(self, number: int) -> _OpenShard:
        if number not in self._open_shards:
            self._open_shards[number] = _OpenShard(
                self._location(number), self._file(number), self._first_indices[number], self.shard_sizes[number]
            )
        self._open_shards.move_to_end(number)
        if len(self._open_shards) > MAX_OPEN_SHARDS:
            _, oldest = self._open_shards.popitem(last=False)
            oldest.file.close()
        return self._open_shards[number]

    def _file(self, number: int) -> BinaryIO:
        shard = self.manifest.shards[number]
        if isinstance(self.folder, RemoteFolder):
            return self.folder.open(RemoteFile(shard.name, shard.num_bytes, shard.sha256), self.manifest.fingerprint)
        try:
            return (self.folder / shard.name).open("rb")
        except OSError as error:
            raise _damaged(self._location(number), error) from error

    def _location(self, number: int) -> str:
        return f"{self.folder}/{self.manifest.shards[number].name}"


_Extents = dict[str, tuple[int, int]]  # extension -> (offset in the tar, size), in bytes


class _OpenShard:
    """An open tar file, and where each of its samples lies in it. ``location`` is for messages."""

    def __init__(self, location: str, file: BinaryIO, first_index: int, num_samples: int) -> None:
        self.file = file
        self._location = location
        try:
            self._samples = _scan(file)
        except Exception as error:  # tarfile raises nearly anything on damaged headers
            raise _damaged(location, error) from error
        # Compared as a range, which takes no memory whatever number of samples a manifest claims.
        if len(self._samples) != num_samples or any(
            found != expected for found, expected in zip(self._samples, range(first_index, first_index + num_samples))
        ):
            raise _damaged(location, f"its samples are not the {num_samples} that the manifest lists")

    def read(self, index: int) -> dict[str, bytes]:
        return {extension: self._bytes(*extent) for extension, extent in self._samples[index].items()}

    def _bytes(self, offset: int, size: int) -> bytes:
        # pread has no file position, which forked processes would share.
        content = os.pread(self.file.fileno(), size, offset)
        if len(content) != size:
            raise _damaged(self._location, "it ends too early")
        return content


def _scan(file: BinaryIO) -> dict[int, _Extents]:
    """Return sample index -> extents for a tar, reading its headers and seeking past the content."""
    samples: dict[int, _Extents] = {}
    for member in tar_members(file):
        name = member_name(member)
        if name is None:
            raise tarfile.ReadError(f"unexpected member {member.name[:100]!r}")
        samples.setdefault(name.number, {})[name.extension] = (member.offset_data, member.size)
    return samples


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an uncompressed tar, in memory that does not grow with it; reads headers only.

    Raises what tarfile raises for a damaged tar, which is nearly anything, and ReadError for a damaged header in the
    middle too, where tarfile itself believes that the end has come, and for a file that ends before its members do.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
        for member in tar:
            if is_plain_file(member) and not 0 <= member.size <= num_bytes - member.offset_data:
                raise tarfile.ReadError(f"ends within member {member.name[:100]!r}")
            yield member
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {tar.offset:,}")


class _Headers(io.RawIOBase):
    """A tar as tarfile may read it: headers of bounded length, one after the other.

    A header says itself how long it is, and a negative length leads tarfile round in a circle (CVE-2025-8194).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go on to ``offset``."""
        if offset < self._file.tell():
            raise tarfile.ReadError(f"a header that leads back to byte {offset:,}")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._file.tell()


def is_plain_file(member: tarfile.TarInfo) -> bool:
    """Whether a member's bytes lie in the tar as they are: no link, folder, device, or file with holes."""
    return member.isreg() and not member.issparse()


class MemberName(NamedTuple):
    """What the name of a shard's member says: ``{number:09d}.{extension}``."""

    number: int
    extension: str


def member_name(member: tarfile.TarInfo) -> MemberName | None:
    """The parts of a member's name, or None if a shard of ours has no such member."""
    name = _MEMBER_NAME.fullmatch(member.name)
    return MemberName(int(name[1]), name[2]) if name is not None and is_plain_file(member) else None


def _damaged(shard: Path | str, reason: object) -> UserError:
    return UserError(f"{shard} is missing or damaged ({reason}); restore it or write the shards again")

"""Images straight from archives: zip and tar files, and the webdataset shards of other tools.

Names of members serve as names only: nothing is unpacked, and no name ever becomes a path. So absolute names, and
those with ``..``, do no harm.
"""

from __future__ import annotations

import functools
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.shards import Manifest, is_plain_file, tar_members
from data_prep.sources import (
    IMAGE_SUFFIXES,
    Content,
    FilePart,
    ListedSource,
    NamedImages,
    RawSample,
    Split,
    check_size,
)
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

MAX_OPEN_ARCHIVES = 4
MAX_NAMED = 5  # of many damaged files, so many are named


class ZipMember(NamedTuple):
    """Member ``number`` of a zip archive, counted in the order of its directory."""

    path: Path
    number: int

    def read(self) -> bytes:
        """See `Content`; encrypted members and those whose checksum is wrong are errors too."""
        archive = _open_zip(self.path)
        member = archive.infolist()[self.number]
        check_size(member.file_size)
        with archive.open(member) as file:
            # Never more than the size that was promised, whatever the compressed bytes would grow to.
            return file.read(member.file_size)


@functools.lru_cache(maxsize=MAX_OPEN_ARCHIVES)
def _open_zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


class ImageArchive(NamedImages):
    """The images of a zip or tar archive; see `NamedImages`.

    With ``inside``, only what is in that folder of the archive (``train``, say). A folder that holds all images is
    looked through, so that the classes are the same as those of that folder itself. Of members with one name the last
    counts, as when an archive is unpacked; links are left out.

    Raises `UserError` as `NamedImages` does, and for a file that is no archive, that is cut, or that is compressed as
    a whole (``.tar.gz``), where no image can be read without all those before it.
    """

    def __init__(
        self,
        path: Path,
        seed: int = 0,
        num_images: int | None = None,
        split: Split | None = None,
        inside: str | None = None,
    ) -> None:
        members = dict(_members(path))
        if inside is not None:
            members = _inside(members, inside)
            if not members:
                raise UserError(f"{path}: nothing is in a folder {inside}; it must be named from the archive's root")
        self._members = _without_common_folder(members)
        super().__init__("image_archive", path, self._members, seed, num_images, split)
        self.description |= {"inside": inside}

    def content(self, name: str) -> Content:
        """See `NamedImages.content`."""
        return self._members[name]


def _members(path: Path) -> Iterator[tuple[str, Content]]:
    """Yield the name of each file in an archive, without what a file system would make of ``..`` and the like."""
    try:
        members = _zip_members(path) if _is_zip(path) else _tar_members(path)
        for name, content in members:
            yield "/".join(part for part in name.split("/") if part not in ("", ".", "..")), content
    except UserError:
        raise
    except Exception as error:  # tarfile and zipfile raise nearly anything on damaged headers
        raise UserError(f"{path} is no archive or damaged ({error}); give a zip or tar file") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        # zipfile looks at the end of a file only, and the last member of a tar may be a zip file.
        return file.read(2) == b"PK" and zipfile.is_zipfile(path)


def _zip_members(path: Path) -> Iterator[tuple[str, ZipMember]]:
    for number, member in enumerate(_open_zip(path).infolist()):
        if not member.is_dir():
            yield member.filename, ZipMember(path, number)


def _tar_members(path: Path) -> Iterator[tuple[str, FilePart]]:
    with path.open("rb") as file:
        try:
            for member in tar_members(file):
                if is_plain_file(member):
                    yield member.name, FilePart(path, member.offset_data, member.size)
        except tarfile.ReadError:
            if _is_compressed(path):
                raise UserError(
                    f"{path} is compressed as a whole; uncompress it first (gunzip, bunzip2, unxz) to a .tar"
                ) from None
            raise


def _is_compressed(path: Path) -> bool:
    """Whether a file that is no plain tar is one after decompression."""
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _without_common_folder(members: dict[str, Content]) -> dict[str, Content]:
    """The same contents, with names that do not all begin with one folder."""
    while len(tops := {name.partition("/")[0] for name in members}) == 1 and not tops.issuperset(members):
        members = _inside(members, tops.pop())
    return members


def _inside(members: dict[str, Content], folder: str) -> dict[str, Content]:
    """What is in a folder, by the names that it has there."""
    prefix = folder.strip("/") + "/"
    return {name.removeprefix(prefix): content for name, content in members.items() if name.startswith(prefix)}


class WebDatasetShards(ListedSource):
    """The samples of all tar files in folder ``root``, such as img2dataset writes.

    The members ``key.jpg``, ``key.cls``, ``key.txt`` and ``key.json`` of a tar are one sample; its key ends at the
    first dot. Its image is the member with an image's suffix; its label the whole number in ``.cls``; its caption the
    text in ``.txt`` or else the ``caption`` in ``.json``. Samples without an image are left out and counted in the
    description. Labels have no names, unless the shards are ours.

    The headers of all tars are read first, and a sample takes about half a kilobyte of memory.

    Raises `UserError` as `ListedSource` does, and where there is no image, or tars are damaged.
    """

    def __init__(self, root: Path, seed: int = 0, num_images: int | None = None, split: Split | None = None) -> None:
        self._samples: list[RawSample] = []
        num_without_image = 0
        for name, members in _scan_shards(root, sorted(root.glob("*.tar"))):
            image = next((file for extension, file in members.items() if f".{extension}" in IMAGE_SUFFIXES), None)
            if image is None:
                num_without_image += 1
            else:
                self._samples.append(RawSample(name, image, members.get("cls"), _caption(members)))
        if not self._samples:
            raise UserError(f"{root}: its tar files hold no images; known suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}")
        self.class_names = _class_names(root)
        self.description = {
            "type": "webdataset_shards",
            "path": str(root),
            "num_without_image": num_without_image,
        }
        super().__init__(len(self._samples), seed, num_images, split)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        return self._samples[number]


_SampleMembers = dict[str, FilePart]  # extension -> content


def _scan_shards(root: Path, shards: list[Path]) -> Iterator[tuple[str, _SampleMembers]]:
    """Yield every sample of all shards, or raise a `UserError` that says which are damaged."""
    damaged: list[str] = []
    with progress_bar("reading headers", len(shards), "shards") as progress:
        for shard in shards:
            try:
                samples = _scan_shard(shard)
            except Exception as error:  # tarfile raises nearly anything on damaged headers
                damaged.append(f"{shard.name}: {error}")
            else:
                yield from samples.items()
            progress.advance()
    if damaged:
        raise UserError(
            f"{root}: {len(damaged)} of {len(shards)} tar files are damaged ({'; '.join(damaged[:MAX_NAMED])});"
            " restore them or move them away"
        )


def _scan_shard(path: Path) -> dict[str, _SampleMembers]:
    samples: dict[str, _SampleMembers] = {}
    with path.open("rb") as file:
        for member in tar_members(file):
            folder, _, file_name = member.name.rpartition("/")
            key, _, extension = file_name.partition(".")
            if key and is_plain_file(member):
                name = "/".join(part for part in (path.name, folder, key) if part)
                samples.setdefault(name, {})[extension.lower()] = FilePart(path, member.offset_data, member.size)
    return samples


def _caption(members: _SampleMembers) -> Content | None:
    if "txt" in members or "json" not in members:
        return members.get("txt")
    return _CaptionInJson(members["json"])


class _CaptionInJson(NamedTuple):
    """What a JSON file calls ``caption``; empty where it does not."""

    file: FilePart

    def read(self) -> bytes:
        fields = json.loads(self.file.read())
        return str(fields.get("caption") or "").encode("utf-8")


def _class_names(root: Path) -> list[str] | None:
    try:
        return Manifest.read(root).class_names
    except UserError:  # not a set of ours: other tools write no manifest, or one of another format
        return None

"""Images straight from archives: zip and tar files, and the webdataset shards of other tools.

Names of members serve as names only: nothing is unpacked, and no name ever becomes a path. So absolute names, and
those with ``..``, do no harm.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.shards import Manifest, is_plain_file, tar_members
from data_prep.sources import (
    IMAGE_SUFFIXES,
    Content,
    FilePart,
    ListedSource,
    NamedImages,
    RawSample,
    Which,
    check_size,
)
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_OPEN_ARCHIVES = 4
MAX_SHARDS = 1_000_000  # that a pattern may stand for
MAX_NAMED = 5  # of many damaged files, so many are named

_BRACES = re.compile(r"(\{[^{}]*\})")
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")


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

    def __init__(self, path: str | os.PathLike[str], inside: str | None = None, **which: Unpack[Which]) -> None:
        path = Path(path)
        members = dict(_members(path))
        if inside is not None:
            members = _inside(members, inside)
            if not members:
                raise UserError(f"{path}: nothing is in a folder {inside}; it must be named from the archive's root")
        self._members = _without_common_folder(members)
        super().__init__("image_archive", path, self._members, **which)
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
    """The samples of tar files such as img2dataset writes: all in a folder, or those of a brace pattern.

    ``path`` is the folder, or a pattern such as ``shards/{00000..00099}.tar``, of which every file has to be there.

    The members ``key.jpg``, ``key.cls``, ``key.txt`` and ``key.json`` of a tar are one sample; its key ends at the
    first dot. Its image is the member with an image's suffix; its label the whole number in ``.cls``; its caption the
    text in ``.txt`` or else the ``caption`` in ``.json``. Samples without an image are left out and counted in the
    description. Labels have no names, unless the shards are ours.

    The headers of all tars are read first, and a sample takes about half a kilobyte of memory.

    Raises `UserError` as `ListedSource` does, and where there is no image, or tars are missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], **which: Unpack[Which]) -> None:
        path = Path(path)
        self._samples: list[RawSample] = []
        num_without_image = 0
        shards = sorted(path.glob("*.tar")) if path.is_dir() else _expand(path)
        for name, members in _scan_shards(path, shards):
            image = next((file for extension, file in members.items() if f".{extension}" in IMAGE_SUFFIXES), None)
            if image is None:
                num_without_image += 1
            else:
                self._samples.append(RawSample(name, image, members.get("cls"), _caption(members)))
        if not self._samples:
            raise UserError(f"{path}: its tar files hold no images; known suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}")
        self.class_names = _class_names(path) if path.is_dir() else None
        self.description = {
            "type": "webdataset_shards",
            "path": str(path),
            "num_without_image": num_without_image,
        }
        super().__init__(len(self._samples), **which)

    def sample(self, number: int) -> RawSample:
        """See `ListedSource.sample`."""
        return self._samples[number]


_SampleMembers = dict[str, FilePart]  # extension -> content


def _expand(pattern: Path) -> list[Path]:
    """The files of a brace pattern, in its order; not by braceexpand, which would make whatever a range promises."""
    paths = [""]
    for part in _BRACES.split(str(pattern)):
        choices = _choices(pattern, part)
        if len(paths) * len(choices) > MAX_SHARDS:
            raise UserError(f"{pattern} stands for more than {MAX_SHARDS:,} files; give fewer at a time")
        paths = [path + choice for path in paths for choice in choices]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{pattern}: {len(missing):,} of its {len(paths):,} files are missing, the first is {missing[0]}"
        )
    return list(map(Path, paths))


def _choices(pattern: Path, part: str) -> list[str]:
    """What a part of a pattern stands for: 08, 09, 10 for ``{08..10}``; a, b for ``{a,b}``; itself without braces."""
    if bounds := _RANGE.fullmatch(part):
        first, last = map(int, bounds.groups())
        numbers = range(first, min(last, first + MAX_SHARDS) + 1)  # one too many at most
        return [f"{number:0{len(bounds[1])}d}" for number in numbers]
    if part.startswith("{") and "," in part:
        return part[1:-1].split(",")
    if "{" in part or "}" in part:
        raise UserError(f"{pattern}: {part} is neither a range nor a list; write {{00000..00099}} or {{a,b}}")
    return [part]


def _scan_shards(root: Path, shards: list[Path]) -> Iterator[tuple[str, _SampleMembers]]:
    """Yield every sample of all shards, or raise a `UserError` that says which are damaged."""
    damaged: list[str] = []
    common = os.path.commonpath([shard.parent for shard in shards]) if shards else ""
    with progress_bar("reading headers", len(shards), "shards") as progress:
        for shard in shards:
            try:
                samples = _scan_shard(shard, shard.relative_to(common).as_posix())
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


def _scan_shard(path: Path, shard: str) -> dict[str, _SampleMembers]:
    """The samples of a tar, by names that begin with that of the ``shard``."""
    samples: dict[str, _SampleMembers] = {}
    with path.open("rb") as file:
        for member in tar_members(file):
            folder, _, file_name = member.name.rpartition("/")
            key, _, extension = file_name.partition(".")
            if key and is_plain_file(member):
                name = "/".join(part for part in (shard, folder, key) if part)
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

"""Check a shard set against its manifest, and say what is wrong where. Exit status 0: nothing; 1: something."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import copy
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from data_prep.images import IMAGE_FORMATS, image_member
from data_prep.remote import Cache, RemoteFile, RemoteFolder, is_url
from data_prep.samples import load_moments, load_text, open_image, text_shape
from data_prep.shards import MANIFEST_NAME, Manifest, ShardInfo, member_name, tar_members
from data_prep.urls import path_or_url
from data_prep.workers import map_in_processes
from ldgan.engine import cli
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar

EXAMPLES = """\
what is checked:
  that the shards of the manifest are there, and no others; their sizes, SHA-256 and samples; that each sample has one
  image of the manifest's size (or latents of its shape), a label that is a class, and a caption in UTF-8. Of a URL,
  every shard is fetched anew, checked, and removed: beside the cache lies one for each worker. Files behind it that no
  manifest lists are not found.

examples:
  # All bytes are read and hashed; of images the headers are looked at
  python data_prep/check_shards.py data/photos256

  # Every image is decoded too
  python data_prep/check_shards.py data/photos256 --decode --workers 8

  # What has arrived in an object store
  python data_prep/check_shards.py s3://bucket/photos256
"""


class ExpectedShard(NamedTuple):
    """What the manifest says of a shard. ``details`` and ``num_classes`` (None: not known) are those of the set."""

    folder: Path | RemoteFolder
    info: ShardInfo
    first_index: int
    kind: str
    details: Mapping[str, Any]
    num_classes: int | None
    decode: bool

    @property
    def numbers(self) -> range:
        """The samples that belong here."""
        return range(self.first_index, self.first_index + self.info.num_samples)


class ShardReport(NamedTuple):
    """What was found: problems, one line each, and how many captions."""

    problems: list[str]
    num_captions: int


def find_problems(
    folder: Path | RemoteFolder, manifest: Manifest, *, decode: bool = False, num_workers: int = 1
) -> Iterator[str]:
    """Yield a line for each thing that is wrong with a shard set: the file, the sample, and what.

    With ``decode`` every image is decoded; without, its header is read. Shows a progress bar.
    """
    yield from _listed_twice(manifest)
    if isinstance(folder, Path):
        yield from _not_listed(folder, manifest)
    num_captions = 0
    with progress_bar("checking", manifest.num_samples, "samples") as progress:
        shards = list(_expected_shards(folder, manifest, decode))
        for shard, report in zip(shards, map_in_processes(check_shard, shards, num_workers)):
            yield from report.problems
            num_captions += report.num_captions
            progress.advance(shard.info.num_samples)
    if manifest.has_captions != (num_captions > 0):
        yield f'{MANIFEST_NAME}: "has_captions" is {manifest.has_captions}, but {num_captions:,} samples have one'


def _listed_twice(manifest: Manifest) -> Iterator[str]:
    names = Counter(shard.name for shard in manifest.shards)
    yield from (f"{MANIFEST_NAME}: lists {name} {count} times" for name, count in names.items() if count > 1)


def _not_listed(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Shards that should not be there; a missing one is found when it is read."""
    names = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names:
            yield f"{path.name}: is not in the manifest"


def _expected_shards(folder: Path | RemoteFolder, manifest: Manifest, decode: bool) -> Iterator[ExpectedShard]:
    num_classes = len(manifest.class_names) if manifest.class_names is not None else None
    first_indices = itertools.accumulate((shard.num_samples for shard in manifest.shards), initial=0)
    for info, first_index in zip(manifest.shards, first_indices):
        yield ExpectedShard(folder, info, first_index, manifest.kind, manifest.details, num_classes, decode)


def check_shard(shard: ExpectedShard) -> ShardReport:
    """Check one shard; runs in a worker process."""
    try:
        with _local_copy(shard) as path:
            return _check_file(path, shard)
    except UserError as error:  # it cannot be fetched
        return ShardReport([str(error)], 0)


@contextmanager
def _local_copy(shard: ExpectedShard) -> Iterator[Path]:
    """The shard's file; that of a URL is fetched, and removed afterwards."""
    if isinstance(shard.folder, Path):
        yield shard.folder / shard.info.name
        return
    with _fetched_anew(shard.folder) as folder:
        info, fingerprint = shard.info, shard.info.sha256
        folder.open(RemoteFile(info.name, info.num_bytes, info.sha256), fingerprint).close()
        yield folder.cache.path(fingerprint, info.name)


@contextmanager
def _fetched_anew(folder: RemoteFolder) -> Iterator[RemoteFolder]:
    """The same folder with an empty cache, beside what was fetched before."""
    with folder.cache.temporary_folder() as temporary:
        anew = copy.copy(folder)
        anew.cache = dataclasses.replace(folder.cache, folder=temporary)
        yield anew


def _check_file(path: Path, shard: ExpectedShard) -> ShardReport:
    try:
        found = ShardInfo.of_file(path, shard.info.num_samples)
    except OSError as error:
        return ShardReport([f"{path.name}: cannot be read ({error.strerror})"], 0)
    problems = list(_wrong_bytes(found, shard.info))
    numbers, num_captions = [], 0
    for number, sample in itertools.groupby(_members(path, problems), key=lambda member: member.number):
        members = _one_of_each(number, sample, path, problems)
        numbers.append(number)
        num_captions += "txt" in members
        problems += [f"{path.name}, sample {number:09d}: {problem}" for problem in _wrong_content(members, shard)]
    problems += [f"{path.name}: {problem}" for problem in _wrong_samples(numbers, shard.numbers)]
    return ShardReport(problems, num_captions)


def _wrong_bytes(found: ShardInfo, expected: ShardInfo) -> Iterator[str]:
    if found.num_bytes != expected.num_bytes:
        yield f"{found.name}: {found.num_bytes:,} bytes, not {expected.num_bytes:,} as in the manifest"
    elif found.sha256 != expected.sha256:
        yield f"{found.name}: its SHA-256 is not that in the manifest"


class _Member(NamedTuple):
    number: int  # of the sample
    extension: str
    content: bytes


def _members(path: Path, problems: list[str]) -> Iterator[_Member]:
    """Yield the members of a tar up to its end or damage; adds to ``problems``."""
    with path.open("rb") as file:
        try:
            for member in tar_members(file):
                name = member_name(member)
                if name is None:
                    problems.append(f"{path.name}: unexpected member {member.name!r}")
                else:
                    # pread leaves the file's position to the reader of the headers.
                    content = os.pread(file.fileno(), member.size, member.offset_data)
                    yield _Member(name.number, name.extension, content)
        except Exception as error:  # tarfile raises nearly anything on damaged headers
            problems.append(f"{path.name}: {error}")


def _one_of_each(number: int, sample: Iterator[_Member], path: Path, problems: list[str]) -> dict[str, bytes]:
    """The content of a sample's members by extension; adds to ``problems``."""
    members: dict[str, bytes] = {}
    for member in sample:
        if member.extension in members:
            problems.append(f"{path.name}, sample {number:09d}: {member.extension} is there twice")
        members[member.extension] = member.content
    return members


def _wrong_samples(found: list[int], expected: range) -> Iterator[str]:
    """Compare the numbers of a shard's samples with those it should have."""
    foreign = [number for number in found if number not in expected]
    # Whatever number of samples a manifest claims, no more memory is used than for those that were found.
    there = set(found).difference(foreign)
    if num_missing := len(expected) - len(there):
        first = next(number for number in expected if number not in there)
        yield f"{num_missing:,} of its {len(expected):,} samples are missing, the first is {first:09d}"
    if foreign:
        yield f"{len(foreign):,} samples belong elsewhere, the first is {foreign[0]:09d}"
    if not num_missing and not foreign and found != list(expected):
        yield "its samples are not in order, or some are there twice"


def _wrong_content(members: Mapping[str, bytes], shard: ExpectedShard) -> Iterator[str]:
    """Say what is wrong with a sample."""
    content = ("image", _check_image) if shard.kind == "images" else ("latents", _check_latents)
    for what, check in (content, ("label", _check_label), ("caption", _check_caption), ("embedding", _check_text)):
        try:
            check(members, shard)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            yield f"{what}: {' '.join(str(error).split()) or type(error).__name__}"


def _check_image(members: Mapping[str, bytes], shard: ExpectedShard) -> None:
    extension, _ = image_member(members)
    if others := (IMAGE_FORMATS.keys() & members.keys()) - {extension}:
        raise ValueError(f"{', '.join(sorted(others))} beside {extension}")
    image = open_image(members, shard.details.get("resolution"))
    if shard.decode:
        image.load()


def _check_latents(members: Mapping[str, bytes], shard: ExpectedShard) -> None:
    load_moments(members, shard.details)


def _check_label(members: Mapping[str, bytes], shard: ExpectedShard) -> None:
    if "cls" not in members:
        return
    label = int(members["cls"])
    if label < 0 or (shard.num_classes is not None and label >= shard.num_classes):
        upper = f"to {shard.num_classes - 1}" if shard.num_classes is not None else "on"
        raise ValueError(f"{label} is not from 0 {upper}")


def _check_caption(members: Mapping[str, bytes], shard: ExpectedShard) -> None:
    members.get("txt", b"").decode("utf-8")


def _check_text(members: Mapping[str, bytes], shard: ExpectedShard) -> None:
    """A caption's embedding is of the encoder that the manifest names; see `data_prep.loader.LatentDataset`."""
    if "text.npy" in members:
        if (shape := text_shape(shard.details)) is None:
            raise ValueError("there is one, and the manifest names no text encoder")
        load_text(members["text.npy"], *shape)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=path_or_url, help="a folder of shards, of images or latents, or the URL of one")
    add("--decode", action="store_true", help="decode every image (default: look at its header)")
    add("--workers", type=cli.positive, default=os.cpu_count(), metavar="N", help="processes (default: one per core)")
    return parser.parse_args()


def open_folder(path: str | os.PathLike[str]) -> Path | RemoteFolder:
    """The folder, or what lies behind the URL; raises `UserError` where there is no folder."""
    if is_url(path):
        return RemoteFolder(path, Cache.from_environment())
    if not os.path.isdir(path):
        raise UserError(f"{path} is not a folder; give a folder of shards")
    return Path(path)


def read_manifest(folder: Path | RemoteFolder) -> Manifest:
    """The manifest as it is now: not an earlier one, where a server cannot be reached."""
    if isinstance(folder, Path):
        return Manifest.read(folder)
    with _fetched_anew(folder) as anew:
        return Manifest.read(anew)


def main() -> None:
    """Run the command."""
    args = parse_args()
    folder = open_folder(args.data)
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        print(error)
        sys.exit(1)
    num_problems = 0
    for problem in find_problems(folder, manifest, decode=args.decode, num_workers=args.workers):
        print(problem, flush=True)
        num_problems += 1
    verdict = f"{num_problems:,} problems" if num_problems else "nothing is wrong"
    num_shards, num_samples, num_megabytes = len(manifest.shards), manifest.num_samples, manifest.num_bytes / 1e6
    print(f"checked {num_shards:,} shards, {num_samples:,} samples, {num_megabytes:,.1f} MB: {verdict}")
    sys.exit(1 if num_problems else 0)


command = cli.command(main)

if __name__ == "__main__":
    command()

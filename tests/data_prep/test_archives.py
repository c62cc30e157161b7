from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import sources
from data_prep.archives import ImageArchive, WebDatasetShards
from data_prep.preparation import Preparation, write_shards
from data_prep.shards import Manifest, ShardSet
from data_prep.sources import ImageFolder, RawSample, Split
from ldgan.engine.cli import UserError

Files = Mapping[str, bytes]
WriteArchive = Callable[[Path, Files], Path]


def picture(seed: int, size: tuple[int, int] = (8, 8), image_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def contents(sample: RawSample) -> tuple[str, bytes, int | None, bytes | None]:
    return sample.name, sample.image.read(), sample.label, sample.caption and sample.caption.read()


CLASSES = {
    "cats/1.png": picture(1),
    "cats/deep/er/2.JPG": picture(2, image_format="JPEG"),
    "cats/1.txt": b"a cat",
    "dogs/1.png": picture(3),
    "dogs/.hidden.png": picture(4),
    "notes.md": b"no image",
}

archives = pytest.mark.parametrize(("write", "suffix"), [(write_zip, "zip"), (write_tar, "tar")], ids=["zip", "tar"])


@archives
def test_an_archive_is_the_same_as_the_folder_that_it_holds(tmp_path, write, suffix):
    folder = ImageFolder(write_folder(tmp_path / "folder", CLASSES), seed=3)
    archive = ImageArchive(write(tmp_path / f"x.{suffix}", CLASSES), seed=3)
    assert list(map(contents, archive)) == list(map(contents, folder))
    assert archive.class_names == folder.class_names == ["cats", "dogs"]
    part = Split("train", 0.5, by_caption=True)
    halves = [
        source(path, split=part)
        for source, path in ((ImageFolder, folder.root), (ImageArchive, tmp_path / f"x.{suffix}"))
    ]
    assert [sample.name for sample in halves[0]] == [sample.name for sample in halves[1]]


@archives
def test_shards_of_an_archive_are_those_of_the_folder_with_two_workers_too(tmp_path, write, suffix):
    files = {f"{'ab'[number % 2]}/{number}.png": picture(number) for number in range(40)}
    folder = write_shards(ImageFolder(write_folder(tmp_path / "folder", files)), tmp_path / "1", Preparation(8))
    archive = ImageArchive(write(tmp_path / f"x.{suffix}", files))
    assert write_shards(archive, tmp_path / "2", Preparation(8), num_workers=2).shards == folder.shards


@archives
def test_a_folder_around_everything_is_looked_through(tmp_path, write, suffix):
    wrapped = {f"./photos/{name}": content for name, content in CLASSES.items()}
    source = ImageArchive(write(tmp_path / f"x.{suffix}", wrapped))
    assert source.class_names == ["cats", "dogs"]
    flat = ImageArchive(write(tmp_path / f"flat.{suffix}", {"photos/1.png": b"", "photos/2.png": b""}))
    assert flat.class_names is None
    assert [sample.label for sample in flat] == [None, None]


@archives
def test_one_folder_of_an_archive_can_be_taken(tmp_path, write, suffix):
    files = {f"photos/{part}/{name}": content for part in ("train", "test") for name, content in CLASSES.items()}
    path = write(tmp_path / f"x.{suffix}", files | {"photos/training/3.png": b""})
    source = ImageArchive(path, inside="photos/train/")
    assert source.class_names == ["cats", "dogs"]
    assert sorted(sample.name for sample in source) == ["cats/1.png", "cats/deep/er/2.JPG", "dogs/1.png"]
    assert ImageArchive(path).class_names == ["test", "train", "training"]
    with pytest.raises(UserError, match="nothing is in a folder trains"):
        ImageArchive(path, inside="trains")


@archives
def test_names_that_would_lead_elsewhere_stay_names(tmp_path, monkeypatch, write, suffix):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    write_folder(tmp_path, {"outside.png": b"not to be read", "a/outside.png": b"not to be read"})
    hostile = {"../a/outside.png": picture(1), str(tmp_path / "outside.png"): picture(2), "b/../../b.png": picture(3)}
    source = ImageArchive(write(inside / f"x.{suffix}", hostile))
    assert {sample.image.read() for sample in source} == set(hostile.values())
    manifest = write_shards(source, inside / "set", Preparation(8), num_workers=1)
    assert manifest.num_samples == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "inside", "outside.png"]
    assert sorted(path.name for path in inside.iterdir()) == ["set", f"x.{suffix}"]


def test_of_two_members_with_one_name_the_last_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("1.png", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("1.png", b"last")
    assert [sample.image.read() for sample in ImageArchive(tmp_path / "x.zip")] == [b"last"]


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"inner.png": b"inner"})
    path = write_tar(tmp_path / "x.tar", {"outer.png": b"outer", "z.zip": inner.read_bytes()})
    assert zipfile.is_zipfile(path)
    assert [sample.name for sample in ImageArchive(path)] == ["outer.png"]


def test_links_and_devices_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("real.png"))
    assert [sample.name for sample in ImageArchive(tmp_path / "x.tar")] == ["real.png"]


# --- Damage, bombs ------------------------------------------------------------------------------------------


def rejected(source: ImageArchive, out: Path) -> dict[str, str]:
    write_shards(source, out, Preparation(8))
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {line["name"]: line["reason"] for line in lines}


def test_encrypted_and_damaged_members_are_rejected_one_by_one(tmp_path):
    files = {f"{number}.png": picture(number) for number in range(3)}
    path = write_zip(tmp_path / "x.zip", files)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        encrypted, damaged, _ = archive.infolist()
    data[damaged.header_offset + 60] ^= 1  # behind the 30 bytes of the header and 5 of the name
    data[encrypted.header_offset + 6] |= 1  # the flag for encryption, here and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    reasons = rejected(ImageArchive(path), tmp_path / "set")
    assert "is encrypted" in reasons["0.png"]
    assert reasons.keys() == {"0.png", "1.png"}


def test_a_member_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path):
    claimed = 1000
    bomb = zipfile.ZipInfo("bomb.png")
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        bomb.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(bomb, bytes(1 << 20))
        archive.writestr("fine.png", picture(1))
    data = path.read_bytes()
    position = data.index(b"PK\x01\x02")
    path.write_bytes(data[: position + 24] + claimed.to_bytes(4, "little") + data[position + 28 :])
    assert "Bad CRC-32" in rejected(ImageArchive(path), tmp_path / "set")["bomb.png"]


def test_members_above_the_limit_and_images_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    row = zlib.compress(bytes(1))
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])  # 3.6 gigapixels of grey, in 100 bytes

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    files = {"bomb.png": bomb, "large.png": bytes(2000), "fine.png": picture(1)}
    monkeypatch.setattr(sources, "MAX_CONTENT_BYTES", 1999)
    reasons = rejected(ImageArchive(write_zip(tmp_path / "x.zip", files)), tmp_path / "set")
    assert "DecompressionBombError" in reasons["bomb.png"]
    assert "2,000 bytes; at most 1,999 are read" in reasons["large.png"]
    assert reasons.keys() == {"bomb.png", "large.png"}


def test_an_archive_that_is_cut_is_refused(tmp_path):
    files = {f"{number}.png": picture(number) for number in range(5)}
    for write, suffix in ((write_zip, "zip"), (write_tar, "tar")):
        path = write(tmp_path / f"x.{suffix}", files)
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(UserError, match=rf"x.{suffix} is no archive or damaged"):
            ImageArchive(path)


def test_a_damaged_header_in_the_middle_of_a_tar_is_no_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{number}.png": picture(number) for number in range(5)})
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2]
    data = bytearray(path.read_bytes())
    data[third.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged header at byte {third.offset:,}"):
        ImageArchive(path)


def test_files_that_are_no_archives_or_hold_no_images_are_named(tmp_path):
    (tmp_path / "x.zip").write_text("hello")
    with pytest.raises(UserError, match=r"x.zip is no archive or damaged .*give a zip or tar file"):
        ImageArchive(tmp_path / "x.zip")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(UserError, match=r"x.tar.gz is compressed as a whole; uncompress it"):
        ImageArchive(tmp_path / "x.tar.gz")
    with pytest.raises(UserError, match=r"empty.zip holds no images"):
        ImageArchive(write_zip(tmp_path / "empty.zip", {"notes.md": b""}))


def outcome(path: Path, out: Path) -> str:
    """What becomes of an archive of four images; anything but a UserError is raised."""
    try:
        return "all" if write_shards(ImageArchive(path), out, Preparation(8)).num_samples == 4 else "some"
    except UserError:
        return "refused"


@archives
def test_bytes_changed_anywhere_give_a_clear_error_or_the_images_that_are_left(tmp_path, write, suffix):
    good = write(tmp_path / "good", {f"{'ab'[number % 2]}/{number}.png": picture(number) for number in range(4)})
    generator = random.Random(0)
    outcomes: set[str] = set()
    for attempt in range(60):
        data = bytearray(good.read_bytes())
        for _ in range(generator.choice((1, 3, 30))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path = tmp_path / f"{attempt}.{suffix}"
        path.write_bytes(data)
        outcomes.add(outcome(path, tmp_path / f"set{attempt}"))
    assert outcomes == {"all", "some", "refused"}


# --- Shards of other tools ----------------------------------------------------------------------------------


def img2dataset_shards(root: Path) -> Path:
    """Two tars as img2dataset names things, with captions in text, in JSON, and none."""
    root.mkdir()
    files = {
        "000000000.jpg": picture(0, image_format="JPEG"),
        "000000000.txt": b"from text",
        "000000000.json": json.dumps({"caption": "not this", "url": "x"}).encode(),
        "000000001.jpg": picture(1, image_format="JPEG"),
        "000000001.json": json.dumps({"caption": "größer"}).encode(),
        "000000002.jpg": picture(2, image_format="JPEG"),
        "000000002.json": json.dumps({"caption": None}).encode(),
        "000000003.json": json.dumps({"caption": "its image could not be fetched"}).encode(),
    }
    write_tar(root / "00000.tar", files)
    write_tar(root / "00001.tar", {"sub/000010000.v2.png": b"", "sub/000010000.PNG": picture(3), "000010001.cls": b"1"})
    (root / "00000_stats.json").write_text("{}")
    (root / "00000.parquet").write_bytes(b"PAR1")
    return root


def test_shards_of_img2dataset_are_read_with_their_captions(tmp_path):
    source = WebDatasetShards(img2dataset_shards(tmp_path / "shards"))
    found = {sample.name: (sample.image.read(), sample.caption and sample.caption.read()) for sample in source}
    assert found == {
        "00000.tar/000000000": (picture(0, image_format="JPEG"), b"from text"),
        "00000.tar/000000001": (picture(1, image_format="JPEG"), "größer".encode()),
        "00000.tar/000000002": (picture(2, image_format="JPEG"), b""),
        "00001.tar/sub/000010000": (picture(3), None),
    }
    assert source.description["num_without_image"] == 2
    manifest = write_shards(source, tmp_path / "set", Preparation(8))
    shards = ShardSet.open(tmp_path / "set")
    texts = sorted(sample["txt"].decode() for sample in map(shards.read, range(4)) if "txt" in sample)
    assert texts == ["from text", "größer"]
    assert manifest.class_names is None


def test_numbers_are_labels_and_those_that_are_none_are_rejected(tmp_path):
    (tmp_path / "shards").mkdir()
    labels = {"a": b"2", "b": b"0\n", "c": b"-1", "d": b"cat", "e": b"100000"}
    files = {
        f"{key}.{name}": content for key in labels for name, content in (("png", picture(1)), ("cls", labels[key]))
    }
    write_tar(tmp_path / "shards" / "0.tar", files)
    source = WebDatasetShards(tmp_path / "shards")
    manifest = write_shards(source, tmp_path / "set", Preparation(8))
    assert manifest.class_names == ["0", "1", "2"]
    assert manifest.details["rejected"] == {"unreadable": 3, "filtered": 0, "duplicate": 0}
    shards = ShardSet.open(tmp_path / "set")
    assert sorted(shards.read(index)["cls"] for index in range(2)) == [b"0", b"2"]


def test_shards_of_ours_can_be_prepared_anew_with_their_classes(tmp_path):
    write_shards(ImageFolder(write_folder(tmp_path / "folder", CLASSES)), tmp_path / "first", Preparation(8))
    again = write_shards(WebDatasetShards(tmp_path / "first"), tmp_path / "second", Preparation(8))
    assert again.class_names == ["cats", "dogs"]
    pairs = [[ShardSet.open(tmp_path / name).read(index) for index in range(3)] for name in ("first", "second")]
    assert sorted(map(repr, pairs[0])) == sorted(map(repr, pairs[1]))  # in another order
    assert Manifest.read(tmp_path / "second").has_captions


def test_every_damaged_shard_is_named(tmp_path):
    root = img2dataset_shards(tmp_path / "shards")
    for name, length in (("00002.tar", 700), ("00003.tar", 100)):
        (root / name).write_bytes((root / "00000.tar").read_bytes()[:length])
    with pytest.raises(UserError, match=r"2 of 4 tar files are damaged \(00002.tar: .*; 00003.tar: .*\); restore"):
        WebDatasetShards(root)


def test_members_whose_content_would_be_code_are_not_looked_at(tmp_path):
    (tmp_path / "shards").mkdir()
    code = b"cos\nsystem\n(S'exit 3'\ntR."  # a pickle that runs a command
    files = {"0.png": picture(1), **{f"0.{extension}": code for extension in ("pkl", "pyd", "pth", "json", "cls")}}
    write_tar(tmp_path / "shards" / "0.tar", files)
    with pytest.raises(
        UserError, match=r"none of 1 images can be used; the first is 0.tar/0 \(ValueError: invalid lit"
    ):
        write_shards(WebDatasetShards(tmp_path / "shards"), tmp_path / "set", Preparation(8))


# --- Brace patterns -----------------------------------------------------------------------------------------


def test_a_brace_pattern_names_tars_of_one_folder_or_several(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for name, number in {"a/00000": 0, "a/00001": 1, "a/00002": 2, "b/00001": 3}.items():
        write_tar(tmp_path / f"{name}.tar", {"x.png": picture(number)})
    two = WebDatasetShards(tmp_path / "a" / "{00000..00001}.tar")
    assert {sample.name: sample.image.read() for sample in two} == {
        "00000.tar/x": picture(0),
        "00001.tar/x": picture(1),
    }
    both = WebDatasetShards(tmp_path / "{a,b}" / "00001.tar")
    assert {sample.name: sample.image.read() for sample in both} == {
        "a/00001.tar/x": picture(1),
        "b/00001.tar/x": picture(3),
    }
    with pytest.raises(UserError, match=r"2 of its 4 files are missing, the first is .*a/00003.tar"):
        WebDatasetShards(tmp_path / "a" / "{00001..00004}.tar")
    with pytest.raises(UserError, match="more than 1,000,000 files"):
        WebDatasetShards(tmp_path / "{000..999}{0..999999999}.tar")
    with pytest.raises(UserError, match=r"\{0..3.tar is neither a range nor a list"):
        WebDatasetShards(tmp_path / "{0..3.tar")

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import shards
from data_prep.samples import load_array
from data_prep.shards import Manifest, ShardSet, ShardWriter
from ldgan.engine.cli import UserError

INFO = {"name": "shard-000000.tar", "num_samples": 1, "num_bytes": 1024, "sha256": "0" * 64}


def content(index: int) -> dict[str, bytes]:
    return {"png": bytes([index]) * (index + 1), "cls": str(index).encode()}


def write(out: Path, num_samples: int = 10, samples_per_shard: int = 4) -> Manifest:
    with ShardWriter(out, "images", samples_per_shard=samples_per_shard, details={"seed": 1}) as writer:
        for index in range(num_samples):
            writer.write(content(index))
    return writer.manifest


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_shard(folder: Path, members: list[tarfile.TarInfo]) -> None:
    """Put other members into the first shard, padded to the size that the manifest promises."""
    path = folder / "shard-000000.tar"
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))


def test_what_was_written_is_read_by_index(tmp_path):
    write(tmp_path / "set")
    samples = ShardSet.open(tmp_path / "set")
    assert samples.shard_sizes == [4, 4, 2]
    assert len(samples) == 10
    for index in (9, 0, 4, 3, 8, 0):
        assert samples.read(index) == content(index)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            samples.read(index)


def test_the_manifest_tells_what_lies_on_the_disk(tmp_path):
    manifest = write(tmp_path / "set")
    assert manifest == Manifest.read(tmp_path / "set")
    for shard in manifest.shards:
        data = (tmp_path / "set" / shard.name).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.num_samples == sum(shard.num_samples for shard in manifest.shards) == 10
    assert manifest.details == {"seed": 1}
    assert not manifest.has_captions


def test_equal_samples_give_equal_bytes_and_others_another_fingerprint(tmp_path):
    first, again, shorter = (write(tmp_path / name, num) for name, num in (("a", 10), ("b", 10), ("c", 9)))
    assert first.shards == again.shards
    assert first.fingerprint == again.fingerprint != shorter.fingerprint


def test_other_tools_read_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path / "set")
    pattern = str(tmp_path / "set" / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(10)]
    assert all(sample["png"] == content(index)["png"] for index, sample in enumerate(samples))


def test_one_caption_is_enough_for_has_captions(tmp_path):
    with ShardWriter(tmp_path / "set", "images") as writer:
        writer.write({"png": b"x"})
        writer.write({"png": b"x", "txt": "größer".encode()})
    assert writer.manifest.has_captions
    assert ShardSet.open(tmp_path / "set").read(1)["txt"].decode() == "größer"


def test_a_pickled_set_reads_the_same(tmp_path):
    write(tmp_path / "set")
    samples = ShardSet.open(tmp_path / "set")
    samples.read(5)
    assert pickle.loads(pickle.dumps(samples)).read(5) == content(5)


def test_no_more_than_the_allowed_number_of_shards_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    write(tmp_path / "set", samples_per_shard=1)
    samples = ShardSet.open(tmp_path / "set")
    for index in range(10):
        samples.read(index)
        assert len(samples._open_shards) <= 2
    assert samples.read(0) == content(0)


# --- Writing that ends badly --------------------------------------------------------------------------------


def test_after_an_exception_nothing_is_left(tmp_path):
    def interrupted() -> None:
        with ShardWriter(tmp_path / "set", "images", samples_per_shard=2) as writer:
            for index in range(3):
                writer.write(content(index))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_under_the_final_name_before_the_end(tmp_path):
    with ShardWriter(tmp_path / "set", "images", samples_per_shard=1) as writer:
        writer.write(content(0))
        writer.write(content(1))
        assert not (tmp_path / "set").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_output_that_exists_is_left_alone(tmp_path):
    manifest = write(tmp_path / "set")
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "set", num_samples=3)
    assert Manifest.read(tmp_path / "set") == manifest


def test_a_set_without_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a single sample"):
        write(tmp_path / "set", num_samples=0)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot create .*file/set"):
        write(tmp_path / "file" / "set")


# --- Sets that are damaged ----------------------------------------------------------------------------------


def test_a_folder_without_manifest_is_not_a_set(tmp_path):
    with pytest.raises(UserError, match=r"no .*manifest.json.*data_prep/make_shards.py"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "ldgan-shards/9"}, '"format" is not "ldgan-shards/1"'),
        ({"kind": "sounds"}, '"kind" is none of'),
        ({"num_samples": 11}, "not the sum"),
        ({"shards": []}, "without samples"),
        ({"surprise": 1}, "surprise"),
        ({"details": []}, '"details" has the wrong type'),
        ({"class_names": 3}, '"class_names" has the wrong type'),
        ({"class_names": ["cat", 3]}, '"class_names" has the wrong type'),
        ({"has_captions": "no"}, '"has_captions" has the wrong type'),
        ({"seconds": "long"}, '"seconds" has the wrong type'),
        ({"num_samples": 10.0}, '"num_samples or num_bytes" has the wrong type'),
        ({"shards": [INFO | {"num_bytes": "1"}]}, '"num_samples or num_bytes" has the wrong type'),
        ({"shards": [INFO | {"num_samples": True}]}, '"num_samples or num_bytes" has the wrong type'),
        ({"shards": [INFO | {"name": 3}]}, '"name or sha256" has the wrong type'),
        ({"shards": [3]}, "must be a mapping"),
        ({"num_samples": 1, "shards": [INFO | {"name": "../x.tar"}]}, "'../x.tar' is no shard's name"),
        ({"num_samples": 1, "shards": [INFO | {"sha256": "../" + "0" * 61}]}, "is no SHA-256"),
        ({"num_samples": 1, "shards": [INFO | {"num_bytes": 511}]}, "1 samples in 511 bytes of shard-000000.tar"),
        ({"num_samples": 10**9 + 1, "shards": [INFO | {"num_samples": 10**9 + 1}]}, "at most 1,000,000,000 are read"),
        ({"details": {"resolution": "8"}}, "\"resolution\" of the details cannot be '8'"),
        ({"details": {"resolution": -8}}, "\"resolution\" of the details cannot be '-8'"),
        ({"details": {"latent_shape": [4, 8]}}, "\"latent_shape\" of the details cannot be '[4, 8]'"),
        ({"details": {"flips": "no"}}, "\"flips\" of the details cannot be 'no'"),
        ({"details": {"autoencoder": None}}, "\"autoencoder\" of the details cannot be 'None'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changes, complaint):
    write(tmp_path / "set")
    edit_manifest(tmp_path / "set", **changes)
    with pytest.raises(UserError, match="is not a valid manifest") as caught:
        ShardSet.open(tmp_path / "set")
    assert complaint in str(caught.value)


def test_a_manifest_nested_without_end_is_refused(tmp_path):
    write(tmp_path / "set")
    (tmp_path / "set" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a valid manifest"):
        Manifest.read(tmp_path / "set")


def test_a_manifest_that_claims_more_samples_than_its_bytes_can_hold_is_refused(tmp_path):
    """The order of an epoch takes memory for each sample of some shards, before any is read."""
    infos = [dataclasses.asdict(shard) for shard in write(tmp_path / "set").shards]
    most = infos[0]["num_bytes"] // 512  # each sample has at least a header
    infos[0]["num_samples"] = most + 1
    edit_manifest(tmp_path / "set", shards=infos, num_samples=most + 7)
    with pytest.raises(UserError, match=rf"valid manifest \({most + 1} samples in .* bytes of shard-000000.tar\)"):
        ShardSet.open(tmp_path / "set")
    infos[0]["num_samples"] = most
    edit_manifest(tmp_path / "set", shards=infos, num_samples=most + 6)
    with pytest.raises(UserError, match=rf"shard-000000.tar .*not the {most} that the manifest lists"):
        ShardSet.open(tmp_path / "set").read(0)


def test_a_manifest_of_very_many_bytes_is_not_read(tmp_path):
    write(tmp_path / "set")
    os.truncate(tmp_path / "set" / "manifest.json", 2**40)  # takes no room on the disk
    with pytest.raises(UserError, match=r"is not a valid manifest \(more than 134,217,728 bytes\)"):
        Manifest.read(tmp_path / "set")


def test_a_detail_that_is_needed_and_missing_is_said(tmp_path):
    manifest = write(tmp_path / "set")
    read = Manifest.read(tmp_path / "set")
    assert read.details == manifest.details
    with pytest.raises(UserError, match=r'have no "resolution" among the details in their manifest.json'):
        read.details["resolution"]
    assert read.details.get("resolution") is None


def test_missing_and_cut_shards_are_found_at_once(tmp_path):
    write(tmp_path / "set")
    shard = tmp_path / "set" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"shard-000001.tar is missing or damaged \(.* bytes instead of"):
        ShardSet.open(tmp_path / "set")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar is missing or damaged \(No such file"):
        ShardSet.open(tmp_path / "set")


def test_a_shard_cut_while_in_use_is_named(tmp_path):
    write(tmp_path / "set")
    samples = ShardSet.open(tmp_path / "set")
    shard = tmp_path / "set" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"shard-000001.tar is missing or damaged .*write the shards again"):
        samples.read(4)


def test_a_shard_removed_while_in_use_is_named(tmp_path):
    write(tmp_path / "set")
    samples = ShardSet.open(tmp_path / "set")
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"set/shard-000001.tar is missing or damaged \(.*No such file"):
        samples.read(4)


@pytest.mark.parametrize("num_bytes", [0, 700, 2000])
def test_a_shard_that_is_empty_or_cut_is_named_though_the_manifest_agrees(tmp_path, num_bytes):
    infos = [dataclasses.asdict(shard) for shard in write(tmp_path / "set").shards]
    infos[1] |= {"num_bytes": num_bytes, "num_samples": 1}
    os.truncate(tmp_path / "set" / "shard-000001.tar", num_bytes)
    edit_manifest(tmp_path / "set", shards=infos, num_samples=7)
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        ShardSet.open(tmp_path / "set").read(4)


def test_a_shard_with_fewer_samples_than_promised_is_named(tmp_path):
    write(tmp_path / "set")
    replace_shard(tmp_path / "set", [tarfile.TarInfo(f"{index:09d}.png") for index in range(3)])
    with pytest.raises(UserError, match=r"shard-000000.tar .*not the 4 that the manifest lists"):
        ShardSet.open(tmp_path / "set").read(0)


EXECUTABLE = ["pyd", "pickle", "pkl", "pth", "pt", "dill", "json", "exe"]  # webdataset would unpickle most of them


@pytest.mark.parametrize(
    "name", ["../000000000.png", "/etc/passwd", "0.png", "cat.png", *(f"000000000.{end}" for end in EXECUTABLE)]
)
def test_members_of_other_names_are_refused(tmp_path, name):
    write(tmp_path / "set")
    replace_shard(tmp_path / "set", [tarfile.TarInfo(name)])
    with pytest.raises(UserError, match="unexpected member"):
        ShardSet.open(tmp_path / "set").read(0)


def test_links_are_refused(tmp_path):
    write(tmp_path / "set")
    link = tarfile.TarInfo("000000000.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    replace_shard(tmp_path / "set", [link])
    with pytest.raises(UserError, match="unexpected member"):
        ShardSet.open(tmp_path / "set").read(0)


# --- Tars that were made to do harm -------------------------------------------------------------------------


def tar_of(member: tarfile.TarInfo, field: bytes | None = None) -> io.BytesIO:
    """A tar of one member without content, whose header says ``field`` for its size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member)
    data = bytearray(buffer.getvalue())
    if field is not None:
        data[124:136] = field
        checksum = sum(data[:512]) - sum(data[148:156]) + 8 * ord(" ")
        data[148:156] = b"%06o\0 " % checksum
    return io.BytesIO(bytes(data))


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        (b"77777777777\0", "unexpected end of data|ends within member"),  # 8 GiB
        (b"\x80" + bytes(3) + b"\xff" * 8, "unexpected end|ends within|too large|too big"),  # 2^64 - 1
        (b"\xff" * 11 + b"\0", "leads back|ends within|bytes|negative"),  # -256
    ],
)
def test_a_member_of_a_size_that_is_not_there_is_an_error(size, complaint):
    """Memory for its content is never asked for; of a negative size tarfile would read the same header for ever."""
    tar = tar_of(tarfile.TarInfo("000000000.png"), size)
    with pytest.raises(Exception, match=complaint):
        list(shards.tar_members(tar))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_says_it_is_long_takes_no_memory(kind):
    member = tarfile.TarInfo("x")
    member.type = kind
    with pytest.raises(tarfile.ReadError, match="a header of 8,589,934,592 bytes"):
        list(shards.tar_members(tar_of(member, b"77777777777\0")))


def test_a_negative_size_in_extended_attributes_ends_too():
    member = tarfile.TarInfo("000000000.png")
    member.pax_headers = {"size": "-1024"}
    with pytest.raises(tarfile.ReadError, match="ends within member"):
        list(shards.tar_members(tar_of(member)))


def test_names_as_long_as_file_systems_allow_are_read():
    name = "n" * 4095
    assert [member.name for member in shards.tar_members(tar_of(tarfile.TarInfo(name)))] == [name]


@pytest.mark.parametrize(
    ("shape", "dtype"), [("(1125899906842624,)", "<f4"), ("(4611686018427387904, 4611686018427387904)", "<f4")]
)
def test_an_array_takes_no_more_memory_than_its_bytes(shape, dtype):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    lying = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(64)
    with pytest.raises(ValueError, match="64 bytes for an array of float32 of shape"):
        load_array(lying)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_what_numpy_saved(order):
    array = np.asarray(np.arange(24, dtype=np.float16).reshape(2, 3, 4), order=order)
    buffer = io.BytesIO()
    np.save(buffer, array)
    np.testing.assert_array_equal(load_array(buffer.getvalue()), array)


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="an array of Python objects"):
        load_array(buffer.getvalue())

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import remote
from data_prep.check_shards import find_problems, open_folder, read_manifest
from data_prep.images import encode_image
from data_prep.shards import Manifest, ShardInfo, ShardSet, ShardWriter
from ldgan.engine.cli import UserError

ROOT = Path(__file__).resolve().parents[2]
NUM_SAMPLES = 10  # in shards of 4, 4 and 2


def picture(index: int, side: int = 8, image_format: str = "png") -> bytes:
    pixels = np.random.default_rng(index).integers(256, size=(side, side, 3), dtype=np.uint8)
    return encode_image(Image.fromarray(pixels), image_format, 90)


def write(folder: Path, changes: Mapping[int, Mapping[str, bytes]] | None = None, **options: object) -> Path:
    """A set of two classes with a caption, written as it should be but for ``changes`` to its samples."""
    settings = {"class_names": ["cat", "dog"], "details": {"resolution": 8}, "samples_per_shard": 4} | options
    with ShardWriter(folder, "images", **settings) as writer:
        for index in range(NUM_SAMPLES):
            sample = {"png": picture(index), "cls": str(index % 2).encode(), "txt": b"a picture"}
            writer.write((changes or {}).get(index, sample))
    return folder


def problems(folder: Path, **options: object) -> list[str]:
    return list(find_problems(folder, Manifest.read(folder), **options))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def accept_bytes(folder: Path) -> None:
    """Let the manifest agree with the sizes and hashes of the shards as they are now."""
    shards = [ShardInfo.of_file(folder / shard.name, shard.num_samples) for shard in Manifest.read(folder).shards]
    edit_manifest(folder, shards=list(map(dataclasses.asdict, shards)))


def rewrite(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


@pytest.mark.parametrize("decode", [False, True])
def test_a_set_as_it_was_written_has_no_problems(tmp_path, decode):
    assert problems(write(tmp_path / "set"), decode=decode) == []


def test_a_set_behind_a_url_is_fetched_anew_checked_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("LDGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    folder = write(tmp_path / "set", {6: {"png": b"no image", "cls": b"1"}})
    ShardSet.open(f"file://{folder}").read(9)  # what is in the cache is not asked
    for name in ("shard-000000.tar", "shard-000002.tar"):
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"a picture", b"a_picture"))
    remote_folder = open_folder(f"file://{folder}")
    found = list(find_problems(remote_folder, read_manifest(remote_folder), decode=True))
    assert [problem.partition("(at last: ")[2][:45] for problem in found[::2]] == [
        "ValueError: its SHA-256 is not the one in the",
        "ValueError: its SHA-256 is not the one in the",
    ]
    assert found[1].startswith("shard-000001.tar, sample 000000006: image: cannot identify")
    assert [path.name for path in (tmp_path / "cache").rglob("*.tar")] == ["shard-000002.tar"]
    assert list((tmp_path / "cache" / ".fetching").iterdir()) == []
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json cannot be fetched"):
        read_manifest(remote_folder)


# --- Files --------------------------------------------------------------------------------------------------


def test_missing_and_surplus_shards_are_named(tmp_path):
    folder = write(tmp_path / "set")
    (folder / "shard-000001.tar").rename(folder / "shard-000007.tar")
    assert problems(folder) == [
        "shard-000007.tar: is not in the manifest",
        "shard-000001.tar: cannot be read (No such file or directory)",
    ]


def test_a_shard_cut_short_is_named_with_the_samples_that_are_lost(tmp_path):
    folder = write(tmp_path / "set")
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000006.png").offset_data + 1
    path.write_bytes(path.read_bytes()[:cut])
    assert problems(folder) == [
        f"shard-000001.tar: {cut:,} bytes, not {size:,} as in the manifest",
        "shard-000001.tar: ends within member '000000006.png'",
        "shard-000001.tar, sample 000000006: image: no image among its members: cls",
        "shard-000001.tar: 1 of its 4 samples are missing, the first is 000000007",
    ]


def test_any_flipped_bit_is_found(tmp_path):
    path = write(tmp_path / "set") / "shard-000002.tar"
    good = path.read_bytes()
    for position in np.random.default_rng(0).integers(len(good), size=40).tolist():
        path.write_bytes(good[:position] + bytes([good[position] ^ 8]) + good[position + 1 :])
        assert problems(tmp_path / "set")[0] == "shard-000002.tar: its SHA-256 is not that in the manifest"


def test_a_damaged_header_loses_what_follows_it(tmp_path):
    folder = write(tmp_path / "set")
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("000000002.cls").offset
    data[header] ^= 1
    path.write_bytes(data)
    accept_bytes(folder)  # as if damaged before it was hashed
    assert problems(folder) == [
        f"shard-000000.tar: damaged header at byte {header:,}",
        "shard-000000.tar: 2 of its 4 samples are missing, the first is 000000002",
    ]


# --- Samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ({"png": picture(5), "cls": b"2"}, "label: 2 is not from 0 to 1"),
        ({"png": picture(5), "cls": b"-1"}, "label: -1 is not from 0 to 1"),
        ({"png": picture(5), "cls": b"dog"}, "label: invalid literal for int() with base 10: b'dog'"),
        ({"png": picture(5, side=9)}, "image: 9 x 9 pixels, not 8 x 8 as in the manifest"),
        ({"cls": b"1"}, "image: no image among its members: cls"),
        ({"png": picture(5), "webp": picture(5, image_format="webp")}, "image: webp beside png"),
        ({"jpg": picture(5)}, "image: cannot identify image file"),
        ({"png": picture(5), "txt": b"gr\xf6\xdfer"}, "caption: 'utf-8' codec can't decode byte 0xf6"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(tmp_path, sample, problem):
    (line,) = problems(write(tmp_path / "set", {5: sample}))
    assert line.startswith(f"shard-000001.tar, sample 000000005: {problem}")


def test_labels_without_classes_need_only_be_numbers(tmp_path):
    folder = write(tmp_path / "set", {5: {"png": picture(5), "cls": b"-2"}}, class_names=None)
    assert problems(folder) == ["shard-000001.tar, sample 000000005: label: -2 is not from 0 on"]


def test_an_image_damaged_behind_its_header_takes_decoding_to_be_found(tmp_path):
    folder = write(tmp_path / "set", {5: {"png": picture(5)[:-40]}, 9: {"jpg": picture(9, 8, "jpg")[:-60]}})
    assert problems(folder) == []
    first, second = problems(folder, decode=True)
    assert first.startswith("shard-000001.tar, sample 000000005: image: ")
    assert second.startswith("shard-000002.tar, sample 000000009: image: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: {n.replace("000000002", "000000012"): c for n, c in m.items()}, ["1 of its 4", "1 samples belong"]),
        (lambda m: dict(reversed(m.items())), ["its samples are not in order"]),
        (lambda m: m | {"../../evil.png": b""}, ["unexpected member '../../evil.png'"]),
        (lambda m: m | {"000000000.pkl": b""}, ["unexpected member '000000000.pkl'"]),
    ],
)
def test_samples_that_are_not_those_of_the_shard_are_found(tmp_path, change, expected):
    folder = write(tmp_path / "set")
    rewrite(folder / "shard-000000.tar", change(read_members(folder / "shard-000000.tar")))
    accept_bytes(folder)
    found = problems(folder)
    assert len(found) == len(expected)
    assert all(line.startswith(f"shard-000000.tar: {start}") for line, start in zip(found, expected))


def test_samples_that_are_only_claimed_are_counted(tmp_path):
    folder = write(tmp_path / "set")
    shards = [dataclasses.asdict(shard) for shard in Manifest.read(folder).shards]
    claimed = shards[2]["num_samples"] = shards[2]["num_bytes"] // 512  # more are refused with the manifest
    edit_manifest(folder, shards=shards, num_samples=8 + claimed)
    message = f"shard-000002.tar: {claimed - 2} of its {claimed} samples are missing, the first is 000000010"
    assert problems(folder) == [message]


def test_a_member_that_is_there_twice_is_found(tmp_path):
    folder = write(tmp_path / "set")
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("000000003.png"))
    accept_bytes(folder)
    assert "shard-000000.tar, sample 000000003: png is there twice" in problems(folder)


def test_captions_are_there_if_the_manifest_says_so(tmp_path):
    folder = write(tmp_path / "set")
    edit_manifest(folder, has_captions=False)
    assert problems(folder) == ['manifest.json: "has_captions" is False, but 10 samples have one']


# --- Latents ------------------------------------------------------------------------------------------------


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


GOOD = np.zeros((4, 3, 3), np.float16)  # mean and standard deviation of latents (2, 3, 3)


@pytest.mark.parametrize(
    ("moments", "problem"),
    [
        (array(GOOD), None),
        (array(np.stack([GOOD, GOOD])), None),
        (array(GOOD[:2]), "moments of shape (2, 3, 3), not of latents (2, 3, 3)"),
        (array(GOOD.astype(np.int8)), "no moments: an array of int8"),
        (array(np.full_like(GOOD, np.nan)), "moments that are not all finite"),
        (array(GOOD)[:-1], "71 bytes for an array of float16 of shape (4, 3, 3)"),
        (array(np.array([[["a", 1]]], dtype=object)), "an array of Python objects, which only a pickle could hold"),
    ],
)
def test_latents_are_finite_moments_of_the_right_shape(tmp_path, moments, problem):
    details = {"resolution": 6, "latent_shape": [2, 3, 3]}
    with ShardWriter(tmp_path / "set", "latents", details=details) as writer:
        writer.write({"npy": moments})
    found = problems(tmp_path / "set")
    if problem is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith(f"shard-000000.tar, sample 000000000: latents: {problem}")


# --- The command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "embedding", "problem"),
    [
        ({"dim": 4, "max_tokens": 2}, np.ones((3, 4), np.float16), ""),
        ({"dim": 4, "max_tokens": 1}, np.ones((3, 4), np.float16), "text of float16 (3, 4), not float16 (2 to 2, 4)"),
        ({"dim": 5, "max_tokens": 2}, np.ones((3, 4), np.float16), "text of float16 (3, 4), not float16 (2 to 3, 5)"),
        ({"dim": 4, "max_tokens": 2}, np.full((3, 4), np.inf, np.float16), "text that is not finite"),
        ({"dim": 10**9, "max_tokens": 10**9}, np.ones((3, 4), np.float16), '"text" promises captions of'),
        (None, np.ones((3, 4), np.float16), "there is one, and the manifest names no text encoder"),
    ],
)
def test_embeddings_of_captions_are_those_of_the_manifests_encoder(tmp_path, text, embedding, problem):
    details = {"latent_shape": [2, 3, 3], "flips": False, "text": text}
    with ShardWriter(tmp_path / "set", "latents", details=details) as writer:
        writer.write({"npy": array(GOOD), "txt": b"a cat", "text.npy": array(embedding)})
    found = problems(tmp_path / "set")
    assert len(found) == (problem != "")
    assert all(f"embedding: {problem}" in line for line in found)


def check_shards(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/check_shards.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_exit_status_tells_whether_anything_is_wrong_with_two_workers_too(tmp_path):
    folder = write(tmp_path / "set")
    result = check_shards(folder, "--workers", 2, "--decode")
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    assert result.stdout.startswith("checked 3 shards, 10 samples, 0.1 MB: nothing is wrong")
    (folder / "shard-000000.tar").unlink()
    result = check_shards(folder, "--workers", 2)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "shard-000000.tar: cannot be read (No such file or directory)",
        "checked 3 shards, 10 samples, 0.1 MB: 1 problems",
    ]


def test_a_manifest_that_is_wrong_is_a_problem_and_a_folder_that_is_missing_an_error(tmp_path):
    folder = write(tmp_path / "set")
    edit_manifest(folder, num_samples=11)
    result = check_shards(folder)
    assert result.returncode == 1
    assert "manifest.json is not a valid manifest" in result.stdout
    assert check_shards(tmp_path / "missing").returncode == 2

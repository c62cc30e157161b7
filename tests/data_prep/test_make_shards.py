from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.make_shards import write_shards
from data_prep.shards import Manifest, ShardSet
from data_prep.sources import ImageFolder, StackedMNIST

ROOT = Path(__file__).resolve().parents[2]


def make_shards(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/make_shards.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def error_line(*arguments: object, **options: object) -> str:
    """Run the command, which must fail with status 2 and a one-line error, and return that line."""
    result = make_shards(*arguments, **options)
    assert (result.returncode, result.stdout) == (2, "")
    *progress, line = result.stderr.splitlines()
    assert all(earlier.startswith("preparing:") for earlier in progress)
    assert line.startswith("error: ")
    return line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty noise images of many sizes in two classes, one captioned, and a file that is no image."""
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photos" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(*rng.integers(5, 40, size=2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos" / "cats" / "0.txt").write_text("ein Kätzchen\n", encoding="utf-8")
    (tmp_path / "photos" / "dogs" / "broken.jpg").write_bytes(b"no jpeg")
    return tmp_path / "photos"


def test_the_command_writes_the_same_bytes_with_one_and_two_workers(photos, tmp_path):
    for workers in (1, 2):
        result = make_shards(
            *(photos, "--out", tmp_path / str(workers), "--resolution", 16),
            *("--samples-per-shard", 15, "--workers", workers),
        )
        assert result.returncode == 0, result.stderr
        assert f"wrote 40 images of 16x16 pixels to {tmp_path / str(workers)}: 3 shards" in result.stdout
        assert "left out 1 images" in result.stdout
    one, two = (Manifest.read(tmp_path / name) for name in ("1", "2"))
    assert one.shards == two.shards
    assert one.details == two.details
    assert (tmp_path / "1" / "rejected.jsonl").read_text() == (tmp_path / "2" / "rejected.jsonl").read_text()


def test_labels_captions_and_rejects_end_where_they_belong(photos, tmp_path):
    manifest = write_shards(ImageFolder(photos), tmp_path / "set", resolution=8)
    assert manifest.class_names == ["cats", "dogs"]
    assert manifest.has_captions
    shards = ShardSet.open(tmp_path / "set")
    samples = [shards.read(index) for index in range(len(shards))]
    assert sorted(sample["cls"] for sample in samples) == [b"0"] * 20 + [b"1"] * 20
    assert [sample["txt"].decode() for sample in samples if "txt" in sample] == ["ein Kätzchen"]
    assert {Image.open(io.BytesIO(sample["png"])).size for sample in samples} == {(8, 8)}
    assert manifest.details["num_rejected"] == 1
    rejected = json.loads((tmp_path / "set" / "rejected.jsonl").read_text())  # a single line
    assert rejected["name"] == "dogs/broken.jpg"
    assert "cannot identify image file" in rejected["reason"]


def test_stacked_mnist_is_stored_without_loss(tmp_path):
    source = StackedMNIST(num_images=20, seed=5)
    manifest = write_shards(source, tmp_path / "set", resolution=32, seed=5)
    assert len(manifest.class_names) == 1000
    shards = ShardSet.open(tmp_path / "set")
    for index, raw in enumerate(source):
        stored = shards.read(index)
        np.testing.assert_array_equal(Image.open(io.BytesIO(stored["png"])), raw.image)
        assert int(stored["cls"]) == raw.label


@pytest.mark.parametrize(("image_format", "magic"), [("jpg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_the_image_format_is_what_was_asked_for(tmp_path, image_format, magic):
    write_shards(StackedMNIST(num_images=1), tmp_path / "set", resolution=32, image_format=image_format)
    assert ShardSet.open(tmp_path / "set").read(0)[image_format].startswith(magic)


def test_help_shows_examples():
    result = make_shards("--help")
    assert result.returncode == 0
    assert "python data_prep/make_shards.py stacked_mnist --out" in result.stdout


def test_sources_without_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a folder" in error_line(tmp_path / "missing", "--out", tmp_path / "set")
    assert "holds no images" in error_line(tmp_path / "empty", "--out", tmp_path / "set")
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    assert "none of 1 images can be read" in error_line(tmp_path / "empty", "--out", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_outputs_that_cannot_be_are_named(photos, tmp_path):
    assert "lies inside the source" in error_line(photos, "--out", photos / "set")
    assert "exists already" in error_line(photos, "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot create" in error_line(photos, "--out", tmp_path / "file" / "set")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_named(photos, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in error_line(photos, "--out", tmp_path / "locked" / "set")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--resolution", 0), ("--quality", 101), ("--workers", 0), ("--samples-per-shard", 0), ("--seed", -1)],
)
def test_numbers_out_of_range_are_named(tmp_path, option, value):
    line = error_line("stacked_mnist", "--out", tmp_path / "set", option, value)
    assert f"{option} {value} is out of range" in line


def test_a_write_that_fails_half_way_leaves_nothing(photos, tmp_path):
    def allow_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = make_shards(
        photos, "--out", tmp_path / "set", "--resolution", 64, "--workers", 1, preexec_fn=allow_small_files
    )
    assert result.returncode != 0
    assert "File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]

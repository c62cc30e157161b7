from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.archives import ImageArchive, WebDatasetShards
from data_prep.make_shards import open_source, parse_args
from data_prep.preparation import Preparation, write_shards
from data_prep.processes import launched_processes
from data_prep.shards import Manifest, ShardSet
from data_prep.sources import ImageFolder, Source, StackedMNIST
from ldgan.engine.cli import UserError

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
        assert "left out 1 images (1 unreadable)" in result.stdout
    one, two = (Manifest.read(tmp_path / name) for name in ("1", "2"))
    assert one.shards == two.shards
    assert one.details == two.details
    assert (tmp_path / "1" / "rejected.jsonl").read_text() == (tmp_path / "2" / "rejected.jsonl").read_text()


def test_torchrun_with_two_processes_writes_the_bytes_of_one(photos, tmp_path):
    write_shards(ImageFolder(photos), tmp_path / "one", Preparation(8, deduplicate=True), samples_per_shard=15)
    arguments = (photos, "--out", tmp_path / "two", "--resolution", 8, "--samples-per-shard", 15, "--workers", 1)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "data_prep/make_shards.py"]
    result = subprocess.run(
        [sys.executable, *map(str, (*command, *arguments)), "--deduplicate"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"wrote 40 images of 8x8 pixels to {tmp_path / 'two'}: 3 shards") == 1
    one, two = (tmp_path / name for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.glob("[!m]*"))
    assert dataclasses.replace(Manifest.read(two), seconds=0) == dataclasses.replace(Manifest.read(one), seconds=0)


def test_processes_that_do_not_find_each_other_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"do not find each other .*MASTER_ADDR"), launched_processes():
        pass


def test_labels_captions_and_rejects_end_where_they_belong(photos, tmp_path):
    manifest = write_shards(ImageFolder(photos), tmp_path / "set", Preparation(8))
    assert manifest.class_names == ["cats", "dogs"]
    assert manifest.has_captions
    shards = ShardSet.open(tmp_path / "set")
    samples = [shards.read(index) for index in range(len(shards))]
    assert sorted(sample["cls"] for sample in samples) == [b"0"] * 20 + [b"1"] * 20
    assert [sample["txt"].decode() for sample in samples if "txt" in sample] == ["ein Kätzchen"]
    assert {Image.open(io.BytesIO(sample["png"])).size for sample in samples} == {(8, 8)}
    assert manifest.details["rejected"] == {"unreadable": 1, "filtered": 0, "duplicate": 0}
    rejected = json.loads((tmp_path / "set" / "rejected.jsonl").read_text())  # a single line
    assert (rejected["name"], rejected["why"]) == ("dogs/broken.jpg", "unreadable")
    assert "cannot identify image file" in rejected["reason"]


def test_stacked_mnist_is_stored_without_loss(tmp_path):
    source = StackedMNIST(num_images=20, seed=5)
    manifest = write_shards(source, tmp_path / "set", Preparation(32, seed=5))
    assert len(manifest.class_names) == 1000
    shards = ShardSet.open(tmp_path / "set")
    for index, raw in enumerate(source):
        stored = shards.read(index)
        np.testing.assert_array_equal(Image.open(io.BytesIO(stored["png"])), raw.image)
        assert int(stored["cls"]) == raw.label


@pytest.mark.parametrize(("image_format", "magic"), [("jpg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_the_image_format_is_what_was_asked_for(tmp_path, image_format, magic):
    write_shards(StackedMNIST(num_images=1), tmp_path / "set", Preparation(32, image_format=image_format))
    assert ShardSet.open(tmp_path / "set").read(0)[image_format].startswith(magic)


# --- What is left out, and how it is cropped ----------------------------------------------------------------


def save_sizes(root: Path, *sizes: tuple[int, int]) -> Path:
    """One image of each size (width, height), named after it, of other noise each."""
    root.mkdir()
    rng = np.random.default_rng(1)
    for width, height in sizes:
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{width}x{height}.png")
    return root


def rejected_by(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {line["name"]: line["why"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"min_side": 10}, {"9x40.png", "40x9.png"}),
        ({"max_aspect": 2.0}, {"9x40.png", "40x9.png"}),
        ({"max_aspect": 1.0}, {"9x40.png", "40x9.png", "10x20.png", "20x10.png"}),
        ({"min_side": 20, "max_aspect": 2.0}, {"9x40.png", "40x9.png", "10x20.png", "20x10.png"}),
    ],
)
def test_images_that_are_too_small_or_too_long_are_left_out_and_counted(tmp_path, options, left_out):
    root = save_sizes(tmp_path / "photos", (9, 40), (40, 9), (10, 20), (20, 10), (20, 20))
    manifest = write_shards(ImageFolder(root), tmp_path / "set", Preparation(8, **options))
    assert rejected_by(tmp_path / "set") == dict.fromkeys(left_out, "filtered")
    assert manifest.details["rejected"] == {"unreadable": 0, "filtered": len(left_out), "duplicate": 0}
    assert manifest.num_samples == 5 - len(left_out)
    assert options.items() <= manifest.details.items()


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    root = save_sizes(tmp_path / "photos", (9, 9), (8, 8))
    with pytest.raises(UserError, match=r"none of 2 images can be used; the first is .* pixels is below 10"):
        write_shards(ImageFolder(root), tmp_path / "set", Preparation(8, min_side=10))
    assert not (tmp_path / "set").exists()


def test_of_images_with_equal_pixels_the_first_stays_whatever_the_file(tmp_path):
    root = save_sizes(tmp_path / "photos", (12, 8), (8, 12))
    first = Image.open(root / "12x8.png")
    first.save(root / "again.bmp")
    first.save(root / "again.tiff", description="other bytes, same picture")
    mirrored = first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(root / "mirrored.png")
    Image.frombytes("RGB", (8, 12), first.tobytes()).save(root / "same_bytes_of_another_shape.png")
    for crop in ("center", "random"):
        out = tmp_path / crop
        source = ImageFolder(root, seed=4)
        manifest = write_shards(source, out, Preparation(8, crop=crop, deduplicate=True))
        equal = [sample.name for sample in source if sample.name in ("12x8.png", "again.bmp", "again.tiff")]
        assert rejected_by(out) == dict.fromkeys(equal[1:], "duplicate")
        assert f'"the same pixels as {equal[0]}"' in (out / "rejected.jsonl").read_text()
        assert (manifest.num_samples, manifest.details["rejected"]["duplicate"]) == (4, 2)
    everything = write_shards(ImageFolder(root), tmp_path / "everything", Preparation(8))
    assert everything.num_samples == 6


def test_duplicates_are_found_across_workers(photos, tmp_path):
    for number in range(0, 40, 2):  # 20 copies; a task is 16 images
        copy = photos / "dogs" / f"copy{number}.png"
        copy.write_bytes((photos / "cats" / f"{number}.png").read_bytes())
    one, two = (
        write_shards(ImageFolder(photos), tmp_path / str(n), Preparation(8, deduplicate=True), num_workers=n)
        for n in (1, 2)
    )
    assert one.details["rejected"] == {"unreadable": 1, "filtered": 0, "duplicate": 20}
    assert one.shards == two.shards
    assert (tmp_path / "1" / "rejected.jsonl").read_text() == (tmp_path / "2" / "rejected.jsonl").read_text()


def test_random_crops_depend_on_name_and_seed_alone_and_reach_everywhere(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)  # grey level = x
    for number in range(64):
        Image.fromarray(ramp).save(root / f"{number}.png")

    def lefts(seed: int, name: str, order_seed: int = 0) -> dict[str, int]:
        source = ImageFolder(root, seed=order_seed)
        write_shards(source, tmp_path / name, Preparation(8, crop="random", seed=seed))
        shards = ShardSet.open(tmp_path / name)
        images = (Image.open(io.BytesIO(shards.read(index)["png"])) for index in range(len(shards)))
        return {sample.name: image.getpixel((0, 0))[0] for sample, image in zip(source, images)}

    crops = lefts(0, "a")
    assert crops == lefts(0, "b", order_seed=1)
    assert crops != lefts(1, "c")
    # Uniform on 0..248: the mean of 64 lies within 4 standard errors, 4 * 248 / sqrt(12 * 64) = 36, of 124.
    assert abs(np.mean(list(crops.values())) - 124) < 36
    assert min(crops.values()) < 30
    assert max(crops.values()) > 218


# --- The command --------------------------------------------------------------------------------------------


def test_help_shows_examples():
    result = make_shards("--help")
    assert result.returncode == 0
    assert "python data_prep/make_shards.py stacked_mnist --out" in result.stdout


def test_sources_without_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a folder" in error_line(tmp_path / "missing", "--out", tmp_path / "set")
    assert "holds no images" in error_line(tmp_path / "empty", "--out", tmp_path / "set")
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    assert "none of 1 images can be used" in error_line(tmp_path / "empty", "--out", tmp_path / "set")
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
    [
        *(("--resolution", 0), ("--quality", 101), ("--workers", 0), ("--samples-per-shard", 0), ("--seed", -1)),
        *(("--min-side", 0), ("--max-aspect", 0.5), ("--max-aspect", math.nan)),
    ],
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


def test_the_command_line_names_archives_shards_and_sets(photos, tmp_path, monkeypatch):
    def open_named(*arguments: object) -> Source:
        monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments), "--out", str(tmp_path / "set")])
        return open_source(parse_args())

    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", photos.parent, "photos")
    cats = open_named(archive, "--inside", "photos/cats", "--num-images", 5)
    assert (type(cats), len(cats), cats.class_names) == (ImageArchive, 5, None)
    write_shards(cats, tmp_path / "cats", Preparation(8))
    shards = open_named(tmp_path / "cats", "--part", "train")
    assert type(shards) is WebDatasetShards
    assert type(open_named(tmp_path / "cats" / "shard-{000000..000000}.tar")) is WebDatasetShards
    assert type(open_named(photos)) is ImageFolder
    with pytest.raises(UserError, match=r"^https://host/x\.zip: sources are read from files"):
        open_named("https://user:secret@host/x.zip")
    with pytest.raises(UserError, match="torchvision:CIFAR10 needs its folder"):
        open_named("torchvision:CIFAR10")
    with pytest.raises(UserError, match="cifar-10-batches-py is not the unpacked archive"):
        open_named("torchvision:CIFAR10", "--root", tmp_path)
    with pytest.raises(UserError, match="--inside is for archives"):
        open_named(photos, "--inside", "cats")
    shutil.copy(tmp_path / "cats" / "shard-000000.tar", photos)
    with pytest.raises(UserError, match=r"holds tar files beside (cats|dogs)"):
        open_named(photos)

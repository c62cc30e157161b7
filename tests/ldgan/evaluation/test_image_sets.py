"""Sets of images: what reaches a metric is exactly what was written, and what cannot reach it is named or counted."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFile
from torch import Tensor

from autoencoder.inference.decoding import TASK
from data_prep.images import encode_image, resize_and_crop
from data_prep.preparation import Preparation, write_shards
from data_prep.resuming import begin, finish
from data_prep.shards import ShardWriter
from data_prep.sources import ImageFolder
from ldgan.diffusion.process import build_diffusion
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.cli import UserError
from ldgan.engine.images import encode_lossless, image_grid, save_png
from ldgan.engine.shares import share
from ldgan.evaluation.image_sets import ImageSet, Samples, merge_notes, open_images
from ldgan.inference.jobs import Job
from ldgan.inference.trained_model import TrainedModel, build_unet
from ldgan.models.unet import UNetConfig
from ldgan.sample import image_name

SIZE = (6, 8)


def noise(num_images: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    return np.random.default_rng(seed).integers(256, size=(num_images, *size, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def all_of(images: ImageSet, batch_size: int = 4) -> Tensor:
    return torch.cat([batch.images for batch in images.batches(range(len(images)), batch_size)])


def hwc(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def pixels() -> np.ndarray:
    return noise(11)


@pytest.fixture
def classes(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Eleven PNG files in two class folders; the pixels of file number i are ``pixels[i]``."""
    for number, image in enumerate(pixels):
        save(tmp_path / "classes" / ("ant", "bee")[number > 5] / f"{number}.png", image)
    return tmp_path / "classes"


@pytest.fixture
def samples_folder(tmp_path: Path, pixels: np.ndarray) -> Path:
    """What ldgan/sample.py writes, without image number 3."""
    folder = tmp_path / "samples"
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for number, image in enumerate(images):
        save_png(folder / image_name(number), image)
    (folder / image_name(3)).unlink()
    save_png(folder / "grid.png", image_grid(images, columns=4))
    save_png(folder / "steps.png", images[0])
    return folder


def test_a_folder_gives_the_very_pixels_of_its_files_in_a_fixed_shuffle(classes: Path, pixels: np.ndarray) -> None:
    images = open_images(classes)
    assert (len(images), images.size, images.name) == (11, SIZE, str(classes))
    order = [int(Path(sample.name).stem) for sample in ImageFolder(classes, seed=0)]
    assert order != sorted(order)
    np.testing.assert_array_equal(hwc(all_of(images)), pixels[order])
    np.testing.assert_array_equal(images.read(7).permute(1, 2, 0), pixels[order[7]])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_images_do_not_depend_on_batches_processes_and_threads(classes: Path, num_workers: int) -> None:
    expected = all_of(open_images(classes), batch_size=11)
    images = open_images(classes, num_workers=num_workers)
    for world_size, batch_size in ((1, 1), (2, 3), (4, 2), (3, 100)):
        for rank in range(world_size):
            numbers = share(len(images), rank, world_size)
            batches = list(images.batches(numbers, batch_size))
            assert [number for batch in batches for number in batch.numbers] == list(numbers)
            assert all(len(batch.numbers) == batch_size for batch in batches[:-1])
            assert torch.equal(torch.cat([batch.images for batch in batches]), expected[numbers.start : numbers.stop])


def test_a_consumer_may_stop_early(classes: Path) -> None:
    images = open_images(classes, num_workers=2)
    batches = images.batches(range(11), 2)
    assert next(batches).numbers == [0, 1]
    batches.close()
    assert len(all_of(images)) == 11


def test_a_folder_of_samples_is_its_numbered_files_by_number(samples_folder: Path, pixels: np.ndarray) -> None:
    images = open_images(samples_folder)
    assert len(images) == 10
    np.testing.assert_array_equal(hwc(all_of(images)), np.delete(pixels, 3, axis=0))
    description = images.describe()
    assert description["left_out"] == ["grid.png", "steps.png"]
    assert description["num_left_out"] == 2
    assert description["formats"] == {"png": 10}


def test_a_decoding_that_was_stopped_is_refused(samples_folder: Path) -> None:
    decoding = {"format": "ldgan-decoding/1"}
    unfinished = samples_folder.parent / "decoded"
    begin(unfinished, TASK, decoding)
    for file in samples_folder.iterdir():
        shutil.copy(file, unfinished)
    with pytest.raises(UserError, match=r"decoded: is not finished; run the same autoencoder/decode\.py command"):
        open_images(unfinished)
    finish(unfinished, TASK, decoding)
    assert torch.equal(all_of(open_images(unfinished)), all_of(open_images(samples_folder)))
    (unfinished / "decoding.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        open_images(unfinished)


def test_shards_give_the_pixels_of_the_folder_they_were_made_of(tmp_path: Path) -> None:
    for number, image in enumerate(noise(9, (8, 8))):
        save(tmp_path / "folder" / f"{number}.png", image)
    manifest = write_shards(ImageFolder(tmp_path / "folder"), tmp_path / "shards", Preparation(8), samples_per_shard=4)
    folder, shards = open_images(tmp_path / "folder"), open_images(tmp_path / "shards", num_workers=2)
    assert torch.equal(all_of(shards), all_of(folder))
    assert torch.equal(shards.read(5), folder.read(5))
    assert shards.fingerprint() == manifest.fingerprint
    assert shards.describe() == {
        "kind": "shards",
        "path": str(tmp_path / "shards"),
        "num_images": 9,
        "size": [8, 8],
        "resize": None,
        "formats": {"png": 9},
        "lossy": False,
    }


def test_shards_behind_a_url_are_the_same_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LDGAN_CACHE", str(tmp_path / "cache"))
    for number, image in enumerate(noise(9, (8, 8))):
        save(tmp_path / "folder" / f"{number}.png", image)
    write_shards(ImageFolder(tmp_path / "folder"), tmp_path / "shards", Preparation(8), samples_per_shard=4)
    local, remote = open_images(tmp_path / "shards"), open_images(f"file://{tmp_path}/shards")
    assert torch.equal(all_of(remote), all_of(local))
    assert remote.fingerprint() == local.fingerprint()
    assert remote.describe() == local.describe() | {"path": f"file://{tmp_path}/shards"}


def test_one_size_or_a_resolution(tmp_path: Path) -> None:
    square, wide = noise(1, (8, 8))[0], noise(1, (12, 30), seed=1)[0]
    save(tmp_path / "a.png", square)
    save(tmp_path / "b.png", wide)
    with pytest.raises(UserError) as error:
        all_of(open_images(tmp_path))
    for words in (f"{tmp_path}/a.png", f"{tmp_path}/b.png", "8 x 8", "30 x 12", "--resolution"):
        assert words in str(error.value)
    by_filter = {}
    for resize_filter in ("lanczos", "bicubic", "bilinear", "box"):
        images = open_images(tmp_path, resolution=8, resize_filter=resize_filter)
        assert images.size == (8, 8)
        by_name = dict(zip((sample.name for sample in ImageFolder(tmp_path)), hwc(all_of(images))))
        np.testing.assert_array_equal(by_name["a.png"], square)
        cropped = resize_and_crop(Image.fromarray(wide), 8, resize_filter)
        np.testing.assert_array_equal(by_name["b.png"], np.asarray(cropped))
        assert images.notes()["resized"] == 1
        assert images.describe()["resize"] == {"resolution": 8, "filter": resize_filter}
        by_filter[resize_filter] = by_name["b.png"].tobytes()
    assert len(set(by_filter.values())) == 4


def test_the_box_filter_averages(tmp_path: Path) -> None:
    pixels = noise(1, (8, 8))[0]
    save(tmp_path / "a.png", pixels)
    (half,) = hwc(all_of(open_images(tmp_path, resolution=4, resize_filter="box")))
    means = pixels.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - means).max() <= 1  # Pillow rounds after either direction


def sixteen_bit_rgb(pixels: np.ndarray) -> bytes:
    """A PNG file of uint16 (H, W, 3): Pillow reads such files, and writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_grey_alpha_and_sixteen_bits_are_converted_and_counted(tmp_path: Path) -> None:
    rgb, grey = noise(1)[0], noise(1, seed=1)[0, :, :, 0]
    alpha = np.dstack([rgb, np.full(SIZE, 255, np.uint8)])
    alpha[0, :, 3], alpha[1, :, 3] = 0, 128
    expected = {"rgb.png": rgb, "grey.png": np.dstack([grey] * 3), "wide.png": np.dstack([grey] * 3), "deep.png": rgb}
    save(tmp_path / "rgb.png", rgb)
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "wide.png", grey.astype(np.uint16) * 257)
    save(tmp_path / "alpha.png", alpha)
    (tmp_path / "deep.png").write_bytes(sixteen_bit_rgb(rgb.astype(np.uint16) * 257))
    images = open_images(tmp_path)
    names = [sample.name for sample in ImageFolder(tmp_path)]
    for _ in range(2):  # counted once, however often they are read
        read = dict(zip(names, hwc(all_of(images))))
    for name, image in expected.items():
        np.testing.assert_array_equal(read[name], image, err_msg=name)
    assert (read["alpha.png"][0] == 255).all()  # clear: white
    half = rgb[1] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read["alpha.png"][1] - half).max() <= 1
    np.testing.assert_array_equal(read["alpha.png"][2:], rgb[2:])
    counts = {"grey": 2, "alpha": 1, "16-bit": 2, "resized": 0, "unreadable": [], "num_unreadable": 0}
    assert images.notes() == counts


def damage(data: bytes) -> dict[str, bytes]:
    return {"cut.png": data[: len(data) // 2], "empty.png": b"", "text.png": b"no image", "flipped.png": data[::-1]}


@pytest.mark.parametrize("name", ["cut.png", "empty.png", "text.png", "flipped.png"])
def test_an_unreadable_file_is_an_error_or_a_counted_skip(
    classes: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some library may have left it
    intact = open_images(classes)
    whole = dict(enumerate(all_of(intact)))
    victim = classes / [sample.name for sample in ImageFolder(classes)][4]
    victim.write_bytes(damage(encode_image(Image.fromarray(noise(1, (32, 32))[0]), "png", 100))[name])
    with pytest.raises(UserError, match=rf"^{victim} cannot be read \(.*\); mend it, or add --skip-unreadable$"):
        all_of(open_images(classes, num_workers=2))
    images = open_images(classes, skip_unreadable=True)
    assert len(images) == 11
    batches = list(images.batches(range(11), 2))
    assert [batch.numbers for batch in batches] == [[0, 1], [2, 3], [5], [6, 7], [8, 9], [10]]
    for batch in batches:
        assert torch.equal(batch.images, torch.stack([whole[number] for number in batch.numbers]))
    assert [batch.numbers for batch in images.batches(range(3, 6), 1)] == [[3], [5]]
    assert images.notes()["unreadable"] == [str(victim)]
    assert images.notes()["num_unreadable"] == 1
    with pytest.raises(UserError, match="cannot be read"):
        images.read(4)


def test_the_first_readable_image_sets_the_size(tmp_path: Path) -> None:
    for number, image in enumerate(noise(4)):
        save(tmp_path / f"{image_name(number)}", image)
    (tmp_path / image_name(0)).write_bytes(b"")
    with pytest.raises(UserError, match=f"{image_name(0)} cannot be read"):
        open_images(tmp_path)
    assert open_images(tmp_path, skip_unreadable=True).size == SIZE
    for number in range(4):
        (tmp_path / image_name(number)).write_bytes(b"")
    with pytest.raises(UserError, match="none of 4 images can be read"):
        open_images(tmp_path, skip_unreadable=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [30, 20])  # pixels, of 48: Pillow only warns up to twice its limit
def test_decompression_bombs_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save(tmp_path / "a.png", noise(1)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"a\.png cannot be read \(.*pixels"):
        open_images(tmp_path)


def test_only_picture_formats_are_opened(tmp_path: Path) -> None:
    """Pillow would hand Encapsulated PostScript to Ghostscript, whatever the suffix."""
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot identify image file"):
        open_images(tmp_path)


def test_a_path_that_holds_no_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"images\.zip: is a file.*unpack it"):
        open_images(tmp_path / "images.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        open_images(tmp_path / "empty")
    with ShardWriter(tmp_path / "latents", "latents") as writer:
        writer.write({"npy": b""})
    with pytest.raises(UserError, match=r"latents: holds latents.*autoencoder/decode\.py"):
        open_images(tmp_path / "latents")
    (tmp_path / "latents" / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a folder of finished shards"):
        open_images(tmp_path / "latents")


def test_a_sample_without_an_image_and_a_damaged_image_are_located(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", "images") as writer:
        writer.write({"png": encode_image(Image.fromarray(noise(1)[0]), "png", 100)})
        writer.write({"cls": b"1"})
        writer.write({"png": b"no image"})
    images = open_images(tmp_path / "set")
    with pytest.raises(UserError, match=r"shard-000000\.tar, sample 000000001 holds no image"):
        images.read(1)
    with pytest.raises(UserError, match=r"shard-000000\.tar, sample 000000002 cannot be read"):
        images.read(2)


@pytest.mark.parametrize(
    ("names", "options", "formats", "lossy"),
    [
        (["a.png", "b.PNG", "c.tiff"], {}, {"png": 2, "tif": 1}, False),
        (["a.png", "b.jpeg", "c.JPG"], {}, {"png": 1, "jpg": 2}, True),
        (["a.webp"], {}, {"webp": 1}, True),
        (["a.png", "b.webp"], {"lossless": True}, {"png": 1, "webp": 1}, False),
    ],
)
def test_lossy_files_are_said_to_be(
    tmp_path: Path, names: list[str], options: dict[str, Any], formats: dict[str, int], lossy: bool
) -> None:
    for name in names:
        save(tmp_path / name, noise(1)[0], **options)
    description = open_images(tmp_path).describe()
    assert description["formats"] == formats
    assert description["lossy"] is lossy
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize(("image_format", "lossless", "lossy"), [("jpg", False, True), ("webp", True, False)])
def test_lossy_shards_are_said_to_be(tmp_path: Path, image_format: str, lossless: bool, lossy: bool) -> None:
    pixels = noise(1)[0]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    data = encode_lossless(image, "webp") if lossless else encode_image(Image.fromarray(pixels), image_format, 75)
    with ShardWriter(tmp_path / "set", "images") as writer:
        writer.write({"cls": b"0", image_format: data})
    images = open_images(tmp_path / "set")
    assert (images.describe()["formats"], images.describe()["lossy"]) == ({image_format: 1}, lossy)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(hwc(all_of(images))[0], decoded)
    assert np.array_equal(decoded, pixels) is not lossy


def change_a_pixel(folder: Path) -> None:
    path = folder / "ant" / "0.png"
    changed = np.array(Image.open(path))
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(path)


def rename(folder: Path) -> None:
    (folder / "bee").rename(folder / "wasp")


def swap(folder: Path) -> None:
    first, second = (folder / "ant" / name for name in ("0.png", "1.png"))
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


@pytest.mark.parametrize("change", [change_a_pixel, rename, swap])
def test_a_fingerprint_is_of_names_and_contents_wherever_they_lie(
    classes: Path, change: Callable[[Path], None]
) -> None:
    copy = classes.parent / "copy"
    shutil.copytree(classes, copy)
    (copy / "notes.txt").write_text("no image")
    before = open_images(classes).fingerprint()
    assert open_images(copy).fingerprint() == before
    change(copy)
    assert open_images(copy).fingerprint() != before


def test_notes_of_processes_add_up(classes: Path) -> None:
    names = [sample.name for sample in ImageFolder(classes)]
    for number in range(1, 10):
        (classes / names[number]).write_bytes(b"")
    whole = open_images(classes, skip_unreadable=True)
    all_of(whole)
    parts = [open_images(classes, skip_unreadable=True) for _ in range(3)]
    for rank, part in enumerate(parts):
        list(part.batches(share(11, rank, 3), 2))
    merged = merge_notes([part.notes() for part in parts])
    assert merged == whole.notes()
    assert merged["num_unreadable"] == 9
    assert merged["unreadable"] == [str(classes / name) for name in names[1:6]]
    assert merge_notes([{}, {}]) == {}


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    config = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=3, embedding_dim=8)
    network = build_unet(config, (3, 8, 8), num_classes=4)
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    network.eval().requires_grad_(False)
    names = ["a", "b", "c", "d"]
    return TrainedModel(network, build_diffusion("vp", 2, 20.0), None, (3, 8, 8), 8, class_names=names)


def test_samples_are_what_the_model_makes_of_their_seeds(model: TrainedModel) -> None:
    job = Job(model, SamplerConfig(), labels=[3, 1, 0], num_images=7, first_seed=10, batch_size=4)
    images = Samples(job, Accelerator(cpu=True))
    assert (len(images), images.size) == (7, (8, 8))
    for number, image in enumerate(all_of(images)):
        expected = model.decode(model.sample([10 + number], [[3, 1, 0][number % 3]]))[0]
        # One of 255 levels: sums of another batch are rounded otherwise.
        assert (image.int() - expected.int()).abs().max() <= 1
        assert (images.read(number).int() - expected.int()).abs().max() <= 1
        other = model.decode(model.sample([11 + number], [2]))[0]
        assert (image.int() - other.int()).abs().max() > 1
    batches = list(images.batches(range(2, 7), 3))
    assert [batch.numbers for batch in batches] == [[2, 3, 4], [5, 6]]
    assert torch.equal(batches[0].images, model.decode(job.sample([2, 3, 4])))
    assert images.notes() == {}


def test_the_fingerprint_of_samples_is_of_all_that_makes_them(model: TrainedModel) -> None:
    def fingerprint(**changes: Any) -> str:
        settings: dict[str, Any] = {"sampler": SamplerConfig(), "labels": None, "num_images": 7, "first_seed": 0}
        return Samples(Job(model, batch_size=4, **settings | changes), Accelerator(cpu=True)).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    others = [
        fingerprint(first_seed=1),
        fingerprint(num_images=8),
        fingerprint(labels=[1]),
        fingerprint(sampler=SamplerConfig(num_steps=1)),
    ]
    weight = next(model.network.parameters())
    weight[0] += 1
    others.append(fingerprint())
    weight[0] -= 1
    assert len({before, *others}) == 6

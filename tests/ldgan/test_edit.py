"""The command that edits: what it reads, what it writes, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldgan import edit
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import load_png
from ldgan.engine.session import make_accelerator
from ldgan.inference import editing
from ldgan.inference.jobs import open_model
from ldgan.inference.trained_model import GAN, WEIGHTS, TrainedModel, build_unet
from ldgan.models.unet import UNetConfig

SIDE, CLASSES = 8, ["cat", "dog"]
CONFIG = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=3, embedding_dim=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion GAN on pixels with classes, T = 4; the model is random."""
    network, random = build_unet(CONFIG, (3, SIDE, SIDE), len(CLASSES)), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=random)
    config = {"generator": to_dict(CONFIG), "num_timesteps": 4, "latent": False}
    description = {"kind": GAN, "config": config, "data_shape": [3, SIDE, SIDE], "resolution": SIDE}
    folder = tmp_path_factory.mktemp("run")
    description |= {"class_names": CLASSES, "autoencoder": None}
    save_checkpoint(folder / "checkpoints" / "step_000000001", {WEIGHTS[GAN]: network}, description)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return open_model(run, SamplerConfig())


@pytest.fixture
def command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs edit.py in this process; the folder it made."""

    # Networks this small gain nothing from more threads.
    monkeypatch.setattr(edit, "make_accelerator", partial(make_accelerator, num_threads=1))

    def run_command(*words: object) -> Path:
        rest = ("--checkpoint", run, "--out", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("edit.py", *words, *rest)])
        edit.main()
        return tmp_path / "out"

    return run_command


def picture(path: Path, width: int = SIDE, height: int = SIDE, mode: str = "RGB") -> Path:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(len(path.name)).integers(256, size=(height, width, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask_of(path: Path, width: int = SIDE, height: int = SIDE) -> Path:
    """White at the right half, nearly white in its first column, and not so at the left."""
    pixels = np.full((height, width), 127, dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    pixels[:, width // 2] = 128
    Image.fromarray(pixels).save(path)
    return path


def difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def test_variants_are_what_the_function_makes(command, model, tmp_path) -> None:
    image = load_png(picture(tmp_path / "a.png"))
    words = ("--image", tmp_path / "a.png", "--seed", 5, "--num-variants", 3, "--batch-size", 2, "--labels", "dog,cat")
    out = command("stroke", "--step", 3, *words)
    expected = editing.edit(model, image.expand(3, -1, -1, -1), [5, 6, 7], step=3, labels=[1, 0, 1])
    made = torch.stack([load_png(out / f"a_seed_{seed}.png") for seed in (5, 6, 7)])
    assert difference(made, expected) <= 1
    assert sorted(path.name for path in out.iterdir()) == [*(f"a_seed_{seed}.png" for seed in (5, 6, 7)), "grid.png"]
    tile = 12 * SIDE
    grid = load_png(out / "grid.png")
    assert grid.shape == (3, tile, 4 * tile + 3 * 2)
    assert torch.equal(grid[:, ::12, :tile:12], image)
    assert torch.equal(grid[:, ::12, tile + 2 :: 12][..., :SIDE], made[0])


def test_a_folder_of_pictures_and_a_strength(command, model, tmp_path, capsys) -> None:
    (tmp_path / "in").mkdir()
    image = load_png(picture(tmp_path / "in" / "b.png"))
    picture(tmp_path / "in" / "long.png", 30, 12)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    out = command("img2img", "--strength", 0.3, "--image", tmp_path / "in")
    assert difference(load_png(out / "b_seed_0.png"), editing.edit(model, image[None], [0], step=2)[0]) <= 1
    printed = capsys.readouterr().out
    assert "long.png: 30 x 12 pixels, scaled and cropped to 8 x 8" in printed
    assert "b.png" not in printed
    assert "2 images in" in printed


def test_inpainting_keeps_what_the_mask_leaves_black(command, tmp_path) -> None:
    image = load_png(picture(tmp_path / "a.png"))
    out = command("inpaint", "--image", tmp_path / "a.png", "--mask", mask_of(tmp_path / "mask.png"))
    filled = load_png(out / "a_seed_0.png")
    assert torch.equal(filled[..., : SIDE // 2], image[..., : SIDE // 2])
    assert all(difference(filled[..., column], image[..., column]) > 1 for column in range(SIDE // 2, SIDE))


def test_a_mask_of_a_large_picture_is_cropped_with_it(tmp_path) -> None:
    # 24 x 16 pixels: the square in the middle, columns 4 to 19, is halved; the mask begins at column 11.
    image = picture(tmp_path / "large.png", 24, 16)
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:, 11:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    read = edit.read_input(image, SIDE, str(tmp_path / "mask.png"))
    assert read.image.shape == (3, SIDE, SIDE)
    assert read.mask[0, 0].tolist() == [False] * 3 + [True] * 5  # pixel 3 holds columns 10 and 11


def test_transparent_pixels_can_be_the_mask(tmp_path) -> None:
    image = picture(tmp_path / "cutout.png", mode="RGBA")
    alpha = np.asarray(Image.open(image))[:, :, 3]
    assert np.array_equal(edit.read_input(image, SIDE, "alpha").mask[0].numpy(), alpha < 128)
    with pytest.raises(UserError, match="has no transparency"):
        edit.read_input(picture(tmp_path / "plain.png"), SIDE, "alpha")
    Image.open(tmp_path / "plain.png").save(tmp_path / "plain.jpg")
    with pytest.raises(UserError, match="has no transparency"):
        edit.read_input(tmp_path / "plain.jpg", SIDE, "alpha")


def test_outpainting_writes_larger_pictures(command, tmp_path) -> None:
    image = load_png(picture(tmp_path / "a.png"))
    out = command("outpaint", "--image", tmp_path / "a.png", "--left", 3, "--bottom", 2, "--num-resamples", 1)
    assert torch.equal(load_png(out / "a_seed_0.png")[:, :SIDE, 3:], image)
    frame = load_png(out / "grid.png")[:, ::8, ::8][..., : SIDE + 3]  # 96 // 11 = 8 times
    assert torch.equal(frame[:, :SIDE, 3:], image)
    assert frame.sum() == image.sum()


def test_a_way_and_mixed_styles_are_what_the_functions_make(command, model, tmp_path) -> None:
    out = command("interpolate", "--seed", 1, "--to", 2, "--num-frames", 3, "--along", "z", "--labels", "dog")
    frames = torch.stack([load_png(out / f"frame_{number:04d}.png") for number in range(3)])
    assert difference(frames, editing.interpolate(model, 1, 2, 3, along="z", labels=[1, 1, 1])) <= 1
    out.rename(tmp_path / "way")
    flags = ("--seed", 1, "--num-images", 2, "--style-seed", 8, "--num-styles", 2, "--switch-step", 3)
    out = command("mix", *flags)
    mixed = torch.stack([load_png(out / f"seed_{seed}_style_{style}.png") for seed in (1, 2) for style in (8, 9)])
    assert difference(mixed, editing.mix_styles(model, [1, 1, 2, 2], [8, 9, 8, 9], switch_step=3)) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stroke", "--image", "a.png", "--step", 5], "step 5: the model is sampled in 4"),
        (["img2img", "--image", "a.png", "--strength", 0], "choose more than 0"),
        (["img2img", "--image", "a.png", "--labels", "cow"], "labels: no class 'cow'"),
        (["img2img", "--image", "nowhere.png"], "nowhere.png: no such file; check the path"),
        (["img2img", "--image", "empty"], "empty: holds no images"),
        (["img2img", "--image", "twins"], "twins: two images have the same name"),
        (
            ["inpaint", "--image", "a.png", "--mask", "wide.png"],
            "mask: wide.png: not for a.png: mask 0 is 9x8 pixels, its image 8x8; ",
        ),
        (["inpaint", "--image", "a.png", "--mask", "black.png"], "mask: black.png: marks nothing of a.png; "),
        (["outpaint", "--image", "a.png"], "add some"),
        (["mix", "--switch-step", 5], "switch_step 5: the model is sampled in 4 steps"),
        (["stroke", "--image", "a.png", "--prompt", "a heart"], "was trained without captions"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(command, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    mask_of(tmp_path / "wide.png", width=9)
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twins").mkdir()
    for suffix in ("png", "bmp"):
        picture(tmp_path / "twins" / f"a.{suffix}")
    with pytest.raises(UserError) as error:
        command(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_left_alone(command, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        command("mix", "--switch-step", 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]

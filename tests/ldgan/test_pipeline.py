"""`LatentDDGAN`: it makes what the model makes, saved folders stand alone, and bad input gets one clear line."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import hub_mixin
from PIL import Image
from torch import Tensor, nn

from autoencoder.inference.light_decoder import KIND as LIGHT_KIND
from autoencoder.inference.light_decoder import WEIGHTS as LIGHT_WEIGHTS
from autoencoder.inference.light_decoder import light_decoder_folder
from autoencoder.inference.text_encoder import copy_text_encoder, open_text_encoder
from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.inference.trained_autoencoder import fingerprint
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.light_decoder import LightDecoderConfig, build_light_decoder
from ldgan import LatentDDGAN
from ldgan import pipeline as module
from ldgan.diffusion.process import Diffusion
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import from_uint8, to_uint8
from ldgan.engine.run import Best, RunFolder
from ldgan.inference import editing
from ldgan.inference.pictures import open_masks, open_pictures, to_images, to_masks
from ldgan.inference.trained_model import DDPM, GAN, NETWORK, TEXT_ENCODER_FOLDER, WEIGHTS, build_unet, load_model
from ldgan.models.unet import UNet, UNetConfig

CLASSES = ["cat", "tench, Tinca tinca", "12"]
LATENT, SIDE = (2, 4, 4), 8


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Weights under which every input counts; fresh ones leave much at zero."""
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    return network


def save_run(run: Path, kind: str = GAN, *, latent: bool = True, step: int = 1, **config: Any) -> Path:
    """A run of stage 2 with a random model: T = 4, 8 pixels, classes if ``label_dropout`` is given."""
    shape = LATENT if latent else (3, SIDE, SIDE)
    network = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=3, embedding_dim=8)
    network.z_dim = 3 if kind == GAN else 0
    names = CLASSES if "label_dropout" in config else None
    unet = randomise(build_unet(network, shape, len(names or [])), seed=step)
    config = {NETWORK[kind]: to_dict(network), "num_timesteps": 4, "latent": latent, **config}
    description = {"kind": kind, "config": config, "data_shape": list(shape), "resolution": SIDE, "class_names": names}
    description |= {"step": step, "data": {"num_samples": 5000}}
    save_checkpoint(RunFolder(run).checkpoint_path(step), {WEIGHTS[kind]: unet}, description)
    if latent and not (run / "autoencoder").exists():
        save_autoencoder(run / "autoencoder")
    return run


def save_autoencoder(folder: Path) -> None:
    """A random autoencoder of factor 2 with a light decoder."""
    config = AutoencoderConfig(latent_channels=2, base_channels=8, channel_multipliers=[1, 2])
    autoencoder = randomise(AutoencoderKL(config), seed=2)
    description = {"kind": AUTOENCODER_KIND, "config": {"network": to_dict(config)}, "latent_statistics": {}}
    save_checkpoint(folder, {AUTOENCODER_WEIGHTS: autoencoder}, description)
    light_config = LightDecoderConfig(widths=[6], num_blocks=[1])
    light = randomise(build_light_decoder(light_config, autoencoder), seed=3)
    description = {"kind": LIGHT_KIND, "autoencoder": fingerprint(autoencoder)}
    description |= {"config": {"network": to_dict(light_config)}}
    save_checkpoint(light_decoder_folder(folder), {LIGHT_WEIGHTS: light}, description)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "plain")
    save_run(folder / "classes", label_dropout=0.1)
    save_run(folder / "pixels", latent=False)
    save_run(folder / "ddpm", DDPM, predicts="noise", variance="beta", schedule="linear")
    return folder


@pytest.fixture(scope="module")
def pipeline(runs: Path) -> LatentDDGAN:
    return LatentDDGAN.from_pretrained(runs / "plain")


@pytest.fixture(scope="module")
def classes(runs: Path) -> LatentDDGAN:
    return LatentDDGAN.from_pretrained(runs / "classes")


def pictures(number: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Noise as images, uint8 (number, 3, side, side)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, side, side), generator=random, dtype=torch.uint8)


def test_the_package_does_not_import_the_pipeline_before_it_is_asked_for() -> None:
    code = "import sys, ldgan; assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    import ldgan

    offered = {"LatentDDGAN": module.LatentDDGAN, "Diffusion": Diffusion, "UNet": UNet}
    assert {name: getattr(ldgan, name) for name in offered} == offered
    assert {*ldgan.__all__} == {*offered, "__version__"} <= {*dir(ldgan)}
    # Editors and type checkers read imports that never run: they have to be the same.
    imported = re.findall(r"    from (\S+) import (\S+)", Path(ldgan.__file__).read_text())
    assert {name: getattr(import_module(home), name) for home, name in imported} == offered

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ldgan.nothing


def test_samples_are_those_of_the_model(runs: Path, pipeline: LatentDDGAN) -> None:
    model = load_model(runs / "plain")
    expected = model.sample(range(5, 8))
    assert torch.equal(pipeline.sample_latents(3, seed=5), expected)
    assert torch.equal(pipeline.sample(3, seed=5, output="tensor"), model.decode(expected))
    assert (pipeline.num_steps, pipeline.resolution, pipeline.class_names, pipeline.has_text) == (4, 8, [], False)
    assert pipeline.device == torch.device("cpu")


def test_a_pipeline_is_called_to_sample_and_says_what_it_is(
    runs: Path, pipeline: LatentDDGAN, classes: LatentDDGAN
) -> None:
    called = pipeline(2, seed=5, output="tensor")
    assert torch.equal(called, pipeline.sample(2, seed=5, output="tensor"))
    size = sum(parameter.numel() for parameter in pipeline.model.network.parameters())
    assert repr(pipeline) == (
        f"LatentDDGAN(diffusion GAN, {size:,} parameters, T = 4, latents 2x4x4 of images 8x8, on cpu)"
    )
    assert "of images 8x8, 3 classes, on cpu)" in repr(classes)
    assert "T = 4, images 8x8, on cpu)" in repr(LatentDDGAN.from_pretrained(runs / "pixels"))


def test_a_pipeline_moves_whole(runs: Path) -> None:
    light = LatentDDGAN.from_pretrained(runs / "plain", decoder="light")
    assert light.to("meta") is light
    model = light.model
    tensors = [
        tensor
        for network in (model.network, model.autoencoder, model.light_decoder)
        for tensor in (*network.parameters(), *network.buffers())
    ]
    assert {tensor.device.type for tensor in tensors} == {light.device.type} == {"meta"}
    with pytest.raises(UserError, match="moves to a device; weights stay fp32"):
        light.to(torch.float16)  # type: ignore[arg-type]
    for make in (light.to, lambda device: LatentDDGAN.from_pretrained(runs / "plain", device=device)):
        with pytest.raises(UserError, match=r"^device: abacus cannot be used"):
            make("abacus")


class SomePath(os.PathLike[str]):
    """A path as of other libraries: neither str nor Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_paths_are_whatever_names_one(tmp_path: Path, runs: Path, pipeline: LatentDDGAN) -> None:
    image = pictures(1)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    expected = pipeline.encode(image)
    for kind in (str, Path, SomePath):
        opened = LatentDDGAN.from_pretrained(kind(runs / "plain"))
        assert torch.equal(opened.encode(kind(tmp_path / "a.png")), expected)
        assert torch.equal(opened.encode([kind(tmp_path / "a.png")]), expected)
        opened.save_pretrained(kind(tmp_path / kind.__name__))
        assert load_model(kind(tmp_path / kind.__name__)).data_shape == LATENT
    mask = SomePath(tmp_path / "a.png")
    assert torch.equal(
        pipeline.inpaint(image, mask, output="tensor"), pipeline.inpaint(image, mask.path, output="tensor")
    )


def test_outputs_hold_the_same_pixels(pipeline: LatentDDGAN) -> None:
    images = pipeline.sample(2, output="tensor")
    assert np.array_equal(pipeline.sample(2, output="numpy"), images.permute(0, 2, 3, 1).numpy())
    for image, expected in zip(pipeline.sample(2), images):
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())


def test_seeds_count_whatever_the_batch(classes: LatentDDGAN) -> None:
    whole = classes.sample(5, seed=3, labels=["cat", 2], guidance=2.0, output="tensor")
    assert torch.equal(whole, classes.sample(5, seed=3, labels=["cat", 2], guidance=2.0, output="tensor"))
    # Convolutions over batches of other sizes may round otherwise; noise and labels are the same.
    parts = classes.sample(5, seed=3, labels=["cat", 2], guidance=2.0, output="tensor", batch_size=2)
    last = classes.sample(1, seed=7, labels="cat", guidance=2.0, output="tensor")
    assert (parts.int() - whole.int()).abs().max() <= 1
    assert (last.int() - whole[4:].int()).abs().max() <= 1
    assert not torch.equal(whole, classes.sample(5, seed=3, labels=[2, "cat"], guidance=2.0, output="tensor"))


def test_classes_go_by_number_and_by_any_name(classes: LatentDDGAN) -> None:
    by_name = classes.sample_latents(3, labels=["tench, Tinca tinca", "12", 0])
    assert torch.equal(by_name, classes.model.sample(range(3), [1, 2, 0]))
    assert torch.equal(classes.sample_latents(2, labels="cat"), classes.model.sample(range(2), [0, 0]))
    assert torch.equal(classes.sample_latents(2), classes.model.sample(range(2)))  # drawn from the seeds


def test_steps_samplers_and_callbacks_reach_the_model(runs: Path) -> None:
    pipeline, model = LatentDDGAN.from_pretrained(runs / "ddpm"), load_model(runs / "ddpm")
    sampler = SamplerConfig("ddim", 2)
    seen: list[int] = []
    x_0 = pipeline.sample_latents(2, lambda t, x_0, x_previous: seen.append(t), sampler="ddim", steps=2)
    assert torch.equal(x_0, model.sample([0, 1], sampler=sampler))
    assert seen == [2, 1]


def test_half_precision_is_autocast(runs: Path, pipeline: LatentDDGAN) -> None:
    half = LatentDDGAN.from_pretrained(runs / "plain", dtype="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = half.model.sample([0, 1])
    assert torch.equal(half.sample_latents(2), expected)
    full = pipeline.sample_latents(2)
    assert not torch.equal(expected, full)
    torch.testing.assert_close(expected, full, rtol=0.2, atol=0.2)
    assert {parameter.dtype for parameter in half.model.network.parameters()} == {torch.float32}


def test_the_light_decoder_decodes(runs: Path, pipeline: LatentDDGAN) -> None:
    light = LatentDDGAN.from_pretrained(runs / "plain", decoder="light")
    x_0 = pipeline.sample_latents(2)
    assert torch.equal(light.decode(x_0, output="tensor"), to_uint8(light.model.light_decoder.decode(x_0)))
    assert not torch.equal(light.decode(x_0, output="tensor"), pipeline.decode(x_0, output="tensor"))


def test_compiled_networks_are_called(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a compiler would make of them costs minutes here; that it is asked, and asked for, is what we do.
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    LatentDDGAN.from_pretrained(runs / "plain", compile=True)
    LatentDDGAN.from_pretrained(runs / "plain", compile=True, decoder="light")
    LatentDDGAN.from_pretrained(runs / "pixels", compile=True)
    assert compiled == ["UNet", "Decoder", "UNet", "LightDecoder", "UNet"]


@pytest.mark.parametrize("name", ["classes", "pixels", "ddpm"])
def test_a_saved_folder_stands_alone(tmp_path: Path, runs: Path, name: str) -> None:
    run = shutil.copytree(runs / name, tmp_path / "run")
    pipeline = LatentDDGAN.from_pretrained(run)
    expected, image = pipeline.sample(3, output="tensor"), pictures(1)
    reconstructed = pipeline.reconstruct(image, output="tensor")
    pipeline.save_pretrained(tmp_path / "checkpoints" / "saved")  # a name that runs use as well
    shutil.rmtree(run)
    saved = LatentDDGAN.from_pretrained(tmp_path / "checkpoints" / "saved")
    assert torch.equal(saved.sample(3, output="tensor"), expected)
    assert torch.equal(saved.reconstruct(image, output="tensor"), reconstructed)
    assert saved.class_names == pipeline.class_names
    saved.save_pretrained(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.safetensors")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "checkpoints/saved").glob("*.safetensors")}
    assert {path.suffix for path in (tmp_path / "again").rglob("*.*")} == {".json", ".safetensors", ".md"}


def test_a_saved_folder_has_the_light_decoder_and_is_never_overwritten(tmp_path: Path, runs: Path) -> None:
    light = LatentDDGAN.from_pretrained(runs / "plain", decoder="light")
    light.save_pretrained(tmp_path / "saved")
    again = LatentDDGAN.from_pretrained(tmp_path / "saved", decoder="light")
    assert torch.equal(again.sample(2, output="tensor"), light.sample(2, output="tensor"))
    with pytest.raises(UserError, match="exists already; choose a new folder"):
        light.save_pretrained(tmp_path / "saved")


def test_the_best_checkpoint_and_single_ones_are_found(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    save_run(run, step=2)
    RunFolder(run).write_best(Best(1, "fid", 0.0))
    best, latest = (LatentDDGAN.from_pretrained(path).sample_latents(1) for path in (run / "best", run))
    assert torch.equal(best, LatentDDGAN.from_pretrained(RunFolder(run).checkpoint_path(1)).sample_latents(1))
    assert not torch.equal(best, latest)


def test_the_card_tells_facts(classes: LatentDDGAN, pipeline: LatentDDGAN) -> None:
    card = classes.generate_model_card()
    num_parameters = sum(parameter.numel() for parameter in classes.model.network.parameters())
    for fact in ("diffusion GAN", "T = 4", "8x8", "latents 2x4x4", f"{num_parameters:,}", "cat", "5,000 samples"):
        assert fact in card.text
    assert card.data.library_name == "ldgan"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "classes" not in pipeline.generate_model_card().text


def test_pushing_uploads_a_saved_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipeline: LatentDDGAN) -> None:
    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / options["repo_id"])
            return "commit"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    assert pipeline.push_to_hub("org/name") == "commit"
    assert (tmp_path / "org/name/README.md").read_text().startswith("---\nlibrary_name: ldgan")

    def fetch(name: str, allow_patterns: list[str], revision: str | None, **options: Any) -> str:
        assert revision == "v1"
        assert "*.safetensors" in allow_patterns
        return str(tmp_path / name)

    monkeypatch.setattr(module, "snapshot_download", fetch)
    fetched = LatentDDGAN.from_pretrained("org/name", revision="v1")
    assert torch.equal(fetched.sample_latents(2), pipeline.sample_latents(2))


def test_only_what_cannot_be_here_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise OSError(f"no network for\n{name}")

    monkeypatch.setattr(module, "snapshot_download", refuse)
    monkeypatch.chdir(runs.parent)
    with pytest.raises(
        UserError, match=r"^org/name: no folder here, and not to be had from the Hub \(no network for org"
    ):
        LatentDDGAN.from_pretrained("org/name")
    for name in (f"{runs.name}/absent", "absent", str(runs / "absent"), "./a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            LatentDDGAN.from_pretrained(name)


def open_tensor(given: Any) -> Tensor:
    return to_images(open_pictures(given))


def test_all_kinds_of_images_are_the_same_tensor(tmp_path: Path) -> None:
    images = pictures(2)
    arrays = images.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array) for array in arrays]
    files = [tmp_path / "0.png", str(tmp_path / "1.png")]
    for file, image in zip(files, pil):
        image.save(file)
    for given in (images, [*images], arrays, [*arrays], pil, files, [pil[0], arrays[1]], (images[:1], files[1])):
        assert torch.equal(to_images(open_pictures(given), SIDE), images)
    for number in (np.float16, np.float32, np.float64):  # the nearest of 0..255
        assert torch.equal(to_images(open_pictures((arrays / 255).astype(number)), SIDE), images)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(to_images(open_pictures(images.to(dtype) / 255), SIDE), images)
    coarse = images // 64 * 64 / 256  # what bf16 holds exactly
    assert torch.equal(open_tensor(coarse.bfloat16()), open_tensor(coarse))
    grey = Image.fromarray(arrays[0, :, :, 0] / np.float32(255))  # of mode F
    assert torch.equal(open_tensor(grey), images[:1, :1].expand(1, 3, -1, -1))
    transparent = Image.fromarray(np.zeros((4, 4, 4), dtype=np.uint8))  # RGBA
    assert (to_images(open_pictures(transparent)) == 255).all()  # on white, as in files
    wide = torch.cat([images, images], dim=3)  # of which the central square is kept
    assert torch.equal(to_images(open_pictures(wide), SIDE), wide[..., SIDE // 2 : SIDE // 2 + SIDE])
    flat = torch.full((3, 2 * SIDE, 2 * SIDE), 77, dtype=torch.uint8)
    assert torch.equal(to_images(open_pictures(flat), SIDE), torch.full((1, 3, SIDE, SIDE), 77, dtype=torch.uint8))


def test_all_kinds_of_masks_are_the_same_tensor(tmp_path: Path) -> None:
    mask = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) > 0.5
    grey = Image.fromarray(torch.where(mask, 128, 127).to(torch.uint8).numpy())
    grey.save(tmp_path / "mask.png")
    image = open_pictures(pictures(2))
    for given in (
        mask,
        mask[None],
        mask[None, None],
        mask.numpy(),
        mask.byte(),
        torch.where(mask, 0.51, 0.49),
        torch.where(mask, 0.51, 0.49).numpy(),
        grey,
        tmp_path / "mask.png",
        [grey] * 2,
    ):
        assert torch.equal(to_masks(open_masks(given, image), SIDE), mask.expand(2, 1, SIDE, SIDE))
    # Scaled down, a pixel is new if any part of it is.
    point = np.zeros((16, 16), dtype=bool)
    point[5, 7] = True
    small = to_masks(open_masks(point, open_pictures(pictures(1, side=16))), SIDE)
    assert small.nonzero().tolist() == [[0, 0, 2, 3]]


def test_encoding_and_reconstructing_go_through_the_autoencoder(runs: Path, pipeline: LatentDDGAN) -> None:
    images, autoencoder = pictures(3), pipeline.model.autoencoder
    x_0 = pipeline.encode(images)
    assert torch.equal(x_0, autoencoder.encode(from_uint8(images)).mean)
    assert torch.equal(pipeline.reconstruct(images, output="tensor"), to_uint8(autoencoder.decode(x_0)))
    pixels = LatentDDGAN.from_pretrained(runs / "pixels")
    assert torch.equal(pixels.reconstruct(images, output="tensor"), images)


def test_edits_are_those_of_editing(classes: LatentDDGAN) -> None:
    model, images, seeds, labels = classes.model, pictures(2), [4, 5, 6], [0, 2, 0]
    how: dict[str, Any] = {"labels": labels, "sampler": SamplerConfig()}
    three = images[[0, 1, 0]]
    asked: dict[str, Any] = {"num_images": 3, "seed": 4, "labels": ["cat", 2], "output": "tensor"}
    expected = editing.edit(model, three, seeds, step=2, **how)
    assert torch.equal(classes.edit(images, step=2, **asked), expected)
    assert torch.equal(classes.edit(images, strength=0.5, **asked), expected)
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    masks = mask.expand(3, -1, -1, -1)
    expected = editing.inpaint(model, three, masks, seeds, num_resamples=2, **how)
    assert torch.equal(classes.inpaint(images, mask, num_resamples=2, **asked), expected)
    expected = editing.outpaint(model, three, seeds, left=4, num_resamples=1, **how)
    assert torch.equal(classes.outpaint(images, left=4, num_resamples=1, **asked), expected)
    del asked["num_images"]
    expected = editing.mix_styles(model, seeds, [9, 10, 11], switch_step=2, **how)
    assert torch.equal(classes.mix_styles(3, style_seed=9, switch_step=2, **asked), expected)
    frames = classes.interpolate(4, 9, 3, labels=[2], output="tensor")
    expected = editing.interpolate(model, 4, 9, 3, along="both", labels=[2] * 3, sampler=SamplerConfig())
    assert torch.equal(frames, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.sample(1, labels=["cow"]), "labels: no class 'cow'; the model knows 0 to 2, or by name: cat"),
        (lambda p: p.sample(1, labels=[3]), "no class '3'; the model knows 0 to 2"),
        (lambda p: p.sample(1, labels=[]), "there are no labels; give one or more"),
        (lambda p: p.sample(1, prompts=["a cat"]), "sample it by labels"),
        (lambda p: p.sample(1, prompts=[]), "reads no prompts"),
        (lambda p: p.sample(1, steps=5), "steps is 5, but the model has 4; give 1 to 4"),
        (lambda p: p.sample(0), "num_images is 0"),
        (lambda p: p.sample(1, output="jpeg"), "output is 'jpeg'; choose one of 'pil', 'numpy', 'tensor'"),
        (lambda p: p.sample(1, sampler="euler"), "sampler is 'euler'; choose one of 'ancestral', 'ddim'"),
        (lambda p: p.edit(pictures(1)), "strength, in (0, 1], or step, 1 to 4; give one of them"),
        (lambda p: p.edit(pictures(1), step=1, strength=1.0), "give one of them"),
        (lambda p: p.edit(pictures(1), strength=1.5), "1.5"),
        (lambda p: p.edit(pictures(1), step=5), "5"),
        (lambda p: p.edit("absent.png", step=1), "absent.png: no such file"),
        (lambda p: p.edit(__file__, step=1), "cannot be read as an image"),
        (lambda p: p.edit(torch.zeros(3, 8, 8).int(), step=1), "Tensor of torch.int32, shape"),
        (lambda p: p.edit(np.zeros((8, 8, 3), bool), step=1), "ndarray of bool, shape"),
        (lambda p: p.edit(torch.full((3, 8, 8), 1.5), step=1), "floats from 1.5 to 1.5; give them in 0..1"),
        (lambda p: p.edit(np.full((8, 8, 3), -0.5), step=1), "floats from -0.5 to -0.5"),
        (lambda p: p.edit(np.full((8, 8, 3), np.nan), step=1), "floats from nan to nan"),
        (lambda p: p.edit(Image.new("F", (8, 8), 200.0), step=1), "floats from 200 to 200"),
        (lambda p: p.edit(np.zeros((0, 8, 8, 3), np.float32), step=1), "there are no images"),
        (lambda p: p.edit(np.zeros((8, 8), np.uint8), step=1), "shape (8, 8); give PIL images, paths, uint8 arrays"),
        (lambda p: p.edit(None, step=1), "NoneType"),
        (lambda p: p.edit([], step=1), "there are no images"),
        (lambda p: p.inpaint(pictures(1), np.zeros((8, 16), bool)), "mask 0 is 16x8 pixels, its image 8x8"),
        (lambda p: p.inpaint(pictures(3), np.zeros((2, 8, 8), bool)), "2 masks for 3 images"),
        (lambda p: p.inpaint(pictures(1), np.zeros((8, 8), int)), "no masks: ndarray of int64"),
        (lambda p: p.outpaint([pictures(1), pictures(1, side=9)], left=1), "images of several sizes: 8x8, 9x9"),
        (lambda p: p.outpaint(pictures(1, side=4), left=1), "4 x 4"),
        (lambda p: p.interpolate(0, 1, 1), "1 frames"),
        (lambda p: p.mix_styles(1, style_seed=1, switch_step=5), "switch_step 5"),
    ],
)
def test_bad_input_gets_one_line_that_names_what_is_possible(
    classes: LatentDDGAN, call: Callable[[LatentDDGAN], Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        call(classes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_is_not_asked_for_what_it_never_learnt(runs: Path, pipeline: LatentDDGAN) -> None:
    with pytest.raises(UserError, match=r"^labels: .* trained without classes"):
        pipeline.sample(1, labels=[0])
    with pytest.raises(UserError, match=r"^guidance: .* trained without classes"):
        pipeline.sample(1, guidance=2.0)
    with pytest.raises(UserError, match="dtype is 'fp8'; choose one of None, 'bf16', 'fp16'"):
        LatentDDGAN.from_pretrained(runs / "plain", dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^decoder: .* works on pixels and has no decoder"):
        LatentDDGAN.from_pretrained(runs / "pixels", decoder="light")


def test_prompts_are_encoded_by_the_text_encoder_that_travels_along(
    tmp_path: Path, tiny_text_encoder: Callable[..., Path]
) -> None:
    folder = tiny_text_encoder()
    encoder = open_text_encoder(folder, max_tokens=6)
    text = {"encoder": encoder.fingerprint, "name": encoder.name, "dim": encoder.dim, "max_tokens": 6}
    network = UNetConfig(
        base_channels=8,
        channel_multipliers=[1],
        num_res_blocks=1,
        z_dim=3,
        embedding_dim=8,
        attention_resolutions=[],
        text_conditioning="pooled",
    )
    shape = (3, SIDE, SIDE)
    config = {NETWORK[GAN]: to_dict(network), "num_timesteps": 2, "latent": False, "caption_dropout": 0.1}
    description = {"kind": GAN, "config": config, "data_shape": list(shape), "resolution": SIDE, "text": text}
    unet = randomise(build_unet(network, shape, text_dim=encoder.dim), seed=0)
    save_checkpoint(RunFolder(tmp_path / "run").checkpoint_path(1), {WEIGHTS[GAN]: unet}, description)
    copy_text_encoder(folder, tmp_path / "run" / TEXT_ENCODER_FOLDER)

    LatentDDGAN.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "run")
    saved = LatentDDGAN.from_pretrained(tmp_path / "saved")
    assert saved.has_text
    assert "text-to-image" in saved.generate_model_card().content
    prompts = ["a red heart", "the green tree"]
    found = saved.sample_latents(3, seed=4, prompts=prompts, guidance=2.0)
    encoded = encoder([*prompts, prompts[0]])
    expected = saved.model.sample([4, 5, 6], sampler=SamplerConfig(guidance_scale=2.0), text=encoded)
    assert torch.equal(found, expected)
    edited = saved.edit(pictures(1), step=1, num_images=3, seed=4, prompts=prompts, output="tensor")
    expected = editing.edit(saved.model, pictures(1).expand(3, -1, -1, -1), [4, 5, 6], step=1, text=encoded)
    assert torch.equal(edited, expected)
    assert torch.equal(saved.sample_latents(2), saved.model.sample([0, 1]))  # without prompts
    with pytest.raises(UserError, match="there are no prompts; give one or more"):
        saved.sample(1, prompts=[])
    with pytest.raises(UserError, match=r"^guidance: steers towards prompts; give some"):
        saved.sample(1, guidance=2.0)


EXAMPLES = [test for test in doctest.DocTestFinder().find(LatentDDGAN, module=module) if test.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_of_docstrings_run(
    example: doctest.DocTest, runs: Path, pipeline: LatentDDGAN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save("photo.png")
    shutil.copytree(runs / "plain", "runs/mine/gan")
    example.globs = {"LatentDDGAN": LatentDDGAN, "pipeline": pipeline}
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_method_has_an_example() -> None:
    named = {example.name.split(".")[-1] for example in EXAMPLES}
    own = {
        name
        for name, value in vars(LatentDDGAN).items()
        if not name.startswith("_") and not isinstance(value, property)
    }
    assert own - named == {"generate_model_card"}

"""diffusers' format: the same numbers out of both libraries, in both directions, and clear words for the rest."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder import export
from autoencoder.inference.trained_autoencoder import copy_autoencoder, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.diffusers_format import OLD_LAYERS
from ldgan.engine.cli import UserError

diffusers = pytest.importorskip("diffusers")

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"

PLAIN: dict[str, Any] = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 2}
MODELS: dict[str, dict[str, Any]] = {
    "f1, nothing optional": {
        "block_out_channels": (4,),
        "norm_num_groups": 1,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "f4, one latent channel, groups of three, grey": {
        "block_out_channels": (6, 9, 12),
        "norm_num_groups": 3,
        "latent_channels": 1,
        "in_channels": 1,
        "out_channels": 1,
        "mid_block_add_attention": False,
    },
    "f8, as Stable Diffusion 1": {
        "block_out_channels": (8, 16, 32, 32),
        "norm_num_groups": 4,
        "layers_per_block": 2,
    },
    "f8, as Stable Diffusion 3": {
        "block_out_channels": (8, 16, 32, 32),
        "norm_num_groups": 8,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "f4, attention at two of three levels": {
        "block_out_channels": (4, 8, 12),
        "norm_num_groups": 2,
        "layers_per_block": 2,
        "attention_factors": (2, 4),
    },
    "f2, statistics of each channel": PLAIN
    | {"scaling_factor": 0.5, "latents_mean": [0.25, -2.0], "latents_std": [3.0, 0.125]},
}


def new_model(attention_factors: tuple[int, ...] = (), **settings: Any) -> Any:
    """A model of diffusers with random weights, biases and scales of normalisations included."""
    attention = [2**level in attention_factors for level in range(len(settings["block_out_channels"]))]
    down = ["AttnDownEncoderBlock2D" if present else "DownEncoderBlock2D" for present in attention]
    up = ["AttnUpDecoderBlock2D" if present else "UpDecoderBlock2D" for present in reversed(attention)]
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **settings).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def new_folder(folder: Path, **settings: Any) -> Path:
    new_model(**PLAIN | settings).save_pretrained(folder)
    return folder


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_numbers(ours: AutoencoderKL, theirs: Any) -> None:
    """Posteriors and images differ by at most 1e-5."""
    settings = theirs.config
    x = noise(2, settings.in_channels, 16, 24).clamp(-1, 1)
    posterior, expected = ours.raw_posterior(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.log_variance, expected.logvar, rtol=0, atol=1e-5)
    z = noise(2, settings.latent_channels, 4, 6)
    standardised = (z - ours.latent_mean) / ours.latent_std
    torch.testing.assert_close(ours.decode(standardised), theirs.decode(z).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_a_model_of_diffusers_gives_the_same_numbers_here(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = new_model(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_numbers(AutoencoderKL.from_diffusers(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_a_round_trip_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = new_model(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_diffusers(tmp_path / "theirs")
    ours.save_diffusers(tmp_path / "ours")
    again = AutoencoderKL.from_diffusers(tmp_path / "ours")
    assert fingerprint(again) == fingerprint(ours)
    assert fingerprint(AutoencoderKL.from_diffusers(str(tmp_path / "ours"))) == fingerprint(ours)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(back.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert architecture(back) == architecture(theirs)


def architecture(model: Any) -> dict[str, Any]:
    """The settings of a model but for its statistics, which ours hold in another way, and notes of diffusers' own."""
    statistics = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    kept = {key: value for key, value in model.config.items() if key not in statistics and not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_groups": 4},
        {"num_groups": 3, "base_channels": 6, "channel_multipliers": [1, 2, 3, 3], "num_res_blocks": 2},
        {"num_groups": 2, "mid_attention": True, "attention_factors": [1, 2], "latent_convolutions": True},
        {"base_channels": 128, "channel_multipliers": [1, 2]},  # where the rule gives 32 groups at every width
    ],
)
def test_ours_give_the_same_numbers_in_diffusers(tiny_autoencoder, tmp_path: Path, numbers: dict[str, Any]) -> None:
    ours = tiny_autoencoder(**numbers).eval()
    ours.set_latent_statistics(torch.tensor([0.1, -2.0]), torch.tensor([0.3, 7.0]))
    ours.save_diffusers(tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert_same_numbers(ours, theirs)
    assert theirs.config.scaling_factor == 1.0
    assert torch.equal(torch.tensor(theirs.config.latents_mean), ours.latent_mean.flatten())
    assert torch.equal(torch.tensor(theirs.config.latents_std), ours.latent_std.flatten())


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({}, [0.0, 0.0], [1 / 0.18215] * 2),
        ({"scaling_factor": 0.5}, [0.0, 0.0], [2.0, 2.0]),
        ({"scaling_factor": 0.5, "shift_factor": 0.75}, [0.75, 0.75], [2.0, 2.0]),
        ({"scaling_factor": 0.5, "latents_mean": [1, 2], "latents_std": [3, 4]}, [1.0, 2.0], [6.0, 8.0]),
        ({"scaling_factor": 0.5, "latents_mean": [1, 2]}, [0.0, 0.0], [2.0, 2.0]),  # diffusers wants both
    ],
)
def test_statistics_are_those_that_diffusers_pipelines_use(tmp_path: Path, settings: dict, mean: list, std: list):
    ours = AutoencoderKL.from_diffusers(new_folder(tmp_path / "vae", **settings))
    torch.testing.assert_close(ours.latent_mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(ours.latent_std.flatten(), torch.tensor(std))


def test_a_folder_of_diffusers_is_a_finished_autoencoder(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "vae", latents_mean=[1.0, 2.0], latents_std=[3.0, 4.0])
    autoencoder = load_autoencoder(folder)
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    copy_autoencoder(folder, tmp_path / "copy")
    copy = load_autoencoder(tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(autoencoder) == fingerprint(AutoencoderKL.from_diffusers(folder))
    assert_same_numbers(copy, diffusers.AutoencoderKL.from_pretrained(folder))


def test_half_precision_weights_become_fp32(tmp_path: Path) -> None:
    theirs = new_model(**PLAIN).half()
    theirs.save_pretrained(tmp_path / "half")
    ours = AutoencoderKL.from_diffusers(tmp_path / "half")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_numbers(ours, theirs.float())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "4KB"])
def test_variants_and_shards_load_as_diffusers_loads_them(
    tmp_path: Path, variant: str | None, max_shard_size: str
) -> None:
    saved = new_model(**PLAIN) if variant is None else new_model(**PLAIN).half()
    saved.save_pretrained(tmp_path / "vae", variant=variant, max_shard_size=max_shard_size)
    num_files = len(list((tmp_path / "vae").glob("*.safetensors")))
    assert num_files == 1 if max_shard_size == "10GB" else num_files > 2
    ours = AutoencoderKL.from_diffusers(tmp_path / "vae")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    theirs = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "vae", variant=variant, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    assert_same_numbers(ours, theirs)
    assert fingerprint(load_autoencoder(str(tmp_path / "vae"))) == fingerprint(ours)


def test_weights_without_a_variant_come_first(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "vae")
    full = fingerprint(AutoencoderKL.from_diffusers(folder))
    new_model(**PLAIN).half().save_pretrained(folder, variant="fp16")
    assert fingerprint(AutoencoderKL.from_diffusers(folder)) == full
    (folder / WEIGHTS_FILE).unlink()
    assert fingerprint(AutoencoderKL.from_diffusers(folder)) != full


def test_of_a_pipelines_folder_the_vae_is_taken(tmp_path: Path) -> None:
    vae = new_folder(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    expected = fingerprint(AutoencoderKL.from_diffusers(vae))
    assert fingerprint(AutoencoderKL.from_diffusers(tmp_path / "pipeline")) == expected
    assert fingerprint(load_autoencoder(tmp_path / "pipeline")) == expected
    copy_autoencoder(tmp_path / "pipeline", tmp_path / "copy")
    assert fingerprint(load_autoencoder(tmp_path / "copy")) == expected


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_a_missing_or_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    new_model(**PLAIN).save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(UserError, match=shard.name) as caught:
        AutoencoderKL.from_diffusers(tmp_path)
    assert "\n" not in str(caught.value)


def test_attention_under_its_older_names_loads(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "vae", attention_factors=(2,))
    expected = fingerprint(AutoencoderKL.from_diffusers(folder))
    tensors = load_file(folder / WEIGHTS_FILE)
    for old, new in OLD_LAYERS.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    assert fingerprint(AutoencoderKL.from_diffusers(folder)) == expected


def change_config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return apply


def two_variants(folder: Path) -> None:
    for variant in ("fp16", "bf16"):
        shutil.copy(folder / WEIGHTS_FILE, folder / f"diffusion_pytorch_model.{variant}.safetensors")
    (folder / WEIGHTS_FILE).unlink()


def list_in_index(name: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"quant_conv.bias": name}}))


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_config(_class_name="AutoencoderTiny"), "config.json: describes a model of class 'AutoencoderTiny'"),
        (change_config(act_fn="relu"), "act_fn is 'relu', and only 'silu' can be loaded"),
        (change_config(out_channels=4), "out_channels is 4, and only in_channels' 3"),
        (change_config(use_post_quant_conv=False), "use_post_quant_conv is False, and only use_quant_conv's True"),
        (change_config(down_block_types=["DownEncoderBlock2D"]), "down_block_types is .* only 2 of DownEncoderBlock2D"),
        (
            change_config(up_block_types=["UpDecoderBlock2D", "UpBlock2D"]),
            "up_block_types is .*'UpBlock2D'.*, and only",
        ),
        (
            change_config(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
            "only attention where down_block_types has it",
        ),
        (change_config(block_out_channels="64"), "block_out_channels is '64', and only a list of whole numbers"),
        (change_config(norm_num_groups=3), r"norm_num_groups is 3, and only a divisor of block_out_channels \[4, 8\]"),
        (change_config(layers_per_block="two"), "config.json: num_res_blocks: expected int, got 'two'"),
        (
            change_config(latents_mean=[0, 0], latents_std=[1, 1, 1]),
            "config.json: latents_mean, latents_std .* not fit",
        ),
        (change_config(scaling_factor=0), r"standard deviation is \[inf, inf\], not positive"),
        (change_config(layers_per_block=2), r"[1-9]\d* tensors missing .* 0 unknown .* not belong to its config.json"),
        (
            change_config(latent_channels=4),
            r"quant_conv.weight: shape \[4, 4, 1, 1\] in the file, \[8, 8, 1, 1\] by its",
        ),
        (change_tensors(lambda tensors: tensors.pop("quant_conv.bias")), r"1 tensors missing \(first: \['quant_conv.b"),
        (
            change_tensors(lambda tensors: tensors.update(teacher=torch.zeros(1))),
            r"0 tensors missing .* 1 unknown \(first: \['teacher'\]\)",
        ),
        (truncate, f"{WEIGHTS_FILE}: damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: damaged"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE}: no such file"),
        (
            lambda folder: (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.bin"),
            "holds diffusion_pytorch_model.bin, and neither diffusion_pytorch_model.safetensors nor an index",
        ),
        (two_variants, "holds weights in the variants bf16, fp16, and none without; keep one"),
        (list_in_index("../theirs.safetensors"), r"index.json: there is no file of weights '../theirs.safetensors'"),
        (list_in_index(f"../vae/{WEIGHTS_FILE}"), r"index.json: there is no file of weights '../vae/diffusion"),
        (list_in_index("pickle.bin"), r"index.json: there is no file of weights 'pickle.bin' beside it"),
        (list_in_index(7), r"index.json: there is no file of weights 7 beside it"),
        (list_in_index("gone.safetensors"), r"index.json: there is no file of weights 'gone.safetensors' beside it"),
        (lambda folder: (folder / INDEX_FILE).write_text("{"), "index.json: damaged, or no index of weights"),
        (lambda folder: (folder / INDEX_FILE).write_text("[]"), "index.json: damaged, or no index of weights"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path, damage: Callable, message: str) -> None:
    folder = new_folder(tmp_path / "vae")
    AutoencoderKL.from_diffusers(folder)  # whole, it loads
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        AutoencoderKL.from_diffusers(folder)
    assert "\n" not in str(caught.value)


def test_what_the_format_cannot_say_is_refused(tiny_autoencoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this autoencoder \[2, 4\]; train one with network.num_groups set"):
        tiny_autoencoder().save_diffusers(tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tiny_autoencoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        tiny_autoencoder(num_groups=2).save_diffusers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_exports_an_autoencoder(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = new_folder(tmp_path / "vae")
    copy_autoencoder(folder, tmp_path / "run")
    flags = ["--autoencoder", str(tmp_path / "run"), "--out", str(tmp_path / "exported" / "vae")]
    monkeypatch.setattr(sys, "argv", ["export.py", *flags])
    export.main()
    assert str(tmp_path / "exported" / "vae") in capsys.readouterr().out
    assert_same_numbers(load_autoencoder(tmp_path / "run"), diffusers.AutoencoderKL.from_pretrained(flags[-1]))

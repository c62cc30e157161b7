"""Runs on disk: the autoencoder that travels with a run, and its two decoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from autoencoder.inference.light_decoder import KIND as LIGHT_KIND
from autoencoder.inference.light_decoder import WEIGHTS as LIGHT_WEIGHTS
from autoencoder.inference.light_decoder import light_decoder_folder
from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.inference.trained_autoencoder import fingerprint
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoderConfig, build_light_decoder
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import to_uint8
from ldgan.inference.trained_model import GAN, WEIGHTS, build_unet, load_model
from ldgan.models.unet import UNetConfig
from ldgan.training.data import DataConfig, keep_autoencoder

LIGHT_CONFIG = LightDecoderConfig(widths=[6], num_blocks=[1])
GENERATOR_CONFIG = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1)
SHAPE = (2, 4, 4)


@pytest.fixture
def autoencoder(tiny_autoencoder) -> AutoencoderKL:
    return tiny_autoencoder().eval()


@pytest.fixture
def stage_1(tmp_path: Path, autoencoder: AutoencoderKL) -> Path:
    """A finished run of stage 1 whose autoencoder has a light decoder."""
    folder = tmp_path / "stage_1"
    description = {
        "kind": AUTOENCODER_KIND,
        "config": {"network": to_dict(autoencoder.config)},
        "latent_statistics": {},
    }
    save_checkpoint(folder, {AUTOENCODER_WEIGHTS: autoencoder}, description)
    light = build_light_decoder(LIGHT_CONFIG, autoencoder)
    description = {"kind": LIGHT_KIND, "autoencoder": fingerprint(autoencoder)}
    description |= {"config": {"network": to_dict(LIGHT_CONFIG)}}
    save_checkpoint(light_decoder_folder(folder), {LIGHT_WEIGHTS: light}, description)
    return folder


def keep(stage_1: Path, run: Path) -> None:
    """What a run of stage 2 on latents of ``stage_1`` does first."""
    keep_autoencoder(DataConfig(latent=True, autoencoder=str(stage_1)), run, Accelerator(cpu=True))


def save_run(folder: Path, *, latent: bool) -> Path:
    """A run of stage 2, without an autoencoder so far; its only checkpoint."""
    config = {"generator": to_dict(GENERATOR_CONFIG), "num_timesteps": 2, "beta_max": 12.0, "latent": latent}
    description = {"kind": GAN, "config": config, "data_shape": list(SHAPE), "resolution": 8}
    checkpoint = folder / "checkpoints" / "step_000000001"
    save_checkpoint(checkpoint, {WEIGHTS[GAN]: build_unet(GENERATOR_CONFIG, SHAPE)}, description)
    return checkpoint


def test_a_run_keeps_the_autoencoder_and_its_light_decoder(tmp_path, stage_1, autoencoder):
    checkpoint = save_run(tmp_path / "run", latent=True)
    keep(stage_1, tmp_path / "run")
    x_0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    full, light = load_model(checkpoint), load_model(checkpoint, decoder="light")
    assert fingerprint(full.autoencoder) == fingerprint(light.autoencoder) == fingerprint(autoencoder)
    assert torch.equal(full.decode(x_0), to_uint8(full.autoencoder.decode(x_0)))
    assert torch.equal(light.decode(x_0), to_uint8(light.light_decoder.decode(x_0)))
    assert not torch.equal(full.decode(x_0), light.decode(x_0))
    assert torch.equal(replace(light, light_decoder=None).decode(x_0), full.decode(x_0))


def test_the_autoencoder_that_a_run_keeps_is_not_replaced(tmp_path, stage_1, tiny_autoencoder):
    keep(stage_1, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert any("light" in str(path) for path in before)
    keep(stage_1, tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_light_decoder_has_to_be_there_and_pixels_have_none(tmp_path, stage_1):
    with pytest.raises(UserError, match="works on pixels and has no decoder"):
        load_model(save_run(tmp_path / "pixels", latent=False), decoder="light")
    checkpoint = save_run(tmp_path / "run", latent=True)
    for file in light_decoder_folder(stage_1).iterdir():
        file.unlink()
    light_decoder_folder(stage_1).rmdir()
    keep(stage_1, tmp_path / "run")
    with pytest.raises(UserError, match=r"no light decoder.*distill\.py"):
        load_model(checkpoint, decoder="light")


def test_the_schedule_is_the_one_of_training(tmp_path):
    diffusion = load_model(save_run(tmp_path / "run", latent=False)).diffusion
    assert diffusion.num_steps == 2
    # abar_T = exp(-(s_T^2 - s_0^2) (beta_max - beta_min) / 2 - (s_T - s_0) beta_min) at s_0 = 1e-3, s_T = 1.
    expected = -(1 - 1e-6) * (12.0 - 0.1) / 2 - (1 - 1e-3) * 0.1
    assert diffusion.alphas_bar[-1].log().item() == pytest.approx(expected, rel=1e-12)

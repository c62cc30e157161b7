"""The light decoder: what it costs, how far it looks, and that it stays with its autoencoder."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.distill import DistillConfig
from autoencoder.inference.light_decoder import (
    KIND,
    WEIGHTS,
    light_decoder_folder,
    load_light_decoder,
    read_light_decoder,
)
from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.inference.trained_autoencoder import fingerprint
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder, LightDecoderConfig, build_light_decoder
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config, to_dict

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK, CONFIGS = ROOT / "tests" / "benchmarks" / "decoders.py", ROOT / "configs" / "autoencoder"
CONFIG = LightDecoderConfig(widths=[5, 6], num_blocks=[1])


@pytest.fixture(scope="module")
def count_macs() -> Any:
    return runpy.run_path(str(BENCHMARK))["count_macs"]


def new_light_decoder(widths: list[int], num_blocks: list[int]) -> LightDecoder:
    torch.manual_seed(0)
    return LightDecoder(latent_channels=4, image_channels=3, widths=widths, num_blocks=num_blocks).eval()


def latents(height: int, width: int) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))


def save_autoencoder(folder: Path, autoencoder: AutoencoderKL) -> Path:
    """A checkpoint as a finished run writes it."""
    config = {"network": to_dict(autoencoder.config)}
    description = {"kind": AUTOENCODER_KIND, "config": config, "latent_statistics": {}}
    save_checkpoint(folder, {AUTOENCODER_WEIGHTS: autoencoder}, description)
    return folder


def save_light_decoder(folder: Path, light: LightDecoder, autoencoder: AutoencoderKL, **changes: Any) -> Path:
    """What a finished distillation writes, but for ``changes``."""
    description = {"kind": KIND, "autoencoder": fingerprint(autoencoder), "config": {"network": to_dict(CONFIG)}}
    save_checkpoint(folder, {WEIGHTS: light}, description | changes)
    return folder


def test_multiply_adds_are_their_closed_forms(count_macs: Any) -> None:
    image = torch.empty(2, 3, 8, 6)
    # Each of a strided convolution's 4 x 3 outputs takes 5 x 5 products for each pair of channels.
    assert count_macs(nn.Conv2d(3, 7, 5, stride=2, padding=2), image) == 2 * (4 * 3) * 7 * 3 * 25
    assert count_macs(nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.empty(1, 6, 4, 4)) == 16 * 6 * 9
    assert count_macs(nn.Linear(5, 4), torch.empty(11, 5)) == 11 * 5 * 4
    tokens = torch.rand(2, 1, 10, 8)  # queries times keys, then weights times values
    assert count_macs(nn.functional.scaled_dot_product_attention, tokens, tokens, tokens) == 2 * 2 * 10 * 10 * 8
    assert count_macs(nn.Conv2d(3, 7, 1, device="meta"), image.to("meta")) == 2 * 48 * 3 * 7


def test_the_default_takes_5_4_gmac_for_256_px_at_factor_8(count_macs: Any) -> None:
    config = LightDecoderConfig()
    light = new_light_decoder(config.widths, config.num_blocks).to("meta")
    macs = count_macs(light.decode, torch.empty(1, 4, 32, 32, device="meta"))
    at_32, at_64, at_128 = (
        32**2 * 9 * (4 * 96 + 6 * 96 * 96 + 96 * 64),
        64**2 * 9 * (6 * 64 * 64 + 64 * 64),
        128**2 * 9 * (6 * 64 * 64 + 64 * 12),
    )
    assert macs == at_32 + at_64 + at_128 == 5_363_859_456
    assert macs < 8e9  # TAESD's decoder: 17.7e9
    assert sum(parameter.numel() for parameter in light.parameters()) == 1_044_140


@pytest.mark.parametrize(
    ("name", "parameters", "gmac"), [("light_small", 0.315e6, 1.24), ("light_medium", 1.04e6, 5.36)]
)
def test_the_configs_cost_what_they_say(
    count_macs: Any, tiny_autoencoder: Any, name: str, parameters: float, gmac: float
) -> None:
    autoencoder = tiny_autoencoder(latent_channels=4, channel_multipliers=[1, 1, 1, 1])
    light = build_light_decoder(load_config(DistillConfig, CONFIGS / f"{name}.yaml", []).network, autoencoder)
    assert sum(parameter.numel() for parameter in light.parameters()) == pytest.approx(parameters, rel=0.01)
    macs = count_macs(light.to("meta").decode, torch.empty(1, 4, 32, 32, device="meta"))
    assert macs == pytest.approx(gmac * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("factor", "widths", "num_blocks"), [(2, [5], [1]), (4, [5, 6], [1, 1]), (8, [5, 6, 6], [1] * 3)]
)
def test_a_config_serves_every_factor(
    tiny_autoencoder: Any, factor: int, widths: list[int], num_blocks: list[int]
) -> None:
    autoencoder = tiny_autoencoder(channel_multipliers=[1] * factor.bit_length())
    light = build_light_decoder(CONFIG, autoencoder)
    by_hand = LightDecoder(latent_channels=2, image_channels=3, widths=widths, num_blocks=num_blocks)
    assert {k: v.shape for k, v in light.state_dict().items()} == {k: v.shape for k, v in by_hand.state_dict().items()}
    assert light.decode(torch.zeros(1, 2, 3, 5)).shape == (1, 3, 3 * factor, 5 * factor)


@pytest.mark.parametrize(
    ("config", "multipliers", "message"),
    [
        (LightDecoderConfig(widths=[]), [1, 1], r"network.widths is \[\]; give one number per level"),
        (LightDecoderConfig(num_blocks=[1, 0]), [1, 1], r"network.num_blocks is \[1, 0\]"),
        (CONFIG, [1], "an autoencoder of factor 1 has nothing to gain"),
    ],
)
def test_numbers_that_make_no_decoder_are_refused(
    tiny_autoencoder: Any, config: LightDecoderConfig, multipliers: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_light_decoder(config, tiny_autoencoder(channel_multipliers=multipliers))


def test_a_pixel_depends_only_on_latents_nearby() -> None:
    """Factor 4, a block per level: conv_in, a block's two and f2_up's convolution reach 4 latents at f4; at f2 a
    block's two and conv_out reach 3 half-latents. So 6 latents on each side are enough, and 24 pixels.
    """
    light = new_light_decoder([6, 5], [1, 1])
    z = latents(20, 17)
    whole = light.decode(z)
    assert whole.shape == (1, 3, 80, 68)
    part = light.decode(z[..., 3:18, 2:16])[..., 24:-24, 24:-24]
    torch.testing.assert_close(part, whole[..., 12 + 24 : 72 - 24, 8 + 24 : 64 - 24], rtol=0, atol=1e-6)

    far, near = z.clone(), z.clone()
    far[..., 0, :], near[..., 8, :] = 100.0, 100.0
    assert torch.equal(light.decode(far)[..., 28:, :], whole[..., 28:, :])
    assert not torch.equal(light.decode(near)[..., 32:36, :], whole[..., 32:36, :])


def test_every_weight_takes_part() -> None:
    light = new_light_decoder([6, 5, 4], [1, 2, 1])
    light(latents(5, 4)).square().sum().backward()
    assert [name for name, p in light.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_loaded_light_decoder_is_the_saved_one_ready_for_use(tmp_path: Path, tiny_autoencoder: Any) -> None:
    autoencoder = tiny_autoencoder()
    light = build_light_decoder(CONFIG, autoencoder)
    run = save_autoencoder(tmp_path / "run" / "checkpoints" / "step_000000001", autoencoder).parents[1]
    save_light_decoder(light_decoder_folder(run), light, autoencoder)
    for path in (run, run / "checkpoints" / "step_000000001"):
        loaded = load_light_decoder(path)
        torch.testing.assert_close(loaded.state_dict(), light.state_dict(), rtol=0, atol=0)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_missing_light_decoder_is_told_how_to_train(tmp_path: Path, tiny_autoencoder: Any) -> None:
    run = save_autoencoder(tmp_path / "run", tiny_autoencoder())
    with pytest.raises(
        UserError, match=rf"no light decoder .*accelerate launch autoencoder/distill.py .*{run} latents="
    ):
        load_light_decoder(run)


def test_the_light_decoder_of_another_autoencoder_is_refused(tmp_path: Path, tiny_autoencoder: Any) -> None:
    autoencoder, other = tiny_autoencoder(), tiny_autoencoder(seed=1)
    run = save_autoencoder(tmp_path / "run", autoencoder)
    save_light_decoder(light_decoder_folder(run), build_light_decoder(CONFIG, other), other)
    message = f"light decoder of another autoencoder .*{fingerprint(other)[:12]}, given {fingerprint(autoencoder)[:12]}"
    with pytest.raises(UserError, match=message):
        load_light_decoder(run)


def test_what_is_no_light_decoder_is_refused(tmp_path: Path, tiny_autoencoder: Any) -> None:
    autoencoder = tiny_autoencoder()
    run = save_autoencoder(tmp_path / "run", autoencoder)
    with pytest.raises(UserError, match="holds 'autoencoder', not a light decoder"):
        read_light_decoder(run, autoencoder)
    light = build_light_decoder(CONFIG, autoencoder)
    wide = {"network": {"widths": [7], "num_blocks": [1]}}
    folder = save_light_decoder(tmp_path / "light", light, autoencoder, config=wide)
    with pytest.raises(UserError, match="saved from another architecture"):
        read_light_decoder(folder, autoencoder)

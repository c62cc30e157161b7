"""diffusers' AutoencoderTiny as a light decoder: the same numbers, the scale found, the wrong one refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autoencoder.inference import light_decoder
from autoencoder.inference.light_decoder import dead_leaves, fit_scale, load_light_decoder, read_light_decoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from ldgan.engine.cli import UserError

diffusers = pytest.importorskip("diffusers")

NUMBERS: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (2, 1),
    "latent_channels": 2,
}


def new_tiny(seed: int = 0, **numbers: Any) -> Any:
    torch.manual_seed(seed)
    model = diffusers.AutoencoderTiny(**NUMBERS | numbers).eval()
    for parameter in model.decoder.parameters():
        parameter.data *= 1.5  # far from the start, where images hardly depend on latents
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def full_decoder(model: Any, scale: float = 1.0) -> Any:
    """An autoencoder, as far as its decoder goes, whose latents are those of ``model`` over ``scale``."""
    return SimpleNamespace(
        encode=lambda images: SimpleNamespace(mean=2 * F.avg_pool2d(images, 2)[:, :2]),
        decode=lambda latents: model.decode(latents * scale).sample,
        latent_mean=torch.zeros(2, 1, 1),
        config=SimpleNamespace(latent_channels=2, image_channels=3),
        downsampling_factor=2,
    )


@pytest.mark.parametrize("saving", [{}, {"variant": "fp16"}, {"max_shard_size": "4KB"}])
@torch.no_grad()
def test_it_decodes_as_in_diffusers(tmp_path: Path, saving: dict[str, Any]) -> None:
    model = new_tiny()
    model = model.half().float() if "variant" in saving else model
    model.save_pretrained(tmp_path, **saving)
    tiny, latents = load_tiny_decoder(tmp_path), 3 * noise(2, 2, 5, 7)
    assert tiny.downsampling_factor == 2
    torch.testing.assert_close(tiny.decode(latents), model.decode(latents).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 0.0), (1.1, 0.1), (0.18215, 0.04), (6.0, 0.04)])
@torch.no_grad()
def test_the_scale_of_its_latents_is_measured(tmp_path: Path, scale: float, tolerance: float) -> None:
    model = new_tiny()
    model.save_pretrained(tmp_path)
    tiny = load_tiny_decoder(tmp_path)
    explained = fit_scale(tiny, full_decoder(model, scale))
    assert tiny.scale.item() == pytest.approx(scale, rel=tolerance)
    assert explained > 0.95
    latents = noise(2, 2, 6, 6)
    difference = tiny.decode(latents) - model.decode(latents * scale).sample
    assert difference.square().mean() < 0.05 * model.decode(latents * scale).sample.var()


def test_dead_leaves_are_the_same_at_every_call_and_differ_from_image_to_image() -> None:
    images = dead_leaves(3, 2, 32)
    assert images.shape == (3, 2, 32, 32)
    assert torch.equal(images, dead_leaves(3, 2, 32))
    assert images.abs().max() <= 1
    assert len(images.flatten(1).unique(dim=0)) == 3
    # Discs have edges and are flat inside: more than half of all neighbours are equal, but not all.
    equal = (images[..., 1:] == images[..., :-1]).float().mean().item()
    assert 0.5 < equal < 0.99


def test_beside_its_autoencoder_it_is_its_light_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_tiny()
    model.save_pretrained(tmp_path / "run" / "light_decoder")
    monkeypatch.setattr(light_decoder, "load_autoencoder", lambda run: full_decoder(model))
    light = load_light_decoder(str(tmp_path / "run"))
    assert isinstance(light, TinyDecoder)
    assert not light.training
    assert not any(parameter.requires_grad for parameter in light.parameters())
    latents = noise(1, 2, 4, 4)
    torch.testing.assert_close(light.decode(latents), model.decode(latents).sample, rtol=0, atol=1e-5)


def test_one_that_does_not_know_the_latents_is_refused(tmp_path: Path, tiny_autoencoder) -> None:
    new_tiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not know these latents, it explains -?\d+% of the variance"):
        read_light_decoder(tmp_path, full_decoder(new_tiny(seed=1)))
    autoencoder: AutoencoderKL = tiny_autoencoder().eval()
    with pytest.raises(UserError, match="does not know these latents"):
        read_light_decoder(tmp_path, autoencoder)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"latent_channels": 3}, r"factor are \(3, 3, 2\), the autoencoder's \(2, 3, 2\); give an AutoencoderTiny of"),
        ({"act_fn": "gelu"}, "config.json: act_fn is 'gelu', and only 'relu' can be loaded"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor is 3, and only 2"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, numbers: dict[str, Any], message: str) -> None:
    new_tiny(**numbers).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        read_light_decoder(tmp_path, full_decoder(new_tiny()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_decoder_blocks": [2, 2]}, "tensors missing .* not belong to its config.json"),
        ({"decoder_block_out_channels": [8, 16]}, "shape .* in the file, .* by its config.json"),
        ({"decoder_block_out_channels": "wide"}, "no network has the numbers"),
        ({"num_decoder_blocks": [10**9, 1]}, "no network has the numbers"),
        ({"_class_name": "UNet2DModel"}, "describes a model of class 'UNet2DModel'; only 'AutoencoderTiny'"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    new_tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=message) as caught:
        load_tiny_decoder(tmp_path)
    assert "\n" not in str(caught.value)

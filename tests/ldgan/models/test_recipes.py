"""The recipes of configs/ldgan: their generators' sizes beside the published ones, and what a sample costs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from autoencoder.distill import DistillConfig
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.train import TrainConfig as AutoencoderTrainConfig
from ldgan.engine.config import load_config
from ldgan.models.unet import UNet
from ldgan.train import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
MILLION, GIGA = 1e6, 1e9


@pytest.fixture(scope="module")
def count_macs() -> Any:
    return runpy.run_path(str(ROOT / "tests" / "benchmarks" / "decoders.py"))["count_macs"]


def latent_shape(autoencoder: str, size: int) -> tuple[int, int, int]:
    """Shape of the latents that a recipe of stage 1 makes of images of ``size`` pixels."""
    network = load_config(AutoencoderTrainConfig, CONFIGS / "autoencoder" / f"{autoencoder}.yaml", []).network
    side = size // 2 ** (len(network.channel_multipliers) - 1)
    return network.latent_channels, side, side


def generator(name: str, data_shape: tuple[int, int, int]) -> UNet:
    """The generator of a recipe, without memory for its weights."""
    config = load_config(TrainConfig, CONFIGS / "ldgan" / f"{name}.yaml", [])
    channels, side, _ = data_shape
    with torch.device("meta"):
        return UNet(config.generator, channels=channels, resolution=side, out_channels=channels, num_classes=0)


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs_of_a_call(count_macs: Any, unet: UNet, data_shape: tuple[int, int, int]) -> int:
    x_t, z = torch.empty(1, *data_shape, device="meta"), torch.empty(1, unet.z_dim, device="meta")
    return count_macs(unet, x_t, z, torch.ones(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("name", "data_shape", "published", "ours"),
    [
        ("ddgan_cifar10", (3, 32, 32), 48.43, 48_432_515),
        ("ddgan_celebahq256", (3, 256, 256), 39.73, 39_726_979),
        ("ddgan_lsun_church256", (3, 256, 256), 39.73, 39_726_979),
        ("lddgan_cifar10", latent_shape("cifar10", 32), 33.33, 33_329_668),
        ("lddgan_celebahq256", latent_shape("celebahq256", 256), 48.37, 48_366_723),
        ("lddgan_lsun_church256", latent_shape("lsun_church256", 256), 61.86, 61_858_180),
    ],
)
def test_generators_have_the_published_number_of_parameters(
    name: str, data_shape: tuple[int, int, int], published: float, ours: int
) -> None:
    number = num_parameters(generator(name, data_shape))
    assert number == ours
    assert round(number / MILLION, 2) == published


def test_lddgans_cifar10_generator_takes_the_published_multiply_adds(count_macs: Any) -> None:
    shape = latent_shape("cifar10", 32)
    macs = macs_of_a_call(count_macs, generator("lddgan_cifar10", shape), shape)
    assert macs / GIGA == pytest.approx(1.67, rel=0.01)


def test_an_image_of_256_px_takes_less_than_20_gmac(count_macs: Any) -> None:
    """All calls of the generator and the light decoder; DD-GAN takes 142 GMAC, LDDGAN 390, WaveDiff 61."""
    shape = latent_shape("folder256", 256)
    unet = generator("latent256", shape)
    num_calls = load_config(TrainConfig, CONFIGS / "ldgan" / "latent256.yaml", []).num_timesteps
    light_config = load_config(DistillConfig, CONFIGS / "autoencoder" / "light_medium.yaml", []).network
    with torch.device("meta"):
        light = LightDecoder(latent_channels=shape[0], image_channels=3, **vars(light_config))
    assert light.downsampling_factor * shape[1] == 256

    call = macs_of_a_call(count_macs, unet, shape)
    decoding = count_macs(light.decode, torch.empty(1, *shape, device="meta"))
    assert num_parameters(unet) == 34_496_644
    assert (call / GIGA, decoding / GIGA) == pytest.approx((2.74, 5.36), abs=0.005)
    assert num_calls * call + decoding < 20 * GIGA

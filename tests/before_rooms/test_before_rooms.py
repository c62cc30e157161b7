"""Runs of before the modules moved into rooms: they load as they are, and compute what they computed then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoencoder.inference.light_decoder import load_light_decoder
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from ldgan import LatentDDGAN
from ldgan.engine.checkpoint import read_description
from ldgan.engine.run import resolve_checkpoint
from ldgan.inference.trained_classifier import load_classifier

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(HERE / "expected.safetensors")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ["autoencoder", "gan/autoencoder", "saved/autoencoder"])
@torch.no_grad()
def test_autoencoders_encode_and_decode_as_before(folder: str, expected: dict[str, Tensor]) -> None:
    autoencoder = load_autoencoder(HERE / folder)
    assert fingerprint(autoencoder) == read_description(resolve_checkpoint(HERE / folder))["fingerprint"]
    posterior = autoencoder.encode(expected["images"])
    assert_close(posterior.mean, expected["posterior_mean"])
    assert_close(posterior.std, expected["posterior_std"])
    assert_close(autoencoder.decode(expected["posterior_mean"]), expected["decoded"])
    light = load_light_decoder(HERE / folder)
    assert_close(light.decode(expected["posterior_mean"]), expected["decoded_light"])


@pytest.mark.parametrize("folder", ["gan", "gan/checkpoints/step_000000004", "saved"])
@torch.no_grad()
def test_generators_estimate_as_before(folder: str, expected: dict[str, Tensor]) -> None:
    pipeline = LatentDDGAN.from_pretrained(HERE / folder, decoder="light")
    estimate = pipeline.model.network(*(expected[name] for name in ("x_t", "z", "t", "labels")))
    assert_close(estimate, expected["generated"])
    assert len(pipeline.sample(2, labels=[3, 7])) == 2


@torch.no_grad()
def test_classifiers_classify_as_before(expected: dict[str, Tensor]) -> None:
    guided = resolve_checkpoint(HERE / "gan")
    diffusion = LatentDDGAN.from_pretrained(guided).model.diffusion
    classifier = load_classifier(HERE / "classifier", "cpu", diffusion, read_description(guided))
    assert_close(classifier(expected["x_t"], expected["t"]), expected["logits"])

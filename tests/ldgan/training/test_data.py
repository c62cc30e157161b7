"""Where x_0 comes from: the same latents, stored or encoded on the fly, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoencoder.inference.latents import describe_latents, pack_moments
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.train import TrainConfig
from data_prep.shards import ShardWriter
from ldgan.engine.cli import UserError
from ldgan.engine.philox import Random, key_of
from ldgan.training.data import DataConfig, EncodedImages, Pixels, StoredLatents, open_source


@pytest.fixture
def autoencoder(tiny_autoencoder) -> AutoencoderKL:
    autoencoder = tiny_autoencoder()
    autoencoder.set_latent_statistics(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.1]))
    return autoencoder.eval().requires_grad_(False)


@pytest.fixture
def latent_shards(tmp_path: Path, autoencoder: AutoencoderKL) -> str:
    """One latent sample of an 8-pixel image."""
    folder = tmp_path / "latents"
    with ShardWriter(folder, "latents", details=describe_latents(autoencoder, 8, flips=False)) as writer:
        writer.write(pack_moments(torch.ones(4, 4, 4), label=-1))
    return str(folder)


def test_stored_and_fresh_posteriors_give_the_same_x_0(autoencoder: AutoencoderKL) -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    posterior = autoencoder.encode(images)
    random = [Random(key_of(5), "cpu") for _ in range(2)]
    stored = StoredLatents(None, (2, 4, 4), True).x_0({"mean": posterior.mean, "std": posterior.std}, random[0])
    fresh = EncodedImages(None, (2, 4, 4), True, autoencoder).x_0({"image": images}, random[1])
    torch.testing.assert_close(stored, fresh)
    noise = Random(key_of(5), "cpu").normal((3, 2, 4, 4))
    torch.testing.assert_close(stored, posterior.mean + posterior.std * noise)


def test_the_mean_of_the_posterior_is_taken_where_no_sample_is_asked_for(autoencoder: AutoencoderKL) -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    posterior = autoencoder.encode(images)
    batch = {"mean": posterior.mean, "std": posterior.std}
    random = Random(key_of(0), "cpu")
    assert torch.equal(StoredLatents(None, (2, 4, 4), False).x_0(batch, random), posterior.mean)
    fresh = EncodedImages(None, (2, 4, 4), False, autoencoder).x_0({"image": images}, random)
    torch.testing.assert_close(fresh, posterior.mean)


def test_pixels_are_the_images_themselves() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(Pixels(None, (3, 8, 8)).x_0({"image": images}, Random(key_of(0), "cpu")), images)


def test_latent_shards_open_with_their_autoencoder(latent_shards: str, autoencoder: AutoencoderKL) -> None:
    source = open_source(latent_shards, autoencoder)
    assert isinstance(source, StoredLatents)
    assert source.shape == (2, 4, 4)


def test_latent_shards_refuse_no_autoencoder_and_another_one(latent_shards: str, tiny_autoencoder) -> None:
    with pytest.raises(UserError, match="holds latents; give --latent and autoencoder=RUN"):
        open_source(latent_shards, None)
    with pytest.raises(UserError, match="latents of another autoencoder"):
        open_source(latent_shards, tiny_autoencoder(seed=1))


@pytest.mark.parametrize("url", ["https://user:pw@host/set", "https://host/set?token=pw", "s3://pw@bucket/set"])
def test_a_url_with_secrets_is_refused_where_it_would_be_saved(url: str) -> None:
    for config in (DataConfig(data=url), TrainConfig(data=url)):
        with pytest.raises(UserError, match=r"^data=(https|s3)://\w+/set was given with") as error:
            config.validate()
        assert "pw" not in str(error.value)
    for public in ("https://host/set", "s3://bucket/set/", "data/a?b"):
        DataConfig(data=public).validate()

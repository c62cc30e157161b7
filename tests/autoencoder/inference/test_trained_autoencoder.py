"""Autoencoders on disk, and the fingerprint that ties latents to them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoencoder.inference.latents import check_latents, describe_latents, pack_moments
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, copy_autoencoder, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict


@pytest.fixture
def new_autoencoder(tiny_autoencoder) -> Callable[..., AutoencoderKL]:
    """A tiny autoencoder with statistics that are not 0 and 1."""

    def build(**overrides: Any) -> AutoencoderKL:
        autoencoder = tiny_autoencoder(**overrides)
        autoencoder.set_latent_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        return autoencoder

    return build


def save(folder: Path, autoencoder: AutoencoderKL, **changes: object) -> Path:
    """A checkpoint as a finished run writes it, but for ``changes``."""
    network = to_dict(autoencoder.config)
    description = {"kind": KIND, "config": {"network": network}, "latent_statistics": {}} | changes
    save_checkpoint(folder, {WEIGHTS: autoencoder}, {k: v for k, v in description.items() if v is not None})
    return folder


def test_a_loaded_autoencoder_is_the_saved_one_ready_for_use(new_autoencoder, tmp_path: Path) -> None:
    autoencoder = load_autoencoder(save(tmp_path / "saved", new_autoencoder()))
    torch.testing.assert_close(autoencoder.state_dict(), new_autoencoder().state_dict(), rtol=0, atol=0)
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def test_a_loaded_autoencoder_computes_the_same(new_autoencoder, tmp_path: Path) -> None:
    original = new_autoencoder(mid_attention=True, attention_factors=[1], latent_convolutions=True).eval()
    loaded = load_autoencoder(save(tmp_path / "saved", original))
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(loaded.encode(images), original.encode(images), rtol=1e-4, atol=1e-5)
    latents = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.decode(latents), original.decode(latents), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_older_than_an_option_has_its_default(new_autoencoder, tmp_path: Path) -> None:
    older = {
        "image_channels": 3,
        "latent_channels": 2,
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "mid_attention": True,
        "dropout": 0.0,
    }
    autoencoder = new_autoencoder(mid_attention=True)
    loaded = load_autoencoder(save(tmp_path / "saved", autoencoder, config={"network": older}))
    assert fingerprint(loaded) == fingerprint(autoencoder)
    assert loaded.config == autoencoder.config


def test_the_kernel_of_the_training_is_not_needed_any_more(new_autoencoder, tmp_path: Path) -> None:
    trained = new_autoencoder(mid_attention=True, attention_kernel="xformers").eval()
    with pytest.raises(UserError, match="xformers does not run on cpu"):
        trained.encode(torch.zeros(1, 3, 8, 8))
    loaded = load_autoencoder(save(tmp_path / "saved", trained))
    assert loaded.encode(torch.zeros(1, 3, 8, 8)).mean.isfinite().all()


def test_a_copy_is_the_same_autoencoder(new_autoencoder, tmp_path: Path) -> None:
    copy_autoencoder(save(tmp_path / "saved", new_autoencoder()), tmp_path / "copy")
    assert fingerprint(load_autoencoder(tmp_path / "copy")) == fingerprint(new_autoencoder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "diffusion GAN"}, "holds a diffusion GAN, not an autoencoder; give a run of autoencoder/train.py"),
        ({"latent_statistics": None}, "its training has not ended; run the same autoencoder/train.py command"),
    ],
)
def test_what_is_no_finished_autoencoder_is_refused(
    new_autoencoder, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder(save(tmp_path / "saved", new_autoencoder(), **changes))


def test_a_checkpoint_of_another_shape_is_refused(new_autoencoder, tmp_path: Path) -> None:
    for name, numbers, message in (
        ("wider", {"base_channels": 16}, r"encoder.conv_in.weight: shape \[8, 3, 3, 3\] in the file, \[16, 3, 3, 3\]"),
        ("deeper", {"num_res_blocks": 2}, r"\d+ tensors missing .* and 0 unknown"),
    ):
        network = to_dict(new_autoencoder().config) | numbers
        folder = save(tmp_path / name, new_autoencoder(), config={"network": network})
        with pytest.raises(UserError, match=f"{WEIGHTS}.safetensors: {message}"):
            load_autoencoder(folder)


def test_a_truncated_file_is_refused(new_autoencoder, tmp_path: Path) -> None:
    path = save(tmp_path / "saved", new_autoencoder()) / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: damaged: [0-9]+ bytes, not [0-9]+; use another checkpoint"):
        load_autoencoder(tmp_path / "saved")


def test_the_fingerprint_sees_every_weight_and_statistic(new_autoencoder) -> None:
    original = fingerprint(new_autoencoder())
    assert fingerprint(new_autoencoder()) == original
    for name in new_autoencoder().state_dict():
        changed = new_autoencoder()
        changed.state_dict()[name].view(-1)[-1] += 1
        assert fingerprint(changed) != original, name


@pytest.mark.parametrize("label", [3, -1])
def test_packed_moments_are_read_back_exactly(label: int) -> None:
    moments = torch.randn(2, 4, 3, 3)
    sample = pack_moments(moments, label)
    np.testing.assert_array_equal(np.load(io.BytesIO(sample["npy"]), allow_pickle=False), moments.numpy())
    assert sample.get("cls") == (b"3" if label == 3 else None)


def test_latents_know_their_autoencoder(new_autoencoder, tmp_path: Path) -> None:
    autoencoder = new_autoencoder()
    details = describe_latents(autoencoder, 8, flips=True)
    assert details == {
        "autoencoder": fingerprint(autoencoder),
        "latent_shape": [2, 4, 4],
        "resolution": 8,
        "flips": True,
    }
    with ShardWriter(tmp_path / "latents", "latents", details=details) as writer:
        writer.write(pack_moments(torch.zeros(2, 4, 4, 4), label=-1))
    shards = ShardSet.open(tmp_path / "latents")
    check_latents(shards, autoencoder)
    with pytest.raises(UserError, match=r"latents of another autoencoder .* encode again with autoencoder/encode.py"):
        check_latents(shards, new_autoencoder(seed=1))

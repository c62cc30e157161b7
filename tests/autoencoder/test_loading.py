"""Autoencoders on disk, and the fingerprint that ties latents to them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoder.latents import check_latents, describe_latents, pack_moments
from autoencoder.loading import KIND, WEIGHTS, build_autoencoder, copy_autoencoder, fingerprint, load_autoencoder
from autoencoder.networks import AutoencoderConfig, AutoencoderKL
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict

CONFIG = AutoencoderConfig(latent_channels=2, base_channels=4, channel_multipliers=[1, 1])


def new_autoencoder(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    autoencoder = build_autoencoder(CONFIG)
    autoencoder.set_latent_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    return autoencoder


def save(folder: Path, **changes: object) -> Path:
    """A checkpoint as a finished run writes it, but for ``changes``."""
    description = {"kind": KIND, "config": {"network": to_dict(CONFIG)}, "latent_statistics": {}} | changes
    save_checkpoint(folder, {WEIGHTS: new_autoencoder()}, {k: v for k, v in description.items() if v is not None})
    return folder


def test_a_loaded_autoencoder_is_the_saved_one_ready_for_use(tmp_path: Path) -> None:
    autoencoder = load_autoencoder(save(tmp_path / "saved"))
    torch.testing.assert_close(autoencoder.state_dict(), new_autoencoder().state_dict(), rtol=0, atol=0)
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def test_a_copy_is_the_same_autoencoder(tmp_path: Path) -> None:
    copy_autoencoder(save(tmp_path / "saved"), tmp_path / "copy")
    assert fingerprint(load_autoencoder(tmp_path / "copy")) == fingerprint(new_autoencoder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "diffusion GAN"}, "holds a diffusion GAN, not an autoencoder; give a run of autoencoder/train.py"),
        ({"latent_statistics": None}, "its training has not ended; run the same autoencoder/train.py command"),
    ],
)
def test_what_is_no_finished_autoencoder_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder(save(tmp_path / "saved", **changes))


def test_the_fingerprint_sees_every_weight_and_statistic() -> None:
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


def test_latents_know_their_autoencoder(tmp_path: Path) -> None:
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
        check_latents(shards, new_autoencoder(1))

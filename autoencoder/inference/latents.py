"""Latents on disk: how a sample is packed into a shard, and whose latents a shard set holds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from torch import Tensor

from autoencoder.inference.trained_autoencoder import fingerprint
from autoencoder.models.autoencoder import AutoencoderKL
from data_prep.shards import ShardSet
from ldgan.engine.cli import UserError
from ldgan.engine.philox import Random


def describe_latents(autoencoder: AutoencoderKL, resolution: int, *, flips: bool) -> dict[str, Any]:
    """Manifest details of latents that ``autoencoder`` makes of square images of ``resolution`` pixels."""
    return {
        "autoencoder": fingerprint(autoencoder),
        "latent_shape": list(autoencoder.latent_shape(resolution)),
        "resolution": resolution,
        "flips": flips,
    }


def check_latents(shards: ShardSet, autoencoder: AutoencoderKL, *, flips: bool = False) -> None:
    """Raise a UserError unless ``autoencoder`` made these latents, with those of mirror images if ``flips``."""
    made_by, given = shards.manifest.details.get("autoencoder"), fingerprint(autoencoder)
    if made_by != given:
        raise UserError(
            f"{shards.folder}: latents of another autoencoder (fingerprint {str(made_by)[:12]}, given {given[:12]});"
            " give the autoencoder that encoded them, or encode again with autoencoder/encode.py"
        )
    if flips and not shards.manifest.details["flips"]:
        raise UserError(f"{shards.folder}: holds no latents of mirror images; encode them too, or set flips=false")


def read_captions(shards: ShardSet, numbers: range) -> list[str]:
    """The captions of samples, "" for none; raises a UserError where one is no UTF-8."""
    if not shards.manifest.has_captions:
        return [""] * len(numbers)
    return [_read_caption(shards, number) for number in numbers]


def _read_caption(shards: ShardSet, number: int) -> str:
    try:
        return shards.read(number).get("txt", b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shards.locate(number)}: its caption is no UTF-8; write the shards again") from error


def draw(mean: Tensor, std: Tensor, noise: Random) -> Tensor:
    """A sample of N(mean, std^2), in their shape."""
    return mean + std * noise.normal_like(mean)


def pack_caption(caption: str, embedding: Tensor | None = None) -> dict[str, bytes]:
    """The members of a sample's caption, "" for none, and of its embedding, float16 (1 + n, d), pooled row first."""
    members = {"txt": caption.encode()} if caption else {}
    return members | ({"text.npy": _npy(embedding)} if embedding is not None else {})


def pack_moments(moments: Tensor, label: int) -> dict[str, bytes]:
    """A shard's sample of moments (2C, h, w) or, with those of the mirror image, (2, 2C, h, w); label -1: none."""
    return {"npy": _npy(moments)} | ({"cls": str(label).encode()} if label >= 0 else {})


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy(), allow_pickle=False)
    return buffer.getvalue()

"""Random numbers that depend on what they are for, not on what was drawn before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """Return a generator on ``device`` whose seed is a hash of ``keys``.

    Other keys give an independent stream: ``generator(device, seed, "noise", step, micro_batch)`` is the same
    after a resume as without one, and no draw elsewhere can shift it.
    """
    text = repr([key if isinstance(key, str) else int(key) for key in keys])
    digest = hashlib.sha256(text.encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits: every backend takes them
    return torch.Generator(device).manual_seed(seed)


def randn_per_sample(shape: Sequence[int], seeds: Sequence[int], stream: str, device: torch.device | str) -> Tensor:
    """Return standard normal noise (len(seeds), *shape) in fp32; row i depends on seed i alone.

    A seed thus gives the same image at any batch size and any place in the batch. The numbers are drawn on
    the CPU, so that every device gets the same. ``stream`` tells apart the uses an image makes of its seed.
    """
    return torch.stack([torch.randn(*shape, generator=generator("cpu", stream, seed)) for seed in seeds]).to(device)

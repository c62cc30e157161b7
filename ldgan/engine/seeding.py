"""Random numbers that depend on what they are for, not on what was drawn before them."""

from __future__ import annotations

import hashlib

import torch


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """Return a generator on ``device`` whose seed is a hash of ``keys``.

    Other keys give an independent stream: ``generator(device, seed, "noise", step, micro_batch)`` is the same
    after a resume as without one, and no draw elsewhere can shift it.
    """
    text = repr([key if isinstance(key, str) else int(key) for key in keys])
    digest = hashlib.sha256(text.encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits: every backend takes them
    return torch.Generator(device).manual_seed(seed)

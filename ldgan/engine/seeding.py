"""Random numbers that depend on what they are for, not on what was drawn before them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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


def noise_from_seeds(
    seeds: Sequence[int], stream: str, device: torch.device | str
) -> Callable[[Sequence[int]], Tensor]:
    """A source of noise: called with the shape of one sample it gives standard normal (len(seeds), *shape), fp32.

    Each call draws anew, and row i depends on ``seeds[i]`` alone: a seed gives the same image at any batch size,
    any place in the batch, on any process. The numbers are drawn on the CPU, so that every device gets the same.
    ``stream`` tells apart the uses an image makes of its seed.
    """
    generators = [generator("cpu", stream, seed) for seed in seeds]

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=random) for random in generators]).to(device)

    return noise


def noise_like(x: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and dtype, and on the device, of ``x``."""
    return torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)

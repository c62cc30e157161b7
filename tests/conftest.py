"""Fixtures that several test files share."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch

from autoencoder.loading import build_autoencoder
from autoencoder.networks import AutoencoderConfig, AutoencoderKL


class AutoencoderFactory(Protocol):
    """Builds a tiny autoencoder: f2, 2 latent channels, latent statistics 0 and 1, but for ``overrides``."""

    def __call__(self, *, seed: int = 0, **overrides: Any) -> AutoencoderKL: ...


@pytest.fixture
def tiny_autoencoder() -> AutoencoderFactory:
    def build(*, seed: int = 0, **overrides: Any) -> AutoencoderKL:
        torch.manual_seed(seed)
        numbers: dict[str, Any] = {"latent_channels": 2, "base_channels": 8, "channel_multipliers": [1, 2]}
        return build_autoencoder(AutoencoderConfig(**numbers | overrides))

    return build

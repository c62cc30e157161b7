"""Latent-space Denoising Diffusion GANs.

Importing this package is cheap: `autoencoder` and `data_prep` import `ldgan.engine` through it. `LatentDDGAN`, the
pipeline, is imported when it is first asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Module attributes on demand (PEP 562)."""
    if name == "LatentDDGAN":
        return import_module("ldgan.pipeline").LatentDDGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Latent-space Denoising Diffusion GANs.

Importing this package is cheap: `autoencoder` and `data_prep` import `ldgan.engine` through it. What it offers is
imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldgan.diffusion.process import Diffusion
    from ldgan.models.unet import UNet
    from ldgan.pipeline import LatentDDGAN

__version__ = "0.1.0"
__all__ = ["Diffusion", "LatentDDGAN", "UNet", "__version__"]

_HOMES = {"Diffusion": "ldgan.diffusion.process", "LatentDDGAN": "ldgan.pipeline", "UNet": "ldgan.models.unet"}


def __getattr__(name: str) -> Any:
    """Module attributes on demand (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

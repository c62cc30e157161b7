"""Stage 1: a KL-regularised variational autoencoder that compresses images to latents and decodes them.

Importing this package is cheap; the names of `__all__` are imported when they are first asked for.

>>> from autoencoder import AutoencoderKL, load_autoencoder
>>> autoencoder = load_autoencoder("runs/mine/autoencoder")
>>> published = AutoencoderKL.from_diffusers("vae")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoencoder.inference.light_decoder import load_light_decoder
    from autoencoder.inference.trained_autoencoder import load_autoencoder
    from autoencoder.models.autoencoder import AutoencoderKL

__all__ = ["AutoencoderKL", "load_autoencoder", "load_light_decoder"]

_MODULES = {
    "AutoencoderKL": "autoencoder.models.autoencoder",
    "load_autoencoder": "autoencoder.inference.trained_autoencoder",
    "load_light_decoder": "autoencoder.inference.light_decoder",
}


def __getattr__(name: str) -> Any:
    """Module attributes on demand (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Latent-space Denoising Diffusion GANs.

Importing this package is cheap: `autoencoder` and `data_prep` import `ldgan.engine` through it.
"""

__version__ = "0.1.0"

"""Stage 1: a KL-regularised variational autoencoder that compresses images to latents and decodes them."""
